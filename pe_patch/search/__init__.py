"""The evolutionary search for rescale factors of LongRoPE and LongRoPE2."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evolution import Schedule as Schedule
    from .result import SearchResult as SearchResult
    from .run import search as search

_WHERE = {"Schedule": "evolution", "SearchResult": "result", "search": "run"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
