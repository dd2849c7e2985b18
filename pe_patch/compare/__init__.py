"""Several schemes on one model, with everything else the same: what each gives beyond the window, and what it costs.

    from pe_patch.compare import compare

    found = compare("path/to/model", ["yarn", "linear", "self_extend:group=8,window=64"], factor=8, output="comparison")
    found.table()       # one line for each scheme
    found.rows          # every measurement, as `evaluate` gives them

Names are imported on first use.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "Comparison": "comparison",
    "Contender": "contender",
    "PRESETS": "presets",
    "compare": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
