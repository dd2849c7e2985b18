"""Stop a run early: a loss that is not finite or climbs, or SIGTERM."""

from __future__ import annotations

import math
import signal
import sys
import threading
from types import FrameType
from typing import Any

from ..errors import PePatchError
from .checkpoints import Progress
from .recipe import Guard

TERMINATED_EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a run that SIGTERM ended, as a shell reports it (143)."""
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
"""Exit code of a run that Ctrl-C ended (130)."""


class TrainingError(PePatchError, RuntimeError):
    """Raised if training cannot continue: the loss diverged, a phase missed its accuracy, or an evaluation failed."""


class Terminated(PePatchError):
    """Raised after SIGTERM or SIGINT. `exit_code` is the exit code of the script."""

    def __init__(self, message: str, exit_code: int = TERMINATED_EXIT_CODE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EvaluationError(PePatchError, RuntimeError):
    """Raised if an evaluation before, during or after training fails."""


class PostTrainingError(PePatchError, RuntimeError):
    """Raised if a step after saving the model fails.

    The trained model is saved. `exit_code` is the exit code of the script.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def fault(loss: float, norm: float, progress: Progress, limits: Guard) -> str | None:
    """Return what is wrong with a step, or None.

    Args:
        loss: the loss of the step, in nats.
        norm: the norm of its gradient.
        progress: records the losses that later calls need.
        limits: the recipe's `guard`.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"the loss is {loss}, the norm of its gradient {norm}"
    progress.losses = [*progress.losses, loss][-limits.window :]
    count = len(progress.losses)
    mean = sum(progress.losses) / count
    if progress.lowest is None:  # within the first window, the first loss is all there is to compare with
        below, reference = progress.losses[0], "the loss of the phase's first step"
        progress.lowest = mean if count == limits.window else None
    else:
        progress.lowest = min(progress.lowest, mean)
        below, reference = progress.lowest, "the lowest of this phase"
    if limits.rise is None or mean - below <= limits.rise:
        return None
    return (
        f"the loss has climbed: its mean over {count} steps is {mean:.3f}, {mean - below:.3f} nats above {reference} "
        f"(guard.rise is {limits.rise})"
    )


class Signal:
    """Record SIGTERM and the first SIGINT within the block instead of ending the process."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal; 0 if none came."""
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Signal:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received:
                raise KeyboardInterrupt
            print("Ctrl-C: saving a checkpoint after this step; press it again to stop now.", file=sys.stderr)
        self.received = max(self.received, int(number))

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
