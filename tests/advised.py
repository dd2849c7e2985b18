"""Advice on the six configs that come with the tests, computed once each."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pe_patch.advice import Advice, advise

CONFIGS = Path(__file__).parent / "data" / "configs"
ASKED = {
    "llama2": ("llama-2-7b", 32768),
    "llama31": ("llama-3.1-8b", 262144),
    "mistral": ("mistral-7b-v0.1", 32768),
    "qwen3": ("qwen3-8b", 131072),
    "pythia": ("pythia-6.9b", 5000),
    "bloom": ("bloom-7b1", 8192),
}


@cache
def advised(name: str) -> Advice:
    """Return the advice on one of the six models, at a target beyond its window."""
    return advise_on(*ASKED[name])


def advise_on(folder: str, target: int, **options: Any) -> Advice:
    """Return the advice on a test config at any target."""
    return advise(str(CONFIGS / folder), target, **options)
