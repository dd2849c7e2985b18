"""A cache is continued as the scheme that filled it needs, or refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from pe_patch import CacheError, patch_model, unpatch_model

from . import families
from .models import FAMILIES, build, error, logits, padded, put, tokens

pytestmark = pytest.mark.fast
TOLERANCE = 1e-5
AT_SCORES = ("alibi", "self_extend", "rerope", "shaw", "cope", "dynamic_ntk pinned")
"""One scheme of each mechanism that needs to know where cached keys are."""
STATIC = ("yarn", "linear", "rope", "nope", "sinusoidal")

CELLS = [("llama", name) for name in AT_SCORES]
CELLS += [(family, name) for family in ("gpt_neox", "bloom") for name in ("alibi", "self_extend")]
at_scores = pytest.mark.parametrize(("family", "name"), CELLS)
with_position_ids = pytest.mark.parametrize(
    ("family", "name"), [cell for cell in (*CELLS, ("llama", "yarn")) if cell[0] != "bloom"]
)
every = pytest.mark.parametrize(("family", "name"), [*CELLS, ("llama", "yarn"), ("bloom", "yarn")])

any_scheme = pytest.mark.parametrize(
    ("family", "name"), [*CELLS, *(("llama", name) for name in STATIC), ("bloom", "yarn"), ("gpt_neox", "yarn")]
)


@torch.no_grad()
def read(model, ids, cache=None, **inputs):
    """Logits of one pass into a cache, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).logits, cache


def rows():
    """A batch of a short and a long row with its mask; then five more tokens for each."""
    ids, mask, short = padded()
    more = tokens(2, 5, seed=11)
    return ids, mask, short, more


def alone(model, short, long, more):
    """What each row's further tokens give when the row is read alone, in a pass over the whole row."""
    return [logits(model, torch.cat((row, more[n : n + 1]), 1))[:, -5:] for n, row in enumerate((short, long))]


@every
@pytest.mark.parametrize("change", ("reordered", "selected", "repeated", "copied", "pickled"))
def test_changed_rows_equal_rows_alone(family, name, change):
    model = put(build(family), name)
    ids, mask, short, more = rows()
    inputs = {} if family == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}  # as `generate` does
    _, cache = read(model, ids, attention_mask=mask, **inputs)
    order = torch.tensor({"reordered": [1, 0], "selected": [0], "repeated": [0, 0, 1, 1]}.get(change, [0, 1]))
    if change == "reordered":
        cache.reorder_cache(order)
    elif change == "selected":
        cache.batch_select_indices(order)
    elif change == "repeated":
        cache.batch_repeat_interleave(2)
    else:
        cache = copy.deepcopy(cache) if change == "copied" else pickle.loads(pickle.dumps(cache))
    mask = torch.cat((mask[order], torch.ones(len(order), 5, dtype=torch.long)), 1)
    inputs = {} if family == "bloom" else {"position_ids": (mask.cumsum(1) - 1)[:, -5:]}
    found, _ = read(model, more[order], cache, attention_mask=mask, **inputs)
    expected = alone(model, short, ids[1:], more)
    for row, index in zip(found, order.tolist(), strict=True):
        assert error(row[None], expected[index]) < TOLERANCE


class Exact(QuantizedLayer):
    """A layer of a quantized cache whose quantization loses nothing."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, quantized):
        return quantized


@pytest.mark.skipif(not hasattr(QuantizedLayer, "_apply_pending_reorder"), reason="Transformers loses the order itself")
@at_scores
def test_rows_of_a_quantized_cache_equal_rows_alone_when_reordered(family, name):
    model = put(build(family), name)
    ids, mask, short, more = rows()
    cache, order = DynamicCache(config=model.config), torch.tensor([1, 0])
    cache.layers = [Exact(residual_length=8) for _ in cache.layers]
    inputs = {} if family == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    read(model, ids, cache, attention_mask=mask, **inputs)
    cache.reorder_cache(order)
    mask = torch.cat((mask[order], torch.ones(2, 5, dtype=torch.long)), 1)
    inputs = {} if family == "bloom" else {"position_ids": (mask.cumsum(1) - 1)[:, -5:]}
    found, _ = read(model, more[order], cache, attention_mask=mask, **inputs)
    expected = alone(model, short, ids[1:], more)
    for row, index in zip(found, order.tolist(), strict=True):
        assert error(row[None], expected[index]) < TOLERANCE


@at_scores
@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))))
def test_a_copy_remembers_whether_keys_were_overwritten(family, name, duplicate):
    """The counter of changes and the identity of the keys are not those of the original."""
    model, ids = put(build(family), name), tokens(1, 13)
    _, cache = read(model, ids[:, :8])
    cache.layers[-1].keys.mul_(1)  # a change that leaves the values as they are
    with pytest.raises(CacheError, match="were overwritten"):
        read(model, ids[:, 8:], duplicate(cache))
    with torch.inference_mode():  # whose tensors have no counter
        _, cache = read(model, ids[:, :8])
    found, _ = read(model, ids[:, 8:], duplicate(cache))
    assert error(found, logits(model, ids)[:, 8:]) < TOLERANCE
    _, cache = read(model, ids[:, :8], StaticCache(config=model.config, max_cache_len=16))  # written in place
    found, _ = read(model, ids[:, 8:], duplicate(cache))
    assert error(found, logits(model, ids)[:, 8:]) < TOLERANCE


@with_position_ids
def test_a_cache_of_explicit_positions_is_cut_down_to_one_row(family, name):
    """Rows at positions of their own, then one of them without position ids."""
    model, ids, more = put(build(family), name), tokens(2, 12), tokens(1, 3, seed=5)
    at = torch.arange(12)[None].expand(2, -1)
    _, cache = read(model, ids, position_ids=at)
    cache.batch_select_indices(torch.tensor([1]))
    found, _ = read(model, more, cache)
    assert error(found, logits(model, torch.cat((ids[1:], more), 1))[:, -3:]) < TOLERANCE


@at_scores
def test_tokens_cut_out_of_the_middle_are_refused(family, name):
    """As key-value compressors do, in every layer alike."""
    model, ids = put(build(family), name), tokens(1, 24)
    _, cache = read(model, ids)
    kept = torch.tensor([0, 1, *range(12, 24)])
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    with pytest.raises(CacheError, match="removed from its middle"):
        read(model, tokens(1, 1), cache)


@at_scores
def test_layers_that_keep_different_tokens_are_refused(family, name):
    model, ids = put(build(family), name), tokens(1, 24)
    _, cache = read(model, ids)
    cache.layers[0].keys, cache.layers[0].values = cache.layers[0].keys[:, :, 4:], cache.layers[0].values[:, :, 4:]
    with pytest.raises(CacheError):
        read(model, tokens(1, 1), cache)


@any_scheme
def test_a_cache_from_before_the_patch_is_refused(family, name):
    model, ids = build(family), tokens(1, 12)
    _, cache = read(model, ids)
    put(model, name)
    with pytest.raises(CacheError, match="filled before the model was patched"):
        read(model, ids[:, :1], cache)


@any_scheme
def test_a_cache_of_a_patch_is_refused_once_the_patch_is_gone(family, name):
    model, ids = build(family), tokens(1, 12)
    native = logits(model, ids)
    _, cache = read(put(model, name), ids)
    unpatch_model(model)
    with pytest.raises(CacheError, match="without that patch"):
        read(model, ids[:, :1], cache)
    cache.crop(-12)
    assert torch.equal(read(model, ids, cache)[0], native)


@pytest.mark.parametrize("cache_class", (DynamicCache, StaticCache))
@pytest.mark.parametrize(("first", "second"), [("alibi", "yarn"), ("yarn", "linear"), ("rope", "nope"), ("yarn", "t5")])
def test_a_cache_of_another_scheme_is_refused(first, second, cache_class):
    model, ids = put(build("llama"), first), tokens(1, 12)
    length = {"max_cache_len": 32} if cache_class is StaticCache else {}
    _, cache = read(model, ids, cache_class(config=model.config, **length))
    unpatch_model(model)
    put(model, second)
    with pytest.raises(CacheError, match=f"filled under '{first}'"):
        read(model, ids[:, :1], cache)


def test_a_cache_of_other_options_is_refused_and_one_of_the_same_is_not():
    model, ids = build("llama"), tokens(1, 12)
    patch_model(model, "yarn", factor=4)
    expected = logits(model, ids)[:, 8:]
    _, cache = read(model, ids[:, :8])
    patch_model(model, "yarn", factor=8, on_existing="replace")
    with pytest.raises(CacheError, match="other options"):
        read(model, ids[:, 8:], copy.deepcopy(cache))
    patch_model(model, "yarn", factor=4, on_existing="replace")
    assert error(read(model, ids[:, 8:], cache)[0], expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ("dynamic_ntk", "dynamic_yarn", "longrope", "yarn auto"))
def test_a_long_first_pass_cannot_be_cropped_into(family, name):
    """Its tokens were encoded for its length; a fresh pass over what remains would encode them otherwise."""
    model, ids = put(build(family), name), tokens(1, 50)
    _, cache = read(model, ids)
    cache.crop(-30)
    with pytest.raises(CacheError, match="cropped to 20 tokens"):
        read(model, ids[:, :1], cache)


@at_scores
def test_a_pass_that_was_interrupted_can_be_undone_by_a_crop(family, name, monkeypatch):
    model, ids = put(build(family), name), tokens(1, 16)
    expected = logits(model, ids)[:, 10:]
    _, cache = read(model, ids[:, :10])
    last = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    hook = last[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read(model, ids[:, 10:], cache)
    hook.remove()
    broken = copy.deepcopy(cache)
    with pytest.raises(CacheError):
        read(model, ids[:, 10:], broken)
    layer = cache.layers[0]
    layer.keys, layer.values = layer.keys[:, :, :10], layer.values[:, :, :10]
    assert error(read(model, ids[:, 10:], cache)[0], expected) < TOLERANCE


@every
@pytest.mark.parametrize("steps", ((12,), (8, 1, 1, 1, 1)))
def test_holes_in_a_mask_are_no_positions(family, name, steps):
    """Mask three of twelve tokens in the middle of a row: it gives what the row without them gives."""
    model, ids = put(build(family), name), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 3:6] = 0
    real = mask[0].bool()
    expected = logits(model, ids[:1, real])
    cache, start, found = DynamicCache(config=model.config), 0, []
    for size in steps:
        step, cache = read(model, ids[:, start : start + size], cache, attention_mask=mask[:, : start + size])
        found.append(step)
        start += size
    assert error(torch.cat(found, 1)[:1, real], expected) < TOLERANCE
    assert error(logits(model, ids, attention_mask=mask)[:1, real], expected) < TOLERANCE
    assert error(torch.cat(found, 1)[1:], logits(model, ids[1:])) < TOLERANCE


@pytest.mark.parametrize("family", ("phi3", "phimoe"))
@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("longrope", {"long_factor": [2.0] * 8}),
        ("dynamic_ntk", {}),
        ("linear", {"factor": "auto"}),
        ("yarn", {"factor": 2}),
    ],
)
def test_a_batch_of_phi_is_its_rows_alone_across_the_window(family, scheme, options):
    """Transformers drops Phi-3's cache when the padded length crosses the window, whatever the row's own length."""
    model = families.build(family, max_position_embeddings=128, original_max_position_embeddings=32)
    patch_model(model, scheme, original_max_position_embeddings=32, **options)
    prompts = [tokens(1, 26), tokens(1, 31, seed=3)]
    ids = torch.zeros(2, 31, dtype=torch.long)
    ids[0, 5:], ids[1] = prompts[0][0], prompts[1][0]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    asked = {"max_new_tokens": 16, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    asked |= {"eos_token_id": None, "pad_token_id": 0}
    passes = []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    together = model.generate(ids, attention_mask=mask, **asked)
    assert passes == [31] + [1] * 15
    for row, prompt in enumerate(prompts):
        single = model.generate(prompt, **asked)
        for found, expected in zip(together.logits, single.logits, strict=True):
            assert error(found[row : row + 1], expected) < TOLERANCE
