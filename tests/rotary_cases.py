"""Attentions to try rotary schemes on, and what Transformers computes for them."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pe_patch.core.scheme import AttentionShape
from pe_patch.schemes.registry import SCHEMES
from pe_patch.schemes.rotary import Rotary

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
