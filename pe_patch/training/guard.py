"""When a run must stop before its end: a loss that is no number, one that climbs, a signal to leave."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..errors import PePatchError
from .checkpoints import Progress
from .recipe import Guard

LEFT = 128 + signal.SIGTERM
"""The exit code of a run that was told to leave, as a shell has it for a process that SIGTERM ended."""


class TrainingError(PePatchError, RuntimeError):
    """Training cannot go on: the loss is no longer a number or has run away, or a phase missed what it was to reach."""


class Left(PePatchError):
    """SIGTERM came; the run was saved, and can be gone on with."""


class EvaluationError(PePatchError, RuntimeError):
    """An evaluation during or before training did not finish."""


class Unfinished(PePatchError, RuntimeError):
    """The model is trained and saved, and what follows did not finish; `exit_code` is that of the script."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(BaseException):
    """SIGTERM, raised where it arrives. No handler of ordinary exceptions may take it for a failure of its own."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM for as long as the block lasts."""
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers nowhere else
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def fault(loss: float, norm: float, progress: Progress, wanted: Guard) -> str | None:
    """What is wrong with a step's loss and its gradient's norm, if anything; `progress` keeps what later steps need."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"the loss is {loss}, the norm of its gradient {norm}"
    progress.losses = [*progress.losses, loss][-wanted.window :]
    if len(progress.losses) < wanted.window:
        return None
    mean = sum(progress.losses) / wanted.window
    progress.lowest = mean if progress.lowest is None else min(progress.lowest, mean)
    if wanted.rise is None or mean - progress.lowest <= wanted.rise:
        return None
    return (
        f"the loss has climbed: its mean over {wanted.window} steps is {mean:.3f}, {mean - progress.lowest:.3f} nats "
        f"above the lowest of this phase (guard.rise is {wanted.rise})"
    )


class Signal:
    """Notes SIGTERM for as long as the block lasts, in place of dying of it."""

    def __init__(self) -> None:
        self.came = False
        self.previous: Any = None

    def __enter__(self) -> Signal:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True

    def __exit__(self, *error: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)
