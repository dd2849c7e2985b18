"""Small attentions of every kind there is, and hidden states for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pe_patch.core.projections import Latents, Projections, Statistics
from pe_patch.mla.convert import convert_layer, full_rank

HIDDEN = 48
SHAPES: dict[str, dict[str, Any]] = {  # of heads: heads, kv_heads, head_dim, rotary_dim, and what else there is
    "multi-head": {"sizes": (4, 4, 12, 12)},
    "grouped": {"sizes": (6, 2, 8, 8)},
    "one key": {"sizes": (4, 1, 8, 8), "biased": True},
    "partial, biases": {"sizes": (4, 4, 12, 4), "biased": True},
    "grouped, partial, biases, interleaved": {"sizes": (4, 2, 12, 8), "biased": True, "interleaved": True},
    "interleaved": {"sizes": (4, 2, 8, 8), "interleaved": True},
    "norms": {"sizes": (4, 2, 16, 16), "norms": True},
    "wide": {"sizes": (16, 16, 8, 8)},
    "wide, norms": {"sizes": (8, 8, 8, 8), "norms": True},
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm(size: int, seed: int) -> nn.Module:
    made = nn.RMSNorm(size, eps=1e-6, dtype=torch.float64)
    made.weight.data = 1 + 0.3 * random(size, seed=seed)
    return made.requires_grad_(False)


def attention(name: str) -> Projections:
    case = SHAPES[name]
    heads, kv_heads, head_dim, rotary_dim = case["sizes"]
    rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    made = [random(n, HIDDEN, seed=seed) * HIDDEN**-0.5 for seed, n in enumerate(rows)]
    biases = [random(n, seed=9 + seed) if case.get("biased") else None for seed, n in enumerate(rows)]
    norms = [norm(head_dim, 20 + seed) if case.get("norms") else None for seed in range(2)]
    return Projections(
        *made, *biases, heads, kv_heads, head_dim, rotary_dim, case.get("interleaved", False), norms[0], norms[1]
    )


def inputs(tokens: int = 160, seed: int = 5) -> Tensor:
    """Hidden states with few strong directions, as those of a model."""
    strength = torch.linspace(0, -3, HIDDEN, dtype=torch.float64).exp()
    return random(tokens, HIDDEN, seed=seed) * 2 * strength @ random(HIDDEN, HIDDEN, seed=7) * HIDDEN**-0.5 * 2


def output_of(of: Projections) -> Tensor:
    return random(HIDDEN, of.heads * of.head_dim, seed=8)


def options(method: str, of: Projections, everything: bool) -> dict[str, Any]:
    """What converts with all rotation kept, or with half of a head's."""
    if method in ("mha2mla", "split"):
        width = of.rotary_dim if everything and method == "mha2mla" else of.rotary_dim // 2
        return {"method": "mha2mla", "svd": "split" if method == "split" else "joint", "rope_dim": width}
    return {"method": method, "rope_dim": of.kv_heads * of.rotary_dim if everything else of.rotary_dim // 2}


def converted(of: Projections, statistics: Statistics | None, rank: int | None = None, **given: Any) -> Latents:
    most = full_rank(of, given["method"], given["rope_dim"], given.get("svd", "joint"))
    return convert_layer(of, statistics, kv_rank=rank or most, **given)
