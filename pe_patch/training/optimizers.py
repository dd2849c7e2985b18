"""Build the optimiser that a recipe names."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from .quantise import INSTALL
from .recipe import Optimizer, RecipeError


def build_optimizer(groups: list[dict[str, Any]], wanted: Optimizer, *, sharded: bool = False) -> torch.optim.Optimizer:
    """Return AdamW over parameter groups, with moments in float32 or 8 bits. The trainer sets the learning rate.

    `adamw_8bit` is bitsandbytes' AdamW (arXiv 2110.02861): blocks of 256 moments share a scale, so that it needs two
    bytes per parameter instead of eight. Parameters with fewer than 4096 elements keep float32 moments. It also runs
    on CPU.

    Args:
        groups: parameter groups, as in torch's optimisers.
        wanted: the recipe's `optimizer`.
        sharded: True if the parameters are or will be distributed tensors (FSDP2), which bitsandbytes cannot read.

    Raises:
        RecipeError: bitsandbytes is not installed, or the parameters are sharded.
    """
    return OPTIMIZERS[wanted.name](groups, wanted, sharded)


def _adamw(groups: list[dict[str, Any]], wanted: Optimizer, sharded: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=wanted.betas, fused=True)


def _adamw_8bit(groups: list[dict[str, Any]], wanted: Optimizer, sharded: bool) -> torch.optim.Optimizer:
    if sharded:
        raise RecipeError(
            "optimizer.name: adamw_8bit cannot read FSDP2's sharded parameters; use adamw, whose moments are sharded "
            "too, or train with DDP."
        )
    if find_spec("bitsandbytes") is None:
        raise RecipeError(f"optimizer.name: adamw_8bit needs bitsandbytes: {INSTALL}.")
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, lr=0.0, betas=tuple(wanted.betas))


OPTIMIZERS = {"adamw": _adamw, "adamw_8bit": _adamw_8bit}
