"""The weights in effect of a projection, for decoding that multiplies by them the other way round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
"""Subclasses of these are quantised, or spread over processes."""


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _signature(linear: nn.Module) -> tuple[Any, ...]:
    """What changes whenever the weights in effect may have: those of the layer and of whatever PEFT put round it."""
    tensors = [*linear.parameters(), *linear.buffers()]
    adapters = ("merged_adapters", "active_adapters", "disable_adapters", "scaling")
    state = tuple(repr(getattr(linear, name, None)) for name in adapters)
    return (*((t.data_ptr(), _version(t), t.dtype, t.device) for t in tensors), *state)


class Folding:
    """What linear layers in effect multiply by and add, where something is wrapped round them: LoRA, quantisation,
    offloading.

    A plain layer's weight is used as it is, so that nothing can be out of date. What a wrapped layer does is found by
    sending the identity through it, once; that is dropped at every pass over several new tokens, in training, and
    whenever the choice of adapters or a tensor inside the layer has changed (but for changes in place behind
    autograd's back, `.data.mul_()`, which show from the next such pass on). A compiled graph cannot keep it, and finds
    it anew in each pass.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Any, ...], Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self._known = {}

    def drop(self) -> None:
        """Forget what was prepared."""
        if self._known:
            self._known.clear()

    def weight(self, name: str, linear: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[out, width]` and `[out]`: by what `linear` multiplies and what it adds, in the dtype of `like` and on its
        device."""
        plain = type(linear) is nn.Linear and not hasattr(linear, "_hf_hook")
        if plain and isinstance(linear, nn.Linear) and type(linear.weight) in PLAIN and not linear.weight.is_meta:
            return linear.weight.to(like.dtype), None if linear.bias is None else linear.bias.to(like.dtype)
        kept = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or linear.training)
        signature = _signature(linear) if kept else ()
        known = self._known.get(name)
        if kept and known is not None and known[0] == signature:
            return known[1].to(like.dtype), known[2].to(like.dtype)
        identity = torch.eye(width, dtype=like.dtype, device=like.device)
        found = linear(torch.cat((identity, identity.new_zeros(1, width))))
        bias = found[-1]
        weight = (found[:-1] - bias).T
        if kept:
            self._known[name] = (signature, weight, bias)
        return weight.to(like.dtype), bias.to(like.dtype)
