"""Attention by scores defined pair by pair, in float64, and what a patched Llama makes of the same projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import oracles
from .models import tokens

HEADS, KEY_HEADS, HEAD = 4, 2, 16
THETA = 10000.0

Distance = Callable[[int, int], float | None]
"""The distance that query i has to key j, or None where it does not attend to it."""


def relative_scores(
    query: Tensor, key: Tensor, distance: Tensor, frequencies: list[float], zeta: Tensor | None = None
) -> Tensor:
    """q R(distance) k summed over pairs of dimensions (k, k + r / 2), as complex numbers; `[batch, heads, i, j]`.

    A pair also gains zeta^distance where `zeta`, `[pairs]`, is given. The rest of the head meets unturned.
    """
    pairs = len(frequencies)
    turning = [torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) for x in (query, key)]
    angle = distance[..., None] * torch.tensor(frequencies, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle) if zeta is None else zeta ** distance[..., None], angle)
    turned = torch.einsum("bhik,bhjk,ijk->bhij", turning[0], turning[1].conj(), turn).real
    return turned + query[..., 2 * pairs :] @ key[..., 2 * pairs :].transpose(2, 3)


def distances(length: int, of: Distance) -> Tensor:
    """The distance of every pair one by one, `[length, length]`; NaN where it is not attended."""
    rows = [[of(i, j) if j <= i else None for j in range(length)] for i in range(length)]
    return torch.tensor([[torch.nan if d is None else float(d) for d in row] for row in rows], dtype=torch.float64)


def attention(
    projected: tuple[Tensor, Tensor, Tensor],
    of: Distance,
    *,
    frequencies: list[float] | None = None,
    sharpness: Callable[[int], float] = lambda i: 1.0,
    zeta: Tensor | None = None,
    slopes: list[float] | None = None,
) -> Tensor:
    """Output `[batch, length, heads x head]` for projections `[batch, length, heads x head]`, in float64."""
    length = projected[0].shape[1]
    query, key, value = (x.unflatten(2, (-1, HEAD)).transpose(1, 2) for x in projected)
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
    distance = distances(length, of)
    scores = relative_scores(query, key, distance.nan_to_num(), frequencies or oracles.rope(HEAD, THETA), zeta)
    scores = scores * torch.tensor([[sharpness(i)] for i in range(length)], dtype=torch.float64) / HEAD**0.5
    if slopes is not None:
        scores = scores - torch.tensor(slopes, dtype=torch.float64)[:, None, None] * distance.nan_to_num()
    weights = scores.masked_fill(distance.isnan(), -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


@dataclass
class Pass:
    """What one layer of a patched Llama projected and made of it, and gradients of a random sum of the output."""

    projected: tuple[Tensor, Tensor, Tensor]
    output: Tensor
    gradients: tuple[Tensor, Tensor, Tensor]


def through(model: Any, length: int, rows: int = 2) -> Pass:
    """Run a Llama of one layer with its attention watched."""
    layer = model.model.layers[0].self_attn
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            seen[name] = output

        return hook

    hooks = [getattr(layer, f"{name}_proj").register_forward_hook(keep(name)) for name in "qkv"]
    hooks.append(layer.o_proj.register_forward_pre_hook(lambda _module, inputs: seen.update(output=inputs[0])))
    model(tokens(rows, length), use_cache=False)
    for hook in hooks:
        hook.remove()
    (seen["output"] * probe(seen["output"])).sum().backward()
    query, key, value = (seen[name] for name in "qkv")
    assert query.grad is not None and key.grad is not None and value.grad is not None
    gradients = query.grad, key.grad, value.grad
    return Pass((query.detach(), key.detach(), value.detach()), seen["output"].detach(), gradients)


def probe(like: Tensor) -> Tensor:
    """Fixed random numbers of the shape of `like`."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(5)).to(like.dtype)


def compare(found: Pass, of: Distance, tolerance: float = 1e-5, **options: Any) -> None:
    """Output and gradients against the oracle's, relative to the largest of each."""
    query, key, value = projected = tuple(x.double().requires_grad_() for x in found.projected)
    expected = attention((query, key, value), of, **options)
    (expected * probe(expected)).sum().backward()
    pairs = [("output", found.output, expected), *zip("qkv", found.gradients, (x.grad for x in projected), strict=True)]
    for name, ours, wanted in pairs:
        assert float((ours - wanted).detach().abs().max() / wanted.detach().abs().max()) < tolerance, name
