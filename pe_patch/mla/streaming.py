"""The inputs of each attention over calibration text, computed layer by layer in bounded memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.swaps import Swap, with_swaps
from ..errors import NoEffectError

Each = Callable[[int, Tensor], None]
"""A callback with the index of a layer and the inputs of its attention, `[tokens, hidden]`."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a layer other than the hidden states."""

BATCH_TOKENS = 4096
"""Tokens in a batch, unless a single row has more."""


@torch.no_grad()
def stream(
    base: nn.Module,
    layers: Sequence[nn.Module],
    attentions: Sequence[nn.Module],
    rows: Sequence[Tensor],
    each: Each,
    *,
    done: Callable[[int], None] | None = None,
    progress: bool | None = None,
    budget: int = BATCH_TOKENS,
) -> None:
    """Run `rows` through the layers one after the other, and pass the inputs of each attention to a callback.

    The model runs unmodified: each layer receives the output of the one before. Memory holds the hidden states of all
    rows between two layers, and the activations of one layer for one batch.

    Args:
        base: the base model.
        layers: all layers that the forward of `base` calls, in order.
        attentions: the attention module of each layer.
        rows: rows of token ids.
        each: `each(index, hidden)`, called for each layer and batch with `[tokens, hidden]`.
        done: `done(index)`, called after the last batch of a layer.
        progress: whether to show a progress bar; None for only on a terminal.
        budget: tokens in a batch.

    Raises:
        NoEffectError: a layer or its attention does not run exactly once in a forward pass.
    """
    with evaluating(base), _bar(len(layers), progress) as advance:
        work = _record_arguments(base, layers, batches(rows, budget))
        for index, (layer, attention) in enumerate(zip(layers, attentions, strict=True)):
            for batch in work:
                batch.run_layer(index, layer, attention, each)
                advance(1 / len(work))
            if done is not None:
                done(index)


@dataclass
class _Batch:
    """A batch of rows on its way through the layers."""

    hidden: Tensor
    """Input of the next layer, `[rows, length, hidden]`."""
    arguments: list[Arguments]
    """The other arguments of each layer."""

    def run_layer(self, index: int, layer: nn.Module, attention: Any, each: Each) -> None:
        """Run one layer, and pass the inputs of its attention to `each`."""
        calls, forward = 0, attention.forward
        args, kwargs = self.arguments[index]

        def observed(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            hidden = args[0] if args else kwargs["hidden_states"]
            each(index, hidden.reshape(-1, hidden.shape[-1]))
            return forward(*args, **kwargs)

        output = with_swaps([Swap.of(attention, "forward", observed)], lambda: layer(self.hidden, *args, **kwargs))
        if calls != 1:
            raise NoEffectError(
                f"Layer {index} ({type(layer).__name__}) called its {type(attention).__name__} {calls} times. "
                "Calibration supports layers that call it once."
            )
        self.hidden = output[0] if isinstance(output, tuple) else output


def _record_arguments(base: nn.Module, layers: Sequence[nn.Module], id_batches: list[Tensor]) -> list[_Batch]:
    """Return the input of the first layer and the other arguments of every layer, for each batch of token ids.

    This calls the base model with layers that do nothing, so that masks, rotations and scaled embeddings come from the
    family's own code. Hooks on the layers' forwards, which may load offloaded weights, do not run.
    """
    recorder = _Recorder()
    swaps = [Swap.of(layer, "forward", recorder.record) for layer in layers]
    # Run one token through the real first layer, to learn what a layer returns.
    observing = Swap.of(layers[0], "forward", recorder.observing(layers[0].forward))
    recorder.call(base, id_batches[0][:1, :1], [observing, *swaps[1:]])
    work = []
    for ids in id_batches:
        recorder.call(base, ids, swaps)
        if recorder.hidden is None or len(recorder.arguments) != len(layers):
            raise NoEffectError(
                f"The forward of {type(base).__name__} called {len(recorder.arguments)} of {len(layers)} layers. "
                "Calibration supports models that call each layer once."
            )
        work.append(_Batch(recorder.hidden, recorder.arguments))
    return work


@dataclass
class _Recorder:
    """A replacement of the layers' forwards that records their arguments and returns the hidden states unchanged."""

    extra_outputs: tuple[Any, ...] | None = None
    """The outputs of a layer after the hidden states; None if it returns a tensor rather than a tuple."""
    hidden: Tensor | None = None
    """Input of the first layer in the last call."""
    arguments: list[Arguments] = field(default_factory=list)
    """The other arguments of each layer in the last call."""
    unique: list[Tensor] = field(default_factory=list)
    """The distinct tensors among the arguments of all batches."""
    aliases: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Pairs of a tensor of the current batch and the equal tensor in `unique`."""

    def call(self, base: Any, ids: Tensor, swaps: list[Swap]) -> None:
        """Call the base model with the swaps in place."""
        self.hidden, self.arguments = None, []
        weight = base.get_input_embeddings().weight
        ids = ids.to("cpu" if weight.is_meta else weight.device)  # with offloaded weights, hooks move the ids
        with_swaps(swaps, lambda: base(input_ids=ids, use_cache=False))
        self.aliases.clear()

    def observing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a layer that also records the outputs after the hidden states."""

        def observed(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.extra_outputs = output[1:] if isinstance(output, tuple) else None
            return output

        return observed

    def record(self, *args: Any, **kwargs: Any) -> Any:
        """Record the arguments of a layer, and return its input as its output."""
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.hidden = hidden if self.hidden is None else self.hidden
        self.arguments.append((self.deduplicated(args[1:]), self.deduplicated(kwargs)))
        return hidden if self.extra_outputs is None else (hidden, *self.extra_outputs)

    def deduplicated(self, value: Any) -> Any:
        """Return the value with each tensor replaced by an equal one of an earlier batch, if there is one.

        The masks of long rows would fill the memory otherwise.
        """
        if type(value) in (tuple, list):
            return type(value)(self.deduplicated(each) for each in value)
        if type(value) is dict:
            return {name: self.deduplicated(each) for name, each in value.items()}
        if not isinstance(value, Tensor):
            return value
        for tensor, equal in self.aliases:
            if tensor is value:
                return equal
        match = next((tensor for tensor in self.unique if _equal(tensor, value)), None)
        if match is None:
            self.unique.append(match := value)
        self.aliases.append((value, match))
        return match


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype, device and values."""
    comparable = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    return comparable and torch.equal(first, second)


def batches(rows: Sequence[Tensor], budget: int = BATCH_TOKENS) -> list[Tensor]:
    """Batch rows of equal length, so that none is padded.

    Args:
        rows: rows of token ids.
        budget: tokens in a batch; a single longer row is a batch.

    Returns:
        Batches `[rows, length]`.
    """
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    stacked = []
    for length, same_length in by_length.items():
        size = max(1, budget // length)
        stacked += [torch.stack(same_length[start : start + size]) for start in range(0, len(same_length), size)]
    return stacked


@contextmanager
def evaluating(base: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of each module on exit."""
    modes = [(module, module.training) for module in base.modules()]

    def restore() -> None:
        for module, mode in modes:
            module.training = mode

    try:
        try:
            base.eval()
            yield
        finally:
            restore()
    except BaseException:  # an interrupt during `restore`
        restore()
        raise


def _bar(layers: int, progress: bool | None) -> Any:
    """Return a context manager that shows a progress bar over the layers, and yields the function to advance it."""
    if not (sys.stderr.isatty() if progress is None else progress):
        return nullcontext(lambda _: None)
    return _shown_bar(layers)


@contextmanager
def _shown_bar(layers: int) -> Iterator[Callable[[float], None]]:
    """Show a progress bar with the remaining time on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("calibrating"),
        BarColumn(),
        TextColumn("layer {task.completed:.0f} of {task.total:.0f}, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        work = bar.add_task("", total=layers)
        yield lambda share: bar.advance(work, share)
