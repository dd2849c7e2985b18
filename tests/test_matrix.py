"""Every scheme for text on six families in ten situations; `tests/matrix.py` says what each of them checks."""

from __future__ import annotations

import re

import pytest

from pe_patch import PePatchError

from .matrix import OTHERS, OUTCOMES, REFUSED, SITUATIONS, compiled_here, run
from .models import FAMILIES, GIVEN

EVERY = [(family, name) for family in (*FAMILIES, *OTHERS) for name in GIVEN]


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_ten_situations(family, name, request):
    outcome = run(family, name, whole=request.config.getoption("--compile-all"))
    for situation in SITUATIONS:
        pattern = REFUSED.get((name, family, situation), REFUSED.get((name, family)))
        reason = outcome.get(situation)
        if pattern is None:
            if reason is not None:
                raise AssertionError(f"{name} on {family}, {situation}: {reason!r}") from reason
        else:
            assert isinstance(reason, PePatchError) and re.search(pattern, str(reason)), (situation, reason)
    assert OUTCOMES[family, name] is outcome


def test_few_are_refused():
    """None on the first three families, on the others one pair in ten at most."""
    pairs = {(key[0], key[1]) for key in REFUSED}
    assert not {family for _, family in pairs} & set(FAMILIES)
    assert len(pairs) <= len(GIVEN) * len(OTHERS) / 10


def test_the_rota_compiles_every_scheme_and_every_family():
    parts = [(name, family, part) for family, name in EVERY for part in compiled_here(family, name)]
    assert sorted(name for name, _, part in parts if part == "pass") == sorted(GIVEN)
    assert {(family, part) for _, family, part in parts} == {
        (family, part) for family in (*FAMILIES, *OTHERS) for part in ("pass", "step")
    }
