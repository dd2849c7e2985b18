"""Search the rescale factors of LongRoPE and LongRoPE2 by evolution."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evolution import Schedule as Schedule
    from .result import SearchResult as SearchResult
    from .run import search as search

_MODULE_OF = {"Schedule": "evolution", "SearchResult": "result", "search": "run"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_MODULE_OF)
