"""Attention under relative schemes as the papers write it, in float64, pair by pair and in full.

Queries are `[batch, heads, n, head]`; keys and values are repeated for the queries that they serve. `w` holds the
scheme's parameters by name. Everything is built from the whole `[n, n]` table of pairs; gradients are autograd's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pairs(n: int) -> Tensor:
    """i - j, `[n, n]`."""
    return torch.tensor([[i - j for j in range(n)] for i in range(n)], dtype=torch.float64)


def t5_boundaries(buckets: int, farthest: int) -> list[int]:
    """The distance at which each bucket but the first begins: one by one, then evenly in the logarithm."""
    exact = buckets // 2
    step = (farthest / exact) ** (1 / (buckets - exact))
    return [*range(1, exact + 1), *(math.ceil(exact * step**m - 1e-9) for m in range(1, buckets - exact))]


def t5(w: dict[str, Tensor], n: int, buckets: int, farthest: int) -> Tensor:
    """Raffel et al. 2019: the sum of the steps from bucket to bucket up to the distance."""
    table = w["table"]
    bias = table[0][:, None, None].expand(-1, n, n)
    for bucket, begins in enumerate(t5_boundaries(buckets, farthest), 1):
        beyond = (pairs(n) >= begins).double()
        bias = bias + (table[bucket] - table[bucket - 1])[:, None, None] * beyond
    return bias


def kerple_log(w: dict[str, Tensor], n: int) -> Tensor:
    """Chi et al. 2022, equation 3: -r1 log(1 + r2 |m - n|)."""
    return torch.log((1 + w["a"][:, None, None] * pairs(n).abs()) ** -w["p"][:, None, None])


def kerple_power(w: dict[str, Tensor], n: int) -> Tensor:
    """Chi et al. 2022: -r1 |m - n|^r2."""
    distance = pairs(n).abs()
    powers = torch.exp(w["p"][:, None, None] * distance.clamp(min=1).log()) * (distance > 0)
    return -w["a"][:, None, None] * powers


def sandwich(heads: int, n: int, dim: int) -> Tensor:
    """Chi et al. 2022 (Sandwich): the inner product of two sinusoidal embeddings over 8 h / H."""
    frequencies = torch.tensor([math.exp(-math.log(10000) * 2 * k / dim) for k in range(dim // 2)]).double()
    turns = torch.polar(torch.ones(n, dim // 2).double(), torch.arange(n).double()[:, None] * frequencies)
    return torch.stack([(turns @ turns.mH).real / (8 * h / heads) for h in range(1, heads + 1)])


def fire(w: dict[str, Tensor], n: int, threshold: float) -> Tensor:
    """Li et al. 2023, equations 4 to 6, unit by unit."""
    far = torch.maximum(torch.arange(n).double(), (w["multiplier"] * threshold).abs())
    z = torch.log((w["c"] * pairs(n)).abs() + 1) / (torch.log((w["c"] * far).abs() + 1) + 1e-6)[:, None]
    bias = w["bias_out"][:, None, None].expand(-1, n, n)
    for weight, shift, out in zip(w["weight_in"], w["bias_in"], w["weight_out"].T, strict=True):
        unit = weight * z + shift
        bias = bias + out[:, None, None] * torch.where(unit > 0, unit, 0)
    return bias


def shaw(w: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, farthest: int) -> tuple[Tensor, Tensor]:
    """Shaw et al. 2018, equations 3 and 4: scores, and what each pair hands on."""
    n = q.shape[2]
    clipped = (-pairs(n)).clamp(-farthest, farthest).long() + farthest
    of_key, of_value = w["keys"][clipped], w["values"][clipped]
    scores = torch.einsum("bhid,bhijd->bhij", q, k[:, :, None] + of_key) / q.shape[-1] ** 0.5
    return scores, v[:, :, None] + of_value


def transformer_xl(w: dict[str, Tensor], q: Tensor, k: Tensor, layer: int, clamp: int | None) -> Tensor:
    """Dai et al. 2019, section 3.3: the four terms (a) to (d), one after the other."""
    n, hidden = q.shape[2], w["projection"].shape[2]
    distance = pairs(n).clamp(min=0, max=clamp)
    frequencies = torch.tensor([10000 ** (-2 * m / hidden) for m in range(hidden // 2)], dtype=torch.float64)
    angles = distance[..., None] * frequencies
    r = torch.cat((angles.sin(), angles.cos()), -1) @ w["projection"][layer].T
    r = r.unflatten(-1, (q.shape[1], -1))
    content = torch.einsum("bhid,bhjd->bhij", q, k)
    by_distance = torch.einsum("bhid,ijhd->bhij", q, r)
    everywhere = torch.einsum("hd,bhjd->bhj", w["u"], k)[:, :, None]
    either = torch.einsum("hd,ijhd->hij", w["v"], r)
    return (content + by_distance + everywhere + either) / q.shape[-1] ** 0.5


def cope(w: dict[str, Tensor], q: Tensor, k: Tensor) -> Tensor:
    """Golovneva et al. 2024, equations 2 to 6; interpolation as a sum of hats."""
    n, entries = q.shape[2], w["table"].shape[1]
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    gates = torch.sigmoid(scores) * (pairs(n) >= 0)
    places = torch.minimum(gates @ (pairs(n) >= 0).double(), torch.tensor(entries - 1.0))
    for entry in range(entries):
        hat = (1 - (places - entry).abs()).clamp(min=0)
        scores = scores + hat * (q @ w["table"][:, entry])[..., None] / q.shape[-1] ** 0.5
    return scores


def attention(scores: Tensor, handed: Tensor) -> Tensor:
    """Causal softmax; `handed` is `[..., keys, head]` or, where it depends on the query, `[..., query, keys, head]`."""
    weights = scores.masked_fill(pairs(scores.shape[-1]) < 0, -torch.inf).softmax(-1)
    mixed = weights[..., None, :] @ (handed if handed.ndim == 5 else handed[:, :, None])
    return mixed[..., 0, :]
