"""Show the progress of a search, its remaining time, and the best score so far."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from ..evaluation.progress import duration


class Progress:
    """A progress bar on stderr, and one line with the expected time after the first scored candidate.

    Times do not include scores from an earlier run.
    """

    def __init__(self, total: int, iterations: int, shown: bool) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
        )  # fmt: skip
        self.bar = Bar(*columns, console=Console(stderr=True), disable=not shown, transient=True)
        self.task = self.bar.add_task("search", total=total, left="?")
        self.total, self.iterations, self.shown = total, iterations, shown
        self.done, self.measured, self.seconds, self.best = 0, 0, 0.0, float("inf")

    def advance(self, score: float, generation: int | None, seconds: float | None) -> None:
        """Count one more score.

        Args:
            score: the loss in nats per token.
            generation: the generation of the candidate; None for a baseline.
            seconds: the time of the measurement; None if the score comes from an earlier run.
        """
        self.done += 1
        if seconds is not None:
            self.measured += 1
            self.seconds += seconds
            if self.measured == 1 and self.shown:
                left = duration(seconds * (self.total - self.done + 1))
                self.bar.console.print(
                    f"A candidate takes {seconds:.2f} s; {self.total - self.done + 1:,} candidates take about {left}.",
                    highlight=False,
                )
        description = "known schemes" if generation is None else f"generation {generation} of {self.iterations}"
        if generation is not None:
            self.best = min(self.best, score)
            description += f", best {self.best:.4f}"
        left = duration(self.seconds / self.measured * (self.total - self.done)) if self.measured else "?"
        self.bar.update(self.task, completed=self.done, description=description, left=left)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
