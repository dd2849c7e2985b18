"""torch's context parallelism through accelerate: sequences cut over GPUs, keys passed round in a ring.

It needs several GPUs, on which these recipes have not been run with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ...patching.api import find_patch
from ..recipe import RecipeError
from .engine import Engine

INSTEAD = "Use Ulysses (sp_size in place of cp_size), which works with it."


class ContextParallel(Engine):
    """FSDP2 in which a sequence lies on several processes. The ring computes plain causal attention, and drops masks
    and biases without a word."""

    name = "context parallelism"
    sharded = True

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator)
        self.parts = accelerator.parallelism_config.cp_size
        self.waiting: deque[dict[str, Tensor]] = deque()

    def refuse(self, recipe: Any, model: nn.Module) -> None:
        refuse_under_context_parallel(recipe, model, self.parts)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole sequences: their tensors hold this process's part while `micro_step` lasts."""
        whole = super().inputs(batch)
        self.waiting.append(whole)
        return whole

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        return self._cut(self.waiting.popleft(), last)

    @contextmanager
    def _cut(self, whole: dict[str, Tensor], last: bool) -> Iterator[None]:
        tensors = list(whole.values())
        joined = nullcontext() if last else self.accelerator.no_sync(self.model)
        ring = self.accelerator.maybe_context_parallel(
            buffers=tensors, buffer_seq_dims=[1] * len(tensors), no_restore_buffers=set(tensors)
        )
        with joined, ring:
            yield


def refuse_under_context_parallel(recipe: Any, model: nn.Module, parts: int) -> None:
    """Raise `RecipeError` for all but plain causal attention of queries and keys that come rotated."""
    patch = find_patch(model)
    if patch is not None:
        acting = [each for each in patch.adapter.attentions(patch.base) if each.__dict__["pe_scheme"] is not None]
        if acting:
            raise RecipeError(
                f"scheme {patch.scheme.name} acts at the scores, and context parallelism would drop it. {INSTEAD}"
            )
        if patch.base.config._attn_implementation != "pe_sdpa":
            raise RecipeError("model.attention: context parallelism works with sdpa alone.")
    if recipe.data.boundaries:
        raise RecipeError(
            "data.boundaries: context parallelism drops the masks that keep packed documents apart. Set it to false, "
            "or use Ulysses (sp_size in place of cp_size)."
        )
    if recipe.distill is not None:
        raise RecipeError("distill: under context parallelism a teacher would see parts of sequences.")
    for number, phase in enumerate(recipe.phases):
        if phase.pose is not None:
            raise RecipeError(f"phases[{number}].pose needs a mask of ones, which context parallelism drops.")
        if phase.length % (2 * parts):
            raise RecipeError(
                f"phases[{number}].length={phase.length}: context parallelism cuts it into {2 * parts} equal pieces."
            )
