"""Proof that an adapter which somebody wrote says how the model rotates: by running it on a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapters import Adapter
from ..adapters.adapter import frequencies_of
from ..adapters.check import LAYOUTS
from ..attention.interface import backend_for
from ..core.scheme import Scheme
from ..errors import OptionValueError, PePatchError
from ..mla.protocol import converts
from ..schemes.rope import Rotary, Rotation
from .build import Patch, collect

logger = logging.getLogger("pe_patch")

LENGTH = 6
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far queries and keys may be from the native ones, relative to the largest of a layer; `EXACT` elsewhere."""
EXACT = 1e-4

Seen = dict[int, tuple[Tensor, Tensor]]
"""Queries and keys of each layer as its attention multiplies them."""


class Native(Rotary):
    """The model's own rotation, made by this library before the cache or at the scores."""

    name = "native rotation"
    inverse: ClassVar[Tensor]
    """Inverse frequencies of the built module, `[rotary_dim / 2]`."""
    factor: ClassVar[float]
    """Factor on cos and sin."""
    folded: ClassVar[float]
    """Factor of the scheme on the softmax scale."""
    late: ClassVar[bool]
    """Rotate at the scores rather than before the cache."""
    still: ClassVar[bool] = False
    """Rotate by nothing, in layers without rotation."""

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        return (torch.zeros_like(self.inverse), 1.0) if self.still else (self.inverse, self.factor)

    @property
    def length_dependent(self) -> bool:
        return self.late

    @property
    def effective_window(self) -> int | None:
        return None

    @property
    def softmax_factor(self) -> float:
        return self.folded


def check_rotation(patch: Patch) -> None:
    """Raise `OptionValueError` unless queries and keys rotated as the given adapter says equal the model's own.

    The model's own rotation is made by this library in the place of the rotary module, where `layout` must be right;
    and then at the scores, where `interleaved_pairs`, `rotates` and the order of rotation and norm must be right too.
    Each layer is fed what it is fed in the unpatched model, so that nothing but the rotation counts. A scheme that
    does not rotate at the scores only warns of what is wrong there.
    """
    base, adapter, given = patch.base, patch.adapter, patch.arguments
    if adapter.rotary is None or adapter.tower is not None or any(p.is_meta for p in base.parameters()):
        return
    native, inputs = _run(base, adapter, feed=None, implementation=_ours(base, given))
    if not native:
        return  # no attention calls the interface, which the patch itself finds out
    trial = Trial(patch, native, inputs)
    error: Exception | None = None
    for late in (False, True):
        wrong, error = trial.differing(adapter, late)
        if wrong:
            break
    else:
        return
    fitting = trial.fitting()
    if not late or any(_rotates_late(scheme) for scheme in patch.scheme_by_layer.values()):
        raise OptionValueError(trial.message(wrong, error, late, fitting)) from error
    if fitting is not None:
        logger.warning(
            "%s Schemes that rotate at the scores would be refused.", trial.message(wrong, error, late, fitting)
        )


def _rotates_late(scheme: Scheme) -> bool:
    """Whether a scheme needs to know which dimensions the family pairs."""
    return converts(scheme) or (isinstance(scheme, Rotation) and not scheme.rotates_early)


@dataclass
class Trial:
    """Runs of one model under its own rotation as adapters describe it, beside the unpatched model."""

    patch: Patch
    native: Seen
    inputs: dict[int, Tensor]

    def differing(self, adapter: Adapter, late: bool) -> tuple[list[int], Exception | None]:
        """The layers whose queries or keys are not the native ones, and the error where the model does not even run."""
        if late and (adapter.late_norm or not adapter.carries):
            return [], None
        base = self.patch.base
        layer_types, attentions = adapter.layer_types(base, base.config), adapter.attentions(base)
        wrong: list[int] = []
        for layer_type in dict.fromkeys(layer_types):
            layers = [i for i, other in enumerate(layer_types) if other == layer_type and i in self.native]
            if all(adapter.skips_rope(attentions[i]) for i in layers):
                continue
            scheme = _native(base, adapter, layer_type, late, attentions[layers[0]])
            try:
                found = self._under(scheme, adapter, None if len(set(layer_types)) == 1 else layers)
            except PePatchError:
                raise
            except Exception as error:  # a layout of another shape fails somewhere in the family's own code
                return layers, error
            wrong += [i for i in layers if i not in found or not _close(found[i], self.native[i])]
        return sorted(wrong), None

    def resting(self) -> list[int]:
        """The layers whose queries and keys are the same with every frequency at zero."""
        base, adapter = self.patch.base, self.patch.adapter
        still = type(
            "Still", (_native(base, adapter, adapter.layer_types(base, base.config)[0], False, None),), {"still": True}
        )
        found = self._under(still, adapter, None)
        return [i for i, native in self.native.items() if i in found and _close(found[i], native)]

    def fitting(self) -> str | None:
        """What to write in the adapter for its rotation to be the model's, or None where no layout and pairing fits."""
        adapter = self.patch.adapter
        for layout, pairs in product(LAYOUTS, (False, True)):
            if (layout, pairs) == (adapter.layout, adapter.interleaved_pairs):
                continue
            other = replace(adapter, layout=layout, interleaved_pairs=pairs)
            if not any(self.differing(other, late)[0] for late in (False, True)):
                said = [f"layout={layout!r}"] if layout != adapter.layout else []
                said += [f"interleaved_pairs={pairs}"] if pairs != adapter.interleaved_pairs else []
                return ", ".join(said)
        return None

    def message(self, wrong: list[int], error: Exception | None, late: bool, fitting: str | None) -> str:
        """What is wrong with the adapter, and what to write instead."""
        adapter, name = self.patch.adapter, type(self.patch.base).__name__
        resting = [] if fitting is not None or not late else [i for i in wrong if i in self.resting()]
        if fitting is not None:
            remedy = f"Adapter({fitting}) fits."
        elif resting:
            remedy = (
                f"Layers {', '.join(map(str, resting))} do not rotate at all: give rotates=<the attribute of an "
                "attention that says whether it rotates, or a function of the attention>."
            )
        else:
            remedy = (
                f"No other layout= ({', '.join(LAYOUTS)}) or interleaved_pairs= fits. Either `rotary` is not the "
                "module that rotates, or the family does more to queries and keys after it rotates them "
                "(late_norm=True), or it rotates the other way round."
            )
        layers = "any layer" if len(wrong) == len(self.native) else f"layers {', '.join(map(str, wrong))}"
        why = f" ({type(error).__name__}: {error})" if error is not None else ""
        return (
            f"The adapter says layout={adapter.layout!r} and interleaved_pairs={adapter.interleaved_pairs}, and a "
            f"rotation {'at the scores' if late else 'before the cache'} made so is not that of {name} in "
            f"{layers}{why}. {remedy}"
        )

    def _under(self, scheme: type[Native], adapter: Adapter, layers: list[int] | None) -> Seen:
        """Queries and keys under a scheme in some layers; the model is left as it was."""
        defaults = {"on_existing": "replace", "keep_native": False, "strict": False, "layers": layers}
        given = {**self.patch.arguments, **defaults, "adapter": adapter}
        options = {"theta": 10000.0, "original_max_position_embeddings": LENGTH}
        trial = collect(self.patch.model, scheme, options, given)
        trial.apply()
        try:
            return _run(self.patch.base, adapter, self.inputs)[0]
        finally:
            trial.undo()


def _ours(base: Any, given: dict[str, Any]) -> str:
    """The name of our attention function for the backend that the patch will use."""
    return backend_for(given["backend"] or base.config._attn_implementation).implementation


def _native(base: Any, adapter: Adapter, layer_type: str | None, late: bool, attention: Any) -> type[Native]:
    """A scheme that turns by the frequencies of the model's own rotary module."""
    rotary = getattr(base, str(adapter.rotary))
    prefix = "" if layer_type is None else f"{layer_type}_"
    width = getattr(attention, "qk_head_dim", None) if adapter.folds_scale else None  # None of no attention
    members = {
        "inverse": frequencies_of(rotary, layer_type)[0].detach().float().cpu(),
        "factor": float(getattr(rotary, f"{prefix}attention_scaling", 1.0)),
        "folded": 1.0 if width is None else float(attention.scaling * width**0.5) ** 0.5,
        "late": late,
    }
    return type("Native", (Native,), members)


def _close(found: tuple[Tensor, Tensor], native: tuple[Tensor, Tensor]) -> bool:
    for one, other in zip(found, native, strict=True):
        tolerance = TOLERANCE.get(other.dtype, EXACT) * float(other.float().abs().max())
        if one.shape != other.shape or float((one.float() - other.float()).abs().max()) > tolerance:
            return False
    return True


def _run(
    base: Any, adapter: Adapter, feed: dict[int, Tensor] | None, implementation: str | None = None
) -> tuple[Seen, dict[int, Tensor]]:
    """Queries and keys of each layer in a pass over a few tokens, and the hidden states that the layers were given."""
    seen: Seen = {}
    inputs: dict[int, Tensor] = {}
    ids = torch.arange(1, LENGTH + 1, device=base.device)[None] % base.config.vocab_size
    with torch.no_grad(), _watched(base, adapter, seen, inputs, feed), _named(base.config, implementation):
        base(input_ids=ids, use_cache=False)
    return seen, inputs


@contextmanager
def _named(config: Any, implementation: str | None) -> Iterator[None]:
    """Let an unpatched model call our attention function, which does what Transformers' own does."""
    before = config._attn_implementation_internal
    if implementation is not None:
        vars(config)["_attn_implementation_internal"] = implementation  # not by a model that is being built
    try:
        yield
    finally:
        vars(config)["_attn_implementation_internal"] = before


@contextmanager
def _watched(
    base: Any, adapter: Adapter, seen: Seen, inputs: dict[int, Tensor], feed: dict[int, Tensor] | None
) -> Iterator[None]:
    """Note what each attention is given and what it multiplies; with `feed`, give it that."""
    attentions, handles = adapter.attentions(base), []
    for index, attention in enumerate(attentions):

        def given(_: Any, args: tuple, kwargs: dict[str, Any], index: int = index) -> Any:
            names = [*range(len(args)), *kwargs]
            values = dict(zip(names, (*args, *kwargs.values()), strict=True))
            name = next(n for n, value in values.items() if _is_hidden(value))
            inputs[index] = values[name]
            if feed is not None:
                values[name] = feed[index]
            return tuple(values[n] for n in range(len(args))), {n: values[n] for n in kwargs}

        handles.append(attention.register_forward_pre_hook(given, with_kwargs=True))
        attention.__dict__["pe_seen"] = lambda query, key, index=index: seen.update({index: (query, key)})
    try:
        yield
    finally:
        for attention, handle in zip(attentions, handles, strict=True):
            handle.remove()
            del attention.__dict__["pe_seen"]


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()
