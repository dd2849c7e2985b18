"""From the numbers of sequences to the micro-batches of one process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count as count_up

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..recipe import RecipeError
from .phase import PhaseData
from .sequences import IGNORED, Item


def first_tokens(data: PhaseData, count: int) -> list[list[int]]:
    """The first `count` token ids of a phase's sequences, in rows of at most its length and without padding."""
    rows: list[list[int]] = []
    for number in count_up():
        item = data[number]
        stop = 1 + int(np.flatnonzero(item["labels"] != IGNORED)[-1])  # padding comes last and is no target
        rows.append(item["input_ids"][: min(stop, count)].tolist())
        count -= len(rows[-1])
        if count == 0:
            break
    return rows


def micro_batches(
    data: PhaseData, *, first_step: int, rank: int, world: int, workers: int = 0
) -> Iterator[list[dict[str, Tensor]]]:
    """For each step from `first_step` on, this process's share of the step's sequences, as micro-batches.

    Sequence `i` of step `s` has the number `s * batch + i`, however many processes there are.
    """
    phase = data.phase
    micro_batch = phase.micro_batch or max(1, phase.batch // world)
    accumulation, left = divmod(phase.batch, micro_batch * world)
    if left:
        raise RecipeError(
            f"A batch of {phase.batch} sequences cannot be shared by {world} processes in micro-batches of "
            f"{micro_batch}: {phase.batch} is no multiple of {micro_batch * world}."
        )
    numbers = [
        list(range(start + rank * micro_batch, start + (rank + 1) * micro_batch))
        for start in range(first_step * phase.batch, phase.steps * phase.batch, micro_batch * world)
    ]
    # A generator of its own: the loader would take its seed from the global one, and a resumed run would differ.
    loader = DataLoader(
        data,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(0),
    )
    batches = iter(loader)
    for _ in range(first_step, phase.steps):
        yield [next(batches) for _ in range(accumulation)]


def _collate(items: list[Item]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}
