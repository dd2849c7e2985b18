"""The frequencies of every rotary scheme: against Transformers bit for bit, the authors' numbers, and the papers."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from typing import Any

import goldens
import oracles
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXConfig, GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pe_patch.errors import OptionError, UnknownNameError
from pe_patch.scheme import AttentionShape, Rotary, cos_sin, rotate
from pe_patch.schemes import SCHEMES

CASES = 50


def shape(width: int = 128, theta: float = 10000.0, window: int = 4096, head: int | None = None) -> AttentionShape:
    head = head or width
    return AttentionShape(4 * head, 4, 2, head, width, 0, theta, window, 2)


def build(name: str, where: AttentionShape | None = None, **options: Any) -> Rotary:
    scheme = SCHEMES[name](where or shape(), **options)
    assert isinstance(scheme, Rotary)
    return scheme


def close(actual: Tensor, expected: list[float], relative: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=relative, atol=1e-12)


def transformers_says(
    parameters: dict[str, Any], head: int, window: int, length: int | None = None
) -> tuple[Tensor, float]:
    """What Transformers' own function computes from v5 `rope_parameters`."""
    config = LlamaConfig(
        hidden_size=2 * head,
        num_attention_heads=2,
        head_dim=head,
        max_position_embeddings=window,
        rope_parameters=copy.deepcopy(parameters),
    )
    if parameters["rope_type"] == "default":
        if "partial_rotary_factor" in parameters:
            config = GPTNeoXConfig(
                hidden_size=2 * head, num_attention_heads=2, rope_parameters=copy.deepcopy(parameters)
            )
            return GPTNeoXRotaryEmbedding.compute_default_rope_parameters(config)
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)


class Draw:
    """A random attention and the part of `rope_parameters` that says so."""

    def __init__(self, seed: int, partial: bool = True) -> None:
        self.random = random.Random(seed)
        self.head = self.random.choice([32, 48, 64, 80, 96, 128, 256])
        part = self.random.choice([1.0, 0.5, 0.25] if partial else [1.0])
        self.width = int(self.head * part)
        self.theta = self.random.choice([10000.0, 500000.0, 1e6, 10 ** self.random.uniform(3, 7.5)])
        self.window = self.random.choice([256, 2048, 4096, 8192, 32768, self.random.randrange(128, 100000)])
        self.factor = self.random.choice([2.0, 4.0, 8.0, 32.0, self.random.uniform(1.01, 64)])
        self.shape = shape(self.width, self.theta, self.window, self.head)
        self.parameters: dict[str, Any] = {"rope_theta": self.theta}
        if part < 1:
            self.parameters["partial_rotary_factor"] = part

    @property
    def pairs(self) -> int:
        return self.width // 2

    def numbers(self, low: float, high: float) -> list[float]:
        return sorted(self.random.uniform(low, high) for _ in range(self.pairs))


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


def from_golden(name: str, entry: dict[str, Any], **options: Any) -> Rotary:
    said = entry["params"]
    window = said.get("original_max_position_embeddings", said.get("orig", said.get("max_position_embeddings", 8192)))
    return build(name, shape(said.get("dim", said.get("head_dim")), float(said["base"]), window), **options)


GOLDEN_OPTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "rope/inv_freq/": ("rope", lambda said: {}),
    "prope/": ("proportional", lambda said: {"partial_rotary_factor": said["p"]}),
    "linear/": ("linear", lambda said: {"factor": said["factor"]}),
    "ntk/": ("ntk", lambda said: {"factor": said["alpha"]}),
    "dynamic_ntk/": ("dynamic_ntk", lambda said: {"factor": said["factor"]}),
    "yarn/dim": ("yarn", lambda said: {key: said[key] for key in ("factor", "beta_fast", "beta_slow")}),
    "dynamic_yarn/": ("dynamic_yarn", lambda said: {}),
    "llama3/": (
        "llama3",
        lambda said: {key: said[key] for key in ("factor", "low_freq_factor", "high_freq_factor")},
    ),
    "llama4_scout/": (
        "llama3",
        lambda said: {key: said[key] for key in ("factor", "low_freq_factor", "high_freq_factor")},
    ),
    "resonance/": ("resonance", lambda said: {}),
    "resonance_yarn/": ("resonance", lambda said: {"over": {"scheme": "yarn", "factor": said["factor"]}}),
    "cope_clipped/": ("clipped_rope", lambda said: {"dims": said["clip_low_n"]}),
}
GOLDEN_KEYS = [(prefix, key) for prefix in GOLDEN_OPTIONS for key in goldens.load(prefix)]
FREQUENCY_FIELDS = (
    "inv_freq",
    "inv_freq_f32",
    "inv_freq_hf_f32",
    "inv_freq_f32_hf",
    "inv_freq_scaled_hf_f32",
    "inv_freq_cope_f32",
)


@pytest.mark.parametrize(("prefix", "key"), GOLDEN_KEYS)
def test_the_authors_own_numbers(prefix: str, key: str) -> None:
    entry = goldens.load(key)[key]
    name, options_of = GOLDEN_OPTIONS[prefix]
    scheme = from_golden(name, entry, **options_of(entry["params"]))
    inv_freq, attention_factor = scheme.frequencies(entry["params"].get("seq_len"))
    fields = [field for field in FREQUENCY_FIELDS if field in entry]
    assert fields
    for field in fields:
        close(inv_freq[: len(entry[field])], entry[field])
    assert not inv_freq[len(entry[fields[0]]) :].any()  # only p-RoPE's list is cut, and what is cut stands still
    for field in ("attention_factor", "attention_factor_hf"):
        assert attention_factor == pytest.approx(entry.get(field, attention_factor), rel=1e-12)
    if "wavelengths" in entry:
        close(2 * math.pi / inv_freq.double(), entry["wavelengths"])
    if "inv_freq_hf_truncate_false_f32" in entry:
        loose = from_golden(name, entry, truncate=False, **options_of(entry["params"]))
        close(loose.inv_freq, entry["inv_freq_hf_truncate_false_f32"])


def test_the_authors_own_longrope() -> None:
    entry = goldens.load("longrope/")["longrope/llama3_8b_longrope2_su"]
    said = entry["params"]
    factor = said["max_position_embeddings"] / said["orig"]
    scheme = from_golden("longrope", entry, long_factor=entry["long_factor"], factor=factor)
    for field in ("inv_freq_f32", "inv_freq_hf_long_f32"):
        close(scheme.frequencies(said["orig"] + 1)[0], entry[field])
    close(scheme.frequencies(said["orig"])[0], entry["inv_freq_hf_short_f32"])
    assert scheme.attention_factor == pytest.approx(entry["attention_factor"], rel=1e-12)
    expected, attention = oracles.longrope(128, said["base"], entry["long_factor"], factor, said["orig"])
    assert expected == pytest.approx(entry["inv_freq_f64"], rel=1e-9)
    assert attention == pytest.approx(entry["attention_factor"], rel=1e-9)


def test_yarn_attention_factors_of_transformers_and_deepseek() -> None:
    for factor, row in goldens.load("yarn/")["yarn/attention_factor_table"]["value"].items():
        for said, expected in row.items():
            if said.startswith("softmax_scale_mult"):
                continue  # DeepSeek's own multiplier of the softmax scale
            pairs = [] if said == "default" else [part.split("=") for part in said.split(",")]
            options = {key: float(value) for key, value in pairs}
            scheme = build("yarn", factor=float(factor), **options)
            assert scheme.attention_factor == pytest.approx(expected, rel=1e-12), (factor, said)
            assert oracles.yarn_attention(float(factor), **options) == pytest.approx(expected, rel=1e-12)


ORACLES_OF_GOLDENS: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    "rope/inv_freq/": lambda p: oracles.rope(p["dim"], p["base"]),
    "ntk/": lambda p: oracles.ntk(p["dim"], p["base"], p["alpha"]),
    "dynamic_ntk/": lambda p: oracles.dynamic_ntk(
        p["dim"], p["base"], p["factor"], p["max_position_embeddings"], p["seq_len"]
    ),
    "yarn/dim": lambda p: oracles.yarn_frequencies(
        p["dim"], p["base"], p["factor"], p["original_max_position_embeddings"]
    ),
    "dynamic_yarn/": lambda p: oracles.dynamic_yarn(p["dim"], p["base"], p["orig"], p["seq_len"])[0],
    "llama3/": lambda p: oracles.by_turns(p["dim"], p["base"], p["factor"], 8192, 1, 4),
}


@pytest.mark.parametrize("prefix", ORACLES_OF_GOLDENS)
def test_the_oracles_are_the_authors_in_float64(prefix: str) -> None:
    for key, entry in goldens.load(prefix).items():
        assert ORACLES_OF_GOLDENS[prefix](entry["params"]) == pytest.approx(entry["inv_freq_f64"], rel=1e-9), key


@pytest.mark.parametrize("seed", range(CASES))
def test_the_papers_in_float64(seed: int) -> None:
    draw = Draw(seed)
    r, theta, s, window = draw.width, draw.theta, draw.factor, draw.window
    beyond = draw.random.randrange(window + 1, 30 * window)
    low, high = draw.random.uniform(0.5, 2), draw.random.uniform(2, 40)
    stretch = draw.numbers(1, 20)
    part, dims = draw.random.uniform(2 / r, 1), draw.random.randint(2, draw.pairs)
    by_scheme: dict[str, tuple[dict[str, Any], list[float], float]] = {
        "rope": ({}, oracles.rope(r, theta), 1.0),
        "linear": ({"factor": s}, oracles.linear(r, theta, s), 1.0),
        "ntk": ({"factor": s}, oracles.ntk(r, theta, s), 1.0),
        "dynamic_ntk": ({"factor": s}, oracles.dynamic_ntk(r, theta, s, window, beyond), 1.0),
        "ntk_by_parts": (
            {"factor": s, "alpha": low, "beta": high},
            oracles.by_turns(r, theta, s, window, low, high),
            1.0,
        ),
        "llama3": (
            {"factor": s, "low_freq_factor": low, "high_freq_factor": high},
            oracles.by_turns(r, theta, s, window, low, high),
            1.0,
        ),
        "yarn": (
            {"factor": s, "beta_fast": 20, "beta_slow": 2, "truncate": False},
            oracles.yarn_frequencies(r, theta, s, window, 20, 2, truncate=False),
            oracles.yarn_attention(s),
        ),
        "dynamic_yarn": ({"factor": s}, *oracles.dynamic_yarn(r, theta, window, beyond, cap=s)),
        "longrope": ({"long_factor": stretch, "factor": s}, *oracles.longrope(r, theta, stretch, s, window)),
        "proportional": (
            {"partial_rotary_factor": part, "factor": s},
            oracles.proportional(r, theta, part, s),
            1.0,
        ),
        "clipped_rope": (
            {"dims": dims, "over": {"scheme": "ntk", "factor": s}},
            oracles.clipped(oracles.ntk(r, theta, s), dims),
            1.0,
        ),
    }
    for name, (options, frequencies, attention) in by_scheme.items():
        ours, factor = build(name, draw.shape, **options).frequencies(beyond)
        try:
            close(ours, frequencies, 3e-6)  # float32 loses a few bits where a ramp is steep
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        assert factor == pytest.approx(attention, rel=1e-12), name


@pytest.mark.parametrize("seed", range(CASES))
def test_resonance_in_float64(seed: int) -> None:
    draw = Draw(seed)
    ours, factor = build("resonance", draw.shape, over={"rope_type": "yarn", "factor": draw.factor}).frequencies()
    plain = oracles.yarn_frequencies(draw.width, draw.theta, draw.factor, draw.window)
    for k, (mine, expected) in enumerate(zip(ours.tolist(), oracles.resonance(plain), strict=True)):
        wavelength = oracles.TURN / plain[k]
        if abs(wavelength % 1 - 0.5) > 1e-6 * wavelength:  # float32 cannot tell which way the others round
            assert mine == pytest.approx(expected, rel=1e-6), k
    assert factor == pytest.approx(oracles.yarn_attention(draw.factor), rel=1e-12)


IDENTITIES: list[tuple[str, dict[str, Any]]] = [
    ("rope", {}),
    ("linear", {"factor": 1}),
    ("ntk", {"factor": 1}),
    ("ntk_by_parts", {"factor": 1}),
    ("llama3", {"factor": 1}),
    ("yarn", {"factor": 1}),
    ("yarn", {"factor": 1.0, "mscale": 0.7, "mscale_all_dim": 0.5}),
    ("proportional", {"partial_rotary_factor": 1}),
    ("longrope", {"long_factor": [1.0] * 64}),
    ("longrope", {"long_factor": [1] * 64, "factor": 1}),
]


@pytest.mark.parametrize(("name", "options"), IDENTITIES)
def test_nothing_asked_changes_no_bit(name: str, options: dict[str, Any]) -> None:
    scheme = build(name, **options)
    plain, _ = transformers_says({"rope_type": "default", "rope_theta": 10000.0}, 128, 4096)
    for length in (None, 1, 4096, 4097, 100000):
        inv_freq, factor = scheme.frequencies(length)
        assert torch.equal(inv_freq, plain)
        assert factor == 1.0
    assert not scheme.length_dependent
    assert scheme.effective_window == 4096


AUTO = ("linear", "ntk", "ntk_by_parts", "yarn", "llama3")
LENGTH_DEPENDENT: list[tuple[str, dict[str, Any]]] = [
    *((name, {"factor": "auto"}) for name in AUTO),
    ("dynamic_ntk", {}),
    ("dynamic_ntk", {"factor": 2.3}),
    ("dynamic_yarn", {}),
    ("dynamic_yarn", {"factor": 3, "attention_factor": 1.3}),
    ("yarn", {"factor": "auto", "attention_factor": 1.3}),
]


@pytest.mark.parametrize(("name", "options"), LENGTH_DEPENDENT)
def test_within_the_window_no_bit_changes(name: str, options: dict[str, Any]) -> None:
    scheme = build(name, **options)
    plain, _ = transformers_says({"rope_type": "default", "rope_theta": 10000.0}, 128, 4096)
    assert scheme.length_dependent
    for length in (None, 1, 4095, 4096):
        assert torch.equal(scheme.frequencies(length)[0], plain)
        assert scheme.frequencies(length)[1] == 1.0
    assert not torch.equal(scheme.frequencies(4097)[0], plain)


@pytest.mark.parametrize("name", AUTO)
def test_an_automatic_factor_grows_in_powers_of_two(name: str) -> None:
    scheme = build(name, factor="auto")
    regimes = {1: 4096, 4096: 4096, 4097: 8192, 8192: 8192, 8193: 16384, 100000: 131072}
    assert {length: scheme.regime(length) for length in regimes} == regimes
    assert scheme.effective_window is None
    assert scheme.native() is None
    for length, regime in regimes.items():
        fixed = build(name, factor=regime / 4096)
        assert torch.equal(scheme.frequencies(length)[0], fixed.frequencies()[0])
        assert scheme.frequencies(length)[1] == fixed.frequencies()[1]


def test_expected_length_starts_where_it_says() -> None:
    scheme = build("dynamic_ntk", expected_length=10000)
    close(scheme.inv_freq, oracles.dynamic_ntk(128, 10000.0, 1, 4096, 10000))
    assert scheme.regime(5) == 10000 and scheme.effective_window == 10000 and scheme.native() is None
    long = build("longrope", long_factor=[2.0] * 64, expected_length=8192)
    close(long.inv_freq, [w / 2 for w in oracles.rope(128, 10000.0)])
    assert not long.length_dependent and long.effective_window == 8192


WINDOWS: list[tuple[str, dict[str, Any], int]] = [
    ("rope", {}, 4096),
    ("linear", {"factor": 2.5}, 10240),
    ("dynamic_ntk", {}, 4096),
    ("dynamic_ntk", {"factor": 2}, 8192),
    ("dynamic_yarn", {}, 4096),
    ("dynamic_yarn", {"factor": 3, "expected_length": 20000}, 20000),
    ("longrope", {"long_factor": [2.0] * 64}, 4096),
    ("longrope", {"long_factor": [2.0] * 64, "factor": 32}, 131072),
    ("proportional", {"partial_rotary_factor": 0.5, "factor": 2}, 8192),
    ("resonance", {"over": {"scheme": "yarn", "factor": 4}}, 16384),
    ("clipped_rope", {}, 4096),
    ("yarn", {"factor": 4, "original_max_position_embeddings": 1024}, 4096),
]


@pytest.mark.parametrize(("name", "options", "window"), WINDOWS)
def test_effective_window(name: str, options: dict[str, Any], window: int) -> None:
    assert build(name, **options).effective_window == window


def test_equal_bounds_are_a_step() -> None:
    for name, options in (
        ("llama3", {"low_freq_factor": 2, "high_freq_factor": 2}),
        ("ntk_by_parts", {"alpha": 2, "beta": 2}),
    ):
        inv_freq = build(name, factor=16, **options).inv_freq
        close(inv_freq, oracles.by_turns(128, 10000.0, 16, 4096, 2, 2))
        assert inv_freq.isfinite().all()


def test_a_scheme_over_another_keeps_its_length_dependence() -> None:
    for over in ("dynamic_yarn", {"scheme": "yarn", "factor": "auto"}, {"type": "dynamic", "factor": 2.0}):
        scheme = build("resonance", over=over)
        assert scheme.length_dependent
        assert not torch.equal(scheme.frequencies(4096)[0], scheme.frequencies(8192)[0])
    assert build("resonance", over={"scheme": "yarn", "factor": "auto"}).regime(5000) == 8192
    nested = build("clipped_rope", dims=4, over={"scheme": "resonance", "over": "ntk"} | {"over": "rope"})
    close(nested.inv_freq, oracles.clipped(oracles.resonance(oracles.rope(128, 10000.0)), 4), 2e-6)
    assert build("resonance", theta=500000.0).theta == 500000.0
    assert build("resonance", over={"rope_type": "default", "rope_theta": 1e6}).theta == 1e6


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
    for head in range(8, 260, 2):
        for width in range(2, head, 2):
            parameters = build("rope", shape(width, head=head)).native()
            assert int(head * parameters["partial_rotary_factor"]) == width


SIXTY_FOUR = [2.0] * 64
BAD: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"factor": bad}, "factor") for name in AUTO for bad in (0.5, "4", math.nan, math.inf, None, True, [4])),
    ("linear", {}, "factor"),
    ("linear", {"factor": "Auto"}, "auto"),
    ("linear", {"facto": 4}, "'factor'"),
    ("dynamic_ntk", {"factor": "auto"}, "factor"),
    ("dynamic_ntk", {"factor": 0.9}, "factor"),
    ("dynamic_ntk", {"expected_length": 0}, "expected_length"),
    ("dynamic_ntk", {"expected_length": 1.5}, "expected_length"),
    ("dynamic_yarn", {"factor": 0.5}, "factor"),
    ("dynamic_yarn", {"expected_length": "long"}, "expected_length"),
    ("ntk_by_parts", {"factor": 2, "alpha": 33}, "alpha"),
    ("ntk_by_parts", {"factor": 2, "alpha": 0}, "alpha"),
    ("yarn", {"factor": 2, "beta_fast": 1, "beta_slow": 2}, "beta_slow"),
    ("yarn", {"factor": 2, "beta_slow": 0}, "beta_slow"),
    ("yarn", {"factor": 2, "attention_factor": -1}, "attention_factor"),
    ("yarn", {"factor": 2, "attention_factor": "big"}, "attention_factor"),
    ("yarn", {"factor": 2, "mscale": math.nan}, "mscale"),
    ("yarn", {"factor": 2, "truncate": "false"}, "truncate"),
    ("llama3", {"factor": 2, "low_freq_factor": 5}, "low_freq_factor"),
    ("llama3", {"factor": 2, "high_freq_factor": 0}, "high_freq_factor"),
    ("longrope", {}, "long_factor"),
    ("longrope", {"long_factor": SIXTY_FOUR[1:]}, "63"),
    ("longrope", {"long_factor": 2.0}, "long_factor"),
    ("longrope", {"long_factor": "2" * 64}, "long_factor"),
    ("longrope", {"long_factor": [*SIXTY_FOUR[1:], -1.0]}, r"long_factor\[63\]"),
    ("longrope", {"long_factor": SIXTY_FOUR, "short_factor": [0.0] * 64}, "short_factor"),
    ("longrope", {"long_factor": SIXTY_FOUR, "factor": 0.5}, "factor"),
    ("proportional", {"partial_rotary_factor": 0}, "partial_rotary_factor"),
    ("proportional", {"partial_rotary_factor": 1.1}, "partial_rotary_factor"),
    ("proportional", {"partial_rotary_factor": 0.001}, "nope"),
    ("proportional", {"partial_rotary_factor": 0.5, "factor": "auto"}, "factor"),
    ("clipped_rope", {"dims": 1}, "dims"),
    ("clipped_rope", {"dims": 2.5}, "dims"),
    ("clipped_rope", {"over": "alibi"}, "alibi"),
    ("resonance", {"over": "sinusoidal"}, "sinusoidal"),
    ("resonance", {"over": 3}, "over"),
    ("resonance", {"over": {"scheme": "yarn"}}, "factor"),
    ("resonance", {"over": {"rope_type": "default", "rope_theta": 5.0}, "theta": 6.0}, "theta"),
    ("resonance", {"over": {"full_attention": {"rope_type": "default"}}}, "layer type"),
]


@pytest.mark.parametrize(("name", "options", "says"), BAD)
def test_bad_options_teach(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        build(name, **options)


def test_an_unknown_scheme_underneath_names_the_near_one() -> None:
    with pytest.raises(UnknownNameError, match="'yarn'"):
        build("resonance", over="yarm")


@pytest.mark.parametrize(("name", "options"), [("ntk", {"factor": 2}), ("dynamic_ntk", {})])
def test_a_base_cannot_change_for_one_pair(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="linear"):
        build(name, shape(2), **options)


def test_clipping_all_must_be_asked_for() -> None:
    with pytest.raises(OptionError, match="dims"):
        build("clipped_rope", shape(40))
    assert build("clipped_rope", shape(42)).inv_freq[0] == 1.0
    close(
        build("clipped_rope", shape(16), dims=20).inv_freq, oracles.clipped(oracles.rope(16, 10000.0), 8), relative=2e-6
    )


def test_tables_are_made_on_the_cpu_in_float32_whatever_the_surroundings() -> None:
    names = [name for name, scheme in SCHEMES.items() if issubclass(scheme, Rotary)]
    needed = {"factor": 4, "partial_rotary_factor": 0.5, "long_factor": SIXTY_FOUR}
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
