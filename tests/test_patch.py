"""Test length-dependent schemes, with and without a fixed expected length, in the situations of the matrix."""

from __future__ import annotations

import pytest

from pe_patch import SCHEMES

from .matrix import TOLERANCE, Cell, batched, cached, full, model_of, packed, padded, static
from .models import AUTO, FAMILIES, GIVEN, PINNED, build, error, logits, put, tokens, wearing


def test_the_matrix_lists_every_text_scheme():
    """Schemes for images are tested in tests/test_grid.py."""
    assert set(GIVEN) == {name for name, scheme in SCHEMES.items() if scheme.mechanism != "two-dimensional"}


@pytest.mark.parametrize("name", [*PINNED, *AUTO])
@pytest.mark.parametrize("family", FAMILIES)
def test_length_dependent_schemes_agree_however_tokens_are_fed(family, name):
    with wearing(model_of(family)[0], name, backend="sdpa") as model:
        for check in (full, cached, static, padded, packed, batched):
            check(Cell(family, name, model))


@pytest.mark.parametrize("name", PINNED)
@pytest.mark.parametrize("family", FAMILIES)
def test_expected_length_fixes_the_frequencies_of_that_length(family, name):
    """With `expected_length`, a short prompt gets the encoding that the start of a document of that length gets."""
    ids = tokens(1, 64)
    unpinned, pinned = (put(build(family), one, backend="sdpa") for one in (name.split(" ")[0], name))
    assert error(logits(pinned, ids[:, :20]), logits(unpinned, ids)[:, :20]) < TOLERANCE
    assert error(logits(pinned, ids[:, :20]), logits(unpinned, ids[:, :20])) > 100 * TOLERANCE
