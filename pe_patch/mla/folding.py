"""Effective weights of projections, which absorbed decoding multiplies in transposed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import compat

PLAIN = (Tensor, nn.Parameter)
"""The types of an ordinary weight; subclasses are quantized, or distributed over processes."""


def _signature(linear: nn.Module) -> tuple[Any, ...]:
    """Return a key that changes when the effective weights of a layer, with its PEFT adapters, may have changed."""
    tensors = [*linear.parameters(), *linear.buffers()]
    adapters = ("merged_adapters", "active_adapters", "disable_adapters", "scaling")
    state = tuple(repr(getattr(linear, name, None)) for name in adapters)
    return (*((t.data_ptr(), compat.version_counter(t), t.dtype, t.device) for t in tensors), *state)


class EffectiveWeightCache:
    """A cache of the effective weights and biases of linear layers that LoRA, quantization or offloading wraps.

    A plain layer's weight is used directly. The effective weight of a wrapped layer is computed by applying the layer
    to the identity matrix, and cached. The cache is dropped in each pass over several new tokens, and an entry is
    recomputed when the active adapters or a tensor of the layer change. Changes that bypass autograd's version counter,
    such as `.data.mul_()`, show after the next pass over several new tokens. Nothing is cached in training or in a
    compiled graph.
    """

    def __init__(self) -> None:
        self._cache: dict[str, tuple[tuple[Any, ...], Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self._cache = {}

    def clear(self) -> None:
        """Discard all cached weights."""
        if self._cache:
            self._cache.clear()

    def weight(self, name: str, linear: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the effective weight and bias of a linear layer.

        Args:
            name: key of the layer in the cache.
            linear: the layer, possibly wrapped.
            width: number of input dimensions.
            like: a tensor with the dtype of the result, and the device that a wrapped layer computes on.

        Returns:
            The weight `[out, width]`, and the bias `[out]` or None.
        """
        is_plain = type(linear) is nn.Linear and compat.execution_hook(linear) is None
        if is_plain and isinstance(linear, nn.Linear) and type(linear.weight) in PLAIN and not linear.weight.is_meta:
            return linear.weight.to(like.dtype), None if linear.bias is None else linear.bias.to(like.dtype)
        use_cache = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or linear.training)
        signature = _signature(linear) if use_cache else ()
        cached = self._cache.get(name)
        if use_cache and cached is not None and cached[0] == signature:
            return cached[1].to(like.dtype), cached[2].to(like.dtype)
        identity = torch.eye(width, dtype=like.dtype, device=like.device)
        output = linear(torch.cat((identity, identity.new_zeros(1, width))))
        bias = output[-1]
        weight = (output[:-1] - bias).T
        if use_cache:
            self._cache[name] = (signature, weight, bias)
        return weight.to(like.dtype), bias.to(like.dtype)
