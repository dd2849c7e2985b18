"""Let one thread at a time change a model.

This module keeps claims beside the models, not on them, so that an interrupt leaves nothing behind. A claim ends with
the call that made it, even if that call could not release it. Every step is one atomic operation of a dict.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from transformers import PreTrainedModel

from ..errors import AlreadyPatchedError


class ModelLock:
    """A context in which only this thread may change a model.

    Raises:
        AlreadyPatchedError: another thread is changing the model.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.released = model, False

    def __enter__(self) -> ModelLock:
        if not _claim(self.model, self):
            raise self._refusal()
        try:  # another thread may hold a reference to a model inside this one
            inner = [module for module in self.model.modules() if isinstance(module, PreTrainedModel)]
        except RuntimeError as error:  # another thread adds or removes submodules during the iteration
            raise self._refusal() from error
        if not all(_claim(model, self) for model in inner if model is not self.model):
            raise self._refusal()
        return self

    def _refusal(self) -> AlreadyPatchedError:
        self.released = True
        return AlreadyPatchedError(
            f"Another thread is patching or unpatching this {type(self.model).__name__} now. Patch a model from one "
            "thread, or give each thread a copy (copy.deepcopy)."
        )

    def __exit__(self, *_: Any) -> None:
        self.released = True


class _Claim:
    def __init__(self, lock: ModelLock) -> None:
        self.lock, self.thread = weakref.ref(lock), threading.get_ident()

    @property
    def held_elsewhere(self) -> bool:
        """Return whether another thread holds this claim."""
        lock = self.lock()
        return lock is not None and not lock.released and self.thread != threading.get_ident()


_LATEST: weakref.WeakKeyDictionary[Any, _Claim] = weakref.WeakKeyDictionary()
"""A claim for each model; following `next` from it reaches the latest one."""


def _claim(model: Any, lock: ModelLock) -> bool:
    """Append a claim and return True, or return False if another thread holds the latest one."""
    mine = _Claim(lock)
    latest = _LATEST.setdefault(model, mine)
    while latest is not mine:
        if latest.held_elsewhere:
            return False
        latest = vars(latest).setdefault("next", mine)
    _LATEST[model] = mine
    return True
