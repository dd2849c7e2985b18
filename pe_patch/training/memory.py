"""Offload activations to host memory between the forward and the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from .. import compat

LEAST = 2**20
"""Minimum size in bytes of a tensor that is worth a copy."""


def offload_activations(least: int = LEAST) -> saved_tensors_hooks:
    """Return a context for a forward pass that keeps activations in host memory, pinned if there is a GPU.

    This is PyTorch's `save_on_cpu` without the weights, which stay on the device anyway, and without small tensors.
    Under gradient checkpointing, only the inputs of the layers are saved. On a CPU nothing moves.

    Args:
        least: minimum size in bytes of a tensor to offload.
    """
    hooks: Any = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(tensor: Tensor) -> Any:
        base = compat.base_tensor(tensor)
        stays = isinstance(base, nn.Parameter) or tensor.nbytes < least
        return tensor if stays else hooks.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else hooks.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)
