"""The score of a model at its targets without its logits: a chunk of targets at a time, whatever the family."""

# Why this is our own. `F.linear_cross_entropy` (torch 2.13), TRL and Liger take a weight and compute `hidden @ weight`:
# an adapter on the output layer, a cap or scale that they have no name for, a layer whose weight is a shard until the
# layer is called (ZeRO-3, FSDP2), and a teacher's divergence are then dropped or refused. Here the layer itself is
# called, and what the family does to logits is taken from its own forward. Liger's kernel is used where it fits.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import CausalLMOutput

from ..core.swaps import apply_all, bind, undo_all
from ..patching.targets import unwrap
from .loss import Score, among, divergence, find_targets, hits, next_token_score
from .recipe import Distill, Loss, RecipeError
from .recorded import Recorded

Layer = Callable[[Tensor], Tensor]
REMEDY = "set loss.chunk to 0, which keeps all logits"
TRIAL = 8
"""Tokens of the row on which chunks are held against whole logits."""


class Head:
    """The output layer of a causal language model, and what its family does to logits behind it."""

    def __init__(self, model: Any) -> None:
        self.model = unwrap(model)
        self.family = type(self.model).__name__
        self.layer: Any = self.model.get_output_embeddings()
        self.after: Layer | None = None
        """From what the layer gives to the model's logits; None until `learn`."""
        self.bare = False
        """Whether nothing stands between the layer and the logits."""
        if self.layer is None:
            raise RecipeError(f"{self.family} names no output layer, so its loss cannot be chunked: {REMEDY}.")

    @contextmanager
    def standing_in(self, compute: Callable[[Tensor, Layer], Tensor]) -> Iterator[None]:
        """Call `compute(hidden, layer)` where the model calls its output layer, for as long as the block lasts.

        What it returns comes out of the model as its `loss`; there are no logits. It runs inside the layer's and the
        model's forward: hooks that gather sharded weights stand around both.
        """
        held: list[Tensor] = []

        def at_layer(module: nn.Module, inner: Layer, hidden: Tensor) -> Tensor:
            return compute(hidden, inner)

        def behind_layer(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            held.append(output)  # with what other hooks have put into its graph
            return output.detach().reshape(-1)[:1].reshape(1, 1, 1)  # for the family to cap and scale

        def at_model(module: nn.Module, inner: Callable[..., Any], *given: Any, **named: Any) -> CausalLMOutput:
            inner(*given, **named)
            if len(held) != 1:
                raise RecipeError(
                    f"{self.family} calls its output layer {len(held)} times in a forward pass, so its loss cannot be "
                    f"chunked: {REMEDY}."
                )
            return CausalLMOutput(loss=held.pop())  # pyright: ignore[reportArgumentType]

        with self._bound(at_layer, at_model, behind_layer):
            yield

    @contextmanager
    def _bound(self, at_layer: Any, at_model: Any, behind_layer: Any) -> Iterator[None]:
        swaps = [bind(self.layer, "forward", at_layer), bind(self.model, "forward", at_model)]
        hook = None
        try:
            apply_all(swaps)
            hook = self.layer.register_forward_hook(behind_layer)
            yield
        finally:
            if hook is not None:
                hook.remove()
            undo_all(swaps)

    def learn(self, model: Any) -> None:
        """Learn from one short row what the family does to logits; `model` is this one or what it is wrapped in.

        Raises `RecipeError` where rows of hidden states, handed to the layer by themselves, do not give the logits.
        """
        seen: dict[str, Any] = {}

        def at_layer(module: nn.Module, inner: Layer, hidden: Tensor) -> Tensor:
            seen["hidden"], seen["again"] = hidden, inner(hidden[:, 1::2])
            return inner(hidden)

        def behind_layer(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            seen["raw"] = output.clone()  # the family may write into what it is given
            return Recorded.of(output)

        def at_model(module: nn.Module, inner: Callable[..., Any], *given: Any, **named: Any) -> CausalLMOutput:
            seen["logits"] = inner(*given, **named).logits
            return CausalLMOutput(loss=seen["hidden"].new_zeros(()))

        device = next(self.model.parameters()).device
        ids = torch.arange(TRIAL, device=device)[None]
        # With random numbers of its own: dropout in training goes on as if this had not been.
        apart = torch.random.fork_rng([device] if device.type == "cuda" else [])
        # In evaluation, where Ulysses leaves a sequence whole.
        with torch.no_grad(), apart, _evaluating(self.model), self._bound(at_layer, at_model, behind_layer):
            model(input_ids=ids % self.model.config.get_text_config().vocab_size, use_cache=False)
        logits = seen.get("logits")
        if not isinstance(logits, Recorded) or seen["hidden"].shape[:2] != ids.shape:
            raise RecipeError(f"{self.family} does not make its logits of its output layer alone: {REMEDY}.")
        if any(constant.requires_grad for constant in logits.constants):
            raise RecipeError(f"{self.family} trains what stands behind its output layer: {REMEDY}.")
        self.after = logits.replay
        whole = logits.plain
        with torch.no_grad():
            mine = self.after(seen["again"])
        # The layer's product goes by its shape: with half as many rows it may round otherwise.
        rounding = torch.finfo(seen["again"].dtype).eps * 32
        if mine.shape != whole[:, 1::2].shape or not torch.allclose(mine, whole[:, 1::2], rtol=rounding, atol=rounding):
            raise RecipeError(f"{self.family} gives other logits for a chunk of its hidden states: {REMEDY}.")
        self.bare = torch.equal(seen["raw"].float(), whole.float())

    def logits(self, rows: Tensor, layer: Layer) -> Tensor:
        """The family's logits [rows, vocabulary] of hidden states [rows, width]."""
        assert self.after is not None
        return self.after(layer(rows[None]))[0]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The layer's parameters that take a gradient; to be asked inside its forward, where they are whole."""
        parameters = list(self.layer.parameters())
        if any(isinstance(one, DTensor) or one.numel() == 0 for one in parameters):
            raise RecipeError(
                f"Parameters inside the output layer of {self.family} are sharded where the loss needs them (an "
                f"adapter on it, under ZeRO-3 or FSDP2): {REMEDY}, or leave {self.family}'s output layer unadapted."
            )
        return [one for one in parameters if one.requires_grad]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Scorer:
    """Scores a model at its targets. Nothing of how it does so changes a value beyond rounding.

    Args:
        model: what is trained, bare or wrapped.
        loss: how many targets' logits exist at once, and whether a fused kernel may do the work.
        distill: what the teacher's divergence counts for; with a `teacher`.
        teacher: a frozen model, whole on this device.
    """

    def __init__(self, model: Any, loss: Loss, distill: Distill | None = None, teacher: Any = None) -> None:
        self.loss, self.distill, self.teacher = loss, distill, teacher
        self.head = Head(model) if loss.chunk else None
        self.taught = Head(teacher) if loss.chunk and teacher is not None else None

    def learn(self, model: Any) -> None:
        """Check on one short row that chunks give the model's own logits; all processes together, before training."""
        for head, whole in ((self.head, model), (self.taught, self.teacher)):
            if head is not None and head.after is None:
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
    ) -> tuple[Tensor, Score]:
        """What is minimised, a sum over targets that takes a gradient, and its parts, which do not.

        `model(**inputs)` is called once, `model` being what the engine made of it; `labels` [rows, length], and
        `shifted`, `vocabulary`, `accuracy` are as in `next_token_score`.
        """
        if self.head is None:
            return self._whole(model, inputs, labels, shifted, vocabulary, accuracy)
        self.learn(model)
        chosen, wanted = find_targets(labels, shifted)
        wanted, places = wanted - (vocabulary or (0,))[0], chosen.flatten().nonzero().squeeze(1)
        taught = self._taught(inputs, chosen)
        parts: list[Score] = []

        def compute(hidden: Tensor, layer: Layer) -> Tensor:
            assert self.head is not None
            rows = hidden.flatten(0, 1).index_select(0, places)
            if self._fuses(rows, vocabulary, accuracy):
                total = _fused(rows, self.head.layer, wanted)
                parts.append(Score(total.detach(), total.new_zeros(()), total.new_zeros(())))
                return total

            def score(piece: Tensor, place: slice) -> Tensor:
                assert self.head is not None
                candidates = among(self.head.logits(piece, layer), vocabulary)
                total, correct = hits(candidates, wanted[place], accuracy=accuracy)
                parts.append(Score(total.detach(), correct, torch.zeros_like(total.detach())))
                if self.distill is None or taught is None:
                    return total
                apart = divergence(among(taught(place), vocabulary), candidates, self.distill.temperature)
                parts[-1] = parts[-1]._replace(divergence=apart.detach())
                return total + self.distill.weight * apart

            grads = torch.is_grad_enabled()
            return _Chunks.apply(score, self.loss.chunk, grads, rows, *self.head.trained)  # pyright: ignore

        with self.head.standing_in(compute):
            objective = model(**inputs).loss
        nothing = objective.detach().new_zeros(())
        sums = [torch.stack(list(values)).sum() if values else nothing for values in zip(*parts, strict=True)]
        return objective, Score(*sums) if parts else Score(nothing, nothing, nothing)

    def _whole(
        self, model: Any, inputs: dict[str, Any], labels: Tensor, shifted: bool, vocabulary: Any, accuracy: bool
    ) -> tuple[Tensor, Score]:
        options: dict[str, Any] = {"vocabulary": vocabulary, "accuracy": accuracy, "shifted": shifted}
        if self.distill is not None:
            with torch.no_grad():
                options |= {"teacher": self.teacher(**inputs).logits, "temperature": self.distill.temperature}
        score = next_token_score(model(**inputs).logits, labels, **options)
        objective = score.loss if self.distill is None else score.loss + self.distill.weight * score.divergence
        return objective, Score(*(value.detach() for value in score))

    def _taught(self, inputs: dict[str, Any], chosen: Tensor) -> Callable[[slice], Tensor] | None:
        """The teacher's logits at a slice of the targets."""
        head = self.taught
        if head is None:
            return None
        kept: list[Tensor] = []

        def compute(hidden: Tensor, layer: Layer) -> Tensor:
            kept.append(hidden[chosen])
            return hidden.new_zeros(())

        with torch.no_grad(), head.standing_in(compute):
            self.teacher(**inputs)

        def logits(place: slice) -> Tensor:
            with torch.no_grad():
                return head.logits(kept[0][place], head.layer)

        return logits

    def _fuses(self, rows: Tensor, vocabulary: tuple[int, int] | None, accuracy: bool) -> bool:
        """Whether Liger's kernel computes just this: a plain linear layer with nothing behind it, on a GPU."""
        assert self.head is not None
        plain = type(self.head.layer) is nn.Linear and self.head.bare
        wanted = vocabulary is None and not accuracy and self.teacher is None
        may = self.loss.fused == "auto" and rows.is_cuda and len(rows) > 0
        return may and plain and wanted and find_spec("liger_kernel") is not None


def _fused(rows: Tensor, layer: nn.Linear, wanted: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    # It sums the weight's gradient over chunks of its own, which must not happen in bfloat16.
    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return fused(layer.weight, rows, wanted, layer.bias)


class _Chunks(torch.autograd.Function):
    """The sum of a function over chunks of rows, whose gradients are made with the value: a chunk's logits live once,
    and no more is computed than without chunks. `weights` are the parameters that the function trains."""

    @staticmethod
    def forward(
        ctx: Any, score: Callable[[Tensor, slice], Tensor], size: int, grads: bool, rows: Tensor, *weights: nn.Parameter
    ) -> Tensor:
        total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        by_rows = torch.zeros_like(rows) if grads and rows.requires_grad else None
        # Summed over chunks in bfloat16, the small ones would be lost.
        sums = [torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in weights]
        for start in range(0, len(rows), size):
            place = slice(start, start + size)
            # Hooks that send what is saved elsewhere (offloaded activations) are not meant for what is used at once.
            with torch.set_grad_enabled(grads), saved_tensors_hooks(_same, _same):
                piece = rows[place].detach().requires_grad_(by_rows is not None)
                value = score(piece, place)
            total += value.detach()
            if value.requires_grad:
                inputs = [*([piece] if by_rows is not None else []), *weights]
                found = list(torch.autograd.grad(value, inputs, allow_unused=True))
                if by_rows is not None:
                    by_rows[place] = found.pop(0)
                for kept, new in zip(sums, found, strict=True):
                    if new is not None:
                        kept += new
            del value
        ctx.kept = (by_rows, *(kept.to(one.dtype) for kept, one in zip(sums, weights, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.kept is None:
            raise RuntimeError("The gradient of a chunked loss can be taken once; compute the loss again.")
        kept, ctx.kept = ctx.kept, None
        return None, None, None, *(None if one is None else one.mul_(grads[0]) for one in kept)


def _same(tensor: Tensor) -> Tensor:
    return tensor
