"""ALiBi, sinusoids, learned tables: against the authors' numbers and float64 formulas from the papers."""

from __future__ import annotations

import math

import pytest
import torch

from pe_patch import SCHEMES, AttentionShape, PePatchError, Positions
from pe_patch.schemes.bias import LIMBS

from .goldens import load

SHAPE = AttentionShape(
    hidden_size=64, num_heads=8, num_key_value_heads=8, head_dim=8, rotary_dim=8, rotary_start=0, rope_theta=10000.0,
    trained_length=32, num_layers=2,
)  # fmt: skip


def golden(key):
    return load(key)[key]


def shape(**changes):
    return AttentionShape(**{**SHAPE.__dict__, **changes})


@pytest.mark.parametrize("heads", [1, 3, 6, 8, 16, 32, 71])
def test_slopes_are_the_authors(heads):
    expected = golden(f"alibi/slopes/heads{heads}")
    ours = SCHEMES["alibi"](shape(num_heads=heads)).head_slopes
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), torch.tensor(expected["slopes"]).double())
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected["slopes_hf_bloom_f32"]), rtol=1e-6, atol=0)


def test_bias_is_that_of_gpt_neox():
    """The published matrix: minus the slope times the distance, below the diagonal."""
    expected = torch.tensor(golden("alibi/gpt_neox_matrix")["value"], dtype=torch.float64).reshape(4, 5, 5)
    scheme = SCHEMES["alibi"](shape(num_heads=4))
    place = torch.arange(5)
    ours = scheme.score_bias(place[:, None] - place[None, :], torch.arange(4)[:, None, None]).double()
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    constant = (ours - expected).masked_fill(~lower, 0)[..., :1]  # a constant for each row means nothing to the softmax
    torch.testing.assert_close(ours.masked_fill(~lower, 0), (expected + constant).masked_fill(~lower, 0))


def test_dense_bias_is_blooms():
    """By the key's rank among the real tokens of its row."""
    case = golden("alibi/bloom_key_side")
    mask = torch.tensor(case["params"]["attention_mask"])
    expected = torch.tensor(case["value"]).reshape(2, 3, 1, 5)
    rank = (mask.cumsum(-1) - 1) * mask
    ours = SCHEMES["alibi"](shape(num_heads=3)).bias(
        torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 8), Positions(rank, rank)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", sorted(LIMBS, key=str))
@pytest.mark.parametrize("heads, scaling", [(8, 64**-0.5), (6, 128**-0.5), (71, 1.0)])
def test_widened_heads_are_exact(dtype, heads, scaling):
    """Products of the extra dimensions, summed in float64, give slope x distance over 100,000 positions."""
    scheme = SCHEMES["alibi"](shape(num_heads=heads))
    length = 100_000
    at_key = torch.cat((torch.arange(0, length, 997), torch.arange(length - 300, length)))[None]
    at_query = at_key[:, ::7]
    of_query, of_key = scheme.bias_as_head_dims(Positions(at_query, at_key), scaling, dtype)
    assert of_query.dtype == dtype and of_query.shape[-1] == of_key.shape[-1] and of_query.shape[-1] % 8 == 0
    ours = torch.einsum("bhqe,bxke->bhqk", of_query.double(), of_key.double()) * scaling
    power = 2 ** math.floor(math.log2(heads))
    slopes = torch.tensor([2.0 ** (-8 * t / power) for t in range(1, power + 1)], dtype=torch.float64)
    distance = (at_query[0, :, None] - at_key[0, None, :]).double()
    expected = -slopes[:, None, None] * distance
    near = distance.abs() < 20 / slopes[:, None, None]  # farther keys carry no weight
    ours = ours[0, : len(slopes)]
    error = (ours - expected).abs()
    assert (
        float(error[near].max())
        < {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}[dtype]
    )


def test_bad_slopes():
    for slopes in ([1.0], [0.0] * 8, [-1.0] * 8):
        with pytest.raises(PePatchError, match="8 positive numbers"):
            SCHEMES["alibi"](SHAPE, slopes=slopes)


@pytest.mark.parametrize(
    "layout, key",
    [("interleaved", "sinusoidal/interleaved_paper"), ("tensor2tensor", "sinusoidal/tensor2tensor_concat")],
)
def test_sinusoids_are_the_authors(layout, key):
    case = golden(key)
    expected = torch.tensor(case["value"])
    scheme = SCHEMES["sinusoidal"](shape(hidden_size=8), layout=layout)
    positions = torch.tensor(case["params"].get("positions", list(range(expected.shape[-2]))))
    ours = scheme.embed(torch.zeros(1, len(positions), 8), positions[None])[0]
    torch.testing.assert_close(ours, expected.reshape(ours.shape), rtol=0, atol=2e-5)


def test_concatenated_sinusoids_follow_the_paper():
    """All sines, then all cosines, at the paper's exponents."""
    scheme = SCHEMES["sinusoidal"](shape(hidden_size=6), layout="concat")
    positions = [0, 1, 7, 300]
    ours = scheme.embed(torch.zeros(1, 4, 6), torch.tensor([positions]))[0]
    for row, position in enumerate(positions):
        for k in range(3):
            angle = position / 10000 ** (2 * k / 6)
            assert ours[row, k].item() == pytest.approx(math.sin(angle), abs=2e-5)
            assert ours[row, 3 + k].item() == pytest.approx(math.cos(angle), abs=2e-5)


def test_layout_is_checked():
    with pytest.raises(PePatchError, match="Did you mean 'interleaved'"):
        SCHEMES["sinusoidal"](SHAPE, layout="interleave")


def test_hierarchical_extension_is_the_authors():
    case = golden("learned_abs/hierarchical_alpha0.4")
    table = torch.tensor(case["embeddings"])
    expected = torch.tensor(case["value"])
    scheme = SCHEMES["learned"](shape(hidden_size=table.shape[1]), max_positions=len(expected), extend="hierarchical")
    scheme.init_from_table(table)
    torch.testing.assert_close(scheme.table.detach(), expected.float(), rtol=0, atol=2e-5)
    assert torch.equal(scheme.table[: len(table)].detach(), table)


def test_interpolated_extension_keeps_both_ends():
    table = torch.randn(5, 3, dtype=torch.float64)
    scheme = SCHEMES["learned"](shape(hidden_size=3), max_positions=9, extend="interpolate")
    scheme.init_from_table(table)
    for row in range(9):
        place = row * 4 / 8
        low = min(int(place), 3)
        expected = table[low] * (1 - (place - low)) + table[low + 1] * (place - low)
        torch.testing.assert_close(scheme.table[row].detach(), expected)


def test_learned_positions_are_checked():
    with pytest.raises(PePatchError, match="max_positions"):
        SCHEMES["learned"](shape(trained_length=0))
    with pytest.raises(PePatchError, match=r"0\.5"):
        SCHEMES["learned"](SHAPE, alpha=0.5)
    scheme = SCHEMES["learned"](SHAPE, max_positions=64)
    with pytest.raises(PePatchError, match="extend="):
        scheme.init_from_table(torch.zeros(32, 64))
