"""The demo model, a text, and a schedule of seconds, shared by the tests of the search."""

from __future__ import annotations

import argparse
import inspect
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from pe_patch import AttentionShape
from pe_patch.compare.demo import BASE
from pe_patch.search import Schedule, search

WINDOW, LENGTH = 256, 512
SMALL = Schedule(population=8, iterations=2, mutations=2, crossovers=2, parents=4)
TEXT = [inspect.getsource(argparse)]


@cache
def demo() -> tuple[Any, Any]:
    """Return the demo model, trained at 256 tokens, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(BASE).eval(), AutoTokenizer.from_pretrained(BASE)


def run(method: str, output: Path | None = None, **options: Any) -> Any:
    given = {"text": TEXT, "samples": 2, "needles": 4, "schedule": SMALL, "progress": False, **options}
    return search(*demo(), LENGTH, method=method, output=output, **given)


def shape(rotary_dim: int, theta: float, trained_length: int) -> AttentionShape:
    """Return an attention shape with this rotation and arbitrary other sizes."""
    return AttentionShape(
        hidden_size=4 * rotary_dim, num_heads=4, num_key_value_heads=4, head_dim=rotary_dim, rotary_dim=rotary_dim,
        rotary_start=0, rope_theta=theta, trained_length=trained_length, num_layers=2,
    )  # fmt: skip
