"""Show the progress of an evaluation on stderr: a bar in a terminal, else a line at least every half minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import nn

SECONDS_PER_LINE = 30.0
"""Longest time without a line where stderr is not a terminal."""
LONG = 600.0
"""Seconds from which on a run names a cheaper alternative."""


class Progress:
    """Progress over tokens. Use it as a context manager.

    Args:
        label: Name of the model.
        total: Tokens to read.
        plan: A sentence about the planned work, for the first line.
        shown: False shows nothing. A function is called with the tokens read so far and with all tokens instead.
        cheaper: Returns a sentence about a cheaper alternative to a run of so many seconds. It is printed with the
            first estimate if that exceeds ten minutes.
    """

    def __init__(
        self,
        label: str,
        total: int,
        plan: str,
        shown: bool | Callable[[int, int], None],
        cheaper: Callable[[float], str] | None = None,
    ) -> None:
        self.cheaper = cheaper
        self.report = shown if callable(shown) else None
        shown = shown is True
        self.label, self.total, self.plan, self.shown = label, total, plan, shown
        self.text, self.done, self.start = "", 0, time.monotonic()
        self.reading = 0.0
        """Tokens that the pass under way has read, as if its layers read them one after the other."""
        self._lock, self._watch = threading.Lock(), ExitStack()
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

    @contextmanager
    def following(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Count what a pass reads, layer by layer, so that a pass of minutes shows progress.

        Args:
            layers: The layers of the model; none shows progress after each pass only.
        """

        def read(module: nn.Module, inputs: Any, output: Any) -> None:
            if torch.compiler.is_compiling():
                return
            hidden = output[0] if isinstance(output, tuple) else output
            with self._lock:
                self.reading += hidden.shape[:-1].numel() / len(layers)
            self._bar.update(self._work, completed=min(self.total, self.done + self.reading))

        with ExitStack() as hooks:
            for layer in layers if self.shown else ():
                hooks.callback(layer.register_forward_hook(read).remove)
            yield

    def advance(self, tokens: int) -> None:
        """Count tokens that the model has read; the first ones give the first estimate of the time."""
        with self._lock:
            first = self.done == 0
            self.done += tokens
            self.reading = 0.0
        self._bar.update(self._work, completed=self.done)
        if self.report is not None:
            self.report(self.done, self.total)
        if not first or not self.shown:
            return
        if self._lines:
            self._print(self.status())
        seconds = self.total * (time.monotonic() - self.start) / max(self.done, 1)
        if seconds > LONG and self.cheaper is not None:
            self._bar.console.print(
                f"{self.label}: about {duration(seconds)} in all. {self.cheaper(seconds)}", highlight=False,
                markup=False, soft_wrap=True,
            )  # fmt: skip

    def status(self) -> str:
        """Return a line with what is done, the speed and the time left."""
        seconds = max(time.monotonic() - self.start, 1e-6)
        read = int(self.done + self.reading)
        speed = read / seconds
        # The plan estimates the tokens, so more of them may be read, and a judge's reading is not among them.
        left = f"about {duration((self.total - read) / max(speed, 1e-6))} left"
        ahead = left if read < self.total else "the planned tokens are read, the last measures are still to come"
        rate = f", {speed:,.0f} tokens/s, {ahead}"
        percent = min(99, 100 * read // max(1, self.total))
        return (
            f"{self.label}: {self.text}: {read:,} of about {self.total:,} tokens ({percent} %) in "
            f"{duration(seconds)}{rate if read else ''}"
        )

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if self.shown:
            self._print(f"{self.label}: {self.plan}")
        self._bar.start()
        self.start = time.monotonic()
        if self._lines:
            self._watch.enter_context(repeated_lines(self.status))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.close()
        self._bar.stop()
        if self._lines and error is None:
            self._print(f"{self.label}: finished, {self.done:,} tokens in {duration(time.monotonic() - self.start)}")


@contextmanager
def repeated_lines(status: Callable[[], str]) -> Iterator[None]:
    """Print a line about the work to stderr every `SECONDS_PER_LINE`, until the block ends."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SECONDS_PER_LINE):
            print(status(), file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def fewer_samples(samples: int, seconds: float, tokens: Callable[[int], int]) -> str:
    """Return a sentence on how many questions take less than ten minutes, or on what else is cheaper.

    Args:
        samples: Questions at each length.
        seconds: Time that they take.
        tokens: Returns the tokens that so many questions read.
    """
    rest = "Shorter lengths and fewer tasks take less time as well."
    for fewer in (20, 10, 5):
        if fewer < samples:
            read = tokens(fewer)
            expected = seconds * read / max(1, tokens(samples))
            if expected <= LONG or fewer == 5:
                return f"With {fewer} samples instead of {samples}: {read:,} tokens, about {duration(expected)}. {rest}"
    return rest


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes, hours or days, whichever is shorter to read."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
