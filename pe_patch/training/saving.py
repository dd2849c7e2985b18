"""Where a run writes, checked before the first step: that it may, that there is room, that the model can be saved."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer

from ..checkpoints.folders import TRAINING, check_output, refuse_input
from ..checkpoints.load import native_config, read_config
from ..errors import OutputError
from ..patching.config import RECORD_KEY
from ..patching.record import check_record
from ..patching.targets import unwrap
from .log import gigabytes
from .models import locate
from .plan import MOMENTS
from .recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from .trainer import Trainer

PARTS = ("model", "export", "adapter", "checkpoints")
"""Folders that a run writes below its output."""


def check_folders(recipe: Recipe) -> None:
    """Raise `RecipeError` unless the run may write to its output; nothing is created."""
    output = Path(recipe.output).expanduser()
    try:
        check_output(output, TRAINING, overwrite=recipe.overwrite)
        for part in PARTS:
            if (output / part).exists() and not (output / part).is_dir():
                raise OutputError(f"{output / part} is a file, and a folder would be written there; move it away.")
    except OutputError as error:
        flag = str(error).replace("--overwrite (overwrite=True in Python)", "overwrite=true")
        raise RecipeError(f"output: {flag}") from error
    place = _nearest(output)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise RecipeError(
            f"output: {output} cannot be written to ({place}: {error.strerror or error}). Give another output."
        ) from error


def check_inputs(recipe: Recipe) -> None:
    """Raise `RecipeError` where the output is, or lies inside, anything that is read, or where a folder that is written
    below it is the model that the run starts from."""
    output = Path(recipe.output).expanduser()
    models = [recipe.model.source, recipe.tokenizer.source, recipe.distill.source if recipe.distill else None]
    texts = [recipe.data.source, *(part.source for phase in recipe.phases for part in phase.mixture.values())]
    inputs = [*(None if source is None else locate(source) for source in models), *texts]
    try:
        refuse_input(output, inputs, above=False)
        for part in PARTS:
            refuse_input(output / part, inputs)
    except OutputError as error:
        raise RecipeError(f"output: {error}") from error


def check_room(trainer: Trainer) -> None:
    """Raise `RecipeError` where the disk has less room than the model, its exports and the checkpoints take."""
    recipe, output = trainer.recipe, Path(trainer.recipe.output).expanduser()
    model = _saved_bytes(trainer.model, recipe)
    needed = {"the model": model, f"{len(recipe.export)} exports": model * len(recipe.export)}
    if recipe.checkpoints.every:
        parameters = list(trainer.model.parameters())
        each = sum(one.numel() * one.element_size() for one in parameters)
        each += MOMENTS[recipe.optimizer.name] * sum(one.numel() for one in parameters if one.requires_grad)
        count = recipe.checkpoints.keep + 1  # the newest is written before the oldest is dropped
        needed[f"{count} checkpoints"] = count * each
    present = sum(_size(output / part) for part in PARTS)  # of an earlier run, which are replaced or continued
    free = shutil.disk_usage(_nearest(output)).free
    if sum(needed.values()) > free + present:
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in needed.items() if size)
        raise RecipeError(
            f"output: {output} has {gigabytes(free)} free, and the run writes {gigabytes(sum(needed.values()))} there "
            f"({listed}). Free some space, give another output, or lower checkpoints.keep."
        )


def check_saved(trainer: Trainer) -> None:
    """Save everything but the weights into a temporary folder and read it back, on the process that is to save them.

    Raises:
        RecipeError: the model could be trained, and then not be saved or not be loaded again. Every process raises.
    """
    problem: RecipeError | None = None
    if trainer.accelerator.is_main_process:
        try:
            _save_and_read(trainer)
        except RecipeError as error:
            problem = error
    if trainer.engine.failed_anywhere(problem is not None):
        raise problem or RecipeError("The main process found that this model cannot be saved; nothing was trained.")


def _save_and_read(trainer: Trainer) -> None:
    model: Any = unwrap(trainer.model)
    record = getattr(model.config, RECORD_KEY, None)
    with tempfile.TemporaryDirectory(prefix="pe-patch-") as folder:
        try:
            with _unquantised(model):
                model.save_pretrained(folder, state_dict={})
            trainer.tokenizer.save_pretrained(folder)
            AutoConfig.from_pretrained(folder) if record is None else _read_record(folder, record)
            AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # a config may check itself on saving, in a way of its own
            scheme = "" if record is None else f" under the scheme {record['scheme']!r}"
            said = " ".join(str(error).split())[:400]
            raise RecipeError(
                f"This {model.config.model_type} model{scheme} could be trained, but not saved and loaded again "
                f"({type(error).__name__}: {said}). Nothing was trained. Take another scheme; "
                "`pe-patch advise MODEL --target-length N` names those that fit."
            ) from error


def _read_record(folder: str, record: dict[str, Any]) -> None:
    """Read the patch back from a config that was saved, and the config of the model before the patch."""
    stored = read_config(folder)
    kept = check_record(stored.get(RECORD_KEY), stored, folder)
    if any(kept.get(key) != record[key] for key in record.keys() - {"native", "written"}):  # which saving completes
        raise ValueError("the record of the patch is not what was saved")
    native_config(stored, kept["native"])


@contextmanager
def _unquantised(model: Any) -> Iterator[None]:
    """Let a quantised model be saved without weights: its quantiser would take all of them, whatever is handed over.
    In the end the weights are saved as they were before quantisation."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    model.hf_quantizer = None
    try:
        yield
    finally:
        model.hf_quantizer = quantizer


def _saved_bytes(model: Any, recipe: Recipe) -> int:
    """Return the bytes of the weights as they are saved."""
    if recipe.lora is not None and not recipe.lora.merge:
        return sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)
    if recipe.model.quantization is None:
        return sum(one.numel() * one.element_size() for one in model.parameters())
    size = getattr(torch, recipe.model.dtype).itemsize
    counts = (one.numel() * (2 if type(one).__name__ == "Params4bit" else 1) for one in model.parameters())
    return size * sum(counts)  # two weights of 4 bits are packed into one number; they are saved unpacked


def _nearest(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists."""
    real = Path(os.path.realpath(folder))
    return next(path for path in (real, *real.parents) if path.is_dir())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
