"""The sizes of an attention, which are all that a scheme may know of it."""

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
    """What a scheme may know of the attention it serves: sizes only, read from the built modules."""

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    """How many dimensions of a head rotate."""
    rotary_start: int
    """Where in the head they begin (DeepSeek rotates the last ones)."""
    rope_theta: float
    trained_length: int
    """The window the model was trained for, in tokens; 0 where nothing says so."""
    num_layers: int
    interleaved: bool = False
    """Rotated pairs are neighbours (2k, 2k + 1) rather than halves (k, k + rotary_dim / 2)."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches of a trained image, for a tower that reads images."""
    leading_tokens: int = 0
    """Tokens before the patches, such as a class token."""
    latent_rank: int = 0
    """Width of the latent that an attention caches instead of keys and values (DeepSeek); 0 where it caches those."""
    value_dim: int = 0
    """Width of a value, and of a head's output; `head_dim`, which is that of queries and keys, where 0."""
    arithmetic: str = "model"
    """Dtypes in which the family rotates, one of `ARITHMETIC`, so that a rotation at the scores rounds as it does."""

    def __post_init__(self) -> None:
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)
