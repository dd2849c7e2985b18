"""The sizes of an attention, which is all that a scheme knows about a model."""

from __future__ import annotations

from dataclasses import dataclass

ARITHMETIC = ("model", "float32 tables", "float32", "complex")
"""How a family multiplies queries and keys by cos and sin, in half precision:

- "model": cos and sin are cast to the dtype of the model, and so is every product (Llama).
- "float32 tables": cos and sin stay float32, which makes the products float32 (OLMo).
- "float32": cos and sin are cast to the dtype of the model; queries and keys are cast to float32 (Cohere).
- "complex": one complex product in float32 (Llama 4, DeepSeek-V2).

Each casts the result back to the dtype of the model.
"""


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of an attention, read from the built modules."""

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    """Number of dimensions of a head that rotate."""
    rotary_start: int
    """Index of the first of them in the head (DeepSeek rotates the last dimensions)."""
    rope_theta: float
    trained_length: int
    """Trained window in tokens; 0 if unknown."""
    num_layers: int
    interleaved: bool = False
    """Pairs are neighbours (2k, 2k + 1); otherwise halves (k, k + rotary_dim / 2)."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches of a trained image, for a vision encoder."""
    leading_tokens: int = 0
    """Tokens before the patches, such as a class token."""
    latent_rank: int = 0
    """Width of the cached latent (DeepSeek); 0 if the attention caches keys and values."""
    value_dim: int = 0
    """Width of a value and of a head's output; 0 for `head_dim`, the width of queries and keys."""
    arithmetic: str = "model"
    """Dtypes in which the family rotates, one of `ARITHMETIC`. A rotation at the scores rounds in the same way."""

    def __post_init__(self) -> None:
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)
