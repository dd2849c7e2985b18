"""Log a run: JSON lines in a file, its progress (a bar in a terminal, else lines), and Transformers' trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import PePatchError
from ..evaluation.progress import duration, repeated_lines
from ..evaluation.results import write_atomically

COLUMNS = ("phase", "loss", "divergence", "accuracy", "gradient_norm", "tokens_per_second")
"""Values that the progress shows."""


class Log:
    """The log of a run, written by the main process. A resumed run first drops the lines after its checkpoint.

    Args:
        path: the file of JSON lines.
        writes: this process writes; the others keep silent.
        from_step: steps that the run has behind it.
        trained: all of its steps are behind it: what it logged after the last one is dropped too, and logged again.
        total_steps: steps of the whole run.
        progress: show the progress: a bar in a terminal, else a line at least every 30 seconds.
    """

    def __init__(
        self, path: Path, *, writes: bool, from_step: int, total_steps: int, progress: bool, trained: bool = False
    ) -> None:
        self.path, self.writes = path, writes
        self.track: Callable[[dict[str, float]], None] = lambda values: None
        """Sends numbers by name to the trackers."""
        self.console = Console(stderr=True)
        self.shown = progress and writes
        self.lines = self.shown and not self.console.is_terminal
        self.work, self.start = "starting", time.monotonic()
        self.first = from_step
        self._watch = ExitStack()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.shown or self.lines,
        )
        self.task = self.bar.add_task("", total=total_steps, completed=from_step)
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            earlier = [line for line in read_lines(path) if line["step"] <= from_step] if from_step else []
            if trained:
                earlier = [line for line in earlier if line["event"] == "step" or line["step"] < from_step]
            write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in earlier))

    def __enter__(self) -> Log:
        self.bar.start()
        if self.lines:
            self._watch.enter_context(repeated_lines(self.status))
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.close()
        self.bar.stop()

    def status(self) -> str:
        """Return a line with the steps done, the work at hand and the time left."""
        task, seconds = self.bar.tasks[0], time.monotonic() - self.start
        done, total = int(task.completed), int(task.total or 0)
        # Evaluations on the way count as time of the steps.
        known = done > self.first
        left = f", about {duration(seconds / (done - self.first) * (total - done))} left" if known else ""
        return f"step {done:,} of {total:,}: {self.work}; {duration(seconds)} so far{left}"

    def evaluated(self, done: int, total: int) -> None:
        """Show the progress of an evaluation, in tokens."""
        self._show(f"evaluating, {done:,} of about {total:,} tokens")

    def _show(self, work: str) -> None:
        self.work = work
        self.bar.update(self.task, description=work)

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Append one line. `values` must include `step`."""
        if self.writes:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"event": event, **values}) + "\n")
        prefix = "" if event == "step" else "eval_"  # Transformers' trackers sort by this prefix
        where = [str(values[key]) for key in ("task", "measure", "length") if key in values]
        name = prefix + "".join(f"{part}/" for part in where)
        self.track({name + key: value for key, value in values.items() if isinstance(value, int | float)})

    def notes(self, sentences: Sequence[str]) -> None:
        """Write and show sentences on the data of a run that begins."""
        self.write("data", {"step": 0, "notes": [*sentences]})
        for sentence in sentences if self.shown else ():
            self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def step(self, values: Mapping[str, Any]) -> None:
        """Log one optimiser step and advance the progress bar."""
        self.write("step", values)
        shown = [f"{name.replace('_', ' ')} {_short(values[name])}" for name in COLUMNS if values.get(name) is not None]
        shown.append(gigabytes(values["memory"]))
        self.bar.update(self.task, completed=values["step"])
        self._show("  ".join(shown).replace(" per ", "/"))
        if self.lines and values["step"] == self.first + 1:
            self.console.print(self.status(), highlight=False, markup=False, soft_wrap=True)

    def skip(self, steps: int) -> None:
        """Shorten the progress bar by `steps`, after a phase that ended early."""
        task = self.bar.tasks[0]
        self.bar.update(self.task, total=(task.total or 0) - steps)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log. A last line that an interrupted write has cut is left out.

    Raises:
        PePatchError: another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    read: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or type(entry.get("step")) is not int or "event" not in entry:
                raise ValueError("it is not an event with a step")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise PePatchError(f"{path}, line {number} is damaged ({error}). Delete the line and rerun.") from error
        read.append(entry)
    return read


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 100 else f"{value:,.0f}"
    return str(value)


def gigabytes(size: float) -> str:
    """Format bytes as GB of 10^9 bytes, or as MB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e7 else f"{size / 1e6:.2g} MB"


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Return a terminal table of rows that share their keys."""
    result = Table(title=title)
    for name in rows[0]:
        result.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        result.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    return result
