"""Relative schemes through attention: against float64 formulas from the papers, forward and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pe_patch import SCHEMES, AttentionShape, Positions, UnsupportedError, patch_model
from pe_patch.attention.interface import BACKENDS, Engine

from . import oracles_relative as oracle
from .models import build, error, logits, put, tokens

SHAPE = AttentionShape(
    hidden_size=64, num_heads=4, num_key_value_heads=2, head_dim=16, rotary_dim=16, rotary_start=0, rope_theta=10000.0,
    trained_length=32, num_layers=2,
)  # fmt: skip
LENGTH = 300
"""More than the 256 queries that a chunk has."""

BIASES = ("t5", "kerple log", "kerple power", "sandwich", "fire")
CONTENT = ("shaw", "transformer_xl", "transformer_xl clamped", "cope")
OPTIONS: dict[str, dict[str, Any]] = {
    "kerple power": {"kind": "power"},
    "fire": {"threshold": 70},
    "shaw": {"max_distance": 9},
    "transformer_xl clamped": {"clamp_length": 40},
    "cope": {"max_positions": 12},
}
LAYER = 1
INPUTS = ("query", "key", "value")


def core(
    backend: str, mask: Tensor | None = None, scaling: float = 0.25, causal: bool = True, groups: int = 2
) -> Engine:
    """What a layer of grouped queries offers."""
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, causal
    module.__dict__["pe_layer"] = LAYER
    return Engine(module.eval(), mask, scaling, 0.0, BACKENDS[backend], {})


def filled(name: str) -> Any:
    """The scheme in float64 with content in its parameters."""
    scheme: Any = SCHEMES[name.split(" ")[0]](SHAPE, **OPTIONS.get(name, {})).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in scheme.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.startswith("kerple"):
            parameter.data = 0.1 + 0.5 * parameter.data.abs()
        elif name.startswith("transformer_xl"):
            parameter.data *= 0.3
    return scheme


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    heads = (SHAPE.num_heads, SHAPE.num_key_value_heads, SHAPE.num_key_value_heads)
    return [torch.randn(2, count, LENGTH, 16, generator=generator, dtype=torch.float64) for count in heads]


def expected(name: str, w: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[batch, heads, n, head]` by the papers."""
    k, v = (one.repeat_interleave(2, 1) for one in (k, v))
    if name == "shaw":
        return oracle.attention(*oracle.shaw(w, q, k, v, 9))
    if name.startswith("transformer_xl"):
        return oracle.attention(oracle.transformer_xl(w, q, k, LAYER, 40 if "clamped" in name else None), v)
    if name == "cope":
        return oracle.attention(oracle.cope(w, q, k), v)
    bias = {
        "t5": lambda: oracle.t5(w, LENGTH, 32, 128),
        "kerple log": lambda: oracle.kerple_log(w, LENGTH),
        "kerple power": lambda: oracle.kerple_power(w, LENGTH),
        "sandwich": lambda: oracle.sandwich(4, LENGTH, 128),
        "fire": lambda: oracle.fire(w, LENGTH, 70),
    }[name]()
    return oracle.attention(q @ k.transpose(2, 3) / 4 + bias, v)


ANSWERS: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}


def answer(name: str, probe: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradients of (output * probe).sum() by the papers, once for each scheme."""
    if name not in ANSWERS:
        w = {key: one.detach().clone().requires_grad_() for key, one in filled(name).named_parameters()}
        qkv = [one.requires_grad_() for one in inputs()]
        output = expected(name, w, *qkv)
        (output * probe).sum().backward()
        leaves = {**w, **dict(zip(INPUTS, qkv, strict=True))}
        ANSWERS[name] = output.detach(), {key: one.grad for key, one in leaves.items() if one.grad is not None}
    return ANSWERS[name]


@pytest.mark.parametrize("backend, dtype", [("eager", torch.float64), ("sdpa", torch.float32)])
@pytest.mark.parametrize("name", BIASES + CONTENT)
def test_attention_and_every_gradient_are_the_papers(name, backend, dtype):
    probe = torch.randn(2, 4, LENGTH, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    output, gradients = answer(name, probe)
    scheme = filled(name).to(dtype)
    qkv = [one.to(dtype).requires_grad_() for one in inputs()]
    at = torch.arange(LENGTH)[None]
    found = scheme.attend(*qkv, Positions(at, at), core(backend))[0].transpose(1, 2)
    (found * probe.to(dtype)).sum().backward()
    exact = dtype == torch.float64 and not name.startswith(("sandwich", "transformer_xl"))  # those have float32 angles
    tolerance = 1e-9 if exact else 3e-5
    leaves = {**dict(scheme.named_parameters()), **dict(zip(INPUTS, qkv, strict=True))}
    assert error(found.detach().double(), output) < tolerance
    assert gradients.keys() >= set(INPUTS) and gradients.keys() == leaves.keys()
    for key, gradient in gradients.items():
        if key == "bias_out":  # the same for all keys of a query, which a softmax does not see
            assert float(gradient.abs().max()) < 1e-9 and float(leaves[key].grad.abs().max()) < 1e-2
            continue
        worst = float((leaves[key].grad.double() - gradient).abs().max() / gradient.abs().max())
        assert float(gradient.abs().max()) > 1e-3 and worst < tolerance, (key, worst)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", BIASES + CONTENT)
def test_the_last_queries_alone_see_what_they_saw_together(name, backend):
    """As decoding does: few queries over all keys, at the positions of both."""
    probe = torch.randn(2, 4, LENGTH, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    output, _ = answer(name, probe)
    q, k, v = (one.float() for one in inputs())
    at = torch.arange(LENGTH)[None]
    mask = (at[0, -5:, None] >= at)[None, None]
    found = filled(name).float().attend(q[:, :, -5:], k, v, Positions(at[:, -5:], at), core(backend, mask))[0].detach()
    assert error(found.transpose(1, 2).double(), output[:, :, -5:]) < 3e-5


SHIFTED = ("t5", "kerple", "sandwich", "shaw", "transformer_xl", "cope")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", (*SHIFTED, "fire"))
def test_a_shift_of_all_positions(name, backend):
    """Nothing changes, but for FIRE, which goes by how far the query stands."""
    model, ids = put(build("llama"), name, backend=backend), tokens(1, 48)
    inputs = {"attention_mask": torch.ones_like(ids)}
    at = torch.arange(48)[None]
    moved = error(logits(model, ids, position_ids=at + 1009, **inputs), logits(model, ids, position_ids=at, **inputs))
    assert SCHEMES[name].shift_invariant == (name != "fire")
    assert moved > 1e-3 if name == "fire" else moved < 1e-5


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["t5", "fire", "shaw", "transformer_xl", "cope"])
def test_training_starts_at_nope(name, backend):
    plain, model, ids = build("llama"), build("llama"), tokens(2, 48)
    patch_model(plain, "nope", backend=backend)
    patch_model(model, name, backend=backend)
    found, expected = logits(model, ids), logits(plain, ids)
    assert torch.equal(found, expected) if backend == "eager" else error(found, expected) < 2e-6  # another kernel
    model.train()(input_ids=ids, labels=ids).loss.backward()
    learned = {key: one.grad for key, one in model.named_parameters() if "position_schemes" in key}
    assert any(float(one.abs().max()) > 1e-5 for one in learned.values() if one is not None)


@pytest.mark.parametrize("name", ["t5", "fire", "transformer_xl", "kerple", "sandwich"])
def test_a_part_of_the_heads_is_refused(name):
    q, k, v = inputs()
    at = torch.arange(LENGTH)[None]
    with pytest.raises(UnsupportedError, match="each of 4 heads and was handed 2"):
        SCHEMES[name](SHAPE).attend(q[:, :2], k[:, :1], v[:, :1], Positions(at, at), core("eager"))


@pytest.mark.parametrize("name", ["fire", "transformer_xl", "cope"])
def test_attention_that_looks_ahead_is_refused(name):
    at = torch.arange(LENGTH)[None]
    with pytest.raises(UnsupportedError, match=f"'{name}' is defined for causal attention only"):
        SCHEMES[name](SHAPE).attend(*inputs(), Positions(at, at), core("sdpa", causal=False))


@pytest.mark.parametrize("name", ["shaw", "transformer_xl", "cope", "fire"])
@pytest.mark.parametrize("backend", ["flash", "flex"])
def test_kernels_that_hide_the_scores_are_refused(name, backend):
    with pytest.raises(UnsupportedError, match=rf"'{name}'.*'sdpa' or\s+'eager'"):
        patch_model(build("llama"), name, backend=backend)


@pytest.mark.parametrize("name", ["t5", "kerple", "sandwich"])
def test_flash_would_drop_a_distance_bias(name):
    with pytest.raises(UnsupportedError, match=f"drop the bias of '{name}'; use 'sdpa', 'flex' or 'eager'"):
        patch_model(build("llama"), name, backend="flash")


@pytest.mark.parametrize("name", ["t5", "kerple", "sandwich", "fire", "shaw", "transformer_xl"])
def test_scores_go_by_the_distance(name):
    found = SCHEMES[name](SHAPE).relative_position(7)
    for i in range(7):
        for j in range(7):
            assert found[i, j] == i - j if j <= i else found[i, j].isnan()


def test_cope_counts_from_the_text():
    with pytest.raises(UnsupportedError, match="'cope' do not depend on a distance"):
        SCHEMES["cope"](SHAPE).relative_position(7)


@pytest.mark.parametrize("name", ["shaw", "transformer_xl", "transformer_xl clamped"])
def test_vectors_by_distance(name):
    """What a key n tokens back adds is the vector n: the scores of one query without content say so."""
    scheme = filled(name)
    vectors = scheme.vectors(LENGTH, LAYER)
    w = {key: one.detach() for key, one in scheme.named_parameters()}
    for unit in range(0, 16, 5):
        q = torch.zeros(1, 4, LENGTH, 16, dtype=torch.float64)
        q[..., unit] = 4
        none = torch.zeros_like(q)
        if name == "shaw":
            scores = oracle.shaw(w, q, none, none, 9)[0]
        else:
            w["v"] = torch.zeros_like(w["v"])
            scores = oracle.transformer_xl(w, q, none, LAYER, 40 if "clamped" in name else None)
        by_distance = scores[0, :, -1].flip(-1)
        torch.testing.assert_close(vectors[..., unit].expand(4, -1), by_distance, rtol=0, atol=1e-4)
