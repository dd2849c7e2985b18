"""Run a comparison: each scheme in its own process, results on disk as they finish, and timing at the end.

from pe_patch.compare import compare

result = compare("path/to/model", ["yarn", "linear", "self_extend:group=8,window=64"], factor=8, output="comparison")
result.table()      # one line for each scheme
result.rows         # all measurements, as `evaluate` returns them
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import sources
from ..checkpoints.folders import COMPARISON, check_output, sole_writer
from ..data.packaged import shipped_recipes
from ..errors import OptionError, PePatchError, UnknownNameError, silence_log_warnings
from ..evaluation.corpus import Corpus
from ..evaluation.model import windows
from ..evaluation.progress import LONG, duration, fewer_samples, repeated_lines
from ..evaluation.run import DEPTHS, planned_tokens
from . import facts, processes, timing, worker
from .compared_scheme import ComparedScheme, parse_schemes
from .comparison import Comparison, load
from .settings import Folder, Settings, Training, load_recipe, read_json

FACTORS = (1, 2, 4, 8)
"""Default lengths as multiples of the window."""
TIMED_TOKENS = 1024
"""Greatest number of tokens in the forward pass that the estimate is made from."""
TAIL = 8192
"""Bytes at the end of a growing log that include its last lines."""


def compare(
    model: str | os.PathLike[str],
    schemes: Sequence[str | Mapping[str, Any] | ComparedScheme],
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
    """Measure several schemes on one model with the same data, seed and, optionally, the same fine-tuning.

    Results are written under `output` as they finish, and a repeated call continues there.

    Args:
        model: a local folder, a GGUF file or a hub name.
        schemes: names, `name:option=value,...` or dicts.
        lengths: lengths in tokens; None uses the window x 1, 2, 4 and 8.
        output: the output folder.
        factor: factor of all schemes that accept one.
        tasks: names or instances of evaluation tasks.
        fine_tune: path of a recipe. Every scheme and the unpatched model are then measured before and after training.
        steps: steps of the recipe's last phase. Without `fine_tune`, trains with `tiny_yarn` at the greatest length.
        samples: number of questions at each length. With fewer than 32, perplexity reads less text, too.
        depths: positions of the answer in the text, from 0 to 1.
        text: text source: stdlib, a folder, a file or a hub data set.
        seed: random seed for questions, text positions and training.
        dtype: data type of the weights.
        device: device of the model; None uses a GPU if available.
        batch_size: sequences in one forward pass; None chooses it.
        workers: number of parallel processes. None fills the processors at the current number of threads; 0 uses only
            this process.
        progress: show a progress bar.
        overwrite: write into a folder with other content.

    Returns:
        The comparison. Its `unsupported` and `failures` name schemes that do not work on the model or failed.

    Raises:
        UnknownNameError: a scheme or task does not exist; raised before anything is measured.
        OptionError: an option does not exist or is out of range; raised before anything is measured.
        PePatchError: `output` holds a comparison with other settings.
        OutputError: `output` is the model or the text, or has other content and `overwrite` is False.
    """
    if not isinstance(model, str | os.PathLike):
        raise OptionError(
            f"Every process loads the model: give a folder or a hub name, not a {type(model).__name__}. Save the model "
            "and its tokenizer with save_pretrained."
        )
    name = os.fspath(model)
    if Path(name).is_dir():  # so that different paths to one folder are equal
        name = str(Path(name).resolve())
    window = windows(sources.empty_model(name))[0] or 0
    wanted = _lengths(lengths, window)
    settings = Settings(
        model=name,
        contenders=parse_schemes(schemes, factor=factor),
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
    folder = Path(output).expanduser()
    if progress and not (folder / "settings.json").exists():
        _check(settings)
        check_output(folder, COMPARISON, inputs=[settings.model, settings.text], overwrite=overwrite)
        print(estimate(settings), file=sys.stderr, flush=True)
    return carry_out(settings, folder, workers=workers, progress=progress, overwrite=overwrite)


def carry_out(
    settings: Settings,
    output: Path,
    *,
    workers: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> Comparison:
    """Run the unfinished parts of a comparison, and return all finished results."""
    _check(settings)
    folder = Folder(output)
    folder.claim(settings, overwrite=overwrite)
    number = processes.default_workers(settings.device) if workers is None else workers
    if number < 0:
        raise OptionError(f"workers must be at least 0 (0 uses only this process), got {workers}.")
    jobs = [
        processes.Job(entry.label, worker.work, (settings, entry, folder), folder.of(entry) / "failed.json")
        for entry in settings.contenders
        if not finished(settings, entry, folder)
    ]
    clock = processes.Job("timing", timing.time_all, (settings, folder), output / "timing-failed.json")
    with sole_writer(output), _progress(settings, folder, progress) as tick:
        processes.run(jobs, number, tick)
        if not (output / "timing.json").exists():
            processes.run([clock], min(number, 1), tick)  # alone, because other jobs would slow it down
    return load(settings, folder)


def finished(settings: Settings, compared: ComparedScheme, folder: Folder) -> bool:
    """Return whether all stages of a scheme are finished."""
    if (folder.of(compared) / "unsupported.json").exists():
        return True
    return all((folder.of(compared) / stage / "finished.json").exists() for stage in settings.stages)


def _lengths(given: Sequence[int] | None, window: int) -> tuple[int, ...]:
    if given is None:
        if not window:
            raise OptionError("The model's configuration states no window; give the lengths to measure.")
        return tuple(window * factor for factor in FACTORS)
    wanted = tuple(sorted(set(given)))
    if not wanted or wanted[0] < 1:
        raise OptionError(f"lengths must be positive numbers of tokens, got {list(given)}.")
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
        raise OptionError(f"steps must be at least 1 optimiser step, got {steps}.")
    content = load_recipe(training)
    last = len(content.phases) - 1
    warmup = min(content.phases[last].warmup, steps // 2)
    return Training(training.recipe, (*overrides, f"phases.{last}.steps={steps}", f"phases.{last}.warmup={warmup}"))


def _check(settings: Settings) -> None:
    """Raise for unknown names and wrong options before any weights are loaded.

    A scheme that cannot work on this model is not an error here: its process reports it in the results.
    """
    from ..evaluation.tasks import find_tasks

    find_tasks(settings.tasks)
    empty = sources.empty_model(settings.model)
    for compared in settings.contenders:
        try:
            with silence_log_warnings(), timing.applied(empty, compared):
                pass
        except (OptionError, UnknownNameError):
            raise
        except PePatchError:
            continue


@contextlib.contextmanager
def _progress(settings: Settings, folder: Folder, shown: bool) -> Iterator[Callable[[list[str]], None]]:
    """Show a progress bar on stderr. Progress is read from the files that the processes write."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    if shown and not sys.stderr.isatty():
        with _progress_lines(settings, folder) as print_line:
            yield print_line
        return
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


@contextlib.contextmanager
def _progress_lines(settings: Settings, folder: Folder) -> Iterator[Callable[[list[str]], None]]:
    """Print a line if other schemes run than before, and every half minute."""
    current: list[str] = []
    start, started, read = done(settings, folder), time.monotonic(), tokens_read(settings, folder)

    def status() -> str:
        share, seconds = done(settings, folder), max(time.monotonic() - started, 1e-6)
        left = duration(seconds * (1 - share) / (share - start)) if share > start else "unknown"
        speed = max(0, tokens_read(settings, folder) - read) / seconds
        return (
            f"{share:.0%} finished in {duration(seconds)}, {speed:,.0f} tokens/s read, about {left} left; running: "
            f"{', '.join(current)}"
        )

    def tick(running: list[str]) -> None:
        if running and running != current:
            current[:] = running
            print(status(), file=sys.stderr, flush=True)

    with repeated_lines(status):
        yield tick


def estimate(settings: Settings) -> str:
    """Time a forward pass, and return sentences on the least time that the measurements take in one process.

    They name a cheaper alternative if that exceeds ten minutes. Training, timing and the second process of a scheme are
    not part of it.
    """
    model, tokenizer = sources.load(settings.model, settings.dtype, settings.device)
    length = min(settings.lengths[0], TIMED_TOKENS)
    with torch.inference_mode():
        facts.forward(model, min(length, facts.WARM_UP))
        started = time.perf_counter()
        facts.forward(model, length)
        speed = length / (time.perf_counter() - started)
    corpus = Corpus.load(tokenizer, settings.text, needed=max(settings.lengths))
    measured = len(settings.contenders) * len(settings.stages)

    def tokens(samples: int) -> int:
        return measured * planned_tokens(
            model, tokenizer, settings.tasks, settings.lengths, samples=samples, text=corpus, depths=settings.depths,
            control_length=settings.short,
        )  # fmt: skip

    seconds = tokens(settings.samples) / speed
    training = "" if settings.training is None else ", without the training"
    sentence = (
        f"About {tokens(settings.samples):,} tokens are read by {len(settings.contenders)} models: at least "
        f"{duration(seconds)} in one process{training}, at {speed:,.0f} tokens/s. --length, --samples and fewer "
        "schemes shorten it."
    )
    return sentence if seconds <= LONG else f"{sentence} {fewer_samples(settings.samples, seconds, tokens)}"


def done(settings: Settings, folder: Folder) -> float:
    """Return the finished share of the work on disk; lengths and training steps count by their tokens."""
    shares = [_share(settings, entry, folder) for entry in settings.contenders]
    return sum(shares) / len(shares)


def _share(settings: Settings, compared: ComparedScheme, folder: Folder) -> float:
    if finished(settings, compared, folder):
        return 1.0
    here, shares = folder.of(compared), []
    for stage in settings.stages:
        rows = _lines(here / stage / "journal.jsonl")
        lengths = [row["length"] for entry in rows for row in entry.get("rows", ())]
        complete = (here / stage / "finished.json").exists()
        finished_lengths = sum(set(lengths[:-1])) / sum(settings.lengths)  # the last one may not be complete
        shares.append(1.0 if complete else max(finished_lengths, _read_share(here / stage / "progress.json")))
    if settings.training is not None:
        # Training takes longer than measuring.
        shares += [_step(here / "training" / "log.jsonl") / _steps(settings.training)] * 2
    return min(1.0, sum(shares) / len(shares))


def _read_share(file: Path) -> float:
    """Return the share of the tokens that a running evaluation has read."""
    return float(read_json(file)["share"]) if file.exists() else 0.0


def tokens_read(settings: Settings, folder: Folder) -> int:
    """Return the tokens that the evaluations have read, by the files that they write while they run."""
    files = [folder.of(entry) / stage / "progress.json" for entry in settings.contenders for stage in settings.stages]
    return sum(int(read_json(file).get("tokens", 0)) for file in files if file.exists())


@cache
def _steps(training: Training) -> int:
    return sum(phase.steps for phase in load_recipe(training).phases)


def _step(log: Path) -> int:
    """Return the last step in a log. Read only its end, because the log grows and this runs often."""
    if not log.exists():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        whole = file.read().split(b"\n")[1 if file.tell() > TAIL else 0 : -1]
    return next((entry["step"] for line in reversed(whole) if "step" in (entry := json.loads(line))), 0)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Parse the complete lines of a JSON-lines file that is still being written."""
    if not path.exists():
        return []
    # Not splitlines(): an answer may contain other line separators, such as U+2028.
    complete = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in complete]
