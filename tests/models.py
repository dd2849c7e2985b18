"""Models of a few thousand weights, and what every scheme is given on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pe_patch import SCHEMES, patch_model, unpatch_model
from pe_patch.mla.protocol import converts

WINDOW = 32
SLIDING = 16
"""The sliding window of the Mistral."""
VOCABULARY = 97
FAMILIES = ("llama", "gpt_neox", "bloom")
ROTARY_FAMILIES = ("llama", "gpt_neox")
BACKENDS = ("sdpa", "eager")

PAIRS = {"llama": 8, "gpt_neox": 4, "bloom": 8, "qwen3": 8, "mistral": 8, "gpt2": 8}
"""Rotated pairs of each head; GPT-NeoX turns half of its sixteen dimensions."""


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A seeded model in eval mode. The weights are wide enough that positions move the logits, which are about 1."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    if family == "bloom":
        return BloomForCausalLM(BloomConfig(**{**sizes, **overrides})).eval()
    sizes |= {"max_position_embeddings": WINDOW}
    if family == "gpt2":
        undropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**{**sizes, **undropped, **overrides})).eval()
    sizes |= {"intermediate_size": 128}
    grouped = {**sizes, "num_key_value_heads": 2, "head_dim": 16, **overrides}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**grouped)).eval()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**grouped)).eval()
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**{"sliding_window": SLIDING, **grouped})).eval()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**sizes, "rope_parameters": rope, **overrides})).eval()


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of 48, the first of them with 28 of padding; their mask; and the row alone."""
    short, long = tokens(1, 20), tokens(1, 48, seed=4)
    ids = torch.cat((torch.cat((torch.zeros(1, 28, dtype=torch.long), short), 1), long))
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[0, :28] = 0
    return ids, mask, short


GIVEN: dict[str, dict[str, Any]] = {
    "integer": {},
    "one_hot": {"max_positions": 64},
    "sinusoidal": {},
    "learned": {"max_positions": 64},
    "nope": {},
    "drope": {"softmax_scale": 1.5},
    "rope": {},
    "linear": {"factor": 2.0},
    "ntk": {"factor": 2.0},
    "ntk_by_parts": {"factor": 2.0},
    "dynamic_ntk": {"factor": 2.0},
    "yarn": {"factor": 2.0, "beta_fast": 4.0},
    "dynamic_yarn": {"beta_fast": 4.0},
    "llama3": {"factor": 2.0},
    "longrope": {"long_factor": None, "factor": 2.0},
    "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0},
    "clipped_rope": {"dims": 2},
    "resonance": {"over": "rope"},
    "xpos": {"scale_base": 16},
    "rope_alibi": {"slope_scale": 0.5},
    "softmax_scaling": {"scale": 0.5},
    "fope": {},
    "rerope": {"window": 12},
    "leaky_rerope": {"window": 12, "k": 4},
    "self_extend": {"group": 4, "window": 12, "log_scaling": True},
    "dca": {"chunk_size": 16, "local_window": 4},
    "string": {"shift": 16, "window": 4},
    "lm_infinite": {"window": 16, "sinks": 3},
    "alibi": {},
    "t5": {"num_buckets": 16, "max_distance": 40},
    "kerple": {},
    "sandwich": {},
    "fire": {"threshold": 8},
    "shaw": {"max_distance": 6},
    "transformer_xl": {},
    "cope": {"max_positions": 8},
    "mla": {"kv_rank": 24, "rope_dim": 8, "calibration": None},
}
"""The options of each scheme under its own name."""

MASK_ALONE = ("nope", "drope", "cope")
"""What position ids mean nothing to."""

LENGTH_DEPENDENT = ("dynamic_ntk", "dynamic_yarn", "longrope")
PINNED = {f"{name} pinned": {**GIVEN[name], "expected_length": 64} for name in LENGTH_DEPENDENT}
AUTO = {f"{name} auto": {"factor": "auto"} for name in ("linear", "yarn")}
CASES: dict[str, dict[str, Any]] = {**GIVEN, **PINNED, **AUTO}
"""Every scheme, the length-dependent ones also pinned to a length and two scalings also with `factor="auto"`."""


UNROTATED = ("bloom", "gpt2")
"""What converts rotations is refused there (`tests/test_matrix.py`)."""


def applies(family: str, name: str) -> bool:
    """Whether this case goes with this family."""
    return family not in UNROTATED or not converts(SCHEMES[name.split(" ")[0]])


def case(family: str, name: str) -> tuple[str, dict[str, Any]]:
    """Scheme and options of a case on this family."""
    scheme, options = name.split(" ")[0], dict(CASES[name])
    if "long_factor" in options:
        options["long_factor"] = [1.0 + 0.5 * pair for pair in range(PAIRS[family])]
    if "calibration" in options:
        options["calibration"] = tokens(8, 24, seed=5)
    if family == "gpt2" and scheme == "learned":
        options["extend"] = "interpolate"  # its table has one window of positions
    if family == "bloom" and "original_max_position_embeddings" in SCHEMES[scheme].option_names():
        options["original_max_position_embeddings"] = WINDOW
    return scheme, options


def put(model: Any, name: str, **arguments: Any) -> Any:
    """Patch a case in; what is learned, and mostly starts as zeros, is given content."""
    scheme, options = case(model.config.model_type, name)
    patch_model(model, scheme, **options, **arguments)
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in model.named_parameters():
        if "position_schemes.scheme" in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
            if scheme == "kerple":  # below zero it would be cut, and nearly no bias
                parameter.data = parameter.data.abs() + 0.1
    return model


@contextmanager
def wearing(model: Any, name: str, **arguments: Any) -> Iterator[Any]:
    """`put` for the length of a block."""
    put(model, name, **arguments)
    try:
        yield model
    finally:
        unpatch_model(model)


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of one pass without a cache."""
    return model(input_ids=ids, use_cache=False, **inputs).logits


@torch.no_grad()
def cached_logits(model: Any, ids: Tensor, prefill: int, cache: Any = None, mask: Tensor | None = None) -> Tensor:
    """Logits of a first pass over `prefill` tokens and of one further pass for each token after them."""
    steps = [(0, prefill), *((index, index + 1) for index in range(prefill, ids.shape[1]))]
    found = []
    for start, stop in steps:
        seen = None if mask is None else mask[:, :stop]
        output = model(input_ids=ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, 1)


@torch.no_grad()
def in_chunks(model: Any, ids: Tensor, sizes: list[int], cache: Any = None, mask: Tensor | None = None) -> Tensor:
    """Logits of passes over so many tokens each, all into one cache."""
    found, start = [], 0
    for size in sizes:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        output = model(input_ids=ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, stop
        found.append(output.logits)
    assert start == ids.shape[1]
    return torch.cat(found, 1)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value where that exceeds 1."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def snapshot(model: Any) -> dict[str, Any]:
    """All of a model that a patch may touch, to be compared with `==` or `unchanged`."""
    config = model.config
    return {
        "attributes": {
            name: (type(module).__name__, sorted(module.__dict__), sorted(module._modules))
            for name, module in model.named_modules()
        },
        "config": {**config.to_dict(), "own": sorted(config.__dict__), "attention": config._attn_implementation},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "logits": logits(model, tokens(2, 20)),
    }


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two snapshots are the same, tensors bit for bit."""
    plain = ("attributes", "config", "trainable")
    return (
        all(before[key] == after[key] for key in plain)
        and before["weights"].keys() == after["weights"].keys()
        and all(torch.equal(before["weights"][name], tensor) for name, tensor in after["weights"].items())
        and torch.equal(before["logits"], after["logits"])
    )
