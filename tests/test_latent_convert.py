"""Conversions to latent attention: nothing lost where nothing has to be."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pe_patch import PePatchError
from pe_patch.core.projections import Latents, Projections
from pe_patch.mla.checks import check_freqfold
from pe_patch.mla.convert import convert_layer, full_rank, truncated
from pe_patch.mla.statistics import gather

from .latent_oracle import inverse_frequencies, over_latents, projected, trained
from .latent_shapes import HIDDEN, SHAPES, attention, converted, inputs, norm, options, output_of

MANY = pytest.mark.parametrize("name", SHAPES)
METHODS = pytest.mark.parametrize("method", ["transmla", "svd", "mha2mla", "split"])


@MANY
@pytest.mark.parametrize("method", ["transmla", "svd", "mha2mla"])
def test_nothing_is_lost_with_all_rotation_at_full_rank(name, method):
    of, seen = attention(name), inputs()[:30]
    found = converted(of, gather(of, inputs()), **options(method, of, everything=True))
    assert found.nope == of.head_dim - of.rotary_dim
    expected = trained(of, seen, output_of(of))
    torch.testing.assert_close(over_latents(of, found, seen, output_of(of)), expected, rtol=0, atol=1e-10)


@MANY
@pytest.mark.parametrize("svd", ["joint", "split"])
@pytest.mark.parametrize("select", ["2-norm", "high", "low", "uniform"])
def test_full_rank_with_own_rotary_keys_loses_some_rotation_only(name, svd, select):
    of, seen = attention(name), inputs()[:30]
    given = {"method": "mha2mla", "rope_dim": of.rotary_dim // 2, "select": select, "svd": svd}
    found = converted(of, gather(of, inputs()), **given)
    assert found.split == (svd == "split")
    keeps = torch.zeros(of.kv_heads, of.rotary_dim // 2, dtype=torch.float64).scatter(1, found.frequency, 1.0)
    assert keeps.sum(1).eq(of.rotary_dim // 4).all()
    expected = trained(of, seen, output_of(of), keeps)
    torch.testing.assert_close(over_latents(of, found, seen, output_of(of)), expected, rtol=0, atol=1e-10)


def partly_turned(of: Projections, calibration: Tensor, hidden: Tensor, kept: int, fold: int, step: int) -> Tensor:
    """Keys as complex numbers: those in the span of a group's `kept` principal axes turn, the others do not."""
    query, key, value = projected(of, hidden)
    first, second = of.pairs.T
    _, known, _ = projected(of, calibration)
    known = torch.complex(known[..., first], known[..., second]).unflatten(2, (-1, fold)).transpose(1, 2).flatten(2)
    moments = torch.einsum("tgi,tgj->gij", known, known.conj()).real
    axes = torch.linalg.eigh(moments).eigenvectors.flip(-1)  # [groups, kv_heads * fold, axes]
    pairs = torch.complex(key[..., first], key[..., second]).unflatten(2, (-1, fold)).transpose(1, 2).flatten(2)
    along = torch.einsum("tgi,gia->tga", pairs, axes.to(pairs.dtype))
    place = torch.arange(axes.shape[-1])
    number = torch.arange(axes.shape[0])[:, None] * fold + place * step % fold
    frequency = inverse_frequencies(of.rotary_dim)[number] * (place < kept)  # [groups, axes]
    angle = torch.arange(len(hidden), dtype=torch.float64)[:, None, None] * frequency
    at = torch.polar(torch.ones_like(angle), angle)
    scores = []
    for head in range(of.heads):
        own = torch.complex(query[:, head, first], query[:, head, second]).unflatten(1, (-1, fold))
        mine = axes.unflatten(1, (of.kv_heads, fold))[:, head // of.group].to(own.dtype)  # [groups, fold, axes]
        asked = torch.einsum("tgf,gfa->tga", own, mine) * at
        rest = query[:, head, of.rotary_dim :] @ key[:, head // of.group, of.rotary_dim :].T
        scores.append(torch.einsum("qga,kga->qk", asked, (along * at).conj()).real + rest)
    length = len(hidden)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    seen = (torch.stack(scores) * of.head_dim**-0.5).masked_fill(mask, -torch.inf).softmax(-1)
    mixture = torch.einsum("hqk,khd->qhd", seen, value.repeat_interleave(of.group, 1))
    return mixture.flatten(1) @ output_of(of).T


@MANY
@pytest.mark.parametrize("method", ["transmla", "svd"])
@pytest.mark.parametrize("share", ["half", "half, folded", "one", "two"])
def test_full_rank_with_one_rotary_key_loses_some_rotation_only(name, method, share):
    of, seen, pairs = attention(name), inputs()[:20], attention(name).rotary_dim // 2
    if share == "two" and of.kv_heads < 2:
        return
    multiple, fold = {"half": (0, 2), "half, folded": (0, pairs), "one": (1, 1), "two": (2, 1)}[share]
    rope_dim = of.rotary_dim * multiple or of.rotary_dim // 2
    given = {"method": method, "rope_dim": rope_dim, "freqfold": fold if "folded" in share else None}
    found = converted(of, gather(of, inputs()), **given)
    assert (found.rope_heads, found.rope) == (1, rope_dim)
    assert found.nope == of.head_dim - (rope_dim if of.kv_heads == 1 else of.rotary_dim * (multiple == of.kv_heads))
    expected = partly_turned(
        of, inputs(), seen, kept=multiple * fold or fold // 2, fold=fold, step=1 if multiple else 2
    )
    torch.testing.assert_close(over_latents(of, found, seen, output_of(of)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@METHODS
def test_low_precision_is_computed_in_single(dtype, method):
    of, seen = attention("norms"), inputs()[:20]
    low = replace(of, **{name: getattr(of, name).to(dtype) for name in ("query", "key", "value")})
    low = replace(low, query_norm=norm(of.head_dim, 20).to(dtype), key_norm=norm(of.head_dim, 21).to(dtype))
    statistics = gather(low, inputs().to(dtype))
    assert statistics.moment.dtype == statistics.pair_norms.dtype == torch.float32
    found = converted(low, statistics, **options(method, of, everything=True))
    tensors = [getattr(found, field.name) for field in fields(Latents)]
    assert {t.dtype for t in tensors if isinstance(t, Tensor)} == {torch.float32, torch.int64}
    if method != "split":
        exact = replace(low, **{name: getattr(low, name).double() for name in ("query", "key", "value")})
        exact = replace(exact, query_norm=low.query_norm.double(), key_norm=low.key_norm.double())
        wide = replace(
            found,
            **{
                f.name: t.double()
                for f, t in zip(fields(Latents), tensors, strict=True)
                if isinstance(t, Tensor) and t.is_floating_point()
            },
        )
        expected = trained(exact, seen, output_of(of))
        torch.testing.assert_close(over_latents(exact, wide, seen, output_of(of)), expected, rtol=0, atol=1e-4)


@METHODS
def test_a_conversion_is_the_same_every_time(method):
    of = attention("grouped")
    one, other = (converted(of, gather(of, inputs()), 12, **options(method, of, False)) for _ in range(2))
    assert all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in "query down rope_key up_key up_value".split()
    )


@pytest.mark.parametrize("method", ["transmla", "svd"])
@pytest.mark.parametrize("name", ["wide", "multi-head"])
def test_few_tokens_take_nothing_from_full_rank(name, method):
    """Directions that no calibration token has taken are still those that weights can make."""
    of, seen = attention(name), inputs(20, seed=6)
    assert full_rank(of, method, of.rotary_dim) == HIDDEN
    few = gather(of, inputs(9))
    found = converted(of, few, method=method, rope_dim=of.rotary_dim)
    expected = partly_turned(of, inputs(9), seen, 1, 1, 1)
    torch.testing.assert_close(over_latents(of, found, seen, output_of(of)), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"method": "transmlb"}, "Did you mean 'transmla'.* Use one of 'transmla', 'svd', 'mha2mla'"),
        ({"kv_rank": 0}, "rank of 0; give a whole number from 1 to 28, which is the full rank at rope_dim=4"),
        ({"kv_rank": 29}, "from 1 to 28"),
        ({"kv_rank": True}, "a whole number from 1"),
        ({"method": "mha2mla", "kv_rank": 25}, "from 1 to 24"),
        (
            {"rope_dim": 6},
            "can have 2, 4, or a multiple of 8 up to 16 dims, since the rotary width of the trained heads is 8",
        ),
        ({"rope_dim": 24}, "up to 16"),
        ({"method": "svd", "rope_dim": 0}, "'svd' got rope_dim=0"),
        ({"method": "mha2mla", "rope_dim": 3}, "even number of dims for each key-value head, from 2 to 8"),
        ({"method": "mha2mla", "rope_dim": 10}, "from 2 to 8"),
        ({"method": "mha2mla", "rope_dim": 0}, "from 2 to 8"),
        ({"freqfold": 1}, "freqfold=1; at rope_dim=4 it can be one of 2, 4, or None for 2"),
        ({"freqfold": 3}, "one of 2, 4"),
        ({"balance_kv_ratio": 0}, "balance_kv_ratio=0; give a finite number above 0"),
        ({"balance_kv_ratio": float("inf")}, "give a finite number above 0"),
        ({"select": "high"}, "'transmla' has no use for select='high'; it is an option of 'mha2mla'. Leave it out"),
        ({"method": "mha2mla", "select": "hihg"}, "Did you mean 'high'"),
        ({"svd": "split"}, "option of 'mha2mla'"),
        ({"method": "mha2mla", "svd": "both"}, "svd='both' does not exist. Use one of 'joint', 'split'"),
        ({"method": "mha2mla", "svd": "split", "rope_dim": 8}, "none are left for a latent of keys; use svd='joint'"),
        ({"method": "mha2mla", "freqfold": 2}, "option of 'transmla' and 'svd'"),
        ({"method": "svd", "balance_kv_ratio": 2.0}, "option of 'transmla'"),
        (
            {"method": "mha2mla", "svd": "split", "latent_norm": True},
            "adds one norm, and svd='split' makes two latents",
        ),
        ({"statistics": None}, "'transmla' needs the statistics"),
        ({"statistics": None, "method": "mha2mla"}, "select='2-norm' needs the statistics"),
        ({"statistics": None, "method": "mha2mla", "select": "low", "latent_norm": True}, "latent_norm=True needs"),
        ({"statistics": "empty"}, "cover no tokens"),
    ],
)
def test_what_cannot_be_is_said(given, said):
    of = attention("interleaved")
    base: dict[str, Any] = {"method": "transmla", "kv_rank": 8, "rope_dim": 4, "statistics": gather(of, inputs(9))}
    if given.get("statistics") == "empty":
        given = {"statistics": gather(of, inputs(0))}
    base.update(given)
    with pytest.raises(PePatchError, match=said):
        convert_layer(of, base.pop("statistics"), **base)


def test_a_cut_needs_a_smaller_rank_and_the_statistics_of_a_norm():
    of = attention("interleaved")
    found = converted(of, gather(of, inputs(9)), 8, method="svd", rope_dim=4, latent_norm=True)
    with pytest.raises(PePatchError, match="from 1 to 8"):
        truncated(found, 9)
    with pytest.raises(PePatchError, match="give their statistics"):
        truncated(found, 4)


@pytest.mark.parametrize(
    "rotary_dim, rope_dim, fold",
    [(128, 64, 4), (128, 128, 4), (64, 64, 2), (64, 16, 4), (256, 64, 8), (128, 256, 1), (24, 12, 2), (96, 96, 3)],
)
def test_frequencies_are_folded_by_a_sixteenth_of_them(rotary_dim, rope_dim, fold):
    """Or by as much as the width of the rotary key asks for."""
    empty = torch.empty(2 * rotary_dim, 0)
    of = Projections(empty, empty, empty, None, None, None, 2, 2, rotary_dim, rotary_dim)
    assert check_freqfold(of, "transmla", rope_dim, None) == fold


def test_one_key_has_no_multiples_of_its_width():
    of = attention("one key")
    with pytest.raises(PePatchError, match="can have 2, 4, or 8 dims"):
        full_rank(of, "svd", 16)


def test_weights_alone_need_no_tokens():
    of = attention("multi-head")
    found = converted(of, None, 8, method="mha2mla", rope_dim=4, select="uniform")
    assert found.frequency.tolist() == [[0, 3]] * 4
