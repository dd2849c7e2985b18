"""Train with torch's `fully_shard` over gloo: FSDP2 on CPUs, where accelerate ignores its plugin."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ... import compat
from ...patching.targets import unwrap
from ..recipe import RecipeError
from .engine import Engine

NOTE = (
    "FSDP on CPUs: accelerate would run DDP instead without a warning. Using torch's fully_shard, "
    "without mixed precision."
)


class FullyShard(Engine):
    """FSDP2 on CPUs: each process holds a shard of every weight."""

    name = "fully_shard"
    sharded = True

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator)
        accelerator.print(NOTE)

    def refuse(self, recipe: Any, model: nn.Module) -> None:
        if recipe.mixed_precision != "no":
            raise RecipeError(f"mixed_precision={recipe.mixed_precision} has no effect with FSDP on CPUs; set no.")
        if recipe.model.quantization is not None:
            raise RecipeError("model.quantization: 4-bit weights cannot be sharded; use one process.")

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        mesh = init_device_mesh("cpu", (self.accelerator.num_processes,), mesh_dim_names=("fsdp",))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        shards = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [shards[names[id(parameter)]] for parameter in group["params"]]
        self.model, self.optimizer = model, optimizer
        return model, optimizer

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss * self.accelerator.num_processes).backward()

    def clip(self, norm: float) -> float:
        before: Any = nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        return float(before.full_tensor())

    def unwrapped(self) -> Any:
        return self.model

    def full_state_dict(self) -> Any:
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def save(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        save({"model": model, "optimizer": optimizer}, checkpoint_id=str(folder))
        torch.save(_random_states(), folder / f"random_{self.accelerator.process_index}.pt")

    def load(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        load(state, checkpoint_id=str(folder))
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        states = torch.load(folder / f"random_{self.accelerator.process_index}.pt", weights_only=False)
        torch.set_rng_state(states["torch"])
        np.random.set_state(states["numpy"])
        random.setstate(states["python"])


def _random_states() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers to gather individually, which the family does not want to split."""
    whole = unwrap(model)
    wanted = compat.unsplit_classes(whole)
    return [module for module in whole.modules() if type(module).__name__ in wanted]
