"""The frequencies of every rotary scheme are those of Transformers, bit for bit, and rotation is the models' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pe_patch.core.scheme import AttentionShape
from pe_patch.schemes.registry import SCHEMES
from pe_patch.schemes.rotary import Rotary, cos_sin, rotate

from . import goldens, oracles
from .rotary_cases import CASES, Draw, build, shape, transformers_says


def draw_linear(draw: Draw) -> dict[str, Any]:
    return {"factor": draw.factor}


def draw_yarn(draw: Draw) -> dict[str, Any]:
    options: dict[str, Any] = {"factor": draw.factor}
    extra = draw.random.choice(
        [
            {},
            {"beta_fast": draw.random.uniform(4, 128), "beta_slow": draw.random.uniform(0.2, 4)},
            {"mscale": draw.random.choice([0.707, 1.0]), "mscale_all_dim": draw.random.uniform(0.1, 1.5)},
            {"mscale": 1.0},
            {"attention_factor": draw.random.uniform(0.5, 1.5)},
        ]
    )
    return options | extra | draw.random.choice([{}, {"truncate": False}, {"truncate": True}])


def draw_longrope(draw: Draw) -> dict[str, Any]:
    options = {"long_factor": draw.numbers(1, 64), "short_factor": draw.numbers(1, 2), "factor": draw.factor}
    return options | draw.random.choice([{}, {"attention_factor": draw.random.uniform(0.8, 1.6)}])


def draw_llama3(draw: Draw) -> dict[str, Any]:
    low = draw.random.uniform(0.3, 3)
    return {"factor": draw.factor, "low_freq_factor": low, "high_freq_factor": low + draw.random.uniform(0.1, 30)}


def draw_proportional(draw: Draw) -> dict[str, Any]:
    return {"factor": draw.factor, "partial_rotary_factor": draw.random.uniform(0.1, 1.0)}


DRAWS: dict[str, tuple[str, Callable[[Draw], dict[str, Any]]]] = {
    "linear": ("linear", draw_linear),
    "dynamic_ntk": ("dynamic", draw_linear),
    "yarn": ("yarn", draw_yarn),
    "longrope": ("longrope", draw_longrope),
    "llama3": ("llama3", draw_llama3),
    "proportional": ("proportional", draw_proportional),
}
WINDOWED = {"yarn", "longrope", "llama3"}


def both(name: str, seed: int, factor: float | None = None) -> list[tuple[tuple[Tensor, float], tuple[Tensor, float]]]:
    """(ours, Transformers') within the window and at two lengths beyond it."""
    rope_type, options_of = DRAWS[name]
    draw = Draw(seed, partial=name != "proportional")
    options = options_of(draw)
    if factor is not None:
        options["factor"] = factor
    parameters = {"rope_type": rope_type, **draw.parameters, **options}
    if rope_type in WINDOWED:
        parameters["original_max_position_embeddings"] = draw.window
    scheme = build(name, draw.shape, **options)
    lengths = [draw.window // 2, draw.window + 1, draw.random.randrange(draw.window + 2, 40 * draw.window)]
    return [(scheme.frequencies(n), transformers_says(parameters, draw.head, draw.window, n)) for n in lengths]


@pytest.mark.parametrize("name", DRAWS)
def test_frequencies_are_those_of_transformers_bit_for_bit(name: str) -> None:
    for seed in range(CASES):
        for (ours, our_factor), (theirs, their_factor) in both(name, seed):
            assert torch.equal(ours, theirs), f"seed {seed}"
            assert ours.dtype == torch.float32
            assert our_factor == their_factor, f"seed {seed}"


@pytest.mark.parametrize("name", DRAWS)
def test_frequencies_at_factor_one_are_those_of_transformers(name: str) -> None:
    for seed in range(CASES):
        for (ours, our_factor), (theirs, their_factor) in both(name, seed, factor=1.0):
            assert (ours - theirs).abs().max() <= 1e-7  # two of float32's steps at the most
            assert our_factor == pytest.approx(their_factor, rel=1e-7)


def test_plain_frequencies_are_those_of_transformers_bit_for_bit() -> None:
    for seed in range(CASES):
        draw = Draw(seed)
        theirs, _ = transformers_says({"rope_type": "default", **draw.parameters}, draw.head, draw.window)
        ours, factor = build("rope", draw.shape).frequencies()
        assert torch.equal(ours, theirs)
        assert factor == 1.0


NATIVE: list[tuple[str, dict[str, Any]]] = [
    ("rope", {}),
    ("rope", {"theta": 1e6}),
    ("linear", {"factor": 4}),
    ("linear", {"factor": 1}),
    ("ntk", {"factor": 4}),
    ("dynamic_ntk", {"factor": 2}),
    ("dynamic_ntk", {}),
    ("yarn", {"factor": 4}),
    ("yarn", {"factor": 1}),
    ("yarn", {"factor": 32, "truncate": False, "beta_fast": 24}),
    ("yarn", {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.7}),
    ("yarn", {"factor": 40, "mscale": 1.0}),
    ("yarn", {"factor": 8, "attention_factor": 1}),
    ("llama3", {"factor": 8, "original_max_position_embeddings": 1024}),
    ("longrope", {"long_factor": 3.0}),
    ("longrope", {"long_factor": 3.0, "factor": 16}),
    ("longrope", {"long_factor": 3.0, "factor": 16, "expected_length": 9000}),
    ("longrope", {"long_factor": 3.0, "short_factor": 1.5, "attention_factor": 1.2}),
    ("proportional", {"partial_rotary_factor": 0.25, "factor": 2}),
]


@pytest.mark.parametrize("where", [shape(128), shape(16, head=64)], ids=["whole head", "quarter"])
@pytest.mark.parametrize(("name", "options"), NATIVE)
def test_native_parameters_give_the_same_numbers_in_transformers(
    name: str, options: dict[str, Any], where: AttentionShape
) -> None:
    pairs = where.rotary_dim // 2
    options = {
        key: [value] * pairs if key in ("long_factor", "short_factor") else value for key, value in options.items()
    }
    scheme = build(name, where, **options)
    native = scheme.native()
    if name == "proportional" and where.rotary_dim < where.head_dim:
        assert native is None
        return
    assert native is not None and scheme.native_window is not None
    assert native == json.loads(json.dumps(native))
    for length in (100, 4096, 4097, 9000):
        theirs, their_factor = transformers_says(native, where.head_dim, scheme.native_window, length)
        ours, factor = scheme.frequencies(scheme.regime(length))
        assert torch.equal(ours, theirs)
        assert factor == their_factor


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ntk_by_parts", {"factor": 4}),
        ("dynamic_yarn", {}),
        ("clipped_rope", {}),
        ("resonance", {}),
        ("dynamic_ntk", {"expected_length": 8192}),
    ],
)
def test_what_transformers_cannot_say_is_not_native(name: str, options: dict[str, Any]) -> None:
    assert build(name, **options).native() is None


def test_native_part_of_a_head_survives_truncation() -> None:
    for head in (*range(8, 100, 2), 128, 160, 196, 256):
        for width in range(2, head, 2):
            parameters = build("rope", shape(width, head=head)).native()
            assert parameters is not None
            assert int(head * parameters["partial_rotary_factor"]) == width


def test_tables_are_made_on_the_cpu_in_float32_whatever_the_surroundings() -> None:
    names = [name for name, scheme in SCHEMES.items() if issubclass(scheme, Rotary)]
    needed = {"factor": 4, "partial_rotary_factor": 0.5, "long_factor": [2.0] * 64}
    default = torch.get_default_dtype()
    for name in names:
        required = {key: needed[key] for key in needed if key in SCHEMES[name].option_names()}
        expected = build(name, **required).frequencies(9000)
        try:
            torch.set_default_dtype(torch.bfloat16)
            with torch.device("meta"):
                inv_freq, factor = build(name, **required).frequencies(9000)
        finally:
            torch.set_default_dtype(default)
        assert inv_freq.device.type == "cpu" and inv_freq.dtype == torch.float32 and not inv_freq.requires_grad
        assert torch.equal(inv_freq, expected[0]) and factor == expected[1], name


def tables(positions: Tensor, width: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    inv_freq = torch.tensor(oracles.rope(width, 10000.0))
    return cos_sin(positions[None, :, None].float() * inv_freq, 1.0, torch.float32, interleaved)


def test_rotation_of_neighbours_is_metas() -> None:
    entry = goldens.load("rope/apply")["rope/apply_interleaved_meta"]
    cos, sin = tables(torch.tensor(entry["params"]["positions"]), 8, interleaved=True)
    for given, wanted in (("q", "q_out"), ("k", "k_out")):
        x, expected = (torch.tensor(entry[field]).transpose(1, 2) for field in (given, wanted))
        torch.testing.assert_close(rotate(x, cos, sin, interleaved=True), expected, rtol=2e-5, atol=2e-5)


def test_rotation_of_halves_is_that_of_neighbours_reordered() -> None:
    entry = goldens.load("rope/apply")["rope/apply_interleaved_meta"]
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # half[t r/2 + k] = neighbours[2k + t]
    cos, sin = tables(torch.tensor(entry["params"]["positions"]), 8, interleaved=False)
    x, expected = (torch.tensor(entry[field]).transpose(1, 2)[..., order] for field in ("q", "q_out"))
    torch.testing.assert_close(rotate(x, cos, sin), expected, rtol=2e-5, atol=2e-5)


def test_rotation_of_neighbours_is_gptjs() -> None:
    entry = goldens.load("rope/gptj")["rope/gptj_interleaved"]
    x, expected = (torch.tensor(entry[field]).transpose(0, 1)[None] for field in ("x", "out"))
    cos, sin = tables(torch.arange(x.shape[2]), 8, interleaved=True)
    torch.testing.assert_close(rotate(x, cos, sin, interleaved=True), expected, rtol=2e-5, atol=2e-5)


def test_a_slice_of_the_head_rotates_and_the_rest_stays() -> None:
    entry = goldens.load("rope/apply")["rope/apply_interleaved_meta"]
    x, expected = (torch.tensor(entry[field]).transpose(1, 2) for field in ("q", "q_out"))
    rest = torch.ones(*x.shape[:-1], 4)
    cos, sin = tables(torch.tensor(entry["params"]["positions"]), 8, interleaved=True)
    padded = rotate(torch.cat((rest, x, rest), -1), cos, sin, start=4, interleaved=True)
    torch.testing.assert_close(padded, torch.cat((rest, expected, rest), -1), rtol=2e-5, atol=2e-5)
