"""Try model types of Transformers against the table in the documentation: some each week, all in the slow suite."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
import transformers

from pe_patch.adapters.inferred import VERIFIED

from .model_types.checks import outcome
from .model_types.tiny import TYPES

STORED = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "model_types.json").read_text("utf-8"))
SUPPORTED = [name for name, found in STORED["types"].items() if found["supported"]]
WEEKS = 12
"""In so many weeks every supported type has its turn in the default suite."""


def in_turn(number: int) -> bool:
    """Return whether a type is tried this week."""
    return number % WEEKS == date.today().isocalendar().week % WEEKS


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[] if in_turn(i) else [pytest.mark.thorough]) for i, name in enumerate(SUPPORTED)],
)
def test_a_supported_type_is_supported(model_type):
    if model_type not in TYPES and transformers.__version__ != STORED["transformers"]:
        pytest.skip(f"Transformers {transformers.__version__} has no {model_type}.")
    found = outcome(model_type)
    assert found.supported, f"{found.status}: {found.reason} {found.checks}"


def test_every_family_that_is_named_as_verified_is_supported():
    assert not set(VERIFIED) - {found["family"] for found in STORED["types"].values() if found["supported"]}


def test_the_table_covers_every_type_and_gives_a_reason_for_each_gap():
    assert set(STORED["types"]) >= {name for name in TYPES if transformers.__version__ == STORED["transformers"]}
    for name, found in STORED["types"].items():
        assert found["supported"] or found["reason"] or found["checks"], name
    assert len(SUPPORTED) >= 150
