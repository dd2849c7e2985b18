"""A family without a row: its adapter is inferred at the model, and proved on it, or the family is refused."""

from __future__ import annotations

import copy
import logging
from dataclasses import fields

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from pe_patch import ADAPTERS, UnsupportedError, describe, load_patched, patch_model, unpatch_model
from pe_patch.adapters.inferred import INFERRED, LATEST, adapter_row
from pe_patch.patching import inference
from pe_patch.patching.patch import Settings

from .families import EXPERTS, FOUR, GROUPED, LATENT, VOCABULARY, build

IDS = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(5))
IDENTITY = {"group": 1, "window": 8, "original_max_position_embeddings": 64}
"""Self-Extend with a group of one token is RoPE (Jin et al. 2024), rotated at the scores."""


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(autouse=True)
def nothing_known():
    INFERRED.clear()
    LATEST.clear()


# Families with a row, as if they had none: the row is the expected value.


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt_neox", "qwen3", "cohere2", "glm", "gemma3_text", "olmo2", "deepseek_v2", "smollm3", "phi3",
     "gpt_oss", "granite", "stablelm", "glm4_moe_lite"],
)  # fmt: skip
def test_what_is_found_equals_the_row(family, monkeypatch):
    model, expected = build(family), ADAPTERS[family]
    monkeypatch.setattr(inference, "ADAPTERS", {})
    inference.infer_missing(model, Settings())
    found = INFERRED[model.base_model]
    # A float32 model does not show in which dtype products are taken.
    open_fields = {"summary", "projections", "full_precision_product"}
    for each in fields(expected):
        if each.name not in open_fields:
            assert getattr(found, each.name) == getattr(expected, each.name), each.name


# Families of Transformers without a row.

UNKNOWN = {
    "afmoe": GROUPED | EXPERTS,
    "cohere2_moe": FOUR | EXPERTS | {"sliding_window": 8},
    "ernie4_5": GROUPED,
    "jetmoe": GROUPED | {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "laguna": GROUPED | EXPERTS,
    "lfm2": GROUPED,
    "modernbert-decoder": {},
    "qwen3_next": FOUR | EXPERTS | {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
    },
    "deepseek_v32": LATENT | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 64},
}  # fmt: skip


@pytest.mark.parametrize("family", UNKNOWN)
def test_an_unknown_family_is_patched_like_a_known_one(family, tmp_path):
    assert family not in ADAPTERS
    model = build(family, **UNKNOWN[family])
    native = logits(model)
    patch_model(model, "rope", on_existing="replace")
    assert torch.equal(logits(model), native)
    unpatch_model(model)
    layers = ADAPTERS.get(family, INFERRED[model.base_model]).attentions(model.base_model)
    chosen = {"layers": [max(layers)]} if len(set(_bases(model))) > 1 else {}
    if family == "deepseek_v32":  # its indexer would see no rotation
        with pytest.raises(UnsupportedError, match=r"also passes cos and sin to layers\.0\.self_attn\.indexer"):
            patch_model(model, "self_extend", on_existing="replace", **IDENTITY)
    else:
        patch_model(model, "self_extend", on_existing="replace", **IDENTITY, **chosen)
        torch.testing.assert_close(logits(model), native, rtol=0, atol=1e-5 * float(native.abs().max()))
    patch_model(model, "yarn", factor=4, on_existing="replace", **chosen)
    moved = logits(model)
    assert float((moved - native).abs().max()) > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_patched(tmp_path).eval()), moved)
    unpatch_model(model)
    assert torch.equal(logits(model), native)


def _bases(model):
    """The rotary bases of a model."""
    parameters = model.config.get_text_config().rope_parameters or {}
    return [each.get("rope_theta") for each in parameters.values() if isinstance(each, dict)]


def test_a_hybrid_model_is_patched_where_it_attends():
    model = build("qwen3_next", **UNKNOWN["qwen3_next"])
    patch_model(model, "yarn", factor=4)
    described = describe(model)
    assert described.layers == [3] and "1 of the 1 that attend, of 4 in all: [3]" in str(described)
    assert described.inferred_row == "Adapter(summary='inferred')" and described.inferred_row in str(described)
    unpatch_model(model)
    with pytest.raises(ValueError, match=r"names layer 1, which has no attention in this hybrid model.*attend: 3\."):
        patch_model(model, "yarn", factor=4, layers=[1])
    with pytest.raises(ValueError, match="chooses none of the 1 layers that attend"):
        patch_model(model, "yarn", factor=4, layers=slice(0, 2))
    with pytest.raises(UnsupportedError, match="1 of 4 layers"):
        patch_model(model, "mla", kv_rank=24, rope_dim=8, calibration=[IDS[0]])


def test_the_row_can_be_copied():
    model = build("cohere2_moe", **UNKNOWN["cohere2_moe"])
    patch_model(model, "rope")
    text = adapter_row(INFERRED[model.base_model])
    assert text == (
        "Adapter(layout='interleaved', interleaved_pairs=True, rotates='sliding_window', summary='inferred')"
    )


def test_a_model_on_the_meta_device_is_not_proved_and_says_so(caplog):
    with torch.device("meta"):
        model = build("ernie4_5", **UNKNOWN["ernie4_5"])
    with caplog.at_level(logging.WARNING, logger="pe_patch"):
        patch_model(model, "yarn", factor=2)
    assert "inferred and not verified, since its weights are on the meta device" in caplog.text
    row = describe(model).inferred_row
    assert row is not None and row.startswith("Adapter(full_precision=True, interleaved_pairs=True")
    assert "inferred, not verified" in row


@pytest.mark.parametrize(("family", "expected"), [("cohere", True), ("llama", False), ("olmo2", False)])
def test_a_model_of_16_bits_shows_the_dtype_of_its_products(family, expected, monkeypatch):
    model = build(family, dtype=torch.bfloat16)
    monkeypatch.setattr(inference, "ADAPTERS", {})
    inference.infer_missing(model, Settings())
    assert INFERRED[model.base_model].full_precision_product is expected


def test_offloaded_weights_are_looked_at(tmp_path):
    """cohere2_moe rotates in some layers alone, and pairs neighbours; a guess would be wrong."""
    model = build("cohere2_moe", **UNKNOWN["cohere2_moe"])
    native = logits(model)
    cpu_offload(model)
    patch_model(model, "self_extend", **IDENTITY)
    assert INFERRED[model.base_model].rotates == "sliding_window"
    torch.testing.assert_close(logits(model), native, rtol=0, atol=1e-5 * float(native.abs().max()))


def test_each_model_of_a_class_has_its_own_adapter():
    layouts = (["sliding_attention"] * 3 + ["full_attention"], ["sliding_attention", "full_attention"] * 2)
    models = [build("cohere2_moe", **UNKNOWN["cohere2_moe"], layer_types=types) for types in layouts]
    native = [logits(model) for model in models]
    for model in (*models, *models):
        patch_model(model, "self_extend", **IDENTITY)
        unpatch_model(model)
    for model, expected in zip(models, native, strict=True):
        patch_model(model, "self_extend", **IDENTITY)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_another_backend_is_no_reason_to_refuse():
    model = build("ernie4_5", **UNKNOWN["ernie4_5"])
    patch_model(model, "rope", backend="eager")


def test_an_added_embedding_is_refused_where_the_model_would_change_it():
    model = build("afmoe", **UNKNOWN["afmoe"], mup_enabled=True)
    with pytest.raises(UnsupportedError, match="changes `inputs_embeds` in its own way"):
        patch_model(model, "sinusoidal")
    patch_model(model, "alibi")


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v32", "moshi"])
def test_nothing_stays_behind(family):
    """Neither after a refusal nor after an undo."""
    model = build(family, **UNKNOWN.get(family, {})) if family != "moshi" else build("bloom")
    if family == "moshi":
        model.config.model_type = family
    state = [(name, dict(vars(module))) for name, module in model.named_modules()]
    before = [{key for key in each if key != "_parameters"} for _, each in state]
    hooks = [len(each["_forward_hooks"]) + len(each["_forward_pre_hooks"]) for _, each in state]
    implementation = model.config._attn_implementation
    try:
        patch_model(model, "yarn", factor=2)
        unpatch_model(model)
    except UnsupportedError:
        assert family == "moshi"
    assert [set(vars(module)) - {"_parameters"} for module in model.modules()] == before
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.config._attn_implementation == implementation


def test_text_generates_under_a_rotation_at_the_scores_in_a_hybrid_model():
    model = build("qwen3_next", **UNKNOWN["qwen3_next"])
    plain = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    patch_model(model, "self_extend", **IDENTITY)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0), plain)


MROPE = GROUPED | {"hidden_size": 64, "rope_parameters": {
    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0,
}}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_5_text"])
def test_three_rows_of_positions_rotate_as_in_the_family(family):
    model = build(family, **UNKNOWN["qwen3_next"] | MROPE)
    rows = torch.stack((torch.arange(16), torch.arange(16) // 2, torch.arange(16) % 4))[:, None].expand(3, 2, 16)
    text = torch.arange(16).expand(1, 2, 16)

    def images():
        with torch.no_grad():
            return model(input_ids=IDS, position_ids=torch.cat((text, rows)), use_cache=False).logits

    native, native_images = logits(model), images()
    assert float((native - native_images).abs().max()) > 1e-3
    patch_model(model, "rope")
    assert torch.equal(logits(model), native) and torch.equal(images(), native_images)
    unpatch_model(model)
    patch_model(model, "linear", factor=2)
    halved = images()
    unpatch_model(model)
    model.base_model.rotary_emb.inv_freq /= 2
    torch.testing.assert_close(halved, images(), rtol=0, atol=1e-6 * float(halved.abs().max()))


def test_a_bias_takes_text_and_refuses_images():
    model = build("qwen3_5_text", **UNKNOWN["qwen3_next"] | MROPE)
    patch_model(model, "alibi")
    rows = torch.arange(16).expand(4, 2, 16).clone()
    with torch.no_grad():
        text = model(input_ids=IDS, position_ids=rows, use_cache=False).logits
        assert torch.equal(text, logits(model))
        rows[2] //= 2
        with pytest.raises(UnsupportedError, match=r"images and videos have three here \(M-RoPE\)"):
            model(input_ids=IDS, position_ids=rows, use_cache=False)


# Models that were broken on purpose, each in a way that an adapter of a row cannot describe.


def llama(seed=0, **settings):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **settings,
    )  # fmt: skip
    config.model_type = "llama_of_a_stranger"
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def rotating(change):
    """Break the rotation of every attention: `change(query, key, cos, sin)` gives queries and keys."""

    def broken(model, monkeypatch):
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", change)

    return broken


def plain(query, key, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return tuple(x * cos + modeling_llama.rotate_half(x) * sin for x in (query, key))


def swapped_pairs(query, key, cos, sin):
    """The pairs are (0, 1), (2, 3) in the first half of a head and half a head apart in the second."""
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7, *range(8, 16)])
    back = order.argsort()
    return tuple(x[..., back] for x in plain(query[..., order], key[..., order], cos, sin))


def reversed_pairs(query, key, cos, sin):
    return tuple(x.flip(-1) for x in plain(query.flip(-1), key.flip(-1), cos, sin))


def other_way_round(query, key, cos, sin):
    return plain(query, key, cos, -sin)


def queries_alone(query, key, cos, sin):
    return plain(query, key, cos, sin)[0], key


def keys_twice(query, key, cos, sin):
    query, once = plain(query, key, cos, sin)
    return query, plain(once, once, cos, sin)[0]


def normed(query, key, cos, sin):
    return tuple(nn.functional.rms_norm(x, x.shape[-1:]) for x in plain(query, key, cos, sin))


def weighted_norm(query, key, cos, sin):
    weight = torch.linspace(0.5, 1.5, query.shape[-1])
    return tuple(nn.functional.rms_norm(x, x.shape[-1:], weight) for x in plain(query, key, cos, sin))


def scaled_by_dimension(query, key, cos, sin):
    weight = torch.linspace(0.5, 1.5, query.shape[-1])
    return tuple(x * weight for x in plain(query, key, cos, sin))


def half_of_the_head(query, key, cos, sin):
    """The frequencies are those of a whole head, and the second half of the pairs stays as it is."""
    cos, sin = cos.clone(), sin.clone()
    for start in (4, 12):
        cos[..., start : start + 4], sin[..., start : start + 4] = 1, 0
    return plain(query, key, cos, sin)


def first_head_alone(query, key, cos, sin):
    turned = plain(query, key, cos, sin)
    return tuple(torch.cat((new[:, :1], old[:, 1:]), 1) for new, old in zip(turned, (query, key), strict=True))


def twice(query, key, cos, sin):
    return plain(*plain(query, key, cos, sin), cos, sin)


def second_rotary_module(model, monkeypatch):
    """Give the last layer a rotary module with other frequencies."""
    attention = model.model.layers[-1].self_attn
    attention.own_rotary = copy.deepcopy(model.model.rotary_emb)
    attention.own_rotary.inv_freq = model.model.rotary_emb.inv_freq / 7
    inner = attention.forward

    def forward(hidden_states, position_embeddings, **rest):
        positions = torch.arange(hidden_states.shape[1])[None]
        return inner(hidden_states, position_embeddings=attention.own_rotary(hidden_states, positions), **rest)

    monkeypatch.setattr(attention, "forward", forward)


def other_frequencies_in_a_layer(model, monkeypatch):
    """The last layer squares the rotation that it is handed, without a module."""
    attention = model.model.layers[-1].self_attn
    inner = attention.forward

    def forward(hidden_states, position_embeddings, **rest):
        cos, sin = position_embeddings
        return inner(hidden_states, position_embeddings=(cos**2 - sin**2, 2 * sin * cos), **rest)

    monkeypatch.setattr(attention, "forward", forward)


def positions_ignored(model, monkeypatch):
    rotary = model.model.rotary_emb
    inner = rotary.forward
    model.model.rotary_emb.forward = lambda x, position_ids: inner(x, torch.arange(x.shape[1])[None])


def positions_ignored_by_the_model(model, monkeypatch):
    inner = model.model.forward

    def forward(*args, position_ids=None, **kwargs):
        return inner(*args, **kwargs)

    forward.__signature__ = __import__("inspect").signature(inner)
    monkeypatch.setattr(model.model, "forward", forward)


def a_layer_without_rotation(model, monkeypatch):
    """The first layer rotates half as far, by an average of its cos and sin with no rotation."""
    attention = model.model.layers[0].self_attn
    inner = attention.forward

    def forward(hidden_states, position_embeddings, **rest):
        cos, sin = position_embeddings
        return inner(hidden_states, position_embeddings=((1 + cos) / 2, sin / 2), **rest)

    monkeypatch.setattr(attention, "forward", forward)


def biased(bias):
    """Add a bias [queries, keys] to the mask of every layer, which no keyword shows."""

    def broken(model, monkeypatch):
        for layer in model.model.layers:
            attention = layer.self_attn
            inner = attention.forward

            def forward(hidden_states, attention_mask=None, inner=inner, **rest):
                count = hidden_states.shape[1]
                keys = count if attention_mask is None else attention_mask.shape[-1]
                at = torch.arange(keys)
                added = bias(at[None, :] - at[-count:, None]).clone()
                added[at[None, :] > at[-count:, None]] = torch.finfo(torch.float32).min
                return inner(hidden_states, attention_mask=added[None, None], **rest)

            monkeypatch.setattr(attention, "forward", forward)

    return broken


def absolute_too(model, monkeypatch):
    """A sinusoid on the hidden states of every attention, from a count that nobody passes."""
    for layer in model.model.layers:
        attention = layer.self_attn
        inner = attention.forward

        def forward(hidden_states, inner=inner, **rest):
            at = torch.arange(hidden_states.shape[1], dtype=torch.float32)[None, :, None]
            return inner(hidden_states + torch.sin(at / 3), **rest)

        monkeypatch.setattr(attention, "forward", forward)


def positions_at_the_input(model, monkeypatch):
    """A table of positions beside the rotation."""

    def add(module, args, result):
        return result + torch.sin(torch.arange(result.shape[1], dtype=torch.float32)[None, :, None] / 3)

    model.model.embed_tokens.register_forward_hook(add)


def silent_keys(model, monkeypatch):
    """Keys of zero show no rotation."""
    torch.nn.init.zeros_(model.model.layers[1].self_attn.k_proj.weight)


def one_attention_twice(model, monkeypatch):
    model.model.layers[1].self_attn = model.model.layers[0].self_attn


def mixing_neighbours(model, monkeypatch):
    """Each attention first adds the token before, as a short convolution does."""
    for layer in model.model.layers:
        attention = layer.self_attn
        inner = attention.forward

        def forward(hidden_states, inner=inner, **rest):
            before = nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
            return inner(hidden_states + before, **rest)

        monkeypatch.setattr(attention, "forward", forward)


BROKEN = {
    "swapped pairs": rotating(swapped_pairs),
    "reversed pairs": rotating(reversed_pairs),
    "the other way round": rotating(other_way_round),
    "queries alone": rotating(queries_alone),
    "keys twice": rotating(keys_twice),
    "both twice": rotating(twice),
    "a norm after the rotation": rotating(normed),
    "a norm with weights after the rotation": rotating(weighted_norm),
    "a scale after the rotation": rotating(scaled_by_dimension),
    "half of the pairs": rotating(half_of_the_head),
    "the first head alone": rotating(first_head_alone),
    "a second rotary module": second_rotary_module,
    "other frequencies in a layer": other_frequencies_in_a_layer,
    "half a rotation in a layer": a_layer_without_rotation,
    "positions ignored by the rotary module": positions_ignored,
    "positions ignored by the model": positions_ignored_by_the_model,
    "a linear bias beside": biased(lambda distance: 0.3 * distance),
    "a bias of the nearest key beside": biased(lambda distance: 2.0 * (distance == -1)),
    "absolute positions beside": absolute_too,
    "neighbours mixed before": mixing_neighbours,
    "positions at the input": positions_at_the_input,
    "keys of zero": silent_keys,
    "one attention in two layers": one_attention_twice,
}


def test_the_model_that_is_broken_below_is_supported():
    model = llama()
    native = logits(model)
    patch_model(model, "rope")
    assert torch.equal(logits(model), native)


STEPS = {
    "a norm after the rotation": "layer 0 normalises queries and keys after it rotates them",
    "positions ignored by the rotary module": "before the cache|at the scores",
    "a linear bias beside": "layer 0 depends on the order of tokens without rotation",
    "a bias of the nearest key beside": "layer 0 depends on the order of tokens without rotation",
    "absolute positions beside": "layer 0 depends on the order of tokens without rotation",
    "neighbours mixed before": "layer 0 depends on the order of tokens without rotation",
    "positions at the input": "equal tokens enter its first layer differently",
    "keys of zero": "queries or keys of layer 1 are zero",
    "one attention in two layers": "share one attention module|not at one path",
    "a second rotary module": "needs one rotary module|layer 2",
    "other frequencies in a layer": "differs from that of LlamaModel in layer 2",
    "half a rotation in a layer": "differs from that of LlamaModel in layer 0",
}
"""The step that must fail; for all others, the rotation differs in every layer."""


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_model_is_refused(fault, monkeypatch):
    model = llama()
    BROKEN[fault](model, monkeypatch)
    native = logits(model)
    step = STEPS.get(fault, "differs from that of LlamaModel in every layer")
    with pytest.raises(UnsupportedError, match=rf"llama_of_a_stranger.* none can be inferred: .*({step})"):
        patch_model(model, "yarn", factor=2)
    assert torch.equal(logits(model), native)


def test_a_wrapper_that_changes_nothing_is_accepted(monkeypatch):
    model = llama()
    rotating(plain)(model, monkeypatch)
    biased(lambda distance: 0.0 * distance)(model, monkeypatch)
    native = logits(model)
    patch_model(model, "rope")
    torch.testing.assert_close(logits(model), native)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_no_position_and_a_small_position_is_none_of_rounding(dtype):
    """A matrix product rounds equal rows differently by their place; positions of a trained table are hundredths."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(1, 1, 256, generator=generator).to(dtype)
    rounded = token.expand(1, 6, 256).clone()
    step = torch.nextafter(rounded, torch.full_like(rounded, 9.0))
    changed = torch.rand(rounded.shape, generator=generator) < (0.5 if dtype == torch.float32 else 0.03)
    rounded[changed] = step[changed]
    assert not torch.equal(rounded, rounded[:, :1].expand_as(rounded)) and inference.tokens_alike(rounded)
    table = torch.randn(1, 6, 256, generator=generator) * (1e-4 if dtype == torch.float32 else 1e-2)
    assert not inference.tokens_alike(token + table.to(dtype))
