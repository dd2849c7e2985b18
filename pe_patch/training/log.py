"""Log a run: JSON lines in a file, a progress bar, and accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

COLUMNS = ("phase", "loss", "divergence", "accuracy", "gradient_norm", "tokens_per_second")
"""Values that the progress bar shows."""


class Log:
    """The log of a run, written by the main process. A resumed run first drops the lines after its checkpoint."""

    def __init__(self, accelerator: Any, path: Path, *, from_step: int, total_steps: int, progress: bool) -> None:
        self.accelerator, self.path = accelerator, path
        self.console = Console(stderr=True)
        shown = progress and accelerator.is_main_process
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not shown,
        )
        self.task = self.bar.add_task("", total=total_steps, completed=from_step)
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            earlier = [line for line in self._lines() if json.loads(line)["step"] <= from_step] if from_step else []
            path.write_text("".join(f"{line}\n" for line in earlier), encoding="utf-8")

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []

    def __enter__(self) -> Log:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Append one line. `values` must include `step`."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"event": event, **values}) + "\n")
        numbers = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=values["step"])

    def step(self, values: Mapping[str, Any]) -> None:
        """Log one optimiser step and advance the progress bar."""
        self.write("step", values)
        shown = [f"{name.replace('_', ' ')} {_short(values[name])}" for name in COLUMNS if values.get(name) is not None]
        shown.append(gigabytes(values["memory"]))
        self.bar.update(self.task, completed=values["step"], description="  ".join(shown).replace(" per ", "/"))

    def skip(self, steps: int) -> None:
        """Shorten the progress bar by `steps`, after a phase that ended early."""
        task = self.bar.tasks[0]
        self.bar.update(self.task, total=(task.total or 0) - steps)


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
