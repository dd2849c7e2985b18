"""What each attention is given when a model reads text, one layer after the other."""

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
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What the base model hands a layer besides the hidden states."""

BATCH_TOKENS = 4096
"""Tokens that go through a layer at once, unless a single row has more."""


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
    """Read `rows` with every layer in turn, and hand `each(index, hidden)` what the projections of its attention see.

    `hidden` is `[tokens, hidden]`, of one batch: `each` is called several times for a layer, and `done(index)` after
    the last. The model is read as it is: a layer is given what the one before it made. What exists at a time are the
    hidden states between two layers, of all rows, and the work of one layer on one batch. `layers` are all that the
    forward of `base` calls. The bar is shown on terminals, or as `progress` says.
    """
    with evaluating(base), _bar(len(layers), progress) as advance:
        work = _rehearse(base, layers, batches(rows, budget))
        for index, (layer, attention) in enumerate(zip(layers, attentions, strict=True)):
            for batch in work:
                batch.go_through(index, layer, attention, each)
                advance(1 / len(work))
            if done is not None:
                done(index)


@dataclass
class _Batch:
    """Some rows on their way through the layers."""

    hidden: Tensor
    """Before the next layer, `[rows, length, hidden]`."""
    arguments: list[Arguments]
    """What each layer is told of them."""

    def go_through(self, index: int, layer: nn.Module, attention: Any, each: Each) -> None:
        calls, forward = 0, attention.forward
        args, kwargs = self.arguments[index]

        def catch(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            given = args[0] if args else kwargs["hidden_states"]
            each(index, given.reshape(-1, given.shape[-1]))
            return forward(*args, **kwargs)

        output = with_swaps([Swap.of(attention, "forward", catch)], lambda: layer(self.hidden, *args, **kwargs))
        if calls != 1:
            raise NoEffectError(
                f"Layer {index} ({type(layer).__name__}) called its {type(attention).__name__} {calls} times, where "
                "calibration reads what it is given once."
            )
        self.hidden = output[0] if isinstance(output, tuple) else output


def _rehearse(base: nn.Module, layers: Sequence[nn.Module], parts: list[Tensor]) -> list[_Batch]:
    """Every batch before the first layer, with what the family's own forward hands each layer.

    The base model is called, so that masks, rotations and the scale of embeddings are its own, with layers that do
    nothing. Hooks on their forwards, which may load offloaded weights, rest meanwhile.
    """
    rehearsal = _Rehearsal()
    swaps = [Swap.of(layer, "forward", rehearsal.record) for layer in layers]
    # One token through the first layer shows what a layer returns.
    noting = Swap.of(layers[0], "forward", rehearsal.noting(layers[0].forward))
    rehearsal.call(base, parts[0][:1, :1], [noting, *swaps[1:]])
    work = []
    for part in parts:
        rehearsal.call(base, part, swaps)
        if rehearsal.hidden is None or len(rehearsal.arguments) != len(layers):
            raise NoEffectError(
                f"The forward of {type(base).__name__} called {len(rehearsal.arguments)} of {len(layers)} layers, where"
                " calibration needs each once."
            )
        work.append(_Batch(rehearsal.hidden, rehearsal.arguments))
    return work


@dataclass
class _Rehearsal:
    """Stands in the place of the layers' forwards: notes what each is given, and gives the hidden states back."""

    after: tuple[Any, ...] | None = None
    """What a layer returns after the hidden states; None where it returns them alone."""
    hidden: Tensor | None = None
    arguments: list[Arguments] = field(default_factory=list)
    known: list[Tensor] = field(default_factory=list)
    """The tensors among the arguments of all batches, each once."""
    aliases: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Those of the batch at hand, and which known ones they equal."""

    def call(self, base: Any, ids: Tensor, swaps: list[Swap]) -> None:
        self.hidden, self.arguments = None, []
        weight = base.get_input_embeddings().weight
        ids = ids.to("cpu" if weight.is_meta else weight.device)  # where weights are offloaded, hooks move the ids
        with_swaps(swaps, lambda: base(input_ids=ids, use_cache=False))
        self.aliases.clear()

    def noting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a layer that also notes what a layer returns after the hidden states."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.after = output[1:] if isinstance(output, tuple) else None
            return output

        return noted

    def record(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.hidden = hidden if self.hidden is None else self.hidden
        self.arguments.append((self.shared(args[1:]), self.shared(kwargs)))
        return hidden if self.after is None else (hidden, *self.after)

    def shared(self, value: Any) -> Any:
        """The same, with tensors of earlier batches where they are equal: masks of long rows would fill the memory."""
        if type(value) in (tuple, list):
            return type(value)(self.shared(one) for one in value)
        if type(value) is dict:
            return {name: self.shared(one) for name, one in value.items()}
        if not isinstance(value, Tensor):
            return value
        for seen, one in self.aliases:
            if seen is value:
                return one
        found = next((one for one in self.known if _equal(one, value)), None)
        if found is None:
            self.known.append(found := value)
        self.aliases.append((value, found))
        return found


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(one, other)


def batches(rows: Sequence[Tensor], budget: int = BATCH_TOKENS) -> list[Tensor]:
    """Rows of one length together, `[rows, length]`, as many as make `budget` tokens; so that none is padded."""
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [
        torch.stack(part)
        for length, same in by_length.items()
        for part in (same[at : at + max(1, budget // length)] for at in range(0, len(same), max(1, budget // length)))
    ]


@contextmanager
def evaluating(base: nn.Module) -> Iterator[None]:
    """No dropout for as long as this lasts, and each module's own mode after it."""
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
    except BaseException:  # an interrupt on the way back
        restore()
        raise


def _bar(layers: int, progress: bool | None) -> Any:
    """A bar over the layers with the time left, on stderr; the block is given what moves it on."""
    if not (sys.stderr.isatty() if progress is None else progress):
        return nullcontext(lambda _: None)
    return _shown_bar(layers)


@contextmanager
def _shown_bar(layers: int) -> Iterator[Callable[[float], None]]:
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
