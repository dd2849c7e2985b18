"""List the dtypes in which every family rotates, and whether a rotation at the scores rounds like its own.

`python -m pe_patch.adapters.precision` prints the table of docs/precision.md.
"""

from __future__ import annotations

from . import ADAPTERS
from .adapter import Adapter

ARITHMETIC = {
    "model": "the dtype of the model",
    "float32 tables": "float32, by cos and sin in float32",
    "float32": "float32, by cos and sin in the dtype of the model",
    "complex": "float32, as one complex product",
}
"""The dtype of the product of queries and keys with cos and sin, for each of `scheme.ARITHMETIC`."""
OUTCOMES = {
    "equal": "equal bit for bit",
    "close": "equal up to rounding",
    "refused": "refused",
}


def outcome(adapter: Adapter) -> str:
    """Return how schemes that rotate at the scores compare with the unpatched model within the window.

    The result is a key of `OUTCOMES`.
    """
    if adapter.still_rotation is not None or adapter.at_scores is not None:  # our code replaces the family's
        return "close"
    return "refused" if adapter.bars_rotation_at_scores or not adapter.forwards_kwargs else "equal"


def table() -> dict[str, str]:
    """Return the outcome of each family that rotates, a key of `OUTCOMES`."""
    return {name: outcome(adapter) for name, adapter in sorted(ADAPTERS.items()) if adapter.native == "rope"}


def markdown() -> str:
    """Return the table of docs/precision.md."""
    lines = ['| family | rotates in | `dynamic_*`, `factor="auto"` within the window |', "| --- | --- | --- |"]
    for name, result in table().items():
        lines.append(f"| `{name}` | {ARITHMETIC[ADAPTERS[name].arithmetic]} | {OUTCOMES[result]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
