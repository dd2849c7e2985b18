"""Show the progress of an evaluation on stderr: a bar in a terminal, else a line at least every half minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_PER_LINE = 30.0
"""Longest time without a line where stderr is not a terminal."""


class Progress:
    """Progress over tokens. Use it as a context manager.

    Args:
        label: Name of the model.
        total: Tokens to read.
        plan: A sentence about the planned work, for the first line.
        shown: False shows nothing. A function is called with the tokens read so far and with all tokens instead.
    """

    def __init__(self, label: str, total: int, plan: str, shown: bool | Callable[[int, int], None]) -> None:
        self.report = shown if callable(shown) else None
        shown = shown is True
        self.label, self.total, self.plan, self.shown = label, total, plan, shown
        self.text, self.done, self.start = "", 0, time.monotonic()
        self._lock, self._ended = threading.Lock(), threading.Event()
        console = Console(stderr=True)
        self._lines = shown and not console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=console, disable=not shown or self._lines, transient=True)
        self._work = self._bar.add_task(label, total=total)

    def describe(self, text: str) -> None:
        """Name the work that starts now."""
        self.text = text
        self._bar.update(self._work, description=f"{self.label}: {text}")

    def advance(self, tokens: int) -> None:
        """Count tokens that the model has read; the first ones give the first estimate of the time."""
        with self._lock:
            first = self.done == 0
            self.done += tokens
        self._bar.advance(self._work, tokens)
        if self.report is not None:
            self.report(self.done, self.total)
        if first and self._lines:
            self._print(self.status())

    def status(self) -> str:
        """Return a line with what is done, the speed and the time left."""
        seconds = max(time.monotonic() - self.start, 1e-6)
        speed = self.done / seconds
        # The plan estimates the tokens, so more of them may be read.
        left = duration(max(0, self.total - self.done) / speed) if self.done else "unknown"
        percent = min(99, 100 * self.done // max(1, self.total))
        return (
            f"{self.label}: {self.text}: {self.done:,} of about {self.total:,} tokens ({percent} %) in "
            f"{duration(seconds)}, {speed:,.0f} tokens/s, about {left} left"
        )

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_PER_LINE):
            self._print(self.status())

    def __enter__(self) -> Progress:
        if self.shown:
            self._print(f"{self.label}: {self.plan}")
        self._bar.start()
        self.start = time.monotonic()
        if self._lines:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._bar.stop()
        if self._lines:
            self._thread.join()
            if error is None:
                self._print(
                    f"{self.label}: finished, {self.done:,} tokens in {duration(time.monotonic() - self.start)}"
                )


def duration(seconds: float) -> str:
    """Return a time rounded to hours, minutes or seconds."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
