"""Initialise a new scheme's learned bias from the attention that the model had with its original positions.

A model that changes its family of scheme loses the effect of its old positions. A bias that starts at zero, or at an
author's constants, has to learn that effect again. For each head, the scores without positions, `s_ij`, and the
original attention, `a_ij`, are known. Before any training, this module finds the bias `b` that minimises the mean of
KL(a_i || softmax(s_i + b_i)) over queries. For a bias that is linear in its parameters (T5's table, ALiBi's slopes) the
problem is convex, like logistic regression. The fit weights pairs by their attention and ignores a constant per query.
The mean difference of the scores at each distance, another way to choose `b`, takes neither into account.

Layers may share one bias but need different ones. Then the fit that is best for their mean attention can give a higher
loss on text than the fit to one layer, so the loss decides between them.
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

from .. import compat
from ..attention.backends import BACKENDS
from ..core.positions import Positions
from ..core.scheme import AttentionShape, Scheme, overrides
from ..core.swaps import finally_do
from ..errors import NoEffectError, OptionError, PePatchError, UnsupportedError, nearest, quoted
from ..mla.calibration_text import tokens
from ..mla.conversion import loss
from ..mla.streaming import evaluating
from ..patching.api import find_patch, patch_model
from ..patching.patch import Patch
from ..schemes.bias import ALiBi

BY = ("loss", "attention")
LENGTH = 1024
"""Maximum length in tokens of a calibration row; a shorter model window lowers it."""
STEPS = 100
"""Maximum number of iterations of the optimiser."""
TINY = 1e-300
"""Lower bound of an attention weight, so that its logarithm is finite."""


@dataclass(frozen=True)
class WarmStart:
    """Result of a fit, in nats."""

    before: float
    after: float
    """Mean of KL(original attention || the scheme's) over queries, heads and layers, before and after the fit."""
    loss_before: float | None
    loss_after: float | None
    """Mean loss per token on the calibration text, before and after the fit; None for by="attention"."""
    chosen: str
    """The fit that was applied: "all layers", "layer 3", or "start" if no fit lowered the loss."""
    fitted: tuple[str, ...]
    """Names of the fitted parameters or options."""


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
    """Fit the scheme of a patched model to the attention that the model had before the patch, in place.

    This sets the parameters by which the scheme changes scores (T5's table, KERPLE's a and p, FIRE's network,
    Transformer-XL's projections, Shaw's vectors on keys), or ALiBi's slopes, which become its option `slopes`.

    Args:
        model: a model patched with `patch_model` and not trained since.
        calibration: token ids, `[rows, length]` or rows of different lengths, or texts.
        by: "attention" applies the fit to the attention of all layers. "loss" compares this fit, fits to single layers
            if several layers share their parameters, and the start, and applies the one with the lowest loss.
        limit: maximum number of calibration tokens.
        queries: maximum number of evenly spaced queries of each row to compare. Memory is `tokens x layers x (queries x
            heads + key_heads x head_dim)` numbers: 3 GB for 16384 tokens, 22 layers and 32 heads.
        least_slope: minimum of ALiBi's slopes; a head with slope 0 would see unlimited distances.
        seed: random seed for choosing rows if there are more than `limit` tokens.

    Returns:
        The divergences and losses before and after, and what was fitted.

    Raises:
        OptionError: the scheme has nothing to fit, or a value is out of range.
        UnsupportedError: the original attention does not return its weights.
    """
    patch = find_patch(model)
    if patch is None:
        raise PePatchError("warm_start needs a patched model: call patch_model(model, ...) first.")
    if by not in BY:
        raise OptionError(f"warm_start got by={quoted(by)}; use one of {', '.join(BY)}.{nearest(str(by), BY)}")
    if by == "loss" and patch.model.get_output_embeddings() is None:
        raise OptionError(
            f"{type(patch.model).__name__} predicts no tokens, so it has no loss to choose by; use by='attention'."
        )
    for name, value in (("limit", limit), ("queries", queries)):
        if type(value) is not int or value < 1:
            raise OptionError(f"warm_start got {name}={quoted(value)}; give a whole number of at least 1.")
    if isinstance(least_slope, bool) or not 0 < least_slope < math.inf:
        raise OptionError(f"warm_start got least_slope={quoted(least_slope)}; give a number above 0.")
    schemes = list(dict.fromkeys(patch.scheme_by_layer.values()))
    start = [_trainable_copy(scheme, patch.base.device) for scheme in schemes]
    at_scores = any(overrides(patch.scheme, hook) for hook in ("encode", "bias", "attend"))
    if not at_scores or not any(True for scheme in start for _ in scheme.parameters()):
        raise OptionError(
            f"{patch.scheme.name!r} has nothing to fit: no parameters or slopes that change scores. Remove the warm "
            "start."
        )
    length = min(patch.shape.trained_length or LENGTH, LENGTH)
    rows = [row for row in tokens(calibration, patch.model, length=length, limit=limit, seed=seed) if len(row) > 1]
    if not rows:
        raise OptionError("warm_start needs a row of at least two tokens; give longer calibration text.")
    observed = _observe(patch, rows, queries)
    samples = [
        [sample for i, used in patch.scheme_by_layer.items() if used is scheme for sample in observed[i]]
        for scheme in schemes
    ]
    fits = {"all layers": [_fit(deepcopy(scheme), given) for scheme, given in zip(start, samples, strict=True)]}
    fitted = tuple(name for name, _ in _fitted_parameters(start[0], samples[0]))
    losses: dict[str, float] = {}
    if by == "loss":
        fits["start"] = start
        if len(schemes) == 1 < len(patch.scheme_by_layer):
            fits |= {f"layer {index}": [_fit(deepcopy(start[0]), observed[index])] for index in patch.scheme_by_layer}
        losses = {name: _loss(patch, schemes, fit, least_slope, rows) for name, fit in fits.items()}
    chosen = min(losses, key=losses.__getitem__, default="all layers")
    before, after = (_divergence(fit, samples) for fit in (start, fits[chosen]))
    if chosen != "start":
        _copy_parameters(schemes, fits[chosen], least_slope)
        if isinstance(fits[chosen][0], _LearnedSlopes):  # slopes are an option, and are saved as one
            options = {**schemes[0].options, "slopes": cast(ALiBi, schemes[0]).head_slopes}
            patch_model(model, type(schemes[0]), **{**patch.settings.arguments(), "on_existing": "replace"}, **options)
    return WarmStart(before, after, losses.get("start"), losses.get(chosen), chosen, fitted)


@dataclass
class _Sample:
    """Some queries of one row at one attention layer: the original weights, and the inputs of the new scores."""

    hidden: Tensor | None
    native: Tensor
    """Weights of the original attention, float32 `[1, heads, queries, keys]`; sums are in float64."""
    query: Tensor = field(default_factory=lambda: torch.empty(0))
    key: Tensor = field(default_factory=lambda: torch.empty(0))
    positions: Positions | None = None
    engine: Any = None

    def weights(self, scheme: Scheme) -> Tensor:
        """Return the scheme's attention weights, with their gradient."""
        assert self.positions is not None
        positions = self.positions._replace(prepared=scheme.prepare(self.positions))
        query, key = self.query.double(), self.key.double()
        no_values = key.new_zeros((*key.shape[:-1], 1))  # only the weights are needed
        return scheme("attend", query, key, no_values, positions, self.engine)[1]


class _LearnedSlopes(ALiBi):
    """ALiBi with trainable slopes, parametrised by their logarithms."""

    def setup(self) -> None:
        super().setup()
        self.logarithms = nn.Parameter(torch.tensor(self.head_slopes, dtype=torch.float64).log())

    def _slopes(self, device: torch.device) -> Tensor:
        return self.logarithms.exp()


def _trainable_copy(scheme: Scheme, device: torch.device) -> Scheme:
    """Return a trainable copy in float64."""
    if type(scheme) is ALiBi:
        return _LearnedSlopes(scheme.shape, slopes=scheme.head_slopes).to(device)
    return deepcopy(scheme).double().requires_grad_(True)


def _observe(patch: Patch, rows: list[Tensor], queries: int) -> dict[int, list[_Sample]]:
    """Return samples of each layer: the original attention, and the patched projections of the same hidden states."""
    base, adapter = patch.base, patch.adapter
    attentions = adapter.attentions(base)
    samples: dict[int, list[_Sample]] = {index: [] for index in patch.scheme_by_layer}

    def record_eager() -> None:
        base.set_attn_implementation("eager")  # the only implementation that returns weights
        with evaluating(base), torch.no_grad():
            for row in rows:
                with _record_weights({i: attentions[i] for i in samples}, samples, _choose_queries(len(row), queries)):
                    base(input_ids=row[None].to(base.device), use_cache=False)

    def record_native() -> None:
        implementation: Any = compat.attention_implementation(base.config)
        finally_do(lambda: base.set_attn_implementation(implementation), record_eager)

    patch.while_undone(record_native)
    with evaluating(base), torch.no_grad():
        for number, row in enumerate(rows):
            with _record_projections(
                {i: (attentions[i], samples[i][number]) for i in samples}, _choose_queries(len(row), queries)
            ):
                base(input_ids=row[None].to(base.device), use_cache=False)
    return samples


def _choose_queries(length: int, queries: int) -> Tensor:
    """Return evenly spaced query indices, without the first query, which sees only itself."""
    return torch.linspace(1, length - 1, min(queries, length - 1)).round().long().unique()


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


@contextmanager
def _record_weights(
    attentions: dict[int, nn.Module], samples: dict[int, list[_Sample]], chosen: Tensor
) -> Iterator[None]:
    """Record the input and the attention weights of each layer."""

    def record(index: int, attention: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.ndim != 4:
            raise UnsupportedError(
                f"{type(attention).__name__} in layer {index} does not return its attention weights, which the warm "
                "start needs; patch this model without a warm start."
            )
        samples[index].append(_Sample(_hidden_states(args, kwargs), weights[:, :, chosen.to(weights.device)].float()))

    with ExitStack() as stack:
        for index, attention in attentions.items():
            hook: Any = lambda module, args, kwargs, output, index=index: record(index, module, args, kwargs, output)  # noqa: E731
            stack.callback(attention.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def _record_projections(attentions: dict[int, tuple[nn.Module, _Sample]], chosen: Tensor) -> Iterator[None]:
    """Feed each attention its original hidden states, and record the queries and keys that it projects from them."""
    with ExitStack() as stack:
        for attention, sample in attentions.values():

            def feed(_: nn.Module, args: Any, kwargs: Any, sample: _Sample = sample) -> Any:
                hidden, sample.hidden = sample.hidden, None
                if "hidden_states" in kwargs:
                    return args, {**kwargs, "hidden_states": hidden}
                return (hidden, *args[1:]), kwargs

            stack.callback(attention.register_forward_pre_hook(feed, with_kwargs=True).remove)
            stack.callback(attention.__dict__.__setitem__, "pe_scheme", attention.__dict__["pe_scheme"])
            attention.__dict__["pe_scheme"] = _Recorder(sample, chosen, attention.__dict__["pe_scheme"].shape)
        yield
    if any(sample.positions is None for _, sample in attentions.values()):
        raise NoEffectError("The calibration text did not reach an attention layer of the patch.")


@dataclass
class _Recorder:
    """Replaces the scheme and records the arguments that it receives."""

    sample: _Sample
    chosen: Tensor
    shape: AttentionShape
    name = "warm start"
    calls_modules = False

    def __call__(self, hook: str, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: Any) -> Any:
        sample, at = self.sample, self.chosen.to(query.device)
        sample.query, sample.key = query[:, :, at], key
        sample.positions = positions._replace(query=positions.query[:, at], prepared=())
        mask = engine.allowed(query, key)[..., at, :]
        sample.engine = replace(engine, mask=mask, backend=BACKENDS["eager"], dropout=0.0)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _cross_entropy(scheme: Scheme, sample: _Sample) -> Tensor:
    """Return the cross-entropy of the scheme's attention to the original one, summed over queries and heads."""
    return -(sample.native.double() * sample.weights(scheme).clamp(min=TINY).log()).sum()


def _fitted_parameters(scheme: Scheme, samples: list[_Sample]) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that change attention weights."""
    named = list(scheme.named_parameters())
    objective = _cross_entropy(scheme, samples[0])
    gradients = torch.autograd.grad(objective, [parameter for _, parameter in named], allow_unused=True)
    fitted = [pair for pair, gradient in zip(named, gradients, strict=True) if gradient is not None]
    if not fitted:
        raise OptionError(f"No parameter of {scheme.name!r} changes its attention weights, so there is nothing to fit.")
    return fitted


def _fit(scheme: Scheme, samples: list[_Sample]) -> Scheme:
    """Fit the scheme's parameters to the original attention, in place, and return the scheme."""
    count = sum(sample.native.shape[1] * sample.native.shape[2] for sample in samples)
    optimizer = torch.optim.LBFGS(
        [parameter for _, parameter in _fitted_parameters(scheme, samples)],
        max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-7, tolerance_change=1e-10,
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for sample in samples:  # one at a time, because a graph is as large as all query-key pairs
            loss = _cross_entropy(scheme, sample) / count
            loss.backward()
            total += loss.item()
        return total

    optimizer.step(closure)
    if not all(bool(parameter.isfinite().all()) for parameter in scheme.parameters()):
        raise PePatchError(
            f"The fit of {scheme.name!r} gave values that are not finite; give other text, or remove the warm start."
        )
    return scheme


@torch.no_grad()
def _divergence(schemes: list[Scheme], samples: list[list[_Sample]]) -> float:
    """Return the mean divergence over all queries, heads and layers."""
    total, count = 0.0, 0
    for scheme, of_scheme in zip(schemes, samples, strict=True):
        for sample in of_scheme:
            native = sample.native.double()
            total += (torch.xlogy(native, native).sum() + _cross_entropy(scheme, sample)).item()
            count += sample.native.shape[1] * sample.native.shape[2]
    return total / count


def _copy_parameters(schemes: list[Scheme], fits: list[Scheme], least_slope: float) -> None:
    """Copy the fitted parameters or slopes into the model's schemes."""
    for scheme, fit in zip(schemes, fits, strict=True):
        if isinstance(fit, _LearnedSlopes):
            alibi = cast(ALiBi, scheme)
            alibi.head_slopes = fit.logarithms.detach().exp().clamp(min=least_slope).tolist()
            alibi._constants.clear()
            continue
        with torch.no_grad():
            for parameter, value in zip(scheme.parameters(), fit.parameters(), strict=True):
                parameter.copy_(value)


@torch.no_grad()
def _loss(patch: Patch, schemes: list[Scheme], fits: list[Scheme], least_slope: float, rows: list[Tensor]) -> float:
    """Return the loss of the model with the fitted parameters, and restore its parameters."""
    before = [(getattr(scheme, "head_slopes", None), deepcopy(list(scheme.parameters()))) for scheme in schemes]
    _copy_parameters(schemes, fits, least_slope)
    try:
        return loss(patch.model, rows)
    finally:
        for scheme, (slopes, parameters) in zip(schemes, before, strict=True):
            if isinstance(scheme, ALiBi):
                scheme.head_slopes = cast("list[float]", slopes)
                scheme._constants.clear()
            for parameter, value in zip(scheme.parameters(), parameters, strict=True):
                parameter.copy_(value)
