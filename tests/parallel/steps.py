"""Three optimiser steps on packed documents under whatever engine the launch asks for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_patch import patch_model
from pe_patch.training.engines import IGNORED, choose_engine

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


def train(engine: Any, model: Any, folder: str | None = None, plain: bool = False) -> dict[str, Any]:
    """Losses and gradient norms of the steps, and the weights behind them; with `folder`, through a checkpoint."""
    # Adam would make steps of the noise in gradients that are zero but for rounding.
    kind = torch.optim.SGD if plain else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-1 if plain else 1e-3)
    model, optimizer = engine.prepare(model, optimizer)
    losses, norms = [], []
    for step in range(STEPS):
        whole = batch_of(step)
        rows = range(engine.data_rank, ROWS, engine.data_world)
        inputs = [engine.inputs({name: tensor[row : row + 1] for name, tensor in whole.items()}) for row in rows]
        targets = engine.reduce(torch.stack([(one["shift_labels"] != IGNORED).sum() for one in inputs]).sum())
        total = torch.zeros((), dtype=torch.float64)
        for number, one in enumerate(inputs):
            with engine.micro_step(last=number == len(inputs) - 1):
                logits = model(input_ids=one["input_ids"], position_ids=one["position_ids"], use_cache=False).logits
                loss = F.cross_entropy(logits[0].float(), one["shift_labels"][0], ignore_index=IGNORED, reduction="sum")
                engine.backward(loss / targets)
            total += loss.detach().double()
        losses.append(float(engine.reduce(total) / targets))
        norms.append(engine.clip(1.0))
        engine.step()
        if folder is not None and step == 0:
            engine.save(Path(folder))
            engine.accelerator.wait_for_everyone()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
            engine.load(Path(folder))
    weights = engine.full_state_dict() if engine.sharded else engine.unwrapped().state_dict()
    weights = {name: tensor.detach().clone() for name, tensor in (weights or {}).items()}
    return {"losses": losses, "norms": norms, "weights": weights, "name": engine.describe()}


def forget_ulysses() -> None:
    """Make room for the next model of this process: DeepSpeed registers itself once."""
    state = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if state is None:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    state._release_sequence_parallel_groups()
    for name in [name for name in ALL_ATTENTION_FUNCTIONS._local_mapping if name.startswith("pe_")]:
        del ALL_ATTENTION_FUNCTIONS._local_mapping[name]


def run(schemes: dict[str, dict[str, Any]], folder: str | None = None, **sizes: Any) -> dict[str, Any]:
    """`train` for each scheme, on the processes of one launch."""
    engine, found = choose_engine(), {}
    for name, options in schemes.items():
        checkpoint = f"{folder}/{name}" if folder and name == "t5" else None
        found[name] = train(engine, model_under(name, options, **sizes), checkpoint, plain=name in MORE)
        forget_ulysses()
    return found
