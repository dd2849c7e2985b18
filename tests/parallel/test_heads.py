"""A scheme on some of the heads does to them what it does to them among all."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pe_patch.attention.interface import BACKENDS, Engine
from pe_patch.core.head_slices import Heads, slice_heads
from pe_patch.core.positions import Positions
from pe_patch.core.scheme import AttentionShape, DistanceBias
from pe_patch.errors import UnsupportedError
from pe_patch.schemes.bias import ALiBi
from pe_patch.schemes.registry import SCHEMES

HEADS, KEY_HEADS, WIDTH, LENGTH = 8, 4, 16, 24
SHAPE = AttentionShape(
    hidden_size=32, num_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=WIDTH, rotary_dim=WIDTH, rotary_start=0,
    rope_theta=10000.0, trained_length=12, num_layers=2, grid=(4, 6),
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0}, "linear": {"factor": 4.0}, "ntk": {"factor": 4.0}, "ntk_by_parts": {"factor": 4.0},
    "dynamic_yarn": {}, "llama3": {"factor": 4.0}, "longrope": {"long_factor": [2.0] * 8},
    "proportional": {"partial_rotary_factor": 0.5}, "clipped_rope": {"dims": 4},
    "self_extend": {"group": 3, "window": 4}, "rerope": {"window": 4}, "leaky_rerope": {"window": 4},
    "rope_2d": {"mode": "mixed"},
}  # fmt: skip
ABLE = sorted(set(SCHEMES) - {"mla"})


def inputs(key_heads: int = KEY_HEADS) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, heads, LENGTH, WIDTH) for heads in (HEADS, key_heads, key_heads)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def build(name: str) -> Any:
    torch.manual_seed(1)
    scheme = SCHEMES[name](SHAPE, **OPTIONS.get(name, {}))
    with torch.no_grad():
        for parameter in scheme.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return scheme


def attention(scheme: Any, sides: list[torch.Tensor], backend: str, heads: Heads | None) -> torch.Tensor:
    """Attention of `sides` under the scheme, which are all heads or those of `heads`."""
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = sides[0].shape[1] // sides[1].shape[1], True
    module.__dict__["pe_layer"] = 1
    at = torch.arange(LENGTH)[None]
    positions = Positions(at, at, LENGTH if scheme.length_dependent else None)
    grid = hasattr(scheme, "lay_out")
    prepared = scheme.lay_out(4, 6, at.device) if grid else scheme.prepare(positions)
    extra = {"is_causal": False} if grid else {}
    core = Engine(module, None, WIDTH**-0.5, 0.0, BACKENDS[backend], extra, heads)
    acting = scheme.scorer or scheme
    return acting("attend", *sides, positions._replace(prepared=prepared), core)[0]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_parts_make_the_whole(name, backend, processes):
    scheme = build(name)
    key_heads = HEADS if hasattr(scheme, "lay_out") else KEY_HEADS  # towers have as many
    sides = inputs(key_heads)
    wanted = attention(scheme, sides, backend, None)
    above = torch.randn_like(wanted)
    learned = [*sides, *scheme.parameters()]
    gradients = torch.autograd.grad(wanted, learned, above, allow_unused=True)
    outputs = []
    for rank in range(processes):
        query = sides[0].chunk(processes, 1)[rank]
        # Where there are more processes than key heads, several get the same one.
        repeats = max(1, processes // key_heads)
        keys, values = (side.repeat_interleave(repeats, 1).chunk(processes, 1)[rank] for side in sides[1:])
        count = HEADS // processes
        heads = Heads(rank * count, (rank + 1) * count, keys.shape[1])
        outputs.append(attention(scheme, [query, keys, values], backend, heads))
    got = torch.cat(outputs, 2)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)
    for one, two in zip(torch.autograd.grad(got, learned, above, allow_unused=True), gradients, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["alibi", "sandwich", "kerple", "t5", "rope_alibi"])
def test_heads_differ(name):
    """What the slices are for: another range of heads, another result."""
    scheme, sides = build(name), inputs()
    same = [side[:, :2] for side in sides]
    first, second = (attention(scheme, same, "sdpa", Heads(start, start + 2, 2)) for start in (0, 4))
    assert (first - second).abs().max() > 1e-3


def test_what_does_not_say_what_is_per_head_is_refused():
    class Undeclared(DistanceBias):
        name = "undeclared"

        def score_bias(self, distance, head):
            return -distance.abs() * (head + 1.0)

    class Changed(ALiBi):
        name = "changed"

        def score_bias(self, distance, head):
            return -distance.abs() * (head + 1.0)

    for cls in (Undeclared, Changed):
        with pytest.raises(UnsupportedError, match="head_sharded_attributes"):
            slice_heads(cls(SHAPE), Heads(0, 2, 2))
    with pytest.raises(UnsupportedError, match="head_sharded_attributes"):
        slice_heads(SCHEMES["mla"](replace(SHAPE, latent_rank=8)), Heads(0, 2, 2))


def test_a_size_that_heads_do_not_share_equally_is_refused():
    scheme = build("alibi")
    scheme.head_sharded_attributes = {"odd": 0}
    scheme.odd = nn.Parameter(torch.zeros(HEADS + 1))
    with pytest.raises(UnsupportedError, match="share equally"):
        slice_heads(scheme, Heads(0, 2, 2))


def test_an_unknown_split_is_refused():
    from pe_patch.attention.parallel import local_heads

    module: Any = nn.Module()
    half = torch.zeros(1, HEADS // 2, 3, WIDTH)
    with pytest.raises(UnsupportedError, match="nothing says which"):
        local_heads(module, half, half, build("alibi"), None)
    with torch.no_grad():
        assert local_heads(module, half, half, build("yarn"), None) is None
        assert local_heads(module, half, half, build("shaw"), None) is None
    with pytest.raises(UnsupportedError, match="nothing says which"):  # its gradients would be of half of the heads
        local_heads(module, half, half, build("shaw"), None)


def test_heads_that_are_not_shared_equally_are_refused():
    from pe_patch.attention.parallel import local_heads

    sequence: Any = SimpleNamespace(rank=0, size=3)
    part_of = torch.zeros(1, 3, 3, WIDTH)
    with pytest.raises(UnsupportedError, match="shared equally"):
        local_heads(nn.Module(), part_of, part_of, build("alibi"), sequence)
