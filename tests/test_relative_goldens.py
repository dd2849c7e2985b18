"""Shaw, Transformer-XL and CoPE: against the numbers of their authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pe_patch import SCHEMES, PePatchError, Positions
from pe_patch.schemes.relative import _pick

from .goldens import load
from .test_distance_bias import along, golden, shape
from .test_relative import core


def doubles(case: dict[str, Any], *names: str) -> list[Tensor]:
    return [torch.tensor(case[name], dtype=torch.float64) for name in names]


@pytest.mark.parametrize("causal", [True, False])
def test_shaw_is_the_authors(causal):
    """Their logits are not scaled."""
    case = golden("shaw/clip2_n5")
    q, k, v, of_key, of_value = doubles(case, "q", "k", "v", "table_k", "table_v")
    scheme: Any = SCHEMES["shaw"](shape(num_heads=2, num_key_value_heads=2, head_dim=4), max_distance=2).double()
    scheme.keys.data, scheme.values.data = of_key, of_value
    which = "causal" if causal else "full"
    output, weights = doubles(case, f"out_{which}", f"weights_{which}")
    for backend in ("eager", "sdpa"):
        found = scheme.attend(q, k, v, along(5), core(backend, scaling=1.0, causal=causal, groups=1))
        torch.testing.assert_close(found[0].transpose(1, 2), output, rtol=0, atol=2e-5)
        if backend == "eager":
            torch.testing.assert_close(found[1], weights, rtol=0, atol=2e-5)


def test_shaw_without_values_has_one_table():
    scheme = SCHEMES["shaw"](shape(), values=False)
    assert [name for name, _ in scheme.named_parameters()] == ["keys"]


def test_transformer_xls_shift_is_a_choice_by_distance():
    """Their shifted matrix, as far as it is not garbage that they mask."""
    case = golden("txl/rel_shift_3x5")
    (given, expected) = doubles(case, "input", "output")
    distance = torch.arange(2, 5)[:, None] - torch.arange(5)
    found = _pick(given.flip(1)[None, None], distance.clamp(min=0)[None, None])[0, 0]
    torch.testing.assert_close(found[distance >= 0], expected[distance >= 0])


def test_transformer_xl_is_the_authors():
    """A layer of theirs with a memory of two tokens, from its input to its output."""
    case = golden("txl/mem2")
    w, mems, qkv, u, v = doubles(case, "w", "mems", "qkv_weight", "u", "v")
    r, o, table, scores, output = doubles(case, "r_weight", "o_weight", "pos_emb", "scores", "out")
    scheme: Any = SCHEMES["transformer_xl"](
        shape(hidden_size=6, num_heads=2, num_key_value_heads=2, head_dim=3, num_layers=2)
    ).double()
    scheme.u.data, scheme.v.data, scheme.projection.data = u, v, torch.stack((torch.zeros_like(r), r))
    torch.testing.assert_close(scheme.sinusoids(6, w.device).flip(0).double(), table, rtol=0, atol=2e-5)
    parts = (torch.cat((mems, w)) @ qkv.T).view(1, 6, 3, 2, 3).permute(2, 0, 3, 1, 4)
    at = torch.arange(6)[None]
    mask = (at[0, 2:, None] >= at)[None, None]
    for backend in ("eager", "sdpa"):
        layer = core(backend, mask, scaling=3**-0.5, groups=1)
        found, weights = scheme.attend(parts[0][:, :, 2:], parts[1], parts[2], Positions(at[:, 2:], at), layer)
        if weights is not None:
            expected = scores.permute(2, 0, 1).masked_fill(~mask[0], -torch.inf).softmax(-1)
            torch.testing.assert_close(weights[0], expected, rtol=0, atol=2e-5)
        made = torch.nn.functional.layer_norm(w + found.reshape(4, 6) @ o.T, (6,))
        torch.testing.assert_close(made, output, rtol=0, atol=2e-5)


@pytest.mark.parametrize("key", sorted(load("cope_contextual/")))
def test_cope_is_the_authors(key):
    """In their variant `nodiv` the position's share is not scaled: it is a table twice as large at heads of four."""
    case = golden(key)
    q, k, v, table, weights, output = doubles(case, "q", "k", "v", "pos_emb", "attn", "out")
    scheme: Any = SCHEMES["cope"](shape(num_heads=1, num_key_value_heads=1, head_dim=4), max_positions=7).double()
    scheme.table.data = table[0] * (2 if case["params"].get("cope_nodiv") else 1)
    for backend in ("eager", "sdpa"):
        found = scheme.attend(q[None], k[None], v[None], along(6), core(backend, scaling=0.5, groups=1))
        torch.testing.assert_close(found[0][0].transpose(0, 1), output, rtol=0, atol=2e-5)
        if backend == "eager":
            torch.testing.assert_close(found[1][0], weights, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("t5", {"num_buckets": 2}, "num_buckets must be a whole number of at least 4"),
        ("t5", {"max_distance": 8}, "max_distance must be a whole number of at least 32"),
        ("kerple", {"kind": "logs"}, "Did you mean 'log'"),
        ("sandwich", {"dim": 7}, "dim must be an even number"),
        ("fire", {"width": 0}, "width=0"),
        ("fire", {"threshold": 0}, "threshold must be a finite number above 0"),
        ("shaw", {"max_distance": None}, "must be a number of tokens"),
        ("shaw", {"values": 1}, "give True or False"),
        ("transformer_xl", {"clamp_length": 0}, "clamp_length=0"),
        ("cope", {"max_positions": 1}, "at least 2"),
        ("cope", {"max_position": 8}, "Did you mean 'max_positions'"),
    ],
)
def test_options_are_checked(name, options, said):
    with pytest.raises(PePatchError, match=said):
        SCHEMES[name](shape(), **options)
