"""The optimisers that a recipe may name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from .quantise import INSTALL
from .recipe import Optimizer, RecipeError


def build_optimizer(groups: list[dict[str, Any]], wanted: Optimizer, *, sharded: bool = False) -> torch.optim.Optimizer:
    """AdamW over parameter groups, its moments in float32 or in 8 bits; the learning rate is set at every step.

    `adamw_8bit` is bitsandbytes' (arXiv 2110.02861): blocks of 256 moments share a scale, which makes two bytes a
    parameter in place of eight, and parameters of fewer than 4096 elements keep float32. It is the library that
    `model.quantization` needs as well, and it runs on CPU too.

    Args:
        groups: as torch's optimisers take them.
        wanted: the recipe's `optimizer`.
        sharded: parameters are, or will be, torch's distributed tensors (FSDP2), which bitsandbytes cannot read.

    Raises:
        RecipeError: where bitsandbytes is not installed or cannot do it.
    """
    return OPTIMIZERS[wanted.name](groups, wanted, sharded)


def _adamw(groups: list[dict[str, Any]], wanted: Optimizer, sharded: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=wanted.betas, fused=True)


def _adamw_8bit(groups: list[dict[str, Any]], wanted: Optimizer, sharded: bool) -> torch.optim.Optimizer:
    if sharded:
        raise RecipeError(
            "optimizer.name: adamw_8bit cannot read the sharded parameters of FSDP2; take adamw, whose moments are "
            "sharded with them, or train with DDP."
        )
    if find_spec("bitsandbytes") is None:
        raise RecipeError(f"optimizer.name: adamw_8bit needs bitsandbytes: {INSTALL}.")
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, lr=0.0, betas=tuple(wanted.betas))


OPTIMIZERS = {"adamw": _adamw, "adamw_8bit": _adamw_8bit}
