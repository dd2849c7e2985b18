"""Where the learned biases of a new scheme start: at what the model's own positions do to its attention.

A model that is given another family of scheme loses what its positions did, and a bias that starts at zero, or at an
author's constants, has to be trained to do it again. The scores of one head are known, though: its queries and keys
without positions, `s_ij`, and the attention `a_ij` that the model had with its own. The bias `b` under which
`softmax(s + b)` is nearest to `a`, by the mean of KL(a_i || softmax(s_i + b_i)) over queries, is found here before any
training. For a bias that is linear in its parameters (T5's table, ALiBi's slopes) the problem is convex, as logistic
regression is. Pairs count by the attention that they have, and a constant for each query counts nothing, which the mean
difference of the scores at each distance, another way to choose `b`, leaves out of account.

Where layers share one bias and want different ones, what is best for their attention on the average can be worse for
the text than what is best for one of them; so the loss decides between these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attention.backends import BACKENDS
from ..core.positions import Positions
from ..core.scheme import AttentionShape, Scheme, overrides
from ..core.swaps import finally_do
from ..errors import NoEffectError, OptionError, PePatchError, UnsupportedError, nearest, quoted
from ..mla.calibration_text import tokens
from ..mla.conversion import loss
from ..mla.streaming import evaluating
from ..patching.api import find_patch, patch_model
from ..patching.build import Patch
from ..schemes.bias import ALiBi

BY = ("loss", "attention")
LENGTH = 1024
"""Tokens to a row of calibration, at most; fewer where the model's window is shorter."""
STEPS = 100
"""Passes over everything that was seen, at most."""
TINY = 1e-300
"""What a weight that has underflown counts as, so that its logarithm is a number."""


@dataclass(frozen=True)
class WarmStart:
    """What a fit came to, in nats."""

    before: float
    after: float
    """Mean of KL(native attention || the scheme's) over queries, heads and layers."""
    loss_before: float | None
    loss_after: float | None
    """Mean loss per token on the calibration text; None where it was not asked for."""
    chosen: str
    """What the parameters are best for: "all layers", "layer 3", or "start" where nothing had a smaller loss."""
    fitted: tuple[str, ...]
    """Names of the parameters or options that were set."""


def warm_start(
    model: Any,
    calibration: Any,
    *,
    by: str = "loss",
    limit: int = 16384,
    queries: int = 64,
    least_slope: float = 2.0**-10,
    seed: int = 0,
) -> WarmStart:
    """Fit the scheme that a model was patched with to the attention that the model had before; in place.

    What is set are the parameters by which the scheme changes scores (T5's table, KERPLE's a and p, FIRE's network,
    Transformer-XL's projections, Shaw's vectors on keys), or ALiBi's slopes, which become its option `slopes`.

    Args:
        model: patched with `patch_model` and not trained since.
        calibration: token ids, `[rows, length]` or rows of any lengths, or texts.
        by: "attention" takes what is nearest to the attention of all layers. "loss" takes, of this, of what is nearest
            to one layer where several share their parameters, and of the start, that with the least loss on the text.
        limit: tokens that are read, at most.
        queries: of each row so many, spread evenly, are compared. What is held is `tokens x layers x (queries x heads +
            key_heads x head_dim)` numbers: 3 GB for 16384 tokens, 22 layers and 32 heads.
        least_slope: ALiBi's slopes may not fall below it: a head without one would see no end.
        seed: chooses rows where there are more tokens than `limit`.

    Raises:
        OptionError: nothing in the scheme can be fitted, or a value is out of bounds.
        UnsupportedError: the native attention does not hand out its weights.
    """
    patch = find_patch(model)
    if patch is None:
        raise PePatchError("warm_start fits the scheme of a patched model: call patch_model(model, ...) first.")
    if by not in BY:
        raise OptionError(f"warm_start got by={quoted(by)}; it is one of {', '.join(BY)}.{nearest(str(by), BY)}")
    if by == "loss" and patch.model.get_output_embeddings() is None:
        raise OptionError(
            f"{type(patch.model).__name__} predicts no tokens, so that it has no loss to choose by; give "
            "by='attention'."
        )
    for name, value in (("limit", limit), ("queries", queries)):
        if type(value) is not int or value < 1:
            raise OptionError(f"warm_start got {name}={quoted(value)}; give a whole number of at least 1.")
    if isinstance(least_slope, bool) or not 0 < least_slope < math.inf:
        raise OptionError(f"warm_start got least_slope={quoted(least_slope)}; give a number above 0.")
    schemes = list(dict.fromkeys(patch.scheme_by_layer.values()))
    start = [_trainable(scheme, patch.base.device) for scheme in schemes]
    at_scores = any(overrides(patch.scheme, rung) for rung in ("encode", "bias", "attend"))
    if not at_scores or not any(True for scheme in start for _ in scheme.parameters()):
        raise OptionError(
            f"{patch.scheme.name!r} has nothing to fit, no parameters or slopes that change scores; leave the warm "
            "start out."
        )
    length = min(patch.shape.trained_length or LENGTH, LENGTH)
    rows = [row for row in tokens(calibration, patch.model, length=length, limit=limit, seed=seed) if len(row) > 1]
    if not rows:
        raise OptionError("warm_start got no row of at least two tokens to compare attention on.")
    seen = _observe(patch, rows, queries)
    parts = [
        [part for i, own in patch.scheme_by_layer.items() if own is scheme for part in seen[i]] for scheme in schemes
    ]
    found = {"all layers": [_fit(deepcopy(one), own) for one, own in zip(start, parts, strict=True)]}
    fitted = tuple(name for name, _ in _reached(start[0], parts[0]))
    losses: dict[str, float] = {}
    if by == "loss":
        found["start"] = start
        if len(schemes) == 1 < len(patch.scheme_by_layer):
            found |= {f"layer {index}": [_fit(deepcopy(start[0]), seen[index])] for index in patch.scheme_by_layer}
        losses = {name: _loss(patch, schemes, made, least_slope, rows) for name, made in found.items()}
    chosen = min(losses, key=losses.__getitem__, default="all layers")
    before, after = (_divergence(made, parts) for made in (start, found[chosen]))
    if chosen != "start":
        _put(schemes, found[chosen], least_slope)
        if isinstance(found[chosen][0], _Slopes):  # an option, which is saved as one
            given = {name: value for name, value in patch.arguments.items() if name != "restored"}
            options = {**schemes[0].options, "slopes": cast(ALiBi, schemes[0]).head_slopes}
            patch_model(model, type(schemes[0]), **{**given, "on_existing": "replace"}, **options)
    return WarmStart(before, after, losses.get("start"), losses.get(chosen), chosen, fitted)


@dataclass
class _Seen:
    """What one attention did with some queries of one row."""

    hidden: Tensor | None
    native: Tensor
    """The weights of the native attention, `[1, heads, queries, keys]`, float32; all is counted in float64."""
    query: Tensor = field(default_factory=lambda: torch.empty(0))
    key: Tensor = field(default_factory=lambda: torch.empty(0))
    positions: Positions | None = None
    engine: Any = None

    def weights(self, scheme: Scheme) -> Tensor:
        """The scheme's, with its gradient."""
        assert self.positions is not None
        positions = self.positions._replace(prepared=scheme.prepare(self.positions))
        query, key = self.query.double(), self.key.double()
        nothing = key.new_zeros((*key.shape[:-1], 1))  # weights are all that is wanted
        return scheme("attend", query, key, nothing, positions, self.engine)[1]


class _Slopes(ALiBi):
    """ALiBi of which the slopes are learned, by their logarithms."""

    def setup(self) -> None:
        super().setup()
        self.logarithms = nn.Parameter(torch.tensor(self.head_slopes, dtype=torch.float64).log())

    def _slopes(self, device: torch.device) -> Tensor:
        return self.logarithms.exp()


def _trainable(scheme: Scheme, device: torch.device) -> Scheme:
    """A copy in float64 that can be fitted."""
    if type(scheme) is ALiBi:
        return _Slopes(scheme.shape, slopes=scheme.head_slopes).to(device)
    return deepcopy(scheme).double().requires_grad_(True)


def _observe(patch: Patch, rows: list[Tensor], queries: int) -> dict[int, list[_Seen]]:
    """What every attention of the patch did natively, and what it projects from the same hidden states now."""
    base, adapter = patch.base, patch.adapter
    attentions = adapter.attentions(base)
    seen: dict[int, list[_Seen]] = {index: [] for index in patch.scheme_by_layer}

    def watch_eager() -> None:
        base.set_attn_implementation("eager")  # the only one that makes weights
        with evaluating(base), torch.no_grad():
            for row in rows:
                with _watching({i: attentions[i] for i in seen}, seen, _chosen(len(row), queries)):
                    base(input_ids=row[None].to(base.device), use_cache=False)

    def watch_native() -> None:
        own: Any = base.config._attn_implementation
        finally_do(lambda: base.set_attn_implementation(own), watch_eager)

    patch.while_undone(watch_native)
    with evaluating(base), torch.no_grad():
        for number, row in enumerate(rows):
            with _handing({i: (attentions[i], seen[i][number]) for i in seen}, _chosen(len(row), queries)):
                base(input_ids=row[None].to(base.device), use_cache=False)
    return seen


def _chosen(length: int, queries: int) -> Tensor:
    """Which queries are compared: evenly spread, the first left out, which has nothing to choose from."""
    return torch.linspace(1, length - 1, min(queries, length - 1)).round().long().unique()


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


@contextmanager
def _watching(attentions: dict[int, nn.Module], seen: dict[int, list[_Seen]], chosen: Tensor) -> Iterator[None]:
    """Keep what each attention is given, and the weights that it makes."""

    def watch(index: int, attention: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.ndim != 4:
            raise UnsupportedError(
                f"{type(attention).__name__} in layer {index} does not hand out its attention weights, to which the "
                "new scheme would be fitted; patch this model without a warm start."
            )
        seen[index].append(_Seen(_given(args, kwargs), weights[:, :, chosen.to(weights.device)].float()))

    with ExitStack() as stack:
        for index, attention in attentions.items():
            hook: Any = lambda module, args, kwargs, output, index=index: watch(index, module, args, kwargs, output)  # noqa: E731
            stack.callback(attention.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def _handing(attentions: dict[int, tuple[nn.Module, _Seen]], chosen: Tensor) -> Iterator[None]:
    """Give each attention the hidden states that it had natively, and keep what it projects from them."""
    with ExitStack() as stack:
        for attention, seen in attentions.values():

            def hand(_: nn.Module, args: Any, kwargs: Any, seen: _Seen = seen) -> Any:
                hidden, seen.hidden = seen.hidden, None
                if "hidden_states" in kwargs:
                    return args, {**kwargs, "hidden_states": hidden}
                return (hidden, *args[1:]), kwargs

            stack.callback(attention.register_forward_pre_hook(hand, with_kwargs=True).remove)
            stack.callback(attention.__dict__.__setitem__, "pe_scheme", attention.__dict__["pe_scheme"])
            attention.__dict__["pe_scheme"] = _Catch(seen, chosen, attention.__dict__["pe_scheme"].shape)
        yield
    if any(seen.positions is None for _, seen in attentions.values()):
        raise NoEffectError("An attention of the patch was not reached by the text that it was to be fitted to.")


@dataclass
class _Catch:
    """Stands in the place of the scheme and keeps what it is handed."""

    seen: _Seen
    chosen: Tensor
    shape: AttentionShape
    name = "warm start"
    calls_modules = False

    def __call__(self, rung: str, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: Any) -> Any:
        seen, at = self.seen, self.chosen.to(query.device)
        seen.query, seen.key = query[:, :, at], key
        seen.positions = positions._replace(query=positions.query[:, at], prepared=())
        mask = engine.allowed(query, key)[..., at, :]
        seen.engine = replace(engine, mask=mask, backend=BACKENDS["eager"], dropout=0.0)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _crossed(scheme: Scheme, part: _Seen) -> Tensor:
    """Cross-entropy of the scheme's attention to the native one, summed over queries and heads."""
    return -(part.native.double() * part.weights(scheme).clamp(min=TINY).log()).sum()


def _reached(scheme: Scheme, parts: list[_Seen]) -> list[tuple[str, nn.Parameter]]:
    """The parameters that change attention weights."""
    named = list(scheme.named_parameters())
    found = torch.autograd.grad(_crossed(scheme, parts[0]), [one for _, one in named], allow_unused=True)
    reached = [pair for pair, gradient in zip(named, found, strict=True) if gradient is not None]
    if not reached:
        raise OptionError(
            f"Nothing that {scheme.name!r} learns changes its attention weights, so there is nothing to fit."
        )
    return reached


def _fit(scheme: Scheme, parts: list[_Seen]) -> Scheme:
    """The scheme, with the parameters under which its attention is nearest."""
    count = sum(part.native.shape[1] * part.native.shape[2] for part in parts)
    optimizer = torch.optim.LBFGS(
        [one for _, one in _reached(scheme, parts)],
        max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-7, tolerance_change=1e-10,
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for part in parts:  # one at a time: what a gradient keeps is as large as all pairs
            loss = _crossed(scheme, part) / count
            loss.backward()
            total += loss.item()
        return total

    optimizer.step(closure)
    if not all(bool(one.isfinite().all()) for one in scheme.parameters()):
        raise PePatchError(f"The fit of {scheme.name!r} gave no numbers; give other text, or leave the warm start out.")
    return scheme


@torch.no_grad()
def _divergence(schemes: list[Scheme], parts: list[list[_Seen]]) -> float:
    """The mean over all queries."""
    total, count = 0.0, 0
    for scheme, own in zip(schemes, parts, strict=True):
        for part in own:
            native = part.native.double()
            total += (torch.xlogy(native, native).sum() + _crossed(scheme, part)).item()
            count += part.native.shape[1] * part.native.shape[2]
    return total / count


def _put(schemes: list[Scheme], found: list[Scheme], least_slope: float) -> None:
    """Give the model's schemes what was found."""
    for own, one in zip(schemes, found, strict=True):
        if isinstance(one, _Slopes):
            ours = cast(ALiBi, own)
            ours.head_slopes = one.logarithms.detach().exp().clamp(min=least_slope).tolist()
            ours._constants.clear()
            continue
        with torch.no_grad():
            for parameter, value in zip(own.parameters(), one.parameters(), strict=True):
                parameter.copy_(value)


@torch.no_grad()
def _loss(patch: Patch, schemes: list[Scheme], found: list[Scheme], least_slope: float, rows: list[Tensor]) -> float:
    """The loss with what was found in the place of what the model has."""
    before = [(getattr(scheme, "head_slopes", None), deepcopy(list(scheme.parameters()))) for scheme in schemes]
    _put(schemes, found, least_slope)
    try:
        return loss(patch.model, rows)
    finally:
        for scheme, (slopes, parameters) in zip(schemes, before, strict=True):
            if isinstance(scheme, ALiBi):
                scheme.head_slopes = cast("list[float]", slopes)
                scheme._constants.clear()
            for parameter, value in zip(scheme.parameters(), parameters, strict=True):
                parameter.copy_(value)
