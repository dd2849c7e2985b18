"""Run one scheme in one process: patch, measure, train, measure again. Finished stages are not repeated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints import sources
from ..errors import PePatchError, silence_log_warnings
from ..evaluation.run import evaluate
from ..patching.api import patch_model
from . import facts
from .compared_scheme import ComparedScheme
from .settings import Folder, Settings, Training, load_recipe, write_json

CHECKPOINT_EVERY = 200
"""Maximum number of training steps that a killed run loses."""


def work(settings: Settings, compared: ComparedScheme, folder: Folder) -> None:
    """Run all unfinished stages of one scheme."""
    here = folder.of(compared)
    for file in (here / "failed.json", here / "unsupported.json"):
        file.unlink(missing_ok=True)
    steps: dict[str, Callable[[], None]] = {
        "before": lambda: before(settings, compared, here),
        "after": lambda: after(settings, compared, here),
    }
    for stage in settings.stages:
        if not (here / stage / "finished.json").exists():
            try:
                with silence_log_warnings():
                    steps[stage]()
            except NotPossible as error:
                write_json(here / "unsupported.json", {"reason": str(error)})
                return


class NotPossible(Exception):
    """Raised if the scheme cannot work on this model. This is a result, not a failure."""


def patch(model: Any, compared: ComparedScheme) -> None:
    """Patch the model with the scheme.

    Raises:
        NotPossible: the scheme cannot work on the model.
    """
    if compared.scheme is None:
        return
    try:
        patch_model(model, **compared.arguments())
    except PePatchError as error:
        raise NotPossible(" ".join(str(error).split())) from error


def before(settings: Settings, compared: ComparedScheme, here: Path) -> None:
    """Measure the scheme without training."""
    model, tokenizer = sources.load(settings.model, settings.dtype, settings.device)
    untouched = facts.parameters(model)
    patch(model, compared)
    _measure(settings, compared, here, "before", model, tokenizer, untouched)


def after(settings: Settings, compared: ComparedScheme, here: Path) -> None:
    """Train with the scheme, and measure the trained model."""
    assert settings.training is not None
    folder, finished = here / "training", here / "training.json"
    if not finished.exists():
        _check(settings, compared)
        started = time.perf_counter()
        train(settings, settings.training, compared, folder)
        write_json(finished, {"seconds": time.perf_counter() - started})
    untouched = facts.parameters(sources.empty_model(settings.model))
    model, tokenizer = sources.load(str(folder / "model"), settings.dtype, settings.device)
    _measure(settings, compared, here, "after", model, tokenizer, untouched)


def _check(settings: Settings, compared: ComparedScheme) -> None:
    """Patch once before training, to tell an unsupported scheme from a failed run."""
    if settings.stages == ("after",):
        model, _ = sources.load(settings.model, settings.dtype, settings.device)
        patch(model, compared)


def _measure(
    settings: Settings, compared: ComparedScheme, here: Path, stage: str, model: Any, tokenizer: Any, untouched: int
) -> None:
    file = here / stage / "facts.json"
    if not file.exists():
        write_json(file, facts.measure(model, untouched, settings.lengths))
    lengths = facts.within(settings.lengths, facts.bound(model))
    if lengths:
        evaluate(
            model,
            tokenizer,
            settings.tasks,
            lengths,
            samples=settings.samples,
            depths=settings.depths,
            batch_size=settings.batch_size,
            seed=settings.seed,
            text=settings.text,
            control_length=max(settings.lengths) if lengths != settings.lengths else settings.short,
            beyond_window=True,
            label=settings.label(compared, stage),
            progress=_progress_file(here / stage / "progress.json"),
            output=here / stage,
            overwrite=True,  # the folder already holds facts.json
        )
    write_json(here / stage / "finished.json", {"lengths": lengths})


def _progress_file(file: Path) -> Callable[[int, int], None]:
    """Return a function that writes the number and the share of read tokens to a file, at most once a second."""
    written = 0.0

    def report(read: int, tokens: int) -> None:
        nonlocal written
        if (now := time.monotonic()) - written >= 1:
            written = now
            write_json(file, {"tokens": read, "share": min(1.0, read / max(tokens, 1))})

    file.unlink(missing_ok=True)  # a share of the work that a stopped run had left
    return report


def train(settings: Settings, training: Training, compared: ComparedScheme, folder: Path) -> Any:
    """Train the model with the recipe and the scheme; a killed training resumes from its newest checkpoint."""
    from ..training.reading import check
    from ..training.recipe import Scheme
    from ..training.run import train

    recipe = load_recipe(training)
    scheme = None
    if compared.scheme is not None:
        scheme = Scheme(name=compared.scheme, options=dict(compared.options))
    recipe = replace(
        recipe,
        output=str(folder),
        model=replace(recipe.model, source=settings.model, config=None),
        scheme=scheme,
        seed=settings.seed,
        checkpoints=replace(recipe.checkpoints, every=recipe.checkpoints.every or CHECKPOINT_EVERY, keep=1),
        resume="auto",
        progress=False,
    )
    check(recipe, str(training.recipe))
    return train(recipe)


def rows_of(settings: Settings, compared: ComparedScheme, folder: Folder) -> list[tuple[str, Path]]:
    """Return the finished stages of a scheme and the folders of their rows."""
    here = folder.of(compared)
    return [(stage, here / stage) for stage in settings.stages if (here / stage / "finished.json").exists()]
