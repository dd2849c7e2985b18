"""One thread at a time changes a model.

Claims are kept beside the models, not on them, so that an interrupt leaves nothing behind: a claim ends with the call
that made it, also where the call could not release it. Every step is one operation of a dict, which no other thread
can divide.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from transformers import PreTrainedModel

from ..errors import AlreadyPatchedError


class Turn:
    """The context in which this thread may change a model; an error where another thread is at it."""

    def __init__(self, head: Any) -> None:
        self.head, self.over = head, False

    def __enter__(self) -> Turn:
        if not _claim(self.head, self):
            raise self._refusal()
        try:  # the models inside, which another thread may have been given
            inner = [module for module in self.head.modules() if isinstance(module, PreTrainedModel)]
        except RuntimeError as error:  # it takes submodules out, or puts them in
            raise self._refusal() from error
        if not all(_claim(model, self) for model in inner if model is not self.head):
            raise self._refusal()
        return self

    def _refusal(self) -> AlreadyPatchedError:
        self.over = True
        return AlreadyPatchedError(
            f"Another thread is patching or unpatching this {type(self.head).__name__} now. Patch a model from one "
            "thread, or give each thread a copy (copy.deepcopy)."
        )

    def __exit__(self, *_: Any) -> None:
        self.over = True


class _Claim:
    def __init__(self, turn: Turn) -> None:
        self.turn, self.thread = weakref.ref(turn), threading.get_ident()

    @property
    def held_elsewhere(self) -> bool:
        turn = self.turn()
        return turn is not None and not turn.over and self.thread != threading.get_ident()


_LATEST: weakref.WeakKeyDictionary[Any, _Claim] = weakref.WeakKeyDictionary()
"""A claim on each model, from which `next` leads to the latest one."""


def _claim(model: Any, turn: Turn) -> bool:
    """Append a claim unless the latest one is held by another thread."""
    mine = _Claim(turn)
    latest = _LATEST.setdefault(model, mine)
    while latest is not mine:
        if latest.held_elsewhere:
            return False
        latest = vars(latest).setdefault("next", mine)
    _LATEST[model] = mine
    return True
