"""Bytes that a model takes at a length: read off its modules where they say, estimated where they do not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..evaluation.model import sequence_bytes
from .model_facts import ModelFacts, Parameters

FLOAT32 = 4
CHUNK = 2048
"""Tokens whose logits are made at a time where the cross-entropy is chunked (Gao et al. 2024, arXiv 2410.02660)."""
ADAPTER_RANK = 8
DEVICE = 80 * 10**9
"""Bytes of the accelerator that devices are counted in."""

STATES: dict[str, int] = {"mixed": 4 + 4 + 8, "bfloat16": 2 + 2 + 8}
"""Bytes a weight takes with its gradient and AdamW's two moments: float32 under autocast, or bfloat16 with moments in
float32."""
FROZEN, TRAINED = 2, 16
"""With adapters: bytes of a frozen weight in bfloat16, and of a trained one."""


@dataclass(frozen=True)
class Inference:
    """Bytes for `batch` sequences."""

    batch: int
    weights: int
    cache_per_token: int
    """What one more token leaves where no layer has filled its sliding window."""
    cache: int
    cache_full: int
    """The same if no layer slid."""
    activations: int
    """Estimate: the widest layer while the prompt is read in one pass."""
    scores: int
    """Two matrices of scores of all heads, where the model's own attention makes them; a patch does without."""
    logits: int
    """Float32 logits of every token, which scoring a text needs; generating needs one row."""

    @property
    def generating(self) -> int:
        return self.weights + self.cache + self.activations


@dataclass(frozen=True)
class Training:
    """Bytes for one sequence on one device, and for the states that several devices may share."""

    states: dict[str, int]
    """Weights, gradients and AdamW's moments, by what is trained and in which precision."""
    adapters: int
    """Weights that are trained with adapters of rank 8, embeddings and norms."""
    activations: int
    """Estimate, with every layer recomputed in the backward pass."""
    logits: int
    """Float32 logits and their gradient."""
    chunked_logits: int
    devices: dict[str, int | None]
    """The fewest devices of 80 GB that share the states, with chunked logits; None where one sequence alone is too
    large for a device."""


def cache_bytes(facts: ModelFacts, length: int, *, sliding: bool = True) -> int:
    """What a sequence of `length` tokens leaves in the cache."""
    kept = (
        (layer, min(length, layer.sliding_window) if sliding and layer.sliding_window else length)
        for layer in facts.cache
    )
    return facts.item_bytes * sum(layer.numbers_per_token * tokens for layer, tokens in kept)


def inference(facts: ModelFacts, model: Any, length: int, batch: int) -> Inference:
    """What reading and continuing sequences of `length` tokens takes. `model` is the one on the meta device."""
    heads, eager = facts.shape.num_heads, "eager" in str(model.config.get_text_config()._attn_implementation)
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
    """What is trained with adapters on all linear layers and, as in LongLoRA (arXiv 2309.12307), embeddings and norms
    in full."""
    return rank * parameters.linear + parameters.embedding + parameters.norms


def training(facts: ModelFacts, length: int) -> Training:
    """What one sequence of `length` tokens takes in training, by the usual accounts: 2 L T d bytes of kept inputs of L
    layers and 34 T d of the layer at work (Korthikanti et al. 2022, arXiv 2205.05198, without the scores, which fast
    attention does not keep)."""
    weights, trained = facts.parameters.total, adapter_weights(facts.parameters)
    states = {name: size * weights for name, size in STATES.items()}
    states["adapters"] = FROZEN * weights + TRAINED * trained
    activations = (2 * facts.shape.num_layers + 34) * length * facts.shape.hidden_size
    logits, chunked = (2 * FLOAT32 * tokens * facts.vocabulary for tokens in (length, min(length, CHUNK)))
    room = DEVICE - activations - chunked
    devices = {name: math.ceil(size / room) if room > 0 else None for name, size in states.items()}
    return Training(states, trained, activations, logits, chunked, devices)


def training_flops(facts: ModelFacts, tokens: int, length: int) -> float:
    """Floating-point operations of `tokens` tokens in sequences of `length`: 6 N + 6 L d T a token (causal), and a
    third more for recomputing the layers. Layers that slide are counted as if they did not."""
    shape = facts.shape
    width = shape.num_heads * shape.head_dim
    per_token = 6 * facts.parameters.active + 6 * shape.num_layers * width * length
    return tokens * per_token * 4 / 3
