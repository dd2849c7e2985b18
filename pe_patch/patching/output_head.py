"""Use a causal language model's output layer on chunks of its hidden states, for any family.

The logits of a long sequence with a large vocabulary do not fit into memory: 32,768 tokens and 262,144 words take 34 GB
in float32. The operations that a family applies to its logits (a cap, a scale) are taken from its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import CausalLMOutput

from ..core.swaps import apply_all, bind, undo_all
from ..errors import UnsupportedError
from .recorded import Recorded
from .targets import unwrap

Layer = Callable[[Tensor], Tensor]
TRIAL = 8
"""Tokens of the row on which chunked logits are compared with whole logits."""


class OutputHead:
    """The output layer of a causal language model, with the operations that its family applies to logits."""

    def __init__(self, model: Any) -> None:
        self.model = unwrap(model)
        self.family = type(self.model).__name__
        self.layer: Any = self.model.get_output_embeddings()
        self.post_process: Layer | None = None
        """Maps the layer's output to the model's logits; None before `learn`."""
        self.is_plain = False
        """True if the layer's output is the logits, without further operations."""
        if self.layer is None:
            raise UnsupportedError(f"{self.family} has no output layer.")

    @contextmanager
    def replaced(self, compute: Callable[[Tensor, Layer], Tensor]) -> Iterator[None]:
        """Call `compute(hidden, layer)` instead of the output layer, within the block.

        The model returns the result as its `loss`, without logits. `compute` runs inside the forward of the layer and
        of
        the model, so that hooks that gather sharded weights run around both.
        """
        outputs: list[Tensor] = []

        def at_layer(module: nn.Module, inner: Layer, hidden: Tensor) -> Tensor:
            return compute(hidden, inner)

        def behind_layer(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            outputs.append(output)  # includes what other hooks added to its graph
            # Return a placeholder that the family can cap and scale.
            return output.detach().reshape(-1)[:1].reshape(1, 1, 1)

        def at_model(module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> CausalLMOutput:
            inner(*args, **kwargs)
            if len(outputs) != 1:
                raise UnsupportedError(f"{self.family} calls its output layer {len(outputs)} times in a forward pass.")
            return CausalLMOutput(loss=cast(torch.FloatTensor, outputs.pop()))

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
        """Record on one short row which operations the family applies to logits.

        Args:
            model: the model of this head, or its wrapper.

        Raises:
            UnsupportedError: the logits of a chunk of hidden states differ from those of the whole sequence.
        """
        seen: dict[str, Any] = {}

        def at_layer(module: nn.Module, inner: Layer, hidden: Tensor) -> Tensor:
            seen["hidden"], seen["every_second"] = hidden, inner(hidden[:, 1::2])
            return inner(hidden)

        def behind_layer(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            seen["raw"] = output.clone()  # the family may write into its input
            return Recorded.of(output)

        def at_model(module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> CausalLMOutput:
            seen["logits"] = inner(*args, **kwargs).logits
            return CausalLMOutput(loss=seen["hidden"].new_zeros(()))

        device = next(self.model.parameters()).device
        ids = torch.arange(TRIAL, device=device)[None]
        # Restore the random state afterwards, so that this pass does not change dropout in training.
        separate_rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
        # Use evaluation mode, where Ulysses does not cut sequences.
        with torch.no_grad(), separate_rng, _evaluation_mode(self.model), self._bound(at_layer, at_model, behind_layer):
            model(input_ids=ids % self.model.config.get_text_config().vocab_size, use_cache=False)
        logits = seen.get("logits")
        if not isinstance(logits, Recorded) or seen["hidden"].shape[:2] != ids.shape:
            raise UnsupportedError(f"{self.family} computes its logits from more than its output layer.")
        if any(constant.requires_grad for constant in logits.constants):
            raise UnsupportedError(f"{self.family} trains parameters behind its output layer.")
        self.post_process = logits.replay
        whole = logits.plain
        with torch.no_grad():
            chunked = self.post_process(seen["every_second"])
        # Rounding in the matrix product depends on the number of rows.
        rounding = torch.finfo(seen["every_second"].dtype).eps * 32
        if chunked.shape != whole[:, 1::2].shape or not torch.allclose(
            chunked, whole[:, 1::2], rtol=rounding, atol=rounding
        ):
            raise UnsupportedError(f"{self.family} gives other logits for a chunk of its hidden states.")
        self.is_plain = torch.equal(seen["raw"].float(), whole.float())

    def logits(self, rows: Tensor, layer: Layer) -> Tensor:
        """Return the family's logits `[rows, vocabulary]` of hidden states `[rows, width]`."""
        assert self.post_process is not None
        return self.post_process(layer(rows[None]))[0]

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Return the layer's trainable parameters. Call this inside its forward, where they are gathered."""
        parameters = list(self.layer.parameters())
        if any(isinstance(parameter, DTensor) or parameter.numel() == 0 for parameter in parameters):
            raise UnsupportedError(
                f"Parameters inside the output layer of {self.family} are sharded where the loss needs them (an "
                "adapter on it, under ZeRO-3 or FSDP2)."
            )
        return [parameter for parameter in parameters if parameter.requires_grad]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
