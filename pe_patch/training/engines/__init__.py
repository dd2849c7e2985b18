"""How one optimiser step is spread over processes, chosen by how the script was launched."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from ..recipe import RecipeError
from .context_parallel import ContextParallel
from .engine import IGNORED, Engine
from .fully_shard import FullyShard

__all__ = ["IGNORED", "Engine", "choose_engine"]


def choose_engine(**arguments: Any) -> Engine:
    """The engine for the launch that this process is part of; `arguments` are those of `accelerate.Accelerator`.

    Raises:
        RecipeError: what was launched would be dropped without a word, or is not known here.
    """
    if asked("ACCELERATE_USE_DEEPSPEED"):
        from .deep_speed import DeepSpeed  # it is slow to import, and few have it

        return DeepSpeed(Accelerator(**arguments, **_over_gloo()))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        arguments["cpu"] = True  # else accelerate would run each process by itself, without a word
    accelerator = Accelerator(**arguments)
    kind, sizes = accelerator.distributed_type, _sizes(accelerator)
    if sizes["tp"] > 1:
        raise RecipeError("tp_size: the recipes do not train under tensor parallelism; use FSDP2, ZeRO-3 or Ulysses.")
    if sizes["sp"] > 1:
        raise RecipeError("sp_size: Ulysses is DeepSpeed's, so launch with it: recipes/accelerate/ulysses.yaml.")
    if sizes["cp"] > 1:
        return ContextParallel(accelerator)
    if asked("ACCELERATE_USE_FSDP") and kind != DistributedType.FSDP:
        if kind == DistributedType.NO:
            raise RecipeError("FSDP was asked for, and there is one process: launch several, or leave FSDP out.")
        return FullyShard(accelerator)
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RecipeError("fsdp_version: 1 is not supported here; set fsdp_version: 2.")
    return Engine(accelerator)


def _sizes(accelerator: Any) -> dict[str, int]:
    """Over how many processes each kind of parallelism goes."""
    parallelism = accelerator.parallelism_config
    return {kind: 1 if parallelism is None else getattr(parallelism, f"{kind}_size") for kind in ("tp", "sp", "cp")}


def asked(name: str) -> bool:
    """Whether the launcher has set a switch."""
    return os.environ.get(name, "false").lower() == "true"


def _over_gloo() -> dict[str, Any]:
    """What makes DeepSpeed and accelerate run on CPUs; nothing where there are GPUs."""
    if torch.cuda.is_available():
        return {}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # It would be compiled on its first use, for which not every machine has what it takes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Without a backend accelerate would count one process, whatever the launcher says.
    return {"kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]}
