"""Pass a value to an inner forward through code that has no argument for it.

The value belongs to one call in one thread. Nothing is stored on a module, so several threads can run one model. The
value is dropped when the call ends, and an outer call gets its own value back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_THREAD = threading.local()


def call_with_value(name: str, base: Any, value: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return `call(*args, **kwargs)`, in which `current_value(name, base)` is `value`."""
    before = getattr(_THREAD, name, None)
    setattr(_THREAD, name, (base, value))
    try:
        return call(*args, **kwargs)
    finally:
        setattr(_THREAD, name, before)


def current_value(name: str, base: Any) -> Any:
    """Return the value that this thread passed to `base`, or None."""
    held = getattr(_THREAD, name, None)
    return held[1] if held is not None and held[0] is base else None
