"""Test length-dependent schemes with a cache: the frequencies change with the length, also after a crop."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import oracles
from .models import FAMILIES, PAIRS, WINDOW, build, cached_logits, error, logits, put, tokens

TOLERANCE = 1e-5
NAMES = ("dynamic_ntk", "dynamic_yarn", "longrope", "yarn auto", "linear auto")

every_length_dependent_scheme = pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in NAMES]
)


@cache
def model_of(family: str, name: str, **overrides: int):
    return put(build(family, **overrides), name)


def expected_frequencies(name: str, r: int, length: int) -> tuple[list[float], float]:
    """Return the papers' frequencies and factor for `length` tokens, with the options of `GIVEN`."""
    theta, s = 10000.0, max(1.0, length / WINDOW)
    yarn = oracles.yarn_frequencies(r, theta, s, WINDOW, beta_fast=4), oracles.yarn_attention(s)
    plain_yarn = oracles.yarn_frequencies(r, theta, s, WINDOW), oracles.yarn_attention(s)
    stretch = [1 + 0.5 * pair * (length > WINDOW) for pair in range(r // 2)]
    return {
        "dynamic_ntk": (oracles.dynamic_ntk(r, theta, 2.0, WINDOW, length), 1.0),
        "dynamic_yarn": yarn,
        "longrope": oracles.longrope(r, theta, stretch, 2.0, WINDOW),
        "yarn auto": plain_yarn,
        "linear auto": (oracles.linear(r, theta, s), 1.0),
    }[name]


def rotated_keys(bare: Tensor, name: str, length: int, width: int) -> Tensor:
    """Rotate unrotated keys `[batch, heads, key, head]` in float64 by the frequencies for `length` tokens."""
    frequencies, factor = expected_frequencies(name, width, length)
    angles = torch.arange(bare.shape[2], dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    bare = bare.double()
    pairs = torch.complex(bare[..., : width // 2], bare[..., width // 2 : width])
    pairs = pairs * torch.polar(torch.full_like(angles, factor), angles)
    return torch.cat((pairs.real, pairs.imag, bare[..., width:]), -1)


@every_length_dependent_scheme
def test_cached_keys_are_rotated_by_the_frequencies_of_the_current_length(family, name, monkeypatch):
    """Attention uses the cached unrotated keys, rotated by the formula for the new length."""
    model, width = model_of(family, name), 2 * PAIRS[family]
    used: list[Tensor] = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, *arguments, **keywords):
        used.append(key)
        return original(module, query, key, *arguments, **keywords)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    ids = tokens(1, 66)
    expectations = {20: WINDOW, 32: WINDOW, 33: 64, 64: 64, 65: 128}
    past = DynamicCache(config=model.config)
    for start, stop in [(0, 20), *((n, n + 1) for n in range(20, 66))]:
        used.clear()
        with torch.no_grad():
            model(ids[:, start:stop], past_key_values=past)
        if stop in expectations:
            assert len(used) == len(past.layers) == 2
            for key, layer in zip(used, past.layers, strict=True):
                assert error(key, rotated_keys(layer.keys, name, expectations[stop], width)) < TOLERANCE
                wrong = 64 if expectations[stop] == WINDOW else WINDOW
                assert error(key, rotated_keys(layer.keys, name, wrong, width)) > 100 * TOLERANCE


@every_length_dependent_scheme
def test_a_long_first_pass_uses_the_frequencies_of_its_length(family, name, monkeypatch):
    model, width, length = model_of(family, name), 2 * PAIRS[family], 40
    used: list[Tensor] = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS, "sdpa", lambda m, q, k, *a, **b: (used.append(k), original(m, q, k, *a, **b))[1]
    )
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, length), past_key_values=past)
    regime = 64 if name.endswith("auto") else length  # "auto" goes by powers of two
    for key, layer in zip(used, past.layers, strict=True):
        assert error(key, rotated_keys(layer.keys, name, regime, width)) < TOLERANCE


@every_length_dependent_scheme
def test_rows_that_cross_the_window_at_different_steps_equal_rows_decoded_alone(family, name):
    """One row crosses the window at the third step, one at the eleventh, and one before decoding."""
    model = model_of(family, name)
    lengths, total, prefill = (30, 22, 40), 52, 40
    rows = [tokens(1, length + total - prefill, seed=length) for length in lengths]
    padding = [torch.zeros(1, total - row.shape[1], dtype=torch.long) for row in rows]
    ids = torch.cat([torch.cat(pair, 1) for pair in zip(padding, rows, strict=True)])
    mask = torch.cat([torch.cat((pad, torch.ones_like(row)), 1) for pad, row in zip(padding, rows, strict=True)])
    together = cached_logits(model, ids, prefill, mask=mask)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = cached_logits(model, row, length)
        assert error(together[index : index + 1, -row.shape[1] :], alone) < TOLERANCE


@every_length_dependent_scheme
def test_cropping_the_cache_below_the_window_restores_the_earlier_frequencies(family, name):
    model, ids, other = model_of(family, name), tokens(1, 40), tokens(1, 6, seed=9)

    @torch.no_grad()
    def continue_from(past: DynamicCache) -> Tensor:
        steps = [model(other[:, n : n + 1], past_key_values=past).logits for n in range(other.shape[1])]
        return torch.cat(steps, 1)

    @torch.no_grad()
    def fill_cache(length: int) -> DynamicCache:
        past = DynamicCache(config=model.config)
        model(ids[:, :26], past_key_values=past)
        for n in range(26, length):
            model(ids[:, n : n + 1], past_key_values=past)
        return past

    beyond = fill_cache(40)
    beyond.crop(-12)
    assert torch.equal(continue_from(beyond), continue_from(fill_cache(28)))


@every_length_dependent_scheme
def test_several_tokens_across_the_window_equal_single_tokens(family, name):
    """The pass that checks candidate tokens has queries on both sides of the window."""
    model, ids = model_of(family, name), tokens(2, 40)
    one_by_one = cached_logits(model, ids, 28)
    with torch.no_grad():
        past = model(ids[:, :28], use_cache=True).past_key_values
        at_once = model(ids[:, 28:], past_key_values=past).logits
    assert error(at_once, one_by_one[:, 28:]) < TOLERANCE


def continue_greedily(model, prompt: Tensor, count: int, **arguments) -> Tensor:
    return model.generate(prompt, max_new_tokens=count, do_sample=False, **arguments)


@every_length_dependent_scheme
def test_assisted_and_prompt_lookup_generation_equal_greedy_generation(family, name):
    """Both feed tokens beyond the window before they accept them, and crop the cache."""
    model, assistant = model_of(family, name), build(family, seed=7, num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 8
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    for length in (29, 40):
        prompt = tokens(1, 10, seed=length).repeat(1, 4)[:, :length]
        greedy = continue_greedily(model, prompt, 16)
        assert greedy.shape[1] == length + 16
        assert torch.equal(continue_greedily(model, prompt, 16, assistant_model=assistant), greedy)
        assert torch.equal(continue_greedily(model, prompt, 16, prompt_lookup_num_tokens=6), greedy)


@every_length_dependent_scheme
def test_an_assistant_under_the_same_scheme_gives_greedy_generation(family, name):
    """It crops its cache below the length of its prompt when its first guess is wrong."""
    model, assistant = model_of(family, name), model_of(family, name, seed=7)
    for length in (29, 40):
        prompt = tokens(1, length, seed=length)
        greedy = continue_greedily(model, prompt, 16)
        assert torch.equal(continue_greedily(model, prompt, 16, assistant_model=assistant), greedy)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_layers_as_assistant_give_greedy_generation(name):
    """Llama alone of the three families computes fewer layers on demand."""
    model, prompt = model_of("llama", name), tokens(1, 40)
    layers, greedy = model.config.num_hidden_layers, continue_greedily(model, prompt, 16)
    assert torch.equal(continue_greedily(model, prompt, 16, assistant_early_exit=1), greedy)
    assert model.config.num_hidden_layers == layers > 1


@every_length_dependent_scheme
def test_the_last_logits_of_a_pass_with_a_cache_are_those_of_all(family, name):
    """Only assisted generation reads guesses together with a prompt; any other pass is one text."""
    model, ids = model_of(family, name), tokens(1, 60)
    with torch.no_grad():
        whole = model(ids, use_cache=True).logits
        kept = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=8).logits
    assert error(kept, whole[:, -8:]) < TOLERANCE


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in FAMILIES for n in ("rope", "alibi", *NAMES[:1])])
def test_beam_search_scores_equal_the_likelihood_of_their_sequences(family, name):
    """Beam search reorders the cache; the score of each sequence is that of its tokens fed one by one."""
    model, prompt = model_of(family, name), tokens(2, 28)
    found = model.generate(
        prompt, max_new_tokens=10, num_beams=4, num_return_sequences=2, do_sample=False, length_penalty=0.0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert found.sequences.shape == (4, 38)

    def likelihood(sequences: Tensor) -> Tensor:
        each = cached_logits(model, sequences, 28).log_softmax(-1)[:, 27:-1]
        return each.gather(2, sequences[:, 28:, None]).sum((1, 2))

    assert torch.allclose(likelihood(found.sequences), found.sequences_scores, atol=1e-4)
    greedy = likelihood(continue_greedily(model, prompt, 10))
    assert (found.sequences_scores[::2] >= greedy - 1e-4).all()


@every_length_dependent_scheme
def test_a_row_does_not_depend_on_the_other_rows_of_its_batch(family, name):
    """One first pass holds a short and a long document, padded on the left."""
    model, short, long = model_of(family, name), tokens(1, 20), tokens(1, 48, seed=4)
    ids = torch.cat((torch.cat((torch.zeros(1, 28, dtype=torch.long), short), 1), long))
    mask = torch.ones_like(ids)
    mask[0, :28] = 0
    generated = continue_greedily(model, ids, 14, attention_mask=mask)
    assert torch.equal(generated[:1, 28:], continue_greedily(model, short, 14))
    assert torch.equal(generated[1:], continue_greedily(model, long, 14))
    within = logits(model, short)
    assert error(logits(model, ids, attention_mask=mask)[:1, 28:], within) < TOLERANCE
