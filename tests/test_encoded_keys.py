"""Encoded keys beside a cache: each key is encoded once, and the result is that of encoding all keys at every step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from pe_patch import SCHEMES, describe, patch_model, unpatch_model
from pe_patch.errors import OptionError
from pe_patch.patching.api import find_patch
from pe_patch.patching.cache_record import RECORD, CacheRecord, reuse_encoded_keys
from pe_patch.schemes.relative import TransformerXL
from pe_patch.schemes.rotary import RotaryTransform

from .models import CASES, VOCABULARY, WINDOW, build, cached_logits, case, error, in_chunks, padded, put, tokens

COPIED = [
    name
    for name in CASES
    if name.split(" ")[0] in ("dynamic_ntk", "dynamic_yarn", "longrope", "rerope", "leaky_rerope", "self_extend", "dca")
    or name in ("string", "lm_infinite", "xpos", "linear auto", "yarn auto")
]
"""The cases whose schemes encode keys at the scores by the key's own position."""
WITH_COPIES = [name for name in COPIED if name != "longrope pinned"]
FAMILIES = ("llama", "gpt_neox", "qwen3", "mistral", "gemma3_text", "cohere")
CELLS = [
    pytest.param(family, name, marks=() if row == 0 or column % 5 == row - 1 else pytest.mark.thorough)
    for row, family in enumerate(FAMILIES)
    for column, name in enumerate(WITH_COPIES)
]
"""Every scheme on every family. The default run has all on the first, and each of the others on one more."""
ANSWER = 256
"""Tokens of a greedy answer; with the prompt they cross the regimes at 32, 64, 128 and 256 tokens."""
LENGTH = 3 * WINDOW
"""Tokens of a text that crosses two regimes of length, at 32 and at 64."""


def model_of(family: str) -> Any:
    """A small model; Gemma 3 with sliding and full layers, Cohere with pairs of neighbours."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "initializer_range": 0.2,
        "max_position_embeddings": WINDOW, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "gemma3_text":
        return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, query_pre_attn_scalar=16)).eval()
    if family == "cohere":
        whole = {key: value for key, value in sizes.items() if key not in ("sliding_window", "layer_types", "head_dim")}
        return CohereForCausalLM(CohereConfig(**{**whole, "logit_scale": 1.0, "num_key_value_heads": 4})).eval()
    return build(family)


def arguments_of(family: str, name: str) -> tuple[str, dict[str, Any]]:
    """The scheme and its options on this family."""
    scheme, options = case(family if family == "gpt_neox" else "llama", name)
    return scheme, options | ({"layers": [1]} if family == "gemma3_text" else {})


def twins(family: str, name: str) -> tuple[Any, Any]:
    """The same model under the scheme, with copies of encoded keys and without."""
    scheme, options = arguments_of(family, name)
    pair = tuple(model_of(family) for _ in range(2))
    for model, key_copies in zip(pair, (True, False), strict=True):
        patch_model(model, scheme, **options, key_copies=key_copies)
    return pair


def encoded_in(cache: Any) -> Any:
    return getattr(cache, RECORD).encoded


@pytest.mark.parametrize(("family", "name"), CELLS)
def test_tokens_are_those_of_encoding_all_keys(family: str, name: str) -> None:
    fast, plain = twins(family, name)
    prompt, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0  # one row with padding
    options: dict[str, Any] = {
        "max_new_tokens": ANSWER, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    found, expected = (model.generate(prompt, attention_mask=mask, **options) for model in (fast, plain))
    assert error(torch.stack(found.logits), torch.stack(expected.logits)) < 2e-5
    assert torch.equal(found.sequences, expected.sequences)
    # A sliding layer replaces its keys at every step, and encodes the few that it keeps.
    assert bool(encoded_in(found.past_key_values).layers) == (family != "mistral")
    assert not encoded_in(expected.past_key_values).layers


@pytest.mark.parametrize("name", WITH_COPIES)
def test_a_key_is_encoded_once_in_a_regime(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = twins("llama", name)
    ids, rotated = tokens(1, LENGTH), []
    turn = RotaryTransform.__call__

    def counted(self: Any, x: Tensor) -> Tensor:
        rotated.append(x.shape[2])
        return turn(self, x)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :70], past_key_values=cache)
        model(ids[:, 70:71], past_key_values=cache)
        monkeypatch.setattr(RotaryTransform, "__call__", counted)
        for index in range(71, 90):
            model(ids[:, index : index + 1], past_key_values=cache)
    assert rotated and max(rotated) == 1, "only the new token's query and key"


@pytest.mark.parametrize("name", WITH_COPIES)
def test_bytes_are_what_describe_says(name: str) -> None:
    model, plain = twins("llama", name)
    stated = describe(model).effective["cache_bytes_per_token"]
    assert "cache_bytes_per_token" not in describe(plain).effective
    cache = DynamicCache(config=model.config)
    in_chunks(model, tokens(1, 40), [38, 1, 1], cache)
    held = sum(layer.keys[:, :, 0].nbytes + layer.values[:, :, 0].nbytes for layer in cache.layers)
    copies = encoded_in(cache).bytes_per_token
    assert stated == f"{held + copies:,}, with encoded keys ({held:,} with key_copies=False)" and copies > 0


def test_sliding_layers_have_no_copies_and_describe_says_so() -> None:
    for family, copied in (("gemma3_text", 1), ("mistral", 0)):
        model, _ = twins(family, "self_extend")
        stated = describe(model).effective.get("cache_bytes_per_token")
        cache = DynamicCache(config=model.config)
        in_chunks(model, tokens(1, 40), [38, 1, 1], cache)
        assert len(encoded_in(cache).layers) == copied
        held = 2 * 2 * 16 * 4  # of the patched layer: keys and values, two heads of 16, float32
        both = held + encoded_in(cache).bytes_per_token
        expected = f"{both:,}, with encoded keys ({held:,} with key_copies=False)" if copied else None
        assert stated == expected


@pytest.mark.parametrize("name", ["longrope pinned", "rope", "yarn", "alibi", "mla"])
def test_nothing_is_copied_where_keys_are_cached_encoded(name: str) -> None:
    model = put(build("llama"), name)
    cache = DynamicCache(config=model.config)
    in_chunks(model, tokens(1, 40), [38, 1, 1], cache)
    assert not encoded_in(cache).layers and "encoded keys" not in str(describe(model))


def cropped(cache: Any) -> Any:
    cache.crop(-10)
    return cache


def chosen(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache


def repeated(cache: Any) -> Any:
    cache.batch_repeat_interleave(2)
    return cache


def selected(cache: Any) -> Any:
    cache.batch_select_indices(torch.tensor([1]))
    return cache


def shallow(cache: Any) -> Any:
    return copy.copy(cache)


def moved(cache: Any) -> Any:
    """As after offloading: the keys lie in other memory."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return cache


def pickled(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


CHANGES: list[tuple[Callable[[Any], Any], list[int], int]] = [
    (cropped, [0, 1], 50), (chosen, [1, 0], 60), (repeated, [0, 0, 1, 1], 60), (selected, [1], 60),
    (copy.deepcopy, [0, 1], 60), (shallow, [0, 1], 60), (moved, [0, 1], 60), (pickled, [0, 1], 60),
]  # fmt: skip
"""A change of a cache, the rows that it then holds, and its number of tokens."""


def test_a_cache_in_host_memory_gets_no_copies() -> None:
    """They would stay on the device."""
    cache = DynamicCache(config=build("llama").config)
    record = CacheRecord("self_extend", "")
    assert reuse_encoded_keys(cache, record) is not None
    cache.offloading = True
    assert reuse_encoded_keys(cache, record) is None


@pytest.mark.parametrize(("change", "rows", "kept"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("name", ["dynamic_ntk", "self_extend", "xpos"])
def test_a_changed_cache_continues_as_a_new_one(
    name: str, change: Callable[[Any], Any], rows: list[int], kept: int
) -> None:
    fast, plain = twins("llama", name)
    ids, more = tokens(2, 60), tokens(len(rows), 30, seed=9)
    # The first pass is short, since a length-dependent scheme encodes it for its own length.
    found, expected = [], []
    for model, results in ((fast, found), (plain, expected)):
        cache = DynamicCache(config=model.config)
        cached_logits(model, ids, 20, cache)
        cache = change(cache)
        assert cache.get_seq_length() == kept
        with torch.no_grad():
            for index in range(30):
                results.append(model(more[:, index : index + 1], past_key_values=cache).logits)
    assert error(torch.cat(found, 1), torch.cat(expected, 1)) < 2e-5
    with torch.no_grad():
        fresh = DynamicCache(config=fast.config)
        whole = torch.cat((ids[rows][:, :kept], more), 1)
        again = cached_logits(fast, whole, 20, fresh)[:, kept:]
    assert error(torch.cat(found, 1), again) < 2e-5


def test_a_cropped_cache_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = twins("llama", "dynamic_ntk")
    cache = DynamicCache(config=model.config)
    cached_logits(model, tokens(1, 80), 20, cache)
    cache.crop(-5)
    lengths = []
    turn = RotaryTransform.__call__
    monkeypatch.setattr(RotaryTransform, "__call__", lambda self, x: (lengths.append(x.shape[2]), turn(self, x))[1])
    with torch.no_grad():
        model(tokens(1, 2, seed=3), past_key_values=cache)
    assert max(lengths) == 2


@pytest.mark.parametrize("name", ["dynamic_ntk", "self_extend", "xpos"])
def test_two_conversations_and_copies_of_them_do_not_mix(name: str) -> None:
    fast, plain = twins("llama", name)

    def conversation(model: Any) -> Tensor:
        first, second = (DynamicCache(config=model.config) for _ in range(2))
        texts = ((tokens(1, 60), first), (tokens(1, 50, seed=3), second))
        results = [cached_logits(model, ids, 20, cache) for ids, cache in texts]
        branch = copy.deepcopy(first)
        with torch.no_grad():
            for index in range(12):
                for seed, cache in enumerate((first, second, branch)):
                    token = tokens(1, 12, seed=20 + seed)[:, index : index + 1]
                    results.append(model(token, past_key_values=cache).logits)
        return torch.cat(results, 1)

    assert error(conversation(fast), conversation(plain)) < 2e-5


def test_keys_that_were_written_in_place_are_not_trusted() -> None:
    model, _ = twins("llama", "self_extend")
    cache = DynamicCache(config=model.config)
    cached_logits(model, tokens(1, 50), 20, cache)
    layer = encoded_in(cache).layers[0]
    keys = {index: each.keys for index, each in enumerate(cache.layers)}
    cache.layers[0].keys.mul_(2)
    encoded_in(cache).drop_what_changed(keys)
    assert 0 not in encoded_in(cache).layers and 1 in encoded_in(cache).layers and layer.copies


def test_an_interrupted_pass_leaves_nothing_wrong() -> None:
    fast, plain = twins("llama", "dca")
    ids, results = tokens(1, 60), []
    for model in (fast, plain):
        cache = DynamicCache(config=model.config)
        cached_logits(model, ids[:, :50], 20, cache)
        stop = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            model(ids[:, 50:51], past_key_values=cache)
        stop.remove()
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :49], layer.values[:, :, :49]
        results.append(in_chunks(model, ids[:, 49:], [1] * 11, cache))
    assert error(*results) < 2e-5


@pytest.mark.parametrize("name", ["self_extend", "dynamic_ntk", "xpos"])
def test_a_cache_read_in_inference_mode_continues_outside_it(name: str) -> None:
    ids, results = tokens(1, 60), []
    for model in twins("llama", name):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids[:, :50], past_key_values=cache)
            model(ids[:, 50:51], past_key_values=cache)
        results.append(in_chunks(model, ids[:, 51:], [1] * 9, cache))
    assert error(*results) < 2e-5


@pytest.mark.parametrize("name", ["self_extend", "dynamic_ntk", "xpos"])
def test_a_cache_read_under_autocast_continues_without_it(name: str) -> None:
    ids, results = tokens(1, 60), []
    for key_copies in (True, False):
        scheme, options = case("bloom", name)
        model = patch_model(build("bloom"), scheme, **options, key_copies=key_copies)
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(ids[:, :28], past_key_values=cache)
            model(ids[:, 28:29], past_key_values=cache)
        results.append(in_chunks(model, ids[:, 29:], [1] * 31, cache))
    assert error(*results) < 2e-2  # bfloat16 keys


def test_xpos_reads_keys_ahead_and_far_apart() -> None:
    for at in (10, 49, 50, 10_000_000):
        results = []
        for key_copies in (True, False):
            model = patch_model(build("llama"), "xpos", scale_base=1, key_copies=key_copies)
            cache = DynamicCache(config=model.config)
            cached_logits(model, tokens(1, 50), 40, cache)
            with torch.no_grad():
                place = torch.tensor([[at]])
                results.append(model(tokens(1, 1, seed=8), past_key_values=cache, position_ids=place).logits)
        assert error(*results) < 2e-5, at


def test_shaw_weighs_values_under_a_mask_of_numbers() -> None:
    generator = torch.Generator().manual_seed(3)
    mask = -3 * torch.rand(1, 1, 1, 51, generator=generator)
    mask[..., [3, 48]] = torch.finfo(torch.float32).min
    results = []
    for backend in ("sdpa", "eager"):
        model = build("llama")
        patch_model(model, "shaw", max_distance=6, backend=backend)
        drawn = torch.Generator().manual_seed(2)
        for parameter_name, parameter in model.named_parameters():
            if "position_schemes" in parameter_name:
                parameter.data = torch.randn(parameter.shape, generator=drawn)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens(1, 50), past_key_values=cache)
            results.append(model(tokens(1, 1, seed=8), past_key_values=cache, attention_mask=mask).logits)
    assert error(*results) < 2e-5


@pytest.mark.parametrize("name", ["self_extend", "dynamic_ntk", "xpos"])
def test_compiled_layers_continue_a_cache(name: str) -> None:
    ids, results = tokens(1, 55), []
    for compiled in (False, True):
        model, _ = twins("llama", name)
        cache = DynamicCache(config=model.config)
        cached_logits(model, ids[:, :52], 50, cache)
        if compiled:
            for layer in model.model.layers:
                layer.compile(backend="eager", fullgraph=True)
        results.append(in_chunks(model, ids[:, 52:], [1, 1, 1], cache))
    assert error(*results) < 2e-5


GENERATIONS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3}, "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "static": {"cache_implementation": "static"}, "assisted": {},
    "one chunk after the other": {"prefill_chunk_size": 7},
}  # fmt: skip


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("name", ["dynamic_ntk", "self_extend", "dca", "xpos"])
def test_every_way_to_generate(name: str, how: str) -> None:
    results = []
    for model in twins("llama", name):
        options = dict(GENERATIONS[how])
        if how == "assisted":
            options["assistant_model"] = build("llama", seed=0)
        prompt = tokens(1, 12).repeat(1, 2)
        results.append(
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50, do_sample=False, **options
            )
        )
    assert torch.equal(*results)


def test_a_text_in_chunks_and_with_padding_equals_one_pass() -> None:
    for name in ("self_extend", "rerope", "dca", "xpos", "string", "leaky_rerope"):
        fast, _ = twins("llama", name)
        ids, mask, _ = padded()
        with torch.no_grad():
            whole = fast(ids, attention_mask=mask, use_cache=False).logits
        real = mask.bool()
        parts = in_chunks(fast, ids, [20, 9, 1, 17, 1], mask=mask)
        assert error(parts[real], whole[real]) < 2e-5, name


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom"])
@pytest.mark.parametrize("name", ["shaw", "transformer_xl"])
def test_one_query_by_the_kernel_equals_eager(name: str, family: str) -> None:
    results = []
    prompt, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    for backend in ("sdpa", "eager"):
        model = put(build(family), name, backend=backend)
        options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
        output = model.generate(
            prompt, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
        )
        results.append((output.sequences, torch.stack(output.logits)))
    (tokens_fast, fast), (tokens_eager, eager) = results
    assert torch.equal(tokens_fast, tokens_eager) and error(fast, eager) < 2e-5


def test_a_table_by_distance_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = put(build("llama"), "transformer_xl")
    counts, make = [], TransformerXL.sinusoids

    def counted(self: Any, count: int, device: torch.device) -> Tensor:
        counts.append(count)
        return make(self, count, device)

    monkeypatch.setattr(TransformerXL, "sinusoids", counted)
    cached_logits(model, tokens(1, 70), 40, DynamicCache(config=model.config))
    assert len(counts) == 2 and counts[1] > 70, "for the first pass, and once with room for those behind it"


def test_eager_attention_reuses_nothing() -> None:
    model = build("llama")
    patch_model(model, "self_extend", group=4, window=12, backend="eager")
    cache = DynamicCache(config=model.config)
    cached_logits(model, tokens(1, 40), 20, cache)
    assert not encoded_in(cache).layers


def test_gradients_through_a_cache_reuse_nothing() -> None:
    model, _ = twins("llama", "self_extend")
    cache = DynamicCache(config=model.config)
    model(tokens(1, 20), past_key_values=cache)
    model(tokens(1, 5, seed=2), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None and not encoded_in(cache).layers


def test_the_option_is_checked() -> None:
    with pytest.raises(OptionError, match="key_copies='no'; give True or False"):
        patch_model(build("llama"), "dca", **{"key_copies": "no"})


def test_every_scheme_that_encodes_at_the_scores_by_position_is_listed() -> None:
    model = build("llama")
    listed = {name.split(" ")[0] for name in WITH_COPIES}
    for name in SCHEMES:
        if name.endswith("_2d") or name not in CASES:
            continue
        put(model, name)
        assert (find_patch(model).scheme.key_copies > 0) == (name in listed - {"linear", "yarn"}), name
        unpatch_model(model)
