"""The matrix for schemes whose regime follows the length, pinned to one, and for scalings that follow it."""

from __future__ import annotations

import pytest

from pe_patch import SCHEMES

from .matrix import TOLERANCE, Cell, batched, cached, full, model_of, packed, padded, static
from .models import AUTO, FAMILIES, GIVEN, PINNED, build, error, logits, put, tokens, wearing


def test_every_scheme_is_here():
    """Those for text; images have tests/test_grid.py."""
    assert set(GIVEN) == {name for name, scheme in SCHEMES.items() if scheme.mechanism != "two-dimensional"}


@pytest.mark.parametrize("name", [*PINNED, *AUTO])
@pytest.mark.parametrize("family", FAMILIES)
def test_however_the_tokens_are_fed(family, name):
    with wearing(model_of(family)[0], name, backend="sdpa") as model:
        for check in (full, cached, static, padded, packed, batched):
            check(Cell(family, name, model))


@pytest.mark.parametrize("name", PINNED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pinned_length_is_the_regime_of_that_length(family, name):
    """A short prompt under `expected_length` is encoded as the beginning of a document of that length is."""
    ids = tokens(1, 64)
    unpinned, pinned = (put(build(family), one, backend="sdpa") for one in (name.split(" ")[0], name))
    assert error(logits(pinned, ids[:, :20]), logits(unpinned, ids)[:, :20]) < TOLERANCE
    assert error(logits(pinned, ids[:, :20]), logits(unpinned, ids[:, :20])) > 100 * TOLERANCE
