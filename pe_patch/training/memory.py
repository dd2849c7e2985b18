"""Where what the backward pass needs waits for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

LEAST = 2**20
"""Bytes: less than this is not worth a copy."""


def offload_activations(least: int = LEAST) -> saved_tensors_hooks:
    """A context for a forward pass: what its backward pass needs waits in the host's memory, pinned where a GPU is.

    PyTorch's `save_on_cpu`, without the weights, which stay on the device anyway, and without tensors of fewer than
    `least` bytes. Under gradient checkpointing the inputs of the layers are all there is to save. On a CPU nothing
    moves.
    """
    hooks: Any = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(tensor: Tensor) -> Any:
        base = tensor if tensor._base is None else tensor._base
        stays = isinstance(base, nn.Parameter) or tensor.nbytes < least
        return tensor if stays else hooks.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else hooks.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)
