"""What several tests of training read and build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pe_patch.training.recipe import Phase, Source


def logged(output: Path, event: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def phase(**options: Any) -> Phase:
    return Phase(**{"length": 64, "batch": 4, "steps": 6, "mixture": {"text": Source(share=1)}, **options})
