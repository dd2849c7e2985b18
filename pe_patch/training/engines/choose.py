"""Choose the engine that fits how the script was launched."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from ..recipe import RecipeError
from .context_parallel import ContextParallel
from .engine import Engine
from .fully_shard import FullyShard


def choose_engine(**arguments: Any) -> Engine:
    """Return the engine for the launch that this process belongs to.

    Args:
        arguments: keyword arguments of `accelerate.Accelerator`.

    Raises:
        RecipeError: the launch asks for something that would be ignored or is not supported.
    """
    if is_enabled("ACCELERATE_USE_DEEPSPEED"):
        from .deep_speed import DeepSpeed  # slow to import, and optional

        return DeepSpeed(Accelerator(**arguments, **_over_gloo()))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        arguments["cpu"] = True  # otherwise accelerate would run each process alone without a warning
    accelerator = Accelerator(**arguments)
    kind, sizes = accelerator.distributed_type, _sizes(accelerator)
    if sizes["tp"] > 1:
        raise RecipeError("tp_size: recipes do not support tensor parallelism; use FSDP2, ZeRO-3 or Ulysses.")
    if sizes["sp"] > 1:
        raise RecipeError("sp_size: Ulysses needs DeepSpeed; launch with recipes/accelerate/ulysses.yaml.")
    if sizes["cp"] > 1:
        return ContextParallel(accelerator)
    if is_enabled("ACCELERATE_USE_FSDP") and kind != DistributedType.FSDP:
        if kind == DistributedType.NO:
            raise RecipeError("FSDP needs several processes, and there is one process; launch more, or disable FSDP.")
        return FullyShard(accelerator)
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RecipeError("fsdp_version: 1 is not supported; set fsdp_version: 2.")
    return Engine(accelerator)


def _sizes(accelerator: Any) -> dict[str, int]:
    """Return the number of processes for each kind of parallelism."""
    parallelism = accelerator.parallelism_config
    return {kind: 1 if parallelism is None else getattr(parallelism, f"{kind}_size") for kind in ("tp", "sp", "cp")}


def is_enabled(name: str) -> bool:
    """Return whether the launcher enabled this environment variable."""
    return os.environ.get(name, "false").lower() == "true"


def _over_gloo() -> dict[str, Any]:
    """Return the arguments that make DeepSpeed and accelerate run on CPUs; empty if there are GPUs."""
    if torch.cuda.is_available():
        return {}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed would compile this on first use, which not every machine can.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Without a backend, accelerate would count one process, whatever the launcher set.
    return {"kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]}
