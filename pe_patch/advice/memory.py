"""Compute the memory that a model needs at a length; activations are estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .. import compat
from ..evaluation.model import sequence_bytes
from .model_facts import ModelFacts, Parameters

FLOAT32 = 4
CHUNK = 2048
"""Tokens per chunk of logits in a chunked cross-entropy (Gao et al. 2024, arXiv 2410.02660)."""
ADAPTER_RANK = 8
DEVICE = 80 * 10**9
"""Bytes of one accelerator."""
SIZES = (8, 16, 24, 48, 80)
"""Sizes of common accelerators in GB."""

STATES: dict[str, int] = {"mixed": 4 + 4 + 8, "bfloat16": 2 + 2 + 8}
"""Bytes per weight for weight, gradient and AdamW's two moments: float32 under autocast, or bfloat16 with float32
moments."""
FROZEN, TRAINED = 2, 16
"""Bytes per frozen weight in bfloat16 and per trained weight, with adapters."""


@dataclass(frozen=True)
class Inference:
    """Memory of inference in bytes, for `batch` sequences."""

    batch: int
    weights: int
    cache_per_token: int
    """The cache of one token, before any layer fills its sliding window."""
    cache: int
    cache_full: int
    """The cache without sliding windows."""
    activations: int
    """An estimate: the widest layer while the prompt is read in one pass."""
    scores: int
    """Two score matrices of all heads, if the native attention stores them; 0 otherwise. A patch avoids them."""
    logits: int
    """Float32 logits of every token. Scoring a text needs them; generation needs one row."""

    @property
    def generating(self) -> int:
        """Bytes to generate: weights, cache and activations."""
        return self.weights + self.cache + self.activations


@dataclass(frozen=True)
class Training:
    """Memory of training in bytes: one sequence on one device, and states that devices can shard."""

    states: dict[str, int]
    """Weights, gradients and AdamW's moments, by trained weights and precision."""
    adapters: int
    """The number of trained weights with adapters of rank 8, embeddings and norms."""
    activations: int
    """An estimate, with every layer recomputed in the backward pass."""
    logits: int
    """Float32 logits and their gradient."""
    chunked_logits: int
    """The same for one chunk of tokens."""
    devices: dict[str, int | None]
    """The smallest number of 80 GB devices, with sharded states and chunked logits; None if one sequence exceeds one
    device."""
    smallest: dict[str, int | None]
    """The smallest of `SIZES` that holds states, activations and chunked logits; None if none does."""


def cache_bytes(facts: ModelFacts, length: int, *, sliding: bool = True) -> int:
    """Return the bytes that a sequence of `length` tokens occupies in the cache."""
    kept = (
        (layer, min(length, layer.sliding_window) if sliding and layer.sliding_window else length)
        for layer in facts.cache
    )
    return facts.item_bytes * sum(layer.numbers_per_token * tokens for layer, tokens in kept)


def inference(facts: ModelFacts, model: Any, length: int, batch: int) -> Inference:
    """Return the memory to read and continue `batch` sequences of `length` tokens.

    Args:
        facts: the facts about the model.
        model: the model on the meta device.
        length: tokens per sequence.
        batch: sequences per batch.
    """
    implementation = compat.attention_implementation(model.config.get_text_config())
    heads, eager = facts.shape.num_heads, "eager" in str(implementation)
    scores = 2 * FLOAT32 * heads * length * length if eager else 0
    widest = sequence_bytes(model, length, 0, 0) - scores
    return Inference(
        batch=batch,
        weights=facts.parameters.total * facts.item_bytes,
        cache_per_token=cache_bytes(facts, 1),
        cache=batch * cache_bytes(facts, length),
        cache_full=batch * cache_bytes(facts, length, sliding=False),
        activations=batch * widest * facts.item_bytes // model.dtype.itemsize,
        scores=batch * scores,
        logits=batch * length * facts.vocabulary * FLOAT32,
    )


def adapter_weights(parameters: Parameters, rank: int = ADAPTER_RANK) -> int:
    """Return the number of trained weights with adapters on all linear layers and full embeddings and norms.

    Source: LongLoRA (arXiv 2309.12307), which trains embeddings and norms in full.
    """
    return rank * parameters.linear + parameters.embedding + parameters.norms


def training(facts: ModelFacts, length: int) -> Training:
    """Return the memory to train on one sequence of `length` tokens.

    With recomputation, L layers keep their inputs (2 L T d bytes) and the current layer takes 34 T d bytes.

    Source: Korthikanti et al. 2022, arXiv 2205.05198, without the scores, which fast attention does not store.
    """
    weights, trained = facts.parameters.total, adapter_weights(facts.parameters)
    states = {name: size * weights for name, size in STATES.items()}
    states["adapters"] = FROZEN * weights + TRAINED * trained
    activations = (2 * facts.shape.num_layers + 34) * length * facts.shape.hidden_size
    logits, chunked = (2 * FLOAT32 * tokens * facts.vocabulary for tokens in (length, min(length, CHUNK)))
    room = DEVICE - activations - chunked
    devices = {name: math.ceil(size / room) if room > 0 else None for name, size in states.items()}
    smallest = {
        name: next((each for each in SIZES if size + activations + chunked <= each * 10**9), None)
        for name, size in states.items()
    }
    return Training(states, trained, activations, logits, chunked, devices, smallest)


def training_flops(facts: ModelFacts, tokens: int, length: int) -> float:
    """Return the floating-point operations to train on `tokens` tokens in sequences of `length`.

    A token takes 6 N + 6 L d T operations (causal attention), plus a third for recomputing the layers. Sliding layers
    count as full attention.
    """
    shape = facts.shape
    width = shape.num_heads * shape.head_dim
    per_token = 6 * facts.parameters.active + 6 * shape.num_layers * width * length
    return tokens * per_token * 4 / 3
