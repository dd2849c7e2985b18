"""What calibration tells, and which directions are cached for it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from pe_patch.core.projections import Latents, Projections, Statistics
from pe_patch.mla.convert import convert_layer, full_rank, truncated
from pe_patch.mla.low_rank import balance_of, weights
from pe_patch.mla.rotary_keys import principal, shared_rotary_key
from pe_patch.mla.statistics import SLICE, gather

from .latent_oracle import projected
from .latent_shapes import HIDDEN, SHAPES, attention, converted, inputs, norm, options, random

MANY = pytest.mark.parametrize("name", SHAPES)
METHODS = pytest.mark.parametrize("method", ["transmla", "svd", "mha2mla", "split"])


@MANY
def test_statistics_are_sums_over_all_tokens(name):
    of, hidden = attention(name), inputs(70)
    query, key, _ = projected(of, hidden)
    plain = key.flatten(1) - (0 if of.key_bias is None else of.key_bias)
    z = torch.cat((plain, hidden @ of.value.T), 1)
    first, second = of.pairs.T
    norms = [
        torch.hypot(part[..., first], part[..., second]).sum(0) for part in (query, key.repeat_interleave(of.group, 1))
    ]
    found = gather(of, hidden[60:], gather(of, hidden[:60]))
    assert found.tokens == 70
    for mine, expected in (
        (found.moment, z.T @ z),
        (found.key_moment, key.flatten(1).T @ key.flatten(1)),
        (found.pair_norms, torch.stack(norms)),
    ):
        torch.testing.assert_close(mine, expected)


def test_statistics_are_the_same_whatever_the_slices():
    of, hidden = attention("norms"), inputs(2 * SLICE + 3)
    whole, pieces = gather(of, hidden), None
    for part in hidden.split(700):
        pieces = gather(of, part, pieces)
    for field in fields(Statistics):
        torch.testing.assert_close(getattr(whole, field.name), getattr(pieces, field.name))


def lost(of: Projections, statistics: Statistics, found: Latents, balance: float = 1.0) -> float:
    """Mean square that the latents lose of calibration's key dims without position (over `balance`) and values."""
    width = of.kv_heads * of.head_dim
    whole = convert_layer(
        of, statistics, method="transmla", kv_rank=full_rank(of, "transmla", found.rope), rope_dim=found.rope
    )
    makes = []
    for latents in (whole, found):
        key = (latents.up_key @ latents.down).flatten(0, 1) / balance
        makes.append(torch.cat((key, (latents.up_value @ latents.down).flatten(0, 1))))
    gone = makes[0] - makes[1]
    assert gone.shape == (of.kv_heads * found.nope + width, 2 * width)
    return float(((gone @ statistics.moment) * gone).sum() / statistics.tokens)


@pytest.mark.parametrize("name", ["multi-head", "grouped", "partial, biases", "norms"])
def test_more_rank_loses_less_and_activations_beat_weights(name):
    of = attention(name)
    statistics = gather(of, inputs())
    keys = shared_rotary_key(of, statistics, of.rotary_dim // 2, 2)
    balance = balance_of(of, keys, statistics, 1.0)
    most = full_rank(of, "transmla", of.rotary_dim // 2)
    before = float("inf")
    for rank in (1, most // 8, most // 4, most // 2, most - 1):
        by_tokens, by_weights = (
            lost(of, statistics, converted(of, statistics, rank, **options(method, of, False)), balance)
            for method in ("transmla", "svd")
        )
        assert by_tokens < 0.999 * by_weights
        assert by_tokens < before
        before = by_tokens
    assert before > 1e-9
    assert lost(of, statistics, converted(of, statistics, **options("transmla", of, False)), balance) < 1e-12


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_the_balance_decides_who_gets_the_rank(ratio):
    """Values lose less the smaller keys count, and keys without position have the mean norm that was asked for."""
    of = attention("multi-head")
    statistics = gather(of, inputs())
    keys = shared_rotary_key(of, statistics, 6, 2)
    balance = balance_of(of, keys, statistics, ratio)
    _, key, value = projected(of, inputs())
    rest = (key.flatten(1) @ keys.rest.T / balance).norm(dim=0).mean()
    torch.testing.assert_close(rest, ratio * value.flatten(1)[:, 6:].norm(dim=0).mean())


def errors_of_value(ratio: float) -> float:
    of = attention("multi-head")
    found = convert_layer(of, gather(of, inputs()), method="transmla", kv_rank=16, rope_dim=6, balance_kv_ratio=ratio)
    value = torch.cat((torch.zeros(48, 48), torch.eye(48)), 1).double()
    gone = value - (found.up_value @ found.down).flatten(0, 1)
    return float(((gone @ gather(of, inputs()).moment) * gone).sum())


def test_a_smaller_ratio_favours_values():
    assert errors_of_value(0.25) < errors_of_value(1.0) < errors_of_value(4.0)


@MANY
@METHODS
@pytest.mark.parametrize("latent_norm", [False, True])
def test_a_smaller_rank_is_a_part_of_a_larger(name, method, latent_norm):
    of = attention(name)
    statistics = gather(of, inputs())
    if latent_norm and method == "split":
        return
    given = {**options(method, of, everything=False), "latent_norm": latent_norm}
    whole = converted(of, statistics, **given)
    for rank in (1, 5, 8):
        one, other = truncated(whole, rank, statistics), converted(of, statistics, rank, **given)
        for field in fields(Latents):
            mine, expected = getattr(one, field.name), getattr(other, field.name)
            if isinstance(mine, Tensor):
                torch.testing.assert_close(mine, expected, rtol=0, atol=0)
            else:
                assert mine == expected


def test_the_sign_of_a_direction_is_not_left_to_chance():
    half = torch.linalg.qr(random(12, 12)).Q[:, :5]
    for axes in (principal(random(3, 12, 12)), principal(random(12, 12), half)):
        assert (axes.gather(-2, axes.abs().argmax(-2, keepdim=True)) > 0).all()
        torch.testing.assert_close(axes.mT @ axes, torch.eye(axes.shape[-1]).double().expand(*axes.shape[:-2], -1, -1))


@pytest.mark.parametrize("method", ["transmla", "svd", "mha2mla"])
def test_the_norm_undoes_itself_on_average(method):
    of = attention("grouped")
    statistics = gather(of, inputs())
    given = options(method, of, False)
    plain, normed = (converted(of, statistics, 12, **given, latent_norm=flag) for flag in (False, True))
    _, key, value = projected(of, inputs())
    latent = torch.cat((key.flatten(1), value.flatten(1)), 1) @ plain.down.T
    assert normed.norm is not None and normed.norm.shape == (12,)
    torch.testing.assert_close(normed.norm, latent.square().mean().sqrt().expand(12))
    after = nn.functional.rms_norm(latent, (12,)) * normed.norm
    torch.testing.assert_close(after.square().mean(), latent.square().mean())


def test_a_norm_whose_weight_is_an_offset_counts_the_same():
    class Offset(nn.Module):
        """RMS norm with 1 + weight, and a weight for each head."""

        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight - 1)

        def forward(self, heads: Tensor) -> Tensor:
            return heads * heads.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)

    of = attention("norms")
    own = norm(16, 21)
    key, _ = weights(replace(of, key_norm=own))
    other, _ = weights(replace(of, key_norm=Offset(own.weight.data.expand(2, 16))))
    torch.testing.assert_close(key, other, rtol=0, atol=1e-6)
    heads = of.key.view(2, 16, -1)
    expected = heads * own.weight.data[:, None] * 4 / heads.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(key.view(2, 16, -1), expected, rtol=0, atol=1e-6)
    white = random(20000, HIDDEN, seed=3)
    made = own((white @ of.key.T).view(-1, 2, 16)).square().mean(0)
    torch.testing.assert_close((key.view(2, 16, -1).square().sum(-1)), made, rtol=0.25, atol=0)
