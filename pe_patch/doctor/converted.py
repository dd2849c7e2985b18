"""Compare a GGUF file with the export that it was converted from: a converter may drop the scaling without an error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoints.exporters.checkpoint import SERVING_FILES
from ..checkpoints.exporters.llamacpp import OLDEST
from ..checkpoints.gguf_file import Header, read_header
from ..errors import CheckpointError
from .finding import Finding


def announced_keys(file: Path) -> dict[str, Any]:
    """Return the GGUF keys that an export in the same folder announces; empty if there is none."""
    serving = file.parent / SERVING_FILES[0]
    if not serving.is_file():
        return {}
    try:
        return json.loads(serving.read_text(encoding="utf-8")).get("metadata", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{serving} is not what an export writes there: {error}. Export again.") from error


def check_converted(file: Path) -> list[Finding]:
    """Return a finding that names the announced keys and tensors which the file lacks or has with another value."""
    claimed, found = [], []
    header = read_header(file)
    for name, value, in_file in _differences(header, announced_keys(file)):
        claimed.append(f"{name}={value!r}")
        found.append(f"{name} is {'missing' if in_file is None else repr(in_file)}")
    if not found:
        return []
    return [
        Finding(
            "not_converted", "error", file.name, f"{SERVING_FILES[0]}: {', '.join(claimed)}",
            f"{', '.join(found)}, so llama.cpp does not compute the exported positions",
            f"Convert again with a newer convert_hf_to_gguf.py: that of llama.cpp {OLDEST}, or a later one.",
        )
    ]  # fmt: skip


def _differences(header: Header, announced: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the announced value and the value in the file of each key or tensor that differs."""
    for name, value in announced.items():
        if name == "tensors":
            if missing := [tensor for tensor in value if tensor not in header.tensors]:
                yield name, missing, None
        elif not _equal(found := header.fields.get(name), value):
            yield name, value, found


def _equal(found: Any, announced: Any) -> bool:
    if isinstance(found, float) or isinstance(announced, float):
        # The file has float32.
        return isinstance(found, int | float) and math.isclose(found, announced, rel_tol=1e-6)
    return found == announced
