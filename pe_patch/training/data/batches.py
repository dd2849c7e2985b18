"""Group the sequences of a phase into the micro-batches of one process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count as count_up

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..recipe import RecipeError
from .phase import PhaseData
from .sequences import Item


def first_tokens(data: PhaseData, count: int) -> list[list[int]]:
    """Return the first `count` token ids of a phase, in rows of at most its length, without padding."""
    rows: list[list[int]] = []
    for number in count_up():
        rows.append(data[number]["input_ids"][: min(data.size(number), count)].tolist())
        count -= len(rows[-1])
        if count == 0:
            break
    return rows


def micro_batches(
    data: PhaseData, *, first_step: int, rank: int, world: int, workers: int = 0
) -> Iterator[list[dict[str, Tensor]]]:
    """Yield this process's share of each step's sequences, as micro-batches.

    Sequence `i` of step `s` has the number `s * batch + i`, independent of the number of processes.

    Args:
        data: the sequences of the phase.
        first_step: the step to start from.
        rank: the index of this process, or of its group, among those that see different sequences.
        world: the number of such processes or groups.
        workers: processes that prepare batches in advance.

    Yields:
        Batches with `input_ids`, `labels` and `position_ids`, each `[rows, length]`.

    Raises:
        RecipeError: the batch cannot be divided evenly.
    """
    phase = data.phase
    micro_batch = phase.micro_batch or max(1, phase.batch // world)
    accumulation, remainder = divmod(phase.batch, micro_batch * world)
    if remainder:
        raise RecipeError(
            f"phase.batch is {phase.batch}, but {world} processes with micro-batches of {micro_batch} need a "
            f"multiple of {micro_batch * world}. Change batch or micro_batch."
        )
    numbers = [
        list(range(start + rank * micro_batch, start + (rank + 1) * micro_batch))
        for start in range(first_step * phase.batch, phase.steps * phase.batch, micro_batch * world)
    ]
    # Use a separate generator: the loader would seed itself from the global one, and a resumed run would differ.
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
