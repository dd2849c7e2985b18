"""`compare`: contenders in processes of their own, everything on disk as it is finished, and then the clock."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..checkpoints import loading
from ..data.packaged import shipped_recipes
from ..errors import OptionError, PePatchError, UnknownNameError
from ..evaluation.model import windows
from ..evaluation.run import DEPTHS
from . import processes, timing, worker
from .comparison import Comparison, load
from .contender import Contender, contenders
from .settings import Folder, Settings, Training, load_recipe, quiet

FACTORS = (1, 2, 4, 8)
"""The default lengths, in windows."""
TAIL = 8192
"""Bytes of a growing log that hold its last lines."""


def compare(
    model: str | os.PathLike[str],
    schemes: Sequence[str | Mapping[str, Any] | Contender],
    lengths: Sequence[int] | None = None,
    *,
    output: str | os.PathLike[str],
    factor: float | None = None,
    tasks: Sequence[Any] = ("perplexity", "needle"),
    fine_tune: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    samples: int = 50,
    depths: Sequence[float] = DEPTHS,
    text: str = "stdlib",
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> Comparison:
    """Measure several schemes on one model with the same data, seed and, if asked for, the same fine-tuning.

    `model` is a folder or a name on the hub. `schemes` are names, `name:option=value,...` or dicts; `factor` goes to
    all that take one. `lengths` are in tokens (default: the window x 1, 2, 4 and 8). `fine_tune` is a recipe's YAML
    file, `steps` the steps of its last phase (default recipe: that of `tiny_yarn`, at the greatest length); every
    contender, the model as it is among them, is then measured before and after. Everything is written under `output`
    as it is finished; the same call goes on there. `workers` processes run side by side (default: as many as fill the
    processors at the present number of threads; 0: none but this one).

    What cannot work on the model, and what went wrong, is in the result's `unsupported` and `failures`.

    Raises:
        UnknownNameError, OptionError: a scheme or option that does not exist, before anything is measured.
        PePatchError: `output` holds a comparison with other settings.
        OutputError: `output` is the model or the text, or holds something else (unless `overwrite=True`).
    """
    if not isinstance(model, str | os.PathLike):
        raise OptionError(
            f"Every process loads the model anew: give a folder or a name, not a {type(model).__name__}. Save it with "
            "save_pretrained, its tokenizer beside it."
        )
    name = os.fspath(model)
    if Path(name).is_dir():  # the same folder by another path is the same model
        name = str(Path(name).resolve())
    window = windows(loading.empty_model(name))[0] or 0
    wanted = _lengths(lengths, window)
    settings = Settings(
        model=name,
        contenders=contenders(schemes, factor=factor),
        lengths=wanted,
        tasks=tuple(tasks),
        samples=samples,
        depths=tuple(depths),
        text=text,
        seed=seed,
        training=_training(fine_tune, steps, wanted[-1]),
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        window=window,
    )
    return carry_out(settings, Path(output).expanduser(), workers=workers, progress=progress, overwrite=overwrite)


def carry_out(
    settings: Settings,
    output: Path,
    *,
    workers: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> Comparison:
    """Do what is still to do of a comparison, and give all that is finished."""
    _check(settings)
    folder = Folder(output)
    folder.claim(settings, overwrite=overwrite)
    number = processes.default_workers(settings.device) if workers is None else workers
    if number < 0:
        raise OptionError(f"workers is a number of processes, or 0 for none but this one; got {workers}.")
    jobs = [
        processes.Job(one.label, worker.work, (settings, one, folder), folder.of(one) / "failed.json")
        for one in settings.contenders
        if not finished(settings, one, folder)
    ]
    clock = processes.Job("timing", timing.time_all, (settings, folder), output / "timing-failed.json")
    with _progress(settings, folder, progress) as tick:
        processes.run(jobs, number, tick)
        if not (output / "timing.json").exists():
            processes.run([clock], min(number, 1), tick)  # alone: others would take the processors from it
    return load(settings, folder)


def finished(settings: Settings, contender: Contender, folder: Folder) -> bool:
    """Whether nothing is left to do for a contender."""
    if (folder.of(contender) / "unsupported.json").exists():
        return True
    return all((folder.of(contender) / stage / "finished.json").exists() for stage in settings.stages)


def _lengths(given: Sequence[int] | None, window: int) -> tuple[int, ...]:
    if given is None:
        if not window:
            raise OptionError("The model's configuration names no window: say which lengths to measure.")
        return tuple(window * factor for factor in FACTORS)
    wanted = tuple(sorted(set(given)))
    if not wanted or wanted[0] < 1:
        raise OptionError(f"lengths are positive numbers of tokens, got {list(given)}.")
    return wanted


def _training(recipe: str | os.PathLike[str] | None, steps: int | None, length: int) -> Training | None:
    if recipe is None and not steps:
        return None
    overrides = []
    if recipe is None:
        recipe = shipped_recipes()["tiny_yarn"]
        overrides.append(f"phases.0.length={length}")
    training = Training(Path(recipe), tuple(overrides))
    if steps is None:
        return training
    if steps < 1:
        raise OptionError(f"steps is a number of optimiser steps, at least 1; got {steps}.")
    found = load_recipe(training)
    last = len(found.phases) - 1
    warmup = min(found.phases[last].warmup, steps // 2)
    return Training(training.recipe, (*overrides, f"phases.{last}.steps={steps}", f"phases.{last}.warmup={warmup}"))


def _check(settings: Settings) -> None:
    """Raise for what does not exist or has a value that is none, before anything is loaded.

    What a scheme cannot do on this model is no error: the contender's own process finds it, and its line says so.
    """
    from ..evaluation.tasks import find_tasks

    find_tasks(settings.tasks)
    empty = loading.empty_model(settings.model)
    for contender in settings.contenders:
        try:
            with quiet(), timing.applied(empty, contender):
                pass
        except (OptionError, UnknownNameError):
            raise
        except PePatchError:
            continue


@contextlib.contextmanager
def _progress(settings: Settings, folder: Folder, shown: bool) -> Iterator[Callable[[list[str]], None]]:
    """A bar with the time left, on stderr; how far everybody is, is read off what they have written."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn(), TextColumn("left"))
    last = (TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.description}"))
    with Progress(*columns, *last, console=Console(stderr=True), disable=not shown, speed_estimate_period=600) as bar:
        start = done(settings, folder)
        task = bar.add_task("", total=max(1.0 - start, 1e-9))

        def tick(running: list[str]) -> None:
            if not shown:
                return
            bar.update(task, completed=done(settings, folder) - start, description=", ".join(running))

        yield tick
        bar.update(task, completed=1.0 - start, description="")


def done(settings: Settings, folder: Folder) -> float:
    """The share of the whole work that is on disk, measured lengths and steps of training weighed by their tokens."""
    shares = [_share(settings, one, folder) for one in settings.contenders]
    return sum(shares) / len(shares)


def _share(settings: Settings, contender: Contender, folder: Folder) -> float:
    if finished(settings, contender, folder):
        return 1.0
    here, parts = folder.of(contender), []
    for stage in settings.stages:
        rows = _lines(here / stage / "journal.jsonl")
        lengths = [row["length"] for entry in rows for row in entry.get("rows", ())]
        complete = (here / stage / "finished.json").exists()
        parts.append(1.0 if complete else sum(set(lengths)) / sum(settings.lengths))
    if settings.training is not None:
        # training takes longer than measuring
        parts += [_step(here / "training" / "log.jsonl") / _steps(settings.training)] * 2
    return min(1.0, sum(parts) / len(parts))


@cache
def _steps(training: Training) -> int:
    return sum(phase.steps for phase in load_recipe(training).phases)


def _step(log: Path) -> int:
    """The last step in a log; its end is read alone, since it is looked at all the time while it grows."""
    if not log.exists():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        whole = file.read().split(b"\n")[1 if file.tell() > TAIL else 0 : -1]
    return next((found["step"] for line in reversed(whole) if "step" in (found := json.loads(line))), 0)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON that is still being written."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
