"""Remapped rotations: the authors' own distances, the papers' attention in float64, and what stays exact nearby."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pe_patch import SCHEMES, PePatchError, Positions, UnsupportedError, describe, export, load_patched, patch_model

from . import goldens, oracles
from .families import build as build_family
from .models import BACKENDS, WINDOW, build, cached_logits, error, logits, put, tokens
from .pair_oracle import Distance, compare, through
from .rotary_cases import close, shape

NAMES = ("rerope", "leaky_rerope", "self_extend", "dca", "string", "lm_infinite")


def matrix(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows])


AUTHORS: list[tuple[str, str, dict[str, str], str]] = [
    ("self_extend/", "self_extend", {"group": "group_size_1", "window": "group_size_2"}, "relative_position"),
    ("rerope/", "rerope", {"window": "window"}, "relative_position"),
    ("leaky_rerope/", "leaky_rerope", {"window": "window", "k": "scaling_factor"}, "relative_position"),
    (
        "dca/",
        "dca",
        {"chunk_size": "chunk_size", "local_window": "local_window"},
        "relative_position_prefill",
    ),
    ("lm_infinite/", "lm_infinite", {"window": "local_branch", "sinks": "global_branch"}, "relative_position"),
]


@pytest.mark.parametrize(("prefix", "name", "options", "field"), AUTHORS)
def test_the_authors_own_distances(prefix, name, options, field):
    for entry in goldens.load(prefix).values():
        said, expected = entry["params"], matrix(entry[field])
        scheme = SCHEMES[name](shape(), **{option: said[key] for option, key in options.items()})
        torch.testing.assert_close(scheme.relative_position(said["n"]), expected, rtol=0, atol=0, equal_nan=True)
        if "decode_last_row" in entry:
            ours = scheme.relative_position(said["n"])[-1]
            torch.testing.assert_close(ours, torch.tensor(entry["decode_last_row"]).float(), rtol=0, atol=0)


def test_the_authors_own_distances_of_string():
    """Those of decoding: their first pass counts one key of each row twice."""
    entry = goldens.load("string/")["string/n16_S6_W3"]
    ours = SCHEMES["string"](shape(), shift=6, window=3).relative_position(16)
    for row, expected in entry["relative_position_decode_rows"].items():
        assert ours[int(row), : int(row) + 1].tolist() == expected


def test_the_authors_own_log_scaling():
    entry = goldens.load("logn_scale/")["logn_scale/base8"]
    scheme: Any = SCHEMES["self_extend"](shape(window=8), log_scaling=True)
    close(scheme.query_scale(torch.arange(len(entry["value"]))), entry["value"])
    assert not scheme.shift_invariant and not SCHEMES["rerope"](shape(), log_scaling=True).shift_invariant


def dual_chunk(c: int, w: int) -> Distance:
    u = c - w

    def of(i: int, j: int) -> float:
        if i // u == j // u:
            return i - j
        if i // u == j // u + 1:
            return min(i % u + u, c) - j % u
        return min(2 * u - 1, c) - j % u

    return of


PAPERS: dict[str, tuple[dict[str, Any], Distance]] = {
    "rerope": ({"window": 12}, lambda i, j: min(i - j, 12)),
    "leaky_rerope": (
        {"window": 12, "k": 4},
        lambda i, j: i - j if i - j < 12 else 12 + (i - j - 12) / 4,
    ),
    "self_extend": (
        {"window": 14, "group": 4},
        lambda i, j: i - j if i - j < 14 else i // 4 + 14 - 14 // 4 - j // 4,
    ),
    "dca": ({"chunk_size": 16, "local_window": 4}, dual_chunk(16, 4)),
    "string": (
        {"shift": 16, "window": 4, "attention_factor": 1.0},
        lambda i, j: i - j if i - j < 16 else i - j - 16 + 4,
    ),
    "lm_infinite": (
        {"window": 16, "sinks": 3},
        lambda i, j: i - j if i - j < 16 else 16 if j < 3 else None,
    ),
}
EXACT = {"rerope": 12, "leaky_rerope": 12, "self_extend": 14, "dca": 16, "string": 16, "lm_infinite": 16}
"""With the options above, up to how many tokens nothing changes."""


@pytest.mark.parametrize(("backend", "length"), [("eager", 48), ("sdpa", 48), ("sdpa", 300)])
@pytest.mark.parametrize("name", NAMES)
def test_attention_and_its_gradients_are_the_papers(name, backend, length):
    options, of = PAPERS[name]
    model = patch_model(build("llama", num_hidden_layers=1), name, backend=backend, **options)
    compare(through(model, length, rows=2 if length < 100 else 1), of)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rerope", "leaky_rerope", "self_extend"])
def test_log_scaling_sharpens_queries(name, backend):
    options, of = PAPERS[name]
    model = build("llama", num_hidden_layers=1)
    patch_model(model, name, backend=backend, log_scaling=True, **options)
    compare(through(model, 48), of, sharpness=lambda i: max(1.0, math.log(i + 1) / math.log(WINDOW)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_string_multiplies_cos_and_sin(backend):
    """The default as the authors have it; scores gain its square."""
    model = build("llama", num_hidden_layers=1)
    patch_model(model, "string", backend=backend, shift=16, window=4)
    compare(through(model, 48), PAPERS["string"][1], sharpness=lambda i: (0.1 * math.log(2) + 1) ** 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_short_text_is_as_it_was(name):
    model = build("llama")
    native = {length: logits(model, tokens(2, length)) for length in (EXACT[name], 40)}
    patch_model(model, name, **PAPERS[name][0])
    assert error(logits(model, tokens(2, EXACT[name])), native[EXACT[name]]) < 1e-5
    assert error(logits(model, tokens(2, 40)), native[40]) > 1e-2
    near = PAPERS[name][0].get("local_window", EXACT[name] - 1)
    ours = model.model.position_schemes.scheme[0].relative_position(60)
    distance = torch.arange(60.0)[:, None] - torch.arange(60.0)
    inside = (distance >= 0) & (distance <= near)
    assert torch.equal(ours[inside], distance[inside])


@pytest.mark.parametrize("family", ["cohere", "deepseek_v3", "gpt_oss", "phi", "qwen3"])
def test_a_short_text_is_as_it_was_in_families_that_rotate_otherwise(family):
    """Neighbouring pairs, the last dimensions of a head, sinks in the softmax, a part of a head, normalised queries."""
    model, ids = build_family(family), tokens(2, 24)
    native = logits(model, ids)
    patch_model(model, "rerope", window=24)
    assert error(logits(model, ids), native) < 2e-6
    patch_model(model, "rerope", window=6, on_existing="replace")
    far = logits(model, ids)
    assert error(far, native) > 1e-2 and error(cached_logits(model, ids, 16), far) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_shifted_positions(name):
    model = patch_model(build("llama"), name, **PAPERS[name][0])
    ids, at = tokens(1, 48), torch.arange(48)[None]
    ones = torch.ones_like(ids)
    before = logits(model, ids, attention_mask=ones)
    moved = error(logits(model, ids, attention_mask=ones, position_ids=at + 1009), before)
    steady = name in ("rerope", "leaky_rerope", "string")
    assert SCHEMES[name].shift_invariant == steady
    assert moved < 1e-3 if steady else moved > 1e-2


class Recorder:
    """A core that hands back what it was asked for."""

    def __init__(self, causal: bool = True) -> None:
        self.causal = causal

    def ranges(self, query, key, value, positions, ranges):
        return ranges


@pytest.mark.parametrize(("name", "queries", "keys"), [
    ("rerope", 2, 2), ("leaky_rerope", 2, 2), ("self_extend", 2, 2), ("dca", 3, 1), ("string", 2, 1),
    ("lm_infinite", 2, 2),
])  # fmt: skip
def test_what_turns_alike_is_turned_once(name, queries, keys):
    scheme = SCHEMES[name](shape(16, window=WINDOW), **PAPERS[name][0])
    at = torch.arange(20)[None]
    positions = Positions(at, at)
    positions = positions._replace(prepared=scheme.prepare(positions))
    query, key = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16)
    ranges = scheme("attend", query, key, key, positions, Recorder())
    tables = [{id(None if turn is None else turn.cos) for turn in turns} for turns in zip(
        *((one.rotate_query, one.rotate_key) for one in ranges), strict=True
    )]  # fmt: skip
    assert [len(distinct) for distinct in tables] == [queries, keys]
    if name in ("rerope", "lm_infinite"):
        assert ranges[1].rotate_key is None
    with pytest.raises(UnsupportedError, match="looks ahead"):
        scheme("attend", query, key, key, positions, Recorder(causal=False))


RULES: list[tuple[int, dict[str, Any], int, int, int]] = [
    # trained window, options, then group, window and reach by W + (N - W) / G <= 2 L / 3
    (4096, {}, 8, 1024, 25600),
    (4096, {"factor": 4}, 9, 1024, 28672),  # 15360 / (2730.67 - 1024) = 9
    (4096, {"factor": 4, "group": 8}, 8, 780, 27308),  # (2730.67 - 2048) / (1 - 1 / 8) = 780.2
    (4096, {"factor": 4, "window": 2048}, 21, 2048, 45056),  # 14336 / 682.67 = 21
    (4096, {"factor": 4, "group": 6, "window": 1024}, 6, 1024, 19456),
    (4096, {"factor": 1}, 1, 1024, 4096),
    (32, {}, 8, 8, 200),
    (32, {"group": 4, "window": 12}, 4, 12, 92),
]


@pytest.mark.parametrize(("window", "options", "group", "near", "reach"), RULES)
def test_self_extend_follows_the_factor(window, options, group, near, reach):
    scheme = SCHEMES["self_extend"](shape(window=window), **options)
    assert scheme.resolved_options == {"group": group, "near_window": near} and scheme.effective_window == reach


def test_the_windows_of_the_others():
    for name, options, window in (
        ("rerope", {}, None), ("dca", {}, None), ("string", {}, None), ("lm_infinite", {}, None),
        ("leaky_rerope", {"window": 1024, "k": 4}, 13312),
    ):  # fmt: skip
        assert SCHEMES[name](shape(), **options).effective_window == window
    assert SCHEMES["rerope"](shape()).resolved_options == {"near_window": 512}
    assert SCHEMES["dca"](shape()).resolved_options == {"chunk_size": 3072, "local_window": 512}
    assert SCHEMES["string"](shape(window=6144)).resolved_options == {"shift": 2048, "near_window": 128}
    assert SCHEMES["string"](shape(window=32)).resolved_options == {"shift": 10, "near_window": 5}
    assert SCHEMES["lm_infinite"](shape()).resolved_options == {"near_window": 4096}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("self_extend", {"window": 4097}, "window=4097, and the frequencies are good for 4096"),
    ("self_extend", {"group": 0}, "group=0"),
    ("self_extend", {"group": 2, "window": 1024, "factor": 4}, "reaches 7168 tokens of the 16384"),
    ("self_extend", {"group": 2, "factor": 4}, "a group of 7 or more"),
    ("self_extend", {"window": 3000, "factor": 4}, "give a smaller window"),
    ("self_extend", {"factor": 0.5}, "at least 1"),
    ("self_extend", {"log_scaling": 1}, "log_scaling=1"),
    ("rerope", {"window": 5000}, "at most 4096"),
    ("leaky_rerope", {"k": 0.5}, "at least 1"),
    ("dca", {"chunk_size": 5000}, "at most 4096"),
    ("dca", {"chunk_size": 100, "local_window": 60}, "at most half a chunk"),
    ("string", {"shift": 64, "window": 64}, "the shift is the larger one"),
    ("string", {"attention_factor": 0}, "above 0"),
    ("lm_infinite", {"window": 4097}, "at most 4096"),
    ("lm_infinite", {"sinks": 0}, "sinks=0"),
    ("rerope", {"over": "dynamic_ntk"}, "needs fixed frequencies"),
    ("rerope", {"over": "self_extend"}, "not defined by those alone"),
]


@pytest.mark.parametrize(("name", "options", "said"), BAD)
def test_what_cannot_be_is_an_error(name, options, said):
    with pytest.raises(TypeError, match=re.escape(said)) as caught:
        SCHEMES[name](shape(), **options)
    assert isinstance(caught.value, PePatchError)


def test_flash_does_not_take_ranges():
    with pytest.raises(UnsupportedError, match="use 'sdpa', 'flex' or 'eager'"):
        patch_model(build("llama"), "self_extend", group=4, window=8, backend="flash")


def test_ranges_are_not_added_to_blooms_own_positions():
    with pytest.raises(UnsupportedError, match="leave keep_native out"):
        put(build("bloom"), "self_extend", keep_native=True)


SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip


def test_over_the_scaling_that_a_model_has(tmp_path):
    """The frequencies stay the model's, and its scaled window is the one that is extended."""
    model = build("llama", num_hidden_layers=1, rope_parameters=SCALED)
    native = logits(model, tokens(2, 14))
    patch_model(model, "self_extend", group=4, window=14, on_existing="compose")
    assert error(logits(model, tokens(2, 14)), native) < 1e-5
    assert model.config.max_position_embeddings == (32 - 14) * 4 + 14
    frequencies = oracles.by_turns(16, 10000.0, 2.0, 16, 1, 4)
    compare(through(model, 48), PAPERS["self_extend"][1], frequencies=frequencies)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_patched(tmp_path), tokens(2, 48)), logits(model, tokens(2, 48)))


@pytest.mark.parametrize("name", ["self_extend", "dca", "xpos", "rope_alibi"])
def test_saved_described_and_not_exported(name, tmp_path):
    model = put(build("llama", num_hidden_layers=1), name)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_patched(tmp_path / "saved"), tokens(2, 48)), logits(model, tokens(2, 48)))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tokens(2, 48)),
                       logits(model, tokens(2, 48)))  # fmt: skip
    with pytest.raises(StrictDataclassFieldValidationError, match="pe_patch"):
        LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedError, match=f"cannot express '{name}'"):
        export(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    found = describe(model)
    assert name in str(found) and found.effective["trained_window"] == WINDOW
    if name == "self_extend":
        assert found.effective["group"] == 4 and found.effective["effective_window"] == 92


def test_the_trained_window_is_that_of_the_model_whatever_a_scheme_stands_over():
    model = patch_model(build("llama"), "string", over={"scheme": "yarn", "factor": 8})
    assert describe(model).to_dict()["effective"]["trained_window"] == WINDOW
