"""One of two processes of test_loss: how far loss and gradient, spread over both, are from those of one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pe_patch.training.chunked import Scorer
from pe_patch.training.recipe import Loss
from tests.families import VOCABULARY, build


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {"ddp": DistributedDataParallel, "fsdp": shard}


def main(way: str) -> None:
    rank = dist.get_rank()
    ids = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:2, 5:] = -100  # unequal shares
    alone: Any = build("qwen2", tie_word_embeddings=True).train()
    counted = (labels[:, 1:] != -100).sum()
    whole = alone(input_ids=ids, labels=labels, use_cache=False).loss * counted
    whole.backward()
    model: Any = build("qwen2", tie_word_embeddings=True).train()
    model.gradient_checkpointing_enable()
    scorer = Scorer(model, Loss(chunk=7))
    scorer.learn(model)
    spread = WAYS[way](model)
    mine = slice(2 * rank, 2 * rank + 2)
    objective, _ = scorer(spread, {"input_ids": ids[mine], "use_cache": False}, labels[mine])
    (2 * objective).backward()  # gradients are averaged over the processes; a sum is wanted
    total = objective.detach().clone()
    dist.all_reduce(total)
    apart = []
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        gradient = ours.grad.full_tensor() if way == "fsdp" else ours.grad
        apart.append(float((gradient - theirs.grad).abs().max() / theirs.grad.abs().max()))
    if rank == 0:
        print(way, float(abs(total - whole) / whole), max(apart))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for one in WAYS:
        main(one)
    dist.destroy_process_group()
