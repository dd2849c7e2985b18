"""Whether every scheme on every family means the same however the tokens are fed.

A cell counts only where positions matter: shuffled position ids must move the logits by more than a hundred times the
tolerance. `nope`, `drope` and `cope` are the exceptions, by definition: there they must not move a bit.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import StaticCache

from pe_patch import SCHEMES

from .models import (
    AUTO,
    BACKENDS,
    CASES,
    FAMILIES,
    GIVEN,
    LENGTH_DEPENDENT,
    MASK_ALONE,
    PINNED,
    build,
    cached_logits,
    error,
    logits,
    put,
    tokens,
)

TOLERANCE = 1e-5
"""Relative to the largest logit, which is between 3 and 20 on these models."""

LENGTHS = (20, 48)
"""On both sides of the window of 32."""

cell = pytest.mark.parametrize(
    ("family", "name", "backend"),
    [(family, name, backend) for family in FAMILIES for name in CASES for backend in BACKENDS],
)


@cache
def model_of(family: str, name: str, backend: str):
    return put(build(family), name, backend=backend)


@pytest.fixture
def model(family, name, backend):
    found = model_of(family, name, backend)
    assert positions_matter(family, name, backend)
    return found


@cache
def positions_matter(family: str, name: str, backend: str) -> bool:
    """With a mask of ones, without which position ids that fall would be taken for packed documents."""
    moved = []
    for length in LENGTHS:
        ids = tokens(1, length)
        shuffled = torch.randperm(length, generator=torch.Generator().manual_seed(3))[None]
        patched, ones = model_of(family, name, backend), torch.ones_like(ids)
        plain = logits(patched, ids, attention_mask=ones)
        moved.append(error(logits(patched, ids, attention_mask=ones, position_ids=shuffled), plain))
    return moved == [0.0, 0.0] if name in MASK_ALONE else min(moved) > 100 * TOLERANCE


def test_every_scheme_is_here():
    """Those for text; images have tests/test_grid.py."""
    assert set(GIVEN) == {name for name, scheme in SCHEMES.items() if scheme.mechanism != "two-dimensional"}


def decodes(name: str) -> list[tuple[int, int]]:
    """(first pass, total) of decodings that stay in one regime."""
    if name in LENGTH_DEPENDENT:
        return [(27, 32)]
    if name in AUTO:
        return [(27, 32), (59, 64)]
    return [(29, 37)]


@cell
def test_cached_equals_full(model, name):
    for prefill, total in decodes(name):
        ids = tokens(2, total)
        assert error(cached_logits(model, ids, prefill), logits(model, ids)) < TOLERANCE


@cell
def test_static_cache_equals_dynamic(model, name):
    for prefill, total in ((29, 35), (40, 42)):
        ids = tokens(2, total)
        expected = cached_logits(model, ids, prefill)
        static = StaticCache(config=model.config, max_cache_len=64)
        assert error(cached_logits(model, ids, prefill, static), expected) < TOLERANCE


@cell
def test_batched_equals_alone(model):
    for length in LENGTHS:
        ids = tokens(3, length)
        alone = torch.cat([logits(model, row[None]) for row in ids])
        assert error(logits(model, ids), alone) < TOLERANCE


@cell
def test_left_padded_equals_unpadded(model):
    short, long = tokens(1, 20), tokens(1, 48, seed=4)
    padded = torch.cat((torch.zeros(1, 28, dtype=torch.long), short), 1)
    ids, mask = torch.cat((padded, long)), torch.ones(2, 48, dtype=torch.long)
    mask[0, :28] = 0
    together = logits(model, ids, attention_mask=mask)
    assert error(together[:1, 28:], logits(model, short)) < TOLERANCE
    assert error(together[1:], logits(model, long)) < TOLERANCE
    stepwise = cached_logits(model, ids, 45, mask=mask)
    assert error(stepwise[:1, 28:], cached_logits(model, short, 17)) < TOLERANCE
    assert error(stepwise[1:], cached_logits(model, long, 45)) < TOLERANCE


@cell
def test_packed_equals_separate(model):
    documents = [tokens(1, length, seed=length) for length in (40, 14, 10)]
    position_ids = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    packed = logits(model, torch.cat(documents, 1), position_ids=position_ids)
    separate = torch.cat([logits(model, document) for document in documents], 1)
    assert error(packed, separate) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_eager_and_sdpa_agree(family, name):
    for length in LENGTHS:
        ids = tokens(2, length)
        sdpa, eager = (logits(model_of(family, name, backend), ids) for backend in BACKENDS)
        assert error(sdpa, eager) < TOLERANCE


@pytest.mark.parametrize("name", PINNED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pinned_length_is_the_regime_of_that_length(family, name):
    """A short prompt under `expected_length` is encoded as the beginning of a document of that length is."""
    ids = tokens(1, 64)
    unpinned = model_of(family, name.split(" ")[0], "sdpa")
    pinned = model_of(family, name, "sdpa")
    assert error(logits(pinned, ids[:, :20]), logits(unpinned, ids)[:, :20]) < TOLERANCE
    assert error(logits(pinned, ids[:, :20]), logits(unpinned, ids[:, :20])) > 100 * TOLERANCE
