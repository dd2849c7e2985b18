"""The weights in effect of a projection, for decoding that multiplies by them the other way round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _signature(linear: nn.Module) -> tuple[Any, ...]:
    """What changes whenever the weights in effect may have: those of the layer and of whatever PEFT put round it."""
    tensors = [*linear.parameters(), *linear.buffers()]
    adapters = ("merged_adapters", "active_adapters", "disable_adapters", "scaling")
    state = tuple(repr(getattr(linear, name, None)) for name in adapters)
    return (*((t.data_ptr(), _version(t), t.dtype, t.device) for t in tensors), *state)


class Folding:
    """Weights in effect of linear layers that something is wrapped round: LoRA, quantisation, offloading.

    A plain layer's weight is used as it is, so that nothing can be out of date. What a wrapped layer does is found by
    sending the identity through it, once; that is dropped at every longer pass over new tokens, in training, and
    whenever a tensor inside the layer or the choice of adapters has changed.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Any, ...], Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self._known = {}

    def drop(self) -> None:
        """Forget what was prepared."""
        if self._known:
            self._known.clear()

    def weight(self, name: str, linear: nn.Module, width: int, like: Tensor) -> Tensor:
        """`[out, width]`: the matrix by which `linear` multiplies, in the dtype of `like` and on its device."""
        if type(linear) is nn.Linear and not hasattr(linear, "_hf_hook") and not linear.weight.is_meta:
            return linear.weight.to(like.dtype)
        kept = not torch.is_grad_enabled() and not linear.training
        signature = _signature(linear) if kept else ()
        known = self._known.get(name)
        if kept and known is not None and known[0] == signature:
            return known[1].to(like.dtype)
        identity = torch.eye(width, dtype=like.dtype, device=like.device)
        weight = linear(identity).T
        if kept:
            self._known[name] = (signature, weight)
        return weight.to(like.dtype)
