"""Latent attention of models that were built with it: what Transformers computes, decoded without expanding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from pe_patch import ADAPTERS, describe, patch_model, unpatch_model
from pe_patch.mla import attention as over_latents

from .families import LATENT, build
from .models import cached_logits, error, in_chunks, logits, padded, snapshot, tokens, unchanged

FAMILIES = sorted(name for name, adapter in ADAPTERS.items() if adapter.scaling_includes_mscale)
TOLERANCE = 1e-5
"""Relative to the largest logit where that exceeds 1, as everywhere that `error` is asked."""
RANK, ROPE = LATENT["kv_lora_rank"], LATENT["qk_rope_head_dim"]
CROSSOVER = 32
"""New tokens from which on expanding takes less work: n (2 32 - 16 - 16) <= 32 (16 + 16)."""
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": {"rope_parameters": YARN},
    "unequal mscale": {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.4}},
    "queries in one step": {"q_lora_rank": None},
    "halves": {"rope_interleave": False},
    "wide values": {"v_head_dim": 40},
    "narrow values": {"v_head_dim": 4, "attention_bias": True},
}
LAYOUTS = pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
BACKENDS = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def native(family: str = "deepseek_v3", backend: str | None = None, **settings: Any) -> Any:
    """A model whose norms and biases are random too."""
    model = build(family, backend, **settings)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pair(family: str = "deepseek_v3", backend: str | None = None, **settings: Any) -> tuple[Any, Any]:
    """As Transformers builds it, and the same patched."""
    plain = native(family, backend, **settings)
    return plain, patch_model(copy.deepcopy(plain), "mla")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_transformers(family, absorbing):
    plain, model = pair(family)
    ids = tokens(2, 24)
    expected = logits(plain, ids)
    assert error(logits(model, ids), expected) < TOLERANCE
    assert absorbing == []
    assert error(cached_logits(model, ids, 20), expected) < TOLERANCE
    assert absorbing == [1] * 8
    own, theirs = (one(input_ids=ids, use_cache=True).past_key_values for one in (model, plain))
    for ours, native_layer in zip(own.layers, theirs.layers, strict=True):
        assert error(ours.keys, native_layer.keys) < TOLERANCE and error(ours.values, native_layer.values) < TOLERANCE
        assert ours.keys.shape[1:] == (1, 24, RANK) and ours.values.shape[1:] == (1, 24, ROPE)
    assert f"{RANK + ROPE} numbers" in str(describe(model))
    assert unpatch_model(model) is model and torch.equal(logits(model, ids), expected)


@BACKENDS
@pytest.mark.parametrize(
    "family, variant",
    [("deepseek_v3", name) for name in VARIANTS] + [("deepseek_v2", name) for name in VARIANTS if name != "halves"],
)
def test_chunks_of_every_size(family, variant, backend, absorbing):
    plain, model = pair(family, backend, **VARIANTS[variant])
    ids = tokens(2, 130)
    expected = logits(plain, ids)
    for sizes in ([90, *[1] * 3, 37], [7, 5, CROSSOVER, CROSSOVER + 1, 53], [1] * 4 + [126]):
        absorbing.clear()
        assert error(in_chunks(model, ids, sizes), expected) < TOLERANCE
        if variant == "plain":
            assert absorbing == [size for size in sizes[1:] if size <= CROSSOVER for _ in range(2)]


def test_many_scores_are_taken_in_parts(monkeypatch, absorbing):
    monkeypatch.setattr(over_latents, "MOST_SCORES", 2 * 4 * 40 * 9)
    for backend in ("eager", "sdpa"):
        plain, model = pair(backend=backend)
        ids = tokens(2, 40)
        absorbing.clear()
        assert error(in_chunks(model, ids, [18, 22]), logits(plain, ids)) < TOLERANCE
        assert absorbing == [9, 9, 4] * 2


@BACKENDS
@LAYOUTS
def test_padding_on_the_left(family, backend):
    plain, model = pair(family, backend)
    ids, mask, short = padded()
    alone = [logits(plain, short), logits(plain, ids[1:])]
    for sizes in ([48], [40, *[1] * 8], [20, 16, 12]):
        for cache in (None, StaticCache(config=model.config, max_cache_len=64)):
            found = in_chunks(model, ids, sizes, cache, mask)
            assert error(found[:1, 28:], alone[0]) < TOLERANCE
            assert error(found[1:], alone[1]) < TOLERANCE


@BACKENDS
@LAYOUTS
def test_static_cache(family, backend):
    plain, model = pair(family, backend)
    ids = tokens(2, 60)
    expected = logits(plain, ids)
    for sizes in ([57, 1, 1, 1], [4, 40, 16], [60]):
        slots = StaticCache(config=model.config, max_cache_len=64)
        assert error(in_chunks(model, ids, sizes, slots), expected) < TOLERANCE


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}


@pytest.mark.parametrize("kind", GENERATION)
def test_generation(kind, absorbing):
    plain, model = pair()
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, **GENERATION[kind]}
    ids, mask, _ = padded()
    if kind in ("prompt lookup", "assisted"):
        ids = tokens(1, 12).repeat(1, 3)
        mask = torch.ones_like(ids)
    found, expected = (
        one.generate(
            ids, attention_mask=mask, output_scores=True, output_logits=True, return_dict_in_generate=True,
            **options, **({"assistant_model": copy.deepcopy(plain)} if kind == "assisted" else {}),
        )
        for one in (model, plain)
    )  # fmt: skip
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert error(ours, theirs) < TOLERANCE
    if kind == "beams":
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=0, atol=TOLERANCE)
    assert absorbing


@torch.no_grad()
def test_attention_weights():
    plain, model = pair(backend="eager")
    ids = tokens(2, 20)
    found, expected = (one(input_ids=ids, output_attentions=True).attentions for one in (model, plain))
    prompt = model(input_ids=ids[:, :17], use_cache=True)
    part = model(input_ids=ids[:, 17:], past_key_values=prompt.past_key_values, output_attentions=True).attentions
    assert len(found) == len(expected) == len(part) == 2
    for whole, chunk, theirs in zip(found, part, expected, strict=True):
        assert error(whole, theirs) < TOLERANCE and error(chunk, theirs[:, :, 17:]) < TOLERANCE


def gradients(model: Any, start: int = 0) -> dict[str, Tensor]:
    """Of the loss of one pass, or of that of a second pass over the tokens from `start` on."""
    ids = tokens(2, 40)
    model.zero_grad()
    cache = None
    if start:
        cache = model(input_ids=ids[:, :start], use_cache=True).past_key_values
    found = model(input_ids=ids[:, start:], past_key_values=cache, use_cache=bool(start)).logits
    torch.nn.functional.cross_entropy(found.flatten(0, 1), ids[:, start:].flatten()).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    floor = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        difference = float((found[name] - one).abs().max())
        assert difference < 1e-4 * float(one.abs().max()) + 1e-7 * floor, name


@LAYOUTS
def test_training(family, absorbing):
    plain, model = pair(family)
    for one in (plain, model):
        one.train()
    expected = gradients(plain)
    same_gradients(gradients(model), expected)
    model.gradient_checkpointing_enable()
    same_gradients(gradients(model), expected)
    model.gradient_checkpointing_disable()
    assert absorbing == []
    same_gradients(gradients(model, 30), gradients(plain, 30))
    assert absorbing == [10, 10]
    for one in (plain, model):
        torch.optim.SGD(one.parameters(), lr=1e-2).step()
        one.eval()
    ids = tokens(2, 24)
    assert error(cached_logits(model, ids, 20), logits(plain, ids)) < TOLERANCE


def test_autocast():
    """No farther from single precision than Transformers is under autocast itself."""
    plain, model = pair(first_k_dense_replace=2)  # a router would turn roundings into other experts
    ids = tokens(2, 40)
    expected = logits(plain, ids)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (cached_logits(one, ids, 30).float() for one in (plain, model))
    assert error(ours, expected) < max(1.5 * error(theirs, expected), 1e-2)


def test_copies():
    plain, model = pair()
    ids = tokens(2, 24)
    expected = logits(plain, ids)
    cached_logits(model, ids, 20)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer, own = other.model.layers[1].self_attn, model.model.layers[1].self_attn
        assert layer.mla.__dict__["attention"] is layer and own.mla.__dict__["attention"] is own
        assert error(cached_logits(other, ids, 20), expected) < TOLERANCE
        layer.kv_b_proj.weight.data.mul_(2)
        assert error(cached_logits(other, ids, 20), logits(other, ids)) < TOLERANCE
        assert error(cached_logits(other, ids, 20), expected) > 1e-2
        assert error(cached_logits(model, ids, 20), expected) < TOLERANCE
        unpatch_model(other)
        assert error(logits(other, ids), expected) > 1e-2


def test_compiled_into_one_graph():
    plain, model = pair(num_hidden_layers=1)
    ids = tokens(2, 32)
    expected = logits(plain, ids)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert error(logits(compiled, ids), expected) < TOLERANCE
    slots = StaticCache(config=model.config, max_cache_len=64)
    found = [in_chunks(model, ids[:, :30], [30], slots)]
    with torch.no_grad():
        for at in (30, 31):
            found.append(compiled(input_ids=ids[:, at : at + 1], past_key_values=slots, use_cache=True).logits)
    assert error(torch.cat(found, 1), expected) < TOLERANCE


def test_undone():
    model = native(rope_parameters=YARN)
    before = snapshot(model)
    patch_model(model, "mla")
    cached_logits(model, tokens(2, 24), 20)
    unpatch_model(model)
    assert unchanged(before, snapshot(model))
