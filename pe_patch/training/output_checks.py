"""Check the output of a run before the first step: permissions, free space, and that the model can be saved."""

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
from ..data.text import source_path
from ..errors import OutputError
from ..patching.record import RECORD_KEY, check_record
from ..patching.targets import unwrap
from .log import gigabytes
from .models import locate
from .plan import MOMENTS
from .recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from .run import Run

FOLDERS = ("model", "export", "adapter", "checkpoints")
"""Folders that a run writes in its output."""


def check_folders(recipe: Recipe) -> None:
    """Raise `RecipeError` unless the run may write to its output. Creates nothing."""
    output = Path(recipe.output).expanduser()
    try:
        check_output(output, TRAINING, overwrite=recipe.overwrite)
        for name in FOLDERS:
            if (output / name).exists() and not (output / name).is_dir():
                raise OutputError(f"{output / name} is a file, but the run needs a folder there; move the file away.")
    except OutputError as error:
        flag = str(error).replace("--overwrite (overwrite=True in Python)", "overwrite=true")
        raise RecipeError(f"output: {flag}") from error
    existing = _nearest(output)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise RecipeError(
            f"output: cannot write to {output} ({existing}: {error.strerror or error}). Give another output."
        ) from error


def check_inputs(recipe: Recipe) -> None:
    """Raise `RecipeError` if the output would overwrite an input of the run.

    The output must not be an input or lie inside one, and the folders that the run writes in it must not hold the
    model that the run starts from.
    """
    output = Path(recipe.output).expanduser()
    models = [recipe.model.source, recipe.tokenizer.source, recipe.distill.source if recipe.distill else None]
    texts = [recipe.data.source, *(source.source for phase in recipe.phases for source in phase.mixture.values())]
    texts = [None if text is None else source_path(text) for text in texts]
    inputs = [*(None if source is None else locate(source) for source in models), *texts]
    try:
        refuse_input(output, inputs, above=False)
        for name in FOLDERS:
            refuse_input(output / name, inputs)
    except OutputError as error:
        raise RecipeError(f"output: {error}") from error


def check_room(run: Run) -> None:
    """Raise `RecipeError` if the disk lacks space for the model, its exports and the checkpoints."""
    recipe, output = run.recipe, Path(run.recipe.output).expanduser()
    model = _saved_bytes(run.model, recipe)
    needed = {"the model": model, f"{len(recipe.export)} exports": model * len(recipe.export)}
    if recipe.checkpoints.every:
        parameters = list(run.model.parameters())
        each = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        each += MOMENTS[recipe.optimizer.name] * sum(
            parameter.numel() for parameter in parameters if parameter.requires_grad
        )
        count = recipe.checkpoints.keep + 1  # the newest is written before the oldest is deleted
        needed[f"{count} checkpoints"] = count * each
    present = sum(_size(output / name) for name in FOLDERS)  # an earlier run's, replaced or continued
    free = shutil.disk_usage(_nearest(output)).free
    if sum(needed.values()) > free + present:
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in needed.items() if size)
        raise RecipeError(
            f"output: {output} has {gigabytes(free)} free, but the run needs {gigabytes(sum(needed.values()))} "
            f"({listed}). Free some space, give another output, or lower checkpoints.keep."
        )


def check_saved(run: Run) -> None:
    """Save everything but the weights to a temporary folder and read it back, on the main process.

    Raises:
        RecipeError: the model could not be saved or loaded after training. Every process raises.
    """
    problem: RecipeError | None = None
    if run.launch.is_main:
        try:
            _save_and_read(run)
        except RecipeError as error:
            problem = error
    if run.launch.failed_anywhere(problem is not None):
        raise problem or RecipeError("The main process cannot save this model; nothing was trained.")


def _save_and_read(run: Run) -> None:
    model: Any = unwrap(run.model)
    record = getattr(model.config, RECORD_KEY, None)
    with tempfile.TemporaryDirectory(prefix="pe-patch-") as folder:
        try:
            with _unquantised(model):
                model.save_pretrained(folder, state_dict={})
            run.tokenizer.save_pretrained(folder)
            AutoConfig.from_pretrained(folder) if record is None else _read_record(folder, record)
            AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # configs run their own checks when they save
            scheme = "" if record is None else f" under the scheme {record['scheme']!r}"
            detail = " ".join(str(error).split())[:400]
            raise RecipeError(
                f"This {model.config.model_type} model{scheme} can be trained, but cannot be saved and loaded again "
                f"({type(error).__name__}: {detail}). Nothing was trained. Use another scheme; "
                "`pe-patch advise MODEL --target-length N` lists schemes that fit."
            ) from error


def _read_record(folder: str, record: dict[str, Any]) -> None:
    """Read the patch record and the original config back from a saved config, and check them."""
    stored = read_config(folder)
    saved = check_record(stored.get(RECORD_KEY), stored, folder)
    if any(saved.get(key) != record[key] for key in record.keys() - {"native", "written"}):  # saving fills in these two
        raise ValueError("the saved patch record differs from the model's")
    native_config(stored, saved["native"])


@contextmanager
def _unquantised(model: Any) -> Iterator[None]:
    """Let a quantised model be saved without its weights.

    Its quantiser would save all weights, whatever `state_dict` says. At the end of a run, the weights are saved
    unquantised.
    """
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
    """Return the size of the saved weights in bytes."""
    if recipe.lora is not None and not recipe.lora.merge:
        return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters() if tensor.requires_grad)
    if recipe.model.quantization is None:
        return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    size = getattr(torch, recipe.model.dtype).itemsize
    counts = (tensor.numel() * (2 if type(tensor).__name__ == "Params4bit" else 1) for tensor in model.parameters())
    return size * sum(counts)  # Params4bit packs two weights into each byte


def _nearest(folder: Path) -> Path:
    """Return the folder, or its nearest existing ancestor."""
    real = Path(os.path.realpath(folder))
    return next(path for path in (real, *real.parents) if path.is_dir())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
