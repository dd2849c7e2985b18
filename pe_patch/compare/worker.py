"""One contender in one process: patched, measured, trained, measured again; what is finished is never done twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints import loading
from ..errors import PePatchError
from ..evaluation.run import evaluate
from ..patching.api import patch_model
from . import facts
from .contender import Contender
from .settings import Folder, Settings, Training, load_recipe, quiet, write_json

CHECKPOINT_EVERY = 200
"""Steps of a training that are lost at most when it is killed."""


def work(settings: Settings, contender: Contender, folder: Folder) -> None:
    """Everything that is still to do for one contender."""
    here = folder.of(contender)
    for file in (here / "failed.json", here / "unsupported.json"):
        file.unlink(missing_ok=True)
    steps: dict[str, Callable[[], None]] = {
        "before": lambda: before(settings, contender, here),
        "after": lambda: after(settings, contender, here),
    }
    for stage in settings.stages:
        if not (here / stage / "finished.json").exists():
            try:
                with quiet():
                    steps[stage]()
            except NotPossible as error:
                write_json(here / "unsupported.json", {"reason": str(error)})
                return


class NotPossible(Exception):
    """The scheme cannot work on this model: an answer, not a failure."""


def patch(model: Any, contender: Contender) -> None:
    """Patch the contender in; a scheme that cannot work on the model raises `NotPossible` with the reason."""
    if contender.scheme is None:
        return
    try:
        patch_model(model, **contender.arguments())
    except PePatchError as error:
        raise NotPossible(" ".join(str(error).split())) from error


def before(settings: Settings, contender: Contender, here: Path) -> None:
    model, tokenizer = loading.load(settings.model, settings.dtype, settings.device)
    untouched = facts.parameters(model)
    patch(model, contender)
    _measure(settings, contender, here, "before", model, tokenizer, untouched)


def after(settings: Settings, contender: Contender, here: Path) -> None:
    assert settings.training is not None
    folder, finished = here / "training", here / "training.json"
    if not finished.exists():
        _check(settings, contender)
        started = time.perf_counter()
        train(settings, settings.training, contender, folder)
        write_json(finished, {"seconds": time.perf_counter() - started})
    untouched = facts.parameters(loading.empty_model(settings.model))
    model, tokenizer = loading.load(str(folder / "model"), settings.dtype, settings.device)
    _measure(settings, contender, here, "after", model, tokenizer, untouched)


def _check(settings: Settings, contender: Contender) -> None:
    """Patch once outside the training script, so that what is impossible is told from what fails."""
    if settings.stages == ("after",):
        model, _ = loading.load(settings.model, settings.dtype, settings.device)
        patch(model, contender)


def _measure(
    settings: Settings, contender: Contender, here: Path, stage: str, model: Any, tokenizer: Any, untouched: int
) -> None:
    found = here / stage / "facts.json"
    if not found.exists():
        write_json(found, facts.measure(model, untouched, settings.lengths))
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
            label=settings.label(contender, stage),
            progress=False,
            output=here / stage,
            overwrite=True,  # the comparison's own folder, which holds facts.json already
        )
    write_json(here / stage / "finished.json", {"lengths": lengths})


def train(settings: Settings, training: Training, contender: Contender, folder: Path) -> Any:
    """The recipe with this model and this scheme; a training that was killed goes on from its newest checkpoint."""
    from ..training.reading import check
    from ..training.recipe import Scheme
    from ..training.run import train

    recipe = load_recipe(training)
    scheme = None
    if contender.scheme is not None:
        scheme = Scheme(name=contender.scheme, options=dict(contender.options))
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


def rows_of(settings: Settings, contender: Contender, folder: Folder) -> list[tuple[str, Path]]:
    """The stages of a contender that are finished, with the folders of their rows."""
    here = folder.of(contender)
    return [(stage, here / stage) for stage in settings.stages if (here / stage / "finished.json").exists()]
