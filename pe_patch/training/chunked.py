"""Compute the loss and its gradients without the full logits: one chunk of targets at a time, for any model family."""

# `F.linear_cross_entropy` (torch 2.13), TRL and Liger take a weight and compute `hidden @ weight`. They drop or refuse
# an adapter on the output layer, a logit cap or scale that they do not know, a weight that is sharded until its layer
# runs (ZeRO-3, FSDP2), and a teacher's divergence. This module calls the output layer itself, and takes the family's
# operations on logits from the model's own forward. It uses Liger's kernel where that gives the same result.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import UnsupportedError
from ..patching.output_head import Layer, OutputHead
from .data.sequences import LEARN_FROM
from .loss import Score, find_lessons, find_targets, next_token_score, restrict, score_targets
from .recipe import Distill, Loss, RecipeError


@contextmanager
def _named_remedy() -> Iterator[None]:
    """Raise `RecipeError` with the remedy for a model whose output layer cannot be called on chunks."""
    try:
        yield
    except UnsupportedError as error:
        raise RecipeError(
            f"{error} Its loss cannot be chunked: set loss.chunk to 0, which keeps all logits."
        ) from error


class Scorer:
    """Computes the training loss of a model. The method does not change the value beyond rounding.

    Args:
        model: the model to train, bare or wrapped.
        loss: the recipe's `loss`: the chunk size and whether a fused kernel may run.
        distill: the recipe's `distill`; needs a `teacher`.
        teacher: a frozen model, unsharded, on this device.
    """

    def __init__(self, model: Any, loss: Loss, distill: Distill | None = None, teacher: Any = None) -> None:
        self.loss, self.distill, self.teacher = loss, distill, teacher
        with _named_remedy():
            self.head = OutputHead(model) if loss.chunk else None
            self.teacher_head = OutputHead(teacher) if loss.chunk and teacher is not None else None

    def learn(self, model: Any) -> None:
        """Check on one short row that chunks give the model's own logits. All processes call this before training."""
        for head, whole in ((self.head, model), (self.teacher_head, self.teacher)):
            if head is not None and head.post_process is None:
                with _named_remedy():
                    head.learn(whole)

    def __call__(
        self,
        model: Any,
        inputs: dict[str, Any],
        labels: Tensor,
        *,
        shifted: bool = False,
        vocabulary: tuple[int, int] | None = None,
        accuracy: bool = False,
        learn_from: Tensor | None = None,
    ) -> tuple[Tensor, Score]:
        """Call `model(**inputs)` once and score its predictions.

        Args:
            model: the model, as the engine prepared it.
            inputs: the keyword arguments of the forward pass.
            labels: token ids or `IGNORED`, `[rows, length]`.
            shifted: see `next_token_score`.
            vocabulary: see `next_token_score`.
            accuracy: see `next_token_score`.
            learn_from: see `next_token_score`.

        Returns:
            The loss to minimise, summed over targets, with its gradient; and its parts, detached.
        """
        if self.head is None:
            return self._whole(model, inputs, labels, shifted, vocabulary, accuracy, learn_from)
        self.learn(model)
        chosen, wanted = find_targets(labels, shifted)
        wanted, places = wanted - (vocabulary or (0,))[0], chosen.flatten().nonzero().squeeze(1)
        lessons = find_lessons(chosen, learn_from)
        teacher_logits = self._teacher_logits(inputs, chosen, learn_from)
        parts: list[Score] = []

        def compute(hidden: Tensor, layer: Layer) -> Tensor:
            assert self.head is not None
            rows = hidden.flatten(0, 1).index_select(0, places)
            if self._can_fuse(rows, vocabulary, accuracy):
                total = _fused(rows, self.head.layer, wanted)
                parts.append(Score(total.detach(), *(total.new_zeros(()) for _ in range(3))))
                return total

            def score(chunk: Tensor, place: slice) -> Tensor:
                assert self.head is not None
                candidates = restrict(self.head.logits(chunk, layer), vocabulary)
                options: dict[str, Any] = {"accuracy": accuracy}
                if self.distill is not None and teacher_logits is not None:
                    taught = teacher_logits(place if lessons is None else lessons.taught(place))
                    options |= {"teacher": restrict(taught, vocabulary), "temperature": self.distill.temperature}
                here = None if lessons is None else lessons.of(place)
                result = score_targets(candidates, wanted[place], here, **options)
                parts.append(Score(*(value.detach() for value in result)))
                return self._objective(result)

            grads = torch.is_grad_enabled()
            total = _Chunks.apply(score, self.loss.chunk, grads, rows, *self.head.trainable)
            return cast(Tensor, total)

        with _named_remedy(), self.head.replaced(compute):
            objective = model(**inputs).loss
        nothing = objective.detach().new_zeros(())
        sums = [torch.stack(list(values)).sum() if values else nothing for values in zip(*parts, strict=True)]
        return objective, Score(*sums) if parts else Score(*[nothing] * 4)

    def _whole(
        self,
        model: Any,
        inputs: dict[str, Any],
        labels: Tensor,
        shifted: bool,
        vocabulary: Any,
        accuracy: bool,
        learn_from: Tensor | None,
    ) -> tuple[Tensor, Score]:
        options: dict[str, Any] = {"vocabulary": vocabulary, "accuracy": accuracy, "shifted": shifted}
        if self.distill is not None:
            chosen = find_targets(labels, shifted)[0]
            inputs_of_teacher, chosen = teacher_inputs(inputs, chosen, learn_from)
            options["temperature"] = self.distill.temperature
            if len(chosen):
                with torch.no_grad():
                    options["teacher"] = self.teacher(**inputs_of_teacher).logits[chosen]
        score = next_token_score(model(**inputs).logits, labels, learn_from=learn_from, **options)
        return self._objective(score), Score(*(value.detach() for value in score))

    def _objective(self, score: Score) -> Tensor:
        """Return the loss to minimise."""
        return score.loss if self.distill is None else score.loss + self.distill.weight * score.divergence

    def _teacher_logits(
        self, inputs: dict[str, Any], chosen: Tensor, learn_from: Tensor | None
    ) -> Callable[[slice], Tensor] | None:
        """Run the teacher and return a function from a slice of the taught targets to its logits.

        Returns:
            The function; None without a teacher, or if no row learns from it.
        """
        head = self.teacher_head
        if head is None:
            return None
        inputs, chosen = teacher_inputs(inputs, chosen, learn_from)
        if not len(chosen):
            return None
        hidden_states: list[Tensor] = []

        def compute(hidden: Tensor, layer: Layer) -> Tensor:
            hidden_states.append(hidden[chosen])
            return hidden.new_zeros(())

        with torch.no_grad(), head.replaced(compute):
            self.teacher(**inputs)

        def logits(place: slice) -> Tensor:
            with torch.no_grad():
                return head.logits(hidden_states[0][place], head.layer)

        return logits

    def _can_fuse(self, rows: Tensor, vocabulary: tuple[int, int] | None, accuracy: bool) -> bool:
        """Return whether Liger's kernel computes this loss: a plain linear layer without further operations, on a
        GPU."""
        assert self.head is not None
        plain = type(self.head.layer) is nn.Linear and self.head.is_plain
        plain_loss = vocabulary is None and not accuracy and self.teacher is None
        allowed = self.loss.fused == "auto" and rows.is_cuda and len(rows) > 0
        return allowed and plain and plain_loss and find_spec("liger_kernel") is not None


def teacher_inputs(inputs: dict[str, Any], chosen: Tensor, learn_from: Tensor | None) -> tuple[dict[str, Any], Tensor]:
    """Return what the teacher reads: the rows that learn from it, with consecutive positions in each document.

    The teacher has no scheme for the positions that PoSE skips to.

    Args:
        inputs: the keyword arguments of the student's forward pass.
        chosen: the positions with targets, bool `[rows, length]`.
        learn_from: see `next_token_score`.

    Returns:
        The keyword arguments of the teacher's forward pass, and `chosen` of its rows.
    """
    if learn_from is not None:
        rows = learn_from != LEARN_FROM.index("text")
        inputs = {name: value[rows] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        chosen = chosen[rows]
    if "position_ids" in inputs:
        given = inputs["position_ids"]
        place = torch.arange(given.shape[1], device=given.device).expand_as(given)
        inputs = {**inputs, "position_ids": place - (place * (given == 0)).cummax(1).values}
    return inputs, chosen


def _fused(rows: Tensor, layer: nn.Linear, wanted: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    # The kernel sums the weight's gradient over its own chunks; in bfloat16 that would lose small terms.
    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return fused(layer.weight, rows, wanted, layer.bias)


class _Chunks(torch.autograd.Function):
    """Sum a function over chunks of rows, and compute its gradients in the forward pass.

    Each chunk's logits exist once, and nothing is computed twice. `weights` are the parameters that the function
    trains.
    """

    @staticmethod
    def forward(
        ctx: Any, score: Callable[[Tensor, slice], Tensor], size: int, grads: bool, rows: Tensor, *weights: nn.Parameter
    ) -> Tensor:
        total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        by_rows = torch.zeros_like(rows) if grads and rows.requires_grad else None
        # Sum in float32: a sum over chunks in bfloat16 would lose small terms.
        sums = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
        for start in range(0, len(rows), size):
            place = slice(start, start + size)
            # These tensors are used immediately, so do not offload them.
            with torch.set_grad_enabled(grads), saved_tensors_hooks(_same, _same):
                chunk = rows[place].detach().requires_grad_(by_rows is not None)
                value = score(chunk, place)
            total += value.detach()
            if value.requires_grad:
                inputs = [*([chunk] if by_rows is not None else []), *weights]
                gradients = list(torch.autograd.grad(value, inputs, allow_unused=True))
                if by_rows is not None:
                    by_rows[place] = gradients.pop(0)
                for total_gradient, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total_gradient += gradient
            del value
        ctx.gradients = (by_rows, *(gradient.to(weight.dtype) for gradient, weight in zip(sums, weights, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("A chunked loss can be differentiated only once; compute the loss again.")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *(None if gradient is None else gradient.mul_(grads[0]) for gradient in gradients)


def _same(tensor: Tensor) -> Tensor:
    return tensor
