"""Train with torch's context parallelism through accelerate: sequences are cut over GPUs, and keys pass in a ring.

This needs several GPUs. The recipes have not been run on such a machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ... import compat
from ...patching.api import find_patch
from ..recipe import RecipeError
from .engine import Engine

INSTEAD = "Use Ulysses (sp_size instead of cp_size), which supports it."


class ContextParallel(Engine):
    """FSDP2 with each sequence on several processes. The ring computes plain causal attention and drops masks and
    biases.
    """

    name = "context parallelism"
    sharded = True

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator)
        self.parts = accelerator.parallelism_config.cp_size
        self.waiting: deque[dict[str, Tensor]] = deque()

    def refuse(self, recipe: Any, model: nn.Module) -> None:
        refuse_under_context_parallel(recipe, model, self.parts)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return whole sequences. Within `micro_step`, their tensors hold this process's part."""
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
    """Raise `RecipeError` unless attention is plain and causal, and queries and keys arrive rotated."""
    patch = find_patch(model)
    if patch is not None:
        acts_at_scores = any(layer.__dict__["pe_scheme"] is not None for layer in patch.adapter.attentions(patch.base))
        if acts_at_scores:
            raise RecipeError(
                f"scheme {patch.scheme.name} acts at the scores, and context parallelism would drop it. {INSTEAD}"
            )
        if compat.attention_implementation(patch.base.config) != "pe_sdpa":
            raise RecipeError("model.attention: context parallelism supports only sdpa.")
    if recipe.data.boundaries:
        raise RecipeError(
            "data.boundaries: context parallelism drops the masks that separate packed documents. Set it to false, "
            "or use Ulysses (sp_size instead of cp_size)."
        )
    if recipe.distill is not None:
        raise RecipeError("distill: under context parallelism a teacher would see only parts of sequences.")
    for number, phase in enumerate(recipe.phases):
        if phase.pose is not None:
            raise RecipeError(f"phases[{number}].pose needs a mask of ones, which context parallelism drops.")
        if phase.length % (2 * parts):
            raise RecipeError(
                f"phases[{number}].length={phase.length}: context parallelism needs a multiple of {2 * parts}."
            )
