"""Three optimiser steps on packed documents under whatever parallelism the launch asks for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from pe_patch import patch_model
from pe_patch.training.checkpoints import check_resumable
from pe_patch.training.data import IGNORED
from pe_patch.training.launch import Launch
from pe_patch.training.recipe import Checkpoints, Phase, Recipe
from pe_patch.training.trainer import RecipeTrainer

from ..models import VOCABULARY, build

STEPS, ROWS, LENGTH = 3, 4, 48
SCHEMES: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0}, "alibi": {}, "t5": {}, "self_extend": {"group": 3, "window": 8},
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "dynamic_ntk": {}, "transformer_xl": {}, "fire": {}, "kerple": {}, "shaw": {}, "learned": {"max_positions": 64},
}  # fmt: skip


def batch_of(step: int) -> dict[str, Tensor]:
    """Rows of documents end to end, cut at other places in each row, so that parts of a row hold ends of some."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)
    positions, labels = [], ids.clone()
    for row in range(ROWS):
        ends = sorted(torch.randperm(LENGTH - 1, generator=generator)[:3].add(1).tolist())
        starts = [0, *ends]
        labels[row, starts] = IGNORED
        sizes = torch.tensor([*ends, LENGTH]) - torch.tensor(starts)
        positions.append(torch.cat([torch.arange(int(size)) for size in sizes]))
    return {"input_ids": ids, "labels": labels, "position_ids": torch.stack(positions)}


def model_under(name: str, options: dict[str, Any], family: str = "llama", **sizes: Any) -> Any:
    """A tiny model whose scheme's own parameters are not what they start as."""
    model = patch_model(build(family, **sizes), name, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.model.position_schemes.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model.train()


class Steps(list[dict[str, Any]]):
    """In place of a log."""

    step = list.append


class Plain(RecipeTrainer):
    """With SGD: Adam would make steps of the noise in gradients that are zero but for rounding."""

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = self.optimizer or torch.optim.SGD((model or self.model).parameters(), lr=0.0)
        return self.optimizer


def recipe_for(folder: str, plain: bool = False, **more: Any) -> Recipe:
    phase = Phase(length=LENGTH, batch=ROWS, micro_batch=1, steps=STEPS, learning_rate=1e-1 if plain else 1e-3,
                  schedule="constant", warmup=0)  # fmt: skip
    return Recipe(output=folder, phases=[phase], checkpoints=Checkpoints(every=1, keep=9), trackers=[], **more)


def trainer_for(model: Any, recipe: Recipe, *, plain: bool = False, log: Any = None, progress: Any = None) -> Any:
    launch = Launch(recipe)
    launch.refuse(recipe, model)

    def batches(phase: int, first_step: int) -> Iterator[list[dict[str, Tensor]]]:
        rows = range(launch.data_rank, ROWS, launch.data_world)
        for step in range(first_step, STEPS):
            yield [{name: tensor[row : row + 1] for name, tensor in batch_of(step).items()} for row in rows]

    kind = Plain if plain else RecipeTrainer
    return kind(model, launch, recipe, batches, log=log, progress=progress)


def train(model: Any, folder: str, *, plain: bool = False, resume: bool = False) -> dict[str, Any]:
    """Losses and gradient norms of the steps, and the weights behind them; with `resume`, from step 1 on."""
    recipe, log = recipe_for(folder, plain), Steps()
    checkpoint = Path(folder) / "checkpoints" / "step-000001" if resume else None
    progress = None if checkpoint is None else check_resumable(checkpoint, recipe, {})
    trainer = trainer_for(model, recipe, plain=plain, log=log, progress=progress)
    trainer.train(None if checkpoint is None else str(checkpoint))
    weights = trainer.full_state_dict() if trainer.launch.sharded else trainer.unwrapped().state_dict()
    return {
        "losses": [values["loss"] for values in log],
        "norms": [values["gradient_norm"] for values in log],
        "targets": [values["targets"] for values in log],
        "weights": {name: tensor.detach().clone() for name, tensor in (weights or {}).items()},
        "name": trainer.launch.describe(),
    }


def forget_ulysses() -> None:
    """Make room for the next model of this process: DeepSpeed registers itself once."""
    state = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if state is None:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    state._release_sequence_parallel_groups()
    for name in [name for name in ALL_ATTENTION_FUNCTIONS._local_mapping if name.startswith("pe_")]:
        del ALL_ATTENTION_FUNCTIONS._local_mapping[name]


def run(schemes: dict[str, dict[str, Any]], folder: str, resume: bool = False, **sizes: Any) -> dict[str, Any]:
    """`train` for each scheme, on the processes of one launch."""
    found = {}
    for name, options in schemes.items():
        model = model_under(name, options, **sizes)
        found[name] = train(model, f"{folder}/{name}", plain=name in MORE, resume=resume)
        forget_ulysses()
    return found


def run_fsdp2(**arguments: Any) -> dict[str, Any]:
    """`run` under FSDP2 as Trainer and accelerate do it, which they refuse on CPUs: accelerate takes these for GPUs."""
    from accelerate.state import PartialState

    from pe_patch.training import launch

    def pretend(self: Any) -> bool:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return True

    with mock.patch.object(launch.Launch, "_uses_fsdp", pretend):
        return run(**arguments)
