"""Cases that somebody tried to break the library with, each against a value from elsewhere."""

from __future__ import annotations

import copy
import threading
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from pe_patch import (
    AlreadyPatchedError,
    NoEffectError,
    UnsupportedError,
    export,
    load_patched,
    patch_model,
    patched,
    unpatch_model,
)
from pe_patch.attention.interface import BACKENDS, attend
from pe_patch.core.positions import Positions
from pe_patch.errors import OutputError

from . import families
from .models import build, error, in_chunks, logits, put, snapshot, tokens, unchanged

pytestmark = pytest.mark.fast
TOLERANCE = 1e-5


def test_a_base_that_the_config_stretches_at_every_length_is_the_trained_one():
    """HunYuan's `alpha` is a larger base, not a scaling of a model that was trained with a smaller one."""
    parameters = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}
    model = families.build("hunyuan_v1_dense", rope_parameters=parameters)
    ids = tokens(1, 60)
    expected = logits(model, ids)
    patch_model(model, "rope", on_existing="replace")
    assert error(logits(model, ids), expected) < TOLERANCE
    assert model.config.rope_parameters["rope_theta"] == pytest.approx(10000.0 * 1000.0 ** (16 / 14))


def test_a_block_within_a_block_gives_the_outer_patch_back():
    model, ids = build("llama"), tokens(1, 40)
    before = snapshot(model)
    with patched(model, "shaw", max_distance=6):
        for parameter in model.model.position_schemes.scheme.parameters():
            torch.nn.init.normal_(parameter)
        expected = logits(model, ids)
        with patched(model, "linear", factor=2.0, on_existing="replace"):
            assert error(logits(model, ids), expected) > TOLERANCE
        assert torch.equal(logits(model, ids), expected)
        with pytest.raises(KeyError), patched(model, "linear", factor=2.0, on_existing="replace"):
            raise KeyError
        assert torch.equal(logits(model, ids), expected)
        with patched(model, "linear", factor=2.0, on_existing="replace"):
            unpatch_model(model)
        assert torch.equal(logits(model, ids), expected)
    assert unchanged(before, snapshot(model))


def test_a_block_that_comes_too_late_leaves_the_patch_of_another_thread(monkeypatch):
    """Both threads find the model native; the other one patches it first."""
    model, ids = build("llama"), tokens(1, 40)

    def other_thread_is_first(*_):
        monkeypatch.undo()
        thread = threading.Thread(target=put, args=(model, "self_extend"))
        thread.start()
        thread.join()

    monkeypatch.setattr("pe_patch.patching.api.check_choice", other_thread_is_first)
    with pytest.raises(AlreadyPatchedError), patched(model, "linear", factor=2.0):
        raise AssertionError
    assert torch.equal(logits(model, ids), logits(put(build("llama"), "self_extend"), ids))


@pytest.mark.parametrize("name", ("yarn", "alibi", "self_extend"))
def test_a_module_put_in_behind_the_patch_is_an_error(name):
    model, ids = put(build("llama"), name), tokens(1, 20)
    expected = logits(build("llama"), ids)
    model.model.rotary_emb = LlamaRotaryEmbedding(LlamaConfig(**build("llama").config.to_dict()))
    with pytest.raises(NoEffectError, match="rotary_emb is a LlamaRotaryEmbedding that was assigned after the patch"):
        logits(model, ids)
    unpatch_model(model)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("name", ("alibi", "self_extend", "shaw", "dynamic_ntk"))
def test_an_attention_put_in_behind_the_patch_is_an_error(name):
    model = put(build("llama"), name)
    layer = model.model.layers[1]
    attention: Any = LlamaAttention(LlamaConfig(**build("llama").config.to_dict()), 1)
    attention.load_state_dict(layer.self_attn.state_dict())
    attention.config, layer.self_attn = model.config, attention.eval()
    with pytest.raises(NoEffectError, match="LlamaAttention was added to the model after patching"):
        logits(model, tokens(1, 20))


@pytest.mark.parametrize(("layers", "gone"), [(None, 0), (None, 1), ([1], 0), ([0, 2], 1), ([0, 2], 0)])
@pytest.mark.parametrize("name", ("yarn", "self_extend", "shaw"))
def test_layers_taken_out_of_a_patched_model_are_saved_as_they_are(name, layers, gone, tmp_path):
    model, ids = put(build("llama", num_hidden_layers=3), name, layers=layers), tokens(1, 40)
    del model.model.layers[gone]
    model.config.num_hidden_layers = 2
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert error(logits(load_patched(tmp_path), ids), expected) < TOLERANCE
    assert torch.equal(logits(model, ids), expected)
    unpatch_model(model)
    native = build("llama", num_hidden_layers=3)
    del native.model.layers[gone]
    assert torch.equal(logits(model, ids), logits(native, ids))


@pytest.mark.parametrize("family", ("bloom", "gpt2", "llama"))
def test_the_config_of_a_patched_model_builds_no_model_without_the_scheme(family, tmp_path):
    """BLOOM and GPT-2 have no rotary module that stops at a rope type it does not know."""
    model, ids = put(build(family), "self_extend"), tokens(1, 40)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    saved, own = AutoConfig.from_pretrained(tmp_path), copy.deepcopy(model.config)
    for make in (
        lambda: type(model)(model.config),
        lambda: type(model)(own),
        lambda: type(model.base_model)(own),
        lambda: type(model).from_pretrained(tmp_path, config=saved),
    ):
        with pytest.raises(UnsupportedError, match=r"patched with 'self_extend'.*load_patched"):
            make()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path))
    assert error(logits(loaded, ids), expected) < TOLERANCE
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        built = AutoModelForCausalLM.from_config(model.config).eval()
        built.load_state_dict(model.state_dict())
        assert error(logits(built, ids), expected) < TOLERANCE
    unpatch_model(model)
    type(model)(model.config)


@pytest.mark.parametrize("part", ("whole", "base"))
@pytest.mark.parametrize("name", ("yarn", "alibi", "self_extend", "dynamic_ntk"))
def test_a_config_that_was_edited_after_the_patch_is_saved_as_the_model_computes(name, part, tmp_path, caplog):
    model, ids = put(build("llama"), name), tokens(1, 60)
    expected = logits(model, ids)
    model.config.max_position_embeddings, model.config.pad_token_id = 4096, 5
    model.config.rope_parameters["rope_theta"] = 5e5
    saved = model if part == "whole" else model.model
    saved.save_pretrained(tmp_path)
    assert "max_position_embeddings=4096" in caplog.text and "rope_theta=500000.0 (it is 10000.0)" in caplog.text
    loaded = [load_patched(tmp_path), AutoModel.from_pretrained(tmp_path).eval()]
    with torch.no_grad():
        states = [getattr(each, "model", each)(ids).last_hidden_state for each in (*loaded, model)]
    assert torch.equal(states[0], states[2]) and torch.equal(states[1], states[2])
    assert loaded[0].config.pad_token_id == 5
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("name", ("shaw", "mla"))
def test_the_weights_of_a_scheme_are_found_in_files_of_a_variant(name, tmp_path):
    model, ids = put(build("llama"), name), tokens(1, 40)
    for size in ("5GB", "20KB"):
        folder = tmp_path / size
        model.save_pretrained(folder, variant="fp16", max_shard_size=size)
        assert error(logits(load_patched(folder, variant="fp16"), ids), logits(model, ids)) < TOLERANCE
        loaded = AutoModelForCausalLM.from_pretrained(folder, variant="fp16").eval()
        assert error(logits(loaded, ids), logits(model, ids)) < TOLERANCE


def fork(cache):
    """Return a cache that shares what is in there and grows by itself."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


@pytest.mark.parametrize("name", ("yarn", "alibi", "self_extend", "shaw", "dynamic_ntk"))
def test_a_shallow_copy_of_a_cache_is_continued_by_itself(name):
    """Several answers to one prompt, without copies of its keys."""
    model, ids = put(build("llama"), name), tokens(1, 20)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    other, answers = fork(cache), [tokens(1, 8, seed=5), tokens(1, 8, seed=6)]
    for start, stop in ((0, 4), (4, 8)):
        for answer, mine in zip(answers, (cache, other), strict=True):
            with torch.no_grad():
                found = model(answer[:, start:stop], past_key_values=mine).logits
            expected = in_chunks(model, torch.cat((ids, answer), 1), [20, 4, 4])
            assert error(found, expected[:, 20 + start : 20 + stop]) < TOLERANCE


@pytest.mark.parametrize("name", ("alibi", "sinusoidal", "self_extend"))
def test_position_ids_without_rows_are_those_of_every_row(name):
    """GPT-2 takes them."""
    ids, at = tokens(2, 20), torch.arange(20)
    native = build("gpt2")
    assert torch.equal(logits(native, ids, position_ids=at), logits(native, ids))
    model = put(native, name)
    assert torch.equal(logits(model, ids, position_ids=at), logits(model, ids, position_ids=at[None]))


@pytest.mark.parametrize("name", ("alibi", "dynamic_ntk", "shaw"))
def test_a_mask_of_this_pass_alone_is_an_error(name):
    model, ids = put(build("llama"), name), tokens(2, 20)
    with torch.no_grad():
        cache = model(ids[:, :12], use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match=r"covers 8 tokens, but 20 are read: 12 in the cache and 8"):
            model(ids[:, 12:], past_key_values=cache, attention_mask=torch.ones(2, 8, dtype=torch.long))


def with_strong_sinks():
    model = families.build("gpt_oss", std=0.3)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data = torch.full_like(parameter, 3.0)
    return model


@pytest.mark.parametrize("name", ("alibi", "rope_alibi", "kerple", "sandwich"))
def test_a_bias_beside_learned_sinks_is_that_of_the_distance(name):
    """A sink competes with the scores, so a bias by the key's position alone is another model."""
    model, ids, mask = with_strong_sinks(), tokens(1, 30), torch.ones(1, 30, dtype=torch.long)
    mask[:, :10] = 0
    patch_model(model, name)
    alone = logits(model, ids[:, 10:])
    assert error(logits(model, ids, attention_mask=mask)[:, 10:], alone) < TOLERANCE
    far = torch.arange(20)[None] + 1000
    assert error(logits(model, ids[:, 10:], position_ids=far), alone) < 5e-4


def test_alibi_beside_sinks_is_the_formula():
    model = with_strong_sinks()
    patch_model(model, "alibi")
    attention, core = model.model.layers[1].self_attn, {}
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, heads, 9, 16, generator=generator) for heads in (4, 2, 2))
    at = torch.arange(9)[None]
    for backend in ("eager", "sdpa"):
        core[backend] = attend(
            attention, query, key, value, None, backend=BACKENDS[backend], scaling=0.25, positions=Positions(at, at),
            cached=False, s_aux=attention.sinks.detach(),
        )[0]  # fmt: skip
    keys, values = (each.double().repeat_interleave(2, 1) for each in (key, value))
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64)[:, None, None]
    scores = query.double() @ keys.transpose(2, 3) * 0.25 - slopes * (at[0][:, None] - at[0][None])
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    sinks = attention.sinks.detach().double()[None, :, None, None].expand(1, 4, 9, 1)
    expected = (torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ values).transpose(1, 2)
    for found in core.values():
        assert error(found.double(), expected) < TOLERANCE


@pytest.mark.parametrize("name", ("rope", "dynamic_ntk"))
def test_sdpa_keeps_the_sinks_that_transformers_leaves_out(name):
    """GPT-OSS has no SDPA in Transformers, whose function for it ignores sinks; under a patch it may be chosen."""
    model, ids = with_strong_sinks(), tokens(2, 30)
    expected = logits(model, ids)
    options: dict[str, Any] = {} if name == "rope" else {"factor": 1.0}
    patch_model(model, name, on_existing="replace", **options)
    model.set_attn_implementation("sdpa")
    assert error(logits(model, ids), expected) < TOLERANCE
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :6] = 0
    assert error(logits(model, ids, attention_mask=mask)[:1, 6:], logits(model, ids[:1, 6:])) < TOLERANCE
    assert error(in_chunks(model, ids, [20, 1, 9]), expected) < TOLERANCE


@pytest.mark.parametrize("name", ("alibi", "self_extend", "rerope", "cope", "dynamic_ntk pinned"))
@pytest.mark.parametrize("length", (10, 24))
def test_rows_of_a_static_cache_that_slides_are_followed(name, length):
    """All layers of Mistral slide (its window is 16), so none holds every key."""
    model, ids = put(build("mistral"), name), tokens(2, length + 8)
    mask = torch.ones_like(ids)
    mask[0, : length - 6] = 0
    cache, order = StaticCache(config=model.config, max_cache_len=64), torch.LongTensor([1, 0])
    at = (mask.cumsum(1) - 1).clamp(min=0)

    def read(start, stop):
        given = {"position_ids": at[:, start:stop], "attention_mask": mask[:, :stop], "past_key_values": cache}
        with torch.no_grad():
            return model(ids[:, start:stop], **given).logits

    read(0, length)
    read(length, length + 3)
    cast(Any, cache).reorder_cache(order)
    ids, mask, at = ids[order], mask[order], at[order]
    found = torch.cat((read(length + 3, length + 4), read(length + 4, length + 8)), 1)
    for row in range(2):
        expected = logits(model, ids[row : row + 1, mask[row].bool()])[:, -5:]
        assert error(found[row : row + 1], expected) < TOLERANCE


@pytest.mark.parametrize("name", ("x" * 300, "a\0b", "/".join(["y" * 200] * 30)))
def test_a_folder_that_no_file_system_takes_is_refused_by_name(name, tmp_path):
    model = build("llama")
    patch_model(model, "yarn", factor=2.0)
    with pytest.raises(OutputError, match="cannot be a folder"):
        export(model, tmp_path / name)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 6}),
        ("gemma3_text", {"sliding_window": 6}),
        ("llama4_text", {"attention_chunk_size": 6}),
    ],
)
@pytest.mark.parametrize("name", ("rope", "alibi", "self_extend"))
def test_a_hole_within_the_window_of_a_sliding_layer_is_refused(family, changes, name):
    """Transformers counts masked tokens in such a window, so a row with a hole would differ from the row without it."""
    model = families.build(family, **changes)
    options: dict[str, Any] = {"factor": 2} if name == "self_extend" else {}
    if family == "gemma3_text" and name == "self_extend":  # its layer types turn by different bases
        options["layers"] = [i for i, kind in enumerate(model.config.layer_types) if kind == "sliding_attention"]
    patch_model(model, name, **options)
    ids, mask = tokens(2, 15), torch.ones(2, 15, dtype=torch.long)
    mask[0, 5:8] = 0
    with pytest.raises(UnsupportedError, match="masked tokens between real ones"):
        model(ids, attention_mask=mask)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, :4] = 0
    padded = model(ids, attention_mask=mask).logits[:1, 4:]
    assert error(padded, logits(model, ids[:1, 4:])) < TOLERANCE


def test_a_hole_that_no_window_reaches_is_no_position():
    model, ids = patch_model(families.build("mistral", sliding_window=12), "alibi"), tokens(1, 12)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 3:6] = 0
    shown = torch.cat((ids[:, :3], ids[:, 6:]), 1)
    holed = model(ids, attention_mask=mask).logits[:, mask[0] == 1]
    assert error(holed, logits(model, shown)) < TOLERANCE


@pytest.mark.parametrize(("name", "options"), [("dynamic_ntk", {"factor": 2.0}), ("yarn", {"factor": "auto"})])
def test_a_prompt_read_in_chunks_is_refused_where_the_length_decides(name, options):
    model = build("llama")
    window = model.config.max_position_embeddings
    patch_model(model, name, **options)
    settings: Any = {"max_new_tokens": 2, "do_sample": False, "prefill_chunk_size": 16, "pad_token_id": 0}
    short = tokens(1, window - 8)
    assert torch.equal(
        model.generate(short, **settings), model.generate(short, **settings | {"prefill_chunk_size": None})
    )
    with pytest.raises(UnsupportedError, match="prefill_chunk_size=16"):
        model.generate(tokens(1, window + 8), **settings)
    model.generate(tokens(1, window + 8), **settings | {"prefill_chunk_size": window + 8})
