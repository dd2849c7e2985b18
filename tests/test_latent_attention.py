"""Converted to latent attention: all ways of decoding are one pass, and nothing is lost where nothing has to be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pe_patch import describe, patch_model, unpatch_model

from .families import build as family
from .models import SLIDING, cached_logits, error, in_chunks, logits, padded, snapshot, tokens, unchanged
from .models import build as small

TOLERANCE = 1e-5
"""Relative to the largest logit where that exceeds 1."""
CALIBRATION = tokens(6, 32, seed=8)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped": ("llama", {}),
    "llama, multi-head": ("llama", {"num_key_value_heads": 4}),
    "mistral, sliding": ("mistral", {}),
    "qwen3": ("qwen3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "qwen2": ("qwen2", {}),
}
HEADS = {"llama, multi-head": 4, "gpt_neox": 4}
"""Key-value heads, of 16 dimensions; two where nothing is said. GPT-NeoX rotates half of each."""
METHODS: dict[str, dict[str, Any]] = {
    "transmla": {"method": "transmla", "rope_dim": 4},
    "joint": {"method": "mha2mla", "rope_dim": 4},
    "split": {"method": "mha2mla", "rope_dim": 4, "svd": "split"},
    "svd": {"method": "svd", "rope_dim": 8},
    "norm": {"method": "transmla", "rope_dim": 4, "latent_norm": True},
}


def model_of(name: str, backend: str | None = None, **more: Any) -> Any:
    """Transformers starts biases at zero and norms at one; here they are random."""
    kind, settings = MODELS[name]
    settings = {**settings, **more, **({"attn_implementation": backend} if backend else {})}
    model = family(kind, backend, **more) if kind == "qwen2" else small(kind, **settings)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def converted(name: str, method: str, rank: int, backend: str | None = None, **more: Any) -> Any:
    model = model_of(name, backend, **more)
    return patch_model(model, "mla", kv_rank=rank, calibration=CALIBRATION, **METHODS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_decoding_is_one_pass(name, method, absorbing):
    """Past the sliding window of the Mistral too, which is shorter than the text."""
    ids = tokens(2, 48)
    assert SLIDING < 40
    for rank, backend in ((3, "eager"), (20, "sdpa")):
        model = converted(name, method, rank, backend)
        expected = logits(model, ids)
        assert absorbing == []
        assert error(cached_logits(model, ids, 40), expected) < TOLERANCE
        assert absorbing == [1] * 16
        assert error(in_chunks(model, ids, [5, 3, 40]), expected) < TOLERANCE
        slots = StaticCache(config=model.config, max_cache_len=64)
        assert error(in_chunks(model, ids, [30, 2, 1, 15], slots), expected) < TOLERANCE
        absorbing.clear()


def whole(name: str, method: str) -> dict[str, Any]:
    """All dimensions that rotate keep doing so, at full rank."""
    heads, rotary = HEADS.get(name, 2), 8 if name == "gpt_neox" else 16
    rope_dim = rotary if method == "mha2mla" else heads * rotary
    rank = min(2 * heads * 16 - heads * rotary, 64)  # values, and keys that do not rotate, of 64 hidden states at most
    return {"method": method, "rope_dim": rope_dim, "kv_rank": rank}


@pytest.mark.parametrize("method", ["transmla", "mha2mla", "svd"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_lost_where_everything_rotates(name, method):
    ids = tokens(2, 40)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        model = model_of(name).to(dtype)
        before = snapshot(model)
        expected = logits(model, ids)
        patch_model(model, "mla", calibration=CALIBRATION, **whole(name, method))
        found = logits(model, ids)
        assert error(found, expected) < tolerance
        assert error(cached_logits(model, ids, 30), expected) < tolerance
        unpatch_model(model)
        assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("method, backend", [("transmla", "sdpa"), ("split", "eager"), ("joint", "sdpa")])
@pytest.mark.parametrize("name", MODELS)
def test_padding_on_the_left(name, method, backend):
    model = converted(name, method, 14, backend)
    ids, mask, short = padded()
    alone = [logits(model, short), logits(model, ids[1:])]
    for sizes in ([48], [40, *[1] * 8], [20, 16, 12]):
        for cache in (None, StaticCache(config=model.config, max_cache_len=64)):
            found = in_chunks(model, ids, sizes, cache, mask)
            assert error(found[:1, 28:], alone[0]) < TOLERANCE
            assert error(found[1:], alone[1]) < TOLERANCE


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("kind", GENERATION)
@pytest.mark.parametrize("name", ["llama, grouped", "mistral, sliding", "gpt_neox"])
def test_generation_is_the_same_without_a_cache(name, kind, absorbing):
    """Scores of every step against a pass over the sequence so far, and beams against beams without a cache."""
    model = converted(name, "joint", 14)
    ids, mask, _ = padded()
    if kind == "prompt lookup":
        ids = tokens(1, 12).repeat(1, 3)
        mask = torch.ones_like(ids)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **GENERATION[kind]}
    asked = {"attention_mask": mask, "output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    found = model.generate(ids, **asked, **options)
    assert absorbing
    if kind == "beams":
        expected = model.generate(ids, **asked, **options, use_cache=False)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=0, atol=TOLERANCE)
        return
    longer = torch.cat((mask, torch.ones(len(ids), 12, dtype=torch.long)), 1)
    expected = logits(model, found.sequences, attention_mask=longer)[:, ids.shape[1] - 1 : -1]
    assert error(torch.stack(found.logits, 1), expected) < TOLERANCE


@pytest.mark.parametrize(("backend", "package", "bits"), [("quanto", "optimum.quanto", 4), ("hqq", "hqq", 8)])
def test_quantised_cache(backend, package, bits):
    """Rounding what is cached costs no more than it does without latents."""
    pytest.importorskip(package)
    from transformers import QuantizedCache

    ids, found = tokens(2, 48), []
    for model in (converted("llama, grouped", "transmla", 12), model_of("llama, grouped")):
        cache = QuantizedCache(backend, model.config, nbits=bits, q_group_size=4, residual_length=8)
        found.append(error(in_chunks(model, ids, [30, *[1] * 18], cache), logits(model, ids)))
    assert 1e-4 < found[0] < 1.5 * found[1]


@pytest.mark.parametrize("offloading", [False, True])
def test_a_cache_that_is_given(offloading):
    if offloading and not torch.cuda.is_available():
        pytest.skip("Transformers offloads from an accelerator only")
    model = converted("llama, grouped", "transmla", 14)
    ids = tokens(2, 48)
    cache = DynamicCache(config=model.config, offloading=offloading)
    assert error(in_chunks(model, ids, [30, *[1] * 18], cache), logits(model, ids)) < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_that_are_held(name, method):
    model, ids, heads = converted(name, method, 13), tokens(3, 10), HEADS.get(name, 2)
    expected = {"joint": 13 + heads * 4, "split": 2 * 13 + heads * 4, "svd": 13 + 8}.get(method, 13 + 4)
    with torch.no_grad():
        grown = model(input_ids=ids, use_cache=True).past_key_values
        slots = StaticCache(config=model.config, max_cache_len=10)
        model(input_ids=ids, past_key_values=slots, use_cache=True)
    for cache in (grown, slots):
        for layer in cache.layers:
            held = sum(one.numel() * one.element_size() for one in (layer.keys, layer.values))
            assert held == 4 * expected * ids.numel()
    share = expected / (2 * heads * 16)
    assert f"{expected} numbers, {2 * heads * 16} before ({share:.1%})" in str(describe(model))


@pytest.mark.parametrize("name", ["llama, grouped", "qwen3", "gpt_neox"])
def test_fresh_layers_are_finite_and_decode_as_one_pass(name):
    model, ids = model_of(name), tokens(2, 40)
    patch_model(model, "mla", method="init", kv_rank=12, rope_dim=4)
    weights = {name: one for name, one in model.named_parameters() if ".mla." in name}
    assert weights and all(one.isfinite().all() and one.abs().max() <= 2.5 for one in weights.values())
    assert error(cached_logits(model, ids, 30), logits(model, ids)) < TOLERANCE


def test_training_reaches_every_weight():
    for name in ("llama, grouped", "qwen3", "gpt_neox"):
        model, ids = converted(name, "norm", 14).train(), tokens(2, 40)
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            found.append({n: one.grad.clone() for n, one in model.named_parameters() if ".mla." in n})
        for key, one in found[0].items():
            assert one.abs().max() > 0, key
            torch.testing.assert_close(found[1][key], one, rtol=1e-4, atol=1e-6)


def test_copies_are_their_own():
    model, ids = converted("qwen3", "transmla", 14), tokens(2, 40)
    expected = logits(model, ids)
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.mla.v_b_proj.weight.data.mul_(2)
    assert error(cached_logits(other, ids, 30), logits(other, ids)) < TOLERANCE
    assert error(logits(other, ids), expected) > 1e-2
    assert error(cached_logits(model, ids, 30), expected) < TOLERANCE
