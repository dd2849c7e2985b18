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
from .finding import Finding


def announced_keys(file: Path) -> dict[str, Any]:
    """Return the GGUF keys that an export in the same folder announces; empty if there is none."""
    serving = file.parent / SERVING_FILES[0]
    return json.loads(serving.read_text(encoding="utf-8")).get("metadata", {}) if serving.is_file() else {}


def check_converted(file: Path) -> list[Finding]:
    """Return one finding for each key or tensor that the export announces and the file lacks or has otherwise."""
    announced = announced_keys(file)
    return list(_differences(file, read_header(file), announced)) if announced else []


def _differences(file: Path, header: Header, announced: dict[str, Any]) -> Iterator[Finding]:
    for name, value in announced.items():
        if name == "tensors":
            missing = [tensor for tensor in value if tensor not in header.tensors]
            if missing:
                yield _finding(file, ", ".join(missing), "tensors of the scheme", "the file has no such tensor")
        elif not _equal(header.fields.get(name), value):
            found = header.fields.get(name)
            said = "the file has no such key" if found is None else f"the file has {found!r}"
            yield _finding(file, name, f"{value!r} in {SERVING_FILES[0]}", said)


def _finding(file: Path, where: str, claimed: str, in_effect: str) -> Finding:
    return Finding(
        "not_converted", "error", f"{file.name}: {where}", claimed,
        f"{in_effect}, so llama.cpp does not compute the exported positions",
        f"Convert again with a newer convert_hf_to_gguf.py: that of llama.cpp {OLDEST}, or a later one.",
    )  # fmt: skip


def _equal(found: Any, announced: Any) -> bool:
    if isinstance(found, float) or isinstance(announced, float):
        # The file has float32.
        return isinstance(found, int | float) and math.isclose(found, announced, rel_tol=1e-6)
    return found == announced
