"""Test a bias in each attention backend, and the combinations that are refused."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import StaticCache

from pe_patch import Positions, Scheme, UnsupportedError, patch_model, unpatch_model
from pe_patch.mla.protocol import ProjectionScheme

from .models import BACKENDS, FAMILIES, build, cached_logits, error, logits, put, snapshot, tokens, unchanged

LENGTH = 300
"""More than 256, the number of queries for which the fast path builds a bias at a time."""


class Ripple(Scheme):
    """A bias with a trained parameter: depth cos(distance / (head + 2)) - distance / 10."""

    name = "ripple"
    mechanism = "distance bias"

    def __init__(self, shape, *, depth: float = 2.0):
        super().__init__(shape)
        self.depth = torch.nn.Parameter(torch.tensor(depth))

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor:
        period = torch.arange(query.shape[1], device=query.device)[:, None, None] + 2.0
        distance = positions.distance[:, None].float()
        return self.depth * torch.cos(distance / period) - distance / 10


ATTENTIONS = {
    "llama": lambda model: [layer.self_attn for layer in model.model.layers],
    "gpt_neox": lambda model: [layer.attention for layer in model.gpt_neox.layers],
    "bloom": lambda model: [layer.self_attention for layer in model.transformer.h],
}


def projections(family: str, attention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values `[batch, heads, length, head]` in float64, with keys repeated for all heads."""
    batch, length, _ = hidden.shape
    if family == "llama":
        parts = [getattr(attention, f"{part}_proj")(hidden).view(batch, length, -1, 16) for part in "qkv"]
        parts[1:] = [part.repeat_interleave(2, 2) for part in parts[1:]]
    elif family == "gpt_neox":  # heads of three neighbouring parts
        parts = attention.query_key_value(hidden).view(batch, length, 4, 48).split(16, -1)
    else:
        parts = attention.query_key_value(hidden).view(batch, length, 4, 3, 16).unbind(3)
    query, key, value = (part.transpose(1, 2).double() for part in parts)
    return query, key, value


def dense_oracle(query: Tensor, key: Tensor, value: Tensor, depth: float = 2.0) -> Tensor:
    """Return causal attention with the bias, computed over all pairs in float64."""
    at = torch.arange(query.shape[2], dtype=torch.float64)
    distance = at[:, None] - at
    period = torch.arange(query.shape[1], dtype=torch.float64)[:, None, None] + 2
    bias = depth * torch.cos(distance / period) - distance / 10
    scores = query @ key.transpose(2, 3) / 4 + bias.masked_fill(distance < 0, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


OUTPUTS = {"llama": "o_proj", "gpt_neox": "dense", "bloom": "dense"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_user_defined_bias_equals_a_dense_oracle(family, backend):
    model, ids = build(family), tokens(2, LENGTH)
    patch_model(model, Ripple, backend=backend)
    checked = 0

    def keep_expected_output(attention, arguments, keywords):
        hidden = keywords.get("hidden_states", arguments[0] if arguments else None)
        attention.expected = dense_oracle(*projections(family, attention, hidden))

    for attention in ATTENTIONS[family](model):
        attention.register_forward_pre_hook(keep_expected_output, with_kwargs=True)

        def check_output(_, inputs, attention=attention):
            nonlocal checked
            checked += 1
            assert error(inputs[0].double(), attention.expected) < 1e-5

        getattr(attention, OUTPUTS[family]).register_forward_pre_hook(check_output)
    logits(model, ids)
    assert checked == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_user_defined_bias_equal_those_of_eager(family):
    """The fast path computes chunks, and computes each again in backward."""

    def gradients(backend: str) -> dict[str, Tensor]:
        model = build(family)
        patch_model(model, Ripple, backend=backend)
        model.train()(input_ids=tokens(2, LENGTH), labels=tokens(2, LENGTH), use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients("eager"), gradients("sdpa")
    assert expected.keys() == found.keys()
    assert any("depth" in name and gradient.abs() > 1e-4 for name, gradient in found.items())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max() / gradient.abs().max()) < 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_user_defined_bias_supports_decoding_padding_and_packing(family, backend):
    model = build(family)
    patch_model(model, Ripple, backend=backend)
    ids, full = tokens(2, 48), logits(model, tokens(2, 48))
    assert error(cached_logits(model, ids, 40), full) < 1e-5
    assert error(cached_logits(model, ids, 40, StaticCache(config=model.config, max_cache_len=64)), full) < 1e-5
    padded = torch.cat((torch.zeros(2, 7, dtype=torch.long), ids), 1)
    assert error(logits(model, padded, attention_mask=(padded != 0).long())[:, 7:], full) < 1e-5
    documents = torch.cat((torch.arange(30), torch.arange(18)))[None]
    separate = torch.cat((full[:1, :30], logits(model, ids[:1, 30:])), 1)
    assert error(logits(model, ids[:1], position_ids=documents), separate) < 1e-5


@pytest.mark.parametrize("order", ["patch first", "offload first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_user_defined_scheme_can_be_offloaded(family, order):
    model, ids = build(family), tokens(1, 40)
    patch_model(model, Ripple)
    expected = logits(model, ids)
    if order == "offload first":
        unpatch_model(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if order == "offload first":
        patch_model(model, Ripple)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_that_would_drop_the_bias_are_refused(family):
    model = build(family)
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"drop the bias of 'ripple'; use 'sdpa' or 'eager'"):
        patch_model(model, Ripple, backend="flash")
    with pytest.raises(UnsupportedError, match="no pointwise form for FlexAttention; use 'sdpa' or 'eager'"):
        patch_model(model, Ripple, backend="flex")
    assert unchanged(before, snapshot(model))
    patch_model(model, Ripple)
    expected = logits(model, tokens(1, 40))
    for backend in ("flash_attention_2", "flex_attention"):
        with pytest.raises(NotImplementedError, match="'sdpa'"):
            model.set_attn_implementation(backend)
    assert torch.equal(logits(model, tokens(1, 40)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yarn", "alibi"])
def test_flex_equals_eager(name):
    """The first call compiles, which takes ten seconds or more."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    padded = tokens(2, 48)
    padded[0, :9] = 0
    mask = (padded != 0).long()
    found, expected = (
        logits(put(build("llama", num_hidden_layers=1), name, backend=backend), padded, attention_mask=mask)
        for backend in ("flex", "eager")
    )
    assert error(found[0, 9:], expected[0, 9:]) < 1e-5
    assert error(found[1], expected[1]) < 1e-5


class OneRadianPerToken(Scheme):
    """Rotates by one radian per token, and overrides only `angles`."""

    name = "one_radian"

    def angles(self, positions):
        return positions[..., None].float().expand(-1, -1, self.shape.rotary_dim // 2), 1.0


def test_a_scheme_that_overrides_only_angles_rotates_a_family_with_a_rotary_module():
    """Compare with the rotary module of Transformers, with every frequency set to one."""
    model, native = build("llama"), build("llama")
    native.model.rotary_emb.inv_freq.fill_(1.0)
    patch_model(model, OneRadianPerToken)
    ids = torch.arange(3, 23)[None]
    assert torch.equal(model(ids).logits, native(ids).logits)


def test_a_hook_that_would_never_be_called_is_refused():
    body = {"name": "replacing", "replace": lambda self, projections, seen: projections}
    for family, scheme, said in (
        ("llama", type("Replacing", (ProjectionScheme,), body), "replaces"),
        ("llama", type("Plain", (Scheme,), body), "derive it from"),
        ("bloom", OneRadianPerToken, "Rotary"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            patch_model(build(family), scheme)
