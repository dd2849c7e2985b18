"""Check the rotation that an adapter describes, by running the model on a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import compat
from ..adapters import Adapter
from ..adapters.adapter import frequencies_of
from ..adapters.check import LAYOUTS
from ..attention.interface import backend_for
from ..core.scheme import Scheme
from ..errors import OptionValueError, PePatchError
from ..mla.protocol import converts
from ..mla.streaming import evaluating
from ..schemes.rotary import Rotary, Rotation
from .build import build
from .patch import Patch, Settings
from .plan import plan
from .targets import resolve

logger = logging.getLogger("pe_patch")

POSITIONS = (0, 1, 3, 4, 7, 12)
"""Positions of the tokens in a run. They have gaps, so that a model that counts by itself differs."""
LENGTH = len(POSITIONS)
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest allowed difference from the native queries and keys, relative to the largest entry of a layer.

Other dtypes use `EXACT`.
"""
EXACT = 1e-4
FACTOR = 1.25
"""Factor on cos and sin in the search for a norm after the rotation."""

QueriesAndKeys = dict[int, tuple[Tensor, Tensor]]
"""Queries and keys of each layer, `[batch, heads, tokens, head]`, as its attention multiplies them."""


class Native(Rotary):
    """The model's native rotation, computed by this library before the cache or at the scores."""

    name = "native rotation"
    inverse: ClassVar[Tensor]
    """Inverse frequencies of the built module, `[rotary_dim / 2]`."""
    factor: ClassVar[float]
    """Factor on cos and sin."""
    scale_factor: ClassVar[float]
    """Factor on the softmax scale; the scale contains its square."""
    at_scores: ClassVar[bool]
    """Rotate at the scores rather than before the cache."""
    unrotated: ClassVar[bool] = False
    """Use frequencies of zero, to find the layers that do not rotate."""

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        return (torch.zeros_like(self.inverse), 1.0) if self.unrotated else (self.inverse, self.factor)

    @property
    def length_dependent(self) -> bool:
        return self.at_scores

    @property
    def effective_window(self) -> int | None:
        return None

    @property
    def softmax_factor(self) -> float:
        return self.scale_factor


def check_rotation(patch: Patch) -> None:
    """Check that the rotation which the user's adapter describes is the model's own.

    The library first rotates in place of the rotary module, which tests `layout`. Then it rotates at the scores, which
    also tests `interleaved_pairs`, `rotates` and the order of rotation and norm. Each layer gets the inputs of the
    unpatched model, so that only the rotation can differ. If a scheme does not rotate at the scores, a difference there
    is only logged.

    Raises:
        OptionValueError: queries or keys differ from the native ones.
    """
    base, adapter = patch.base, patch.adapter
    if adapter.rotary is None or adapter.vision_encoder is not None or any(p.is_meta for p in base.parameters()):
        return
    trial = RotationTrial.of(patch.model, base, adapter, patch.settings)
    if not trial.native:
        return  # no attention calls the interface; the patch itself raises for that
    error: Exception | None = None
    for at_scores in (False, True):
        wrong, error = trial.differing(adapter, at_scores)
        if wrong:
            break
    else:
        return
    fitting = trial.fitting(adapter)
    message = trial.message(adapter, wrong, error, at_scores, fitting)
    if not at_scores or any(_needs_pairs(scheme) for scheme in patch.scheme_by_layer.values()):
        raise OptionValueError(message) from error
    if fitting is not None:
        logger.warning("%s Schemes that rotate at the scores would be refused.", message)


def _needs_pairs(scheme: Scheme) -> bool:
    """Return whether a scheme needs to know which dimensions the family pairs."""
    return converts(scheme) or (isinstance(scheme, Rotation) and not scheme.rotates_early)


@dataclass
class RotationTrial:
    """Compare runs of a model under its native rotation, as adapters describe it, with the unpatched model."""

    model: PreTrainedModel
    """The outer model, unwrapped."""
    base: PreTrainedModel
    """The model that holds the layers."""
    settings: Settings
    """The arguments of `patch_model`; backend and submodule are used."""
    native: QueriesAndKeys
    """Queries and keys of the unpatched model."""
    inputs: dict[int, Tensor]
    """Inputs of each attention in the unpatched model, `[batch, tokens, hidden]`."""

    @classmethod
    def of(cls, model: PreTrainedModel, base: PreTrainedModel, adapter: Adapter, settings: Settings) -> RotationTrial:
        """Run the unpatched model, and return the trial that compares with it.

        Args:
            model: the outer model, unwrapped.
            base: the model that holds the layers.
            adapter: names the layers and their attentions; its rotation is not used.
            settings: the arguments of `patch_model`.
        """
        implementation = our_implementation(base, settings.backend)
        return cls(model, base, settings, *_run(base, adapter, feed=None, implementation=implementation))

    def differing(self, adapter: Adapter, at_scores: bool) -> tuple[list[int], Exception | None]:
        """Return the layers whose queries or keys differ from the native ones, and the error if the model fails to
        run."""
        if at_scores and (adapter.bars_rotation_at_scores or not adapter.forwards_kwargs):
            return [], None
        base = self.base
        layer_types, attentions = adapter.layer_types(base, base.config), adapter.attentions(base)
        wrong: list[int] = []
        for layer_type in dict.fromkeys(layer_types):
            layers = [i for i, other in enumerate(layer_types) if other == layer_type and i in self.native]
            if all(adapter.skips_rope(attentions[i]) for i in layers):
                continue
            scheme = native_rotation(base, adapter, layer_type, at_scores, attentions[layers[0]])
            try:
                rotated = self._under(scheme, adapter, None if len(set(layer_types)) == 1 else layers)
            except PePatchError:
                raise
            except Exception as error:  # a layout of another shape raises somewhere in the family's code
                return layers, error
            wrong += [i for i in layers if i not in rotated or not _close(rotated[i], self.native[i])]
        return sorted(wrong), None

    def normalised(self, adapter: Adapter) -> list[int]:
        """Return the layers in which something after the rotation undoes a factor on cos and sin, such as a norm."""
        base, attentions = self.base, adapter.attentions(self.base)
        wrong: list[int] = []
        if adapter.bars_rotation_at_scores or not adapter.forwards_kwargs:
            return wrong
        layer_types = adapter.layer_types(base, base.config)
        for layer_type in dict.fromkeys(layer_types[index] for index in attentions):
            layers = [i for i in attentions if layer_types[i] == layer_type and not adapter.skips_rope(attentions[i])]
            if not layers:
                continue
            chosen = None if len(set(layer_types)) == 1 else layers
            early, late = (
                self._under(type("Stretched", (scheme,), {"factor": FACTOR * scheme.factor}), adapter, chosen)
                for scheme in (
                    native_rotation(base, adapter, layer_type, at_scores, attentions[layers[0]])
                    for at_scores in (False, True)
                )
            )
            wrong += [i for i in layers if not _close(early[i], late[i])]
        return sorted(wrong)

    def unrotated(self, adapter: Adapter) -> list[int]:
        """Return the layers whose queries and keys do not change if every frequency is zero."""
        rotated = self._under(without_rotation(self.base, adapter), adapter, None)
        return [i for i, native in self.native.items() if i in rotated and _close(rotated[i], native)]

    def fitting(self, adapter: Adapter) -> str | None:
        """Return the adapter fields with which its rotation equals the model's, or None if no layout and pairing
        fits."""
        for layout, pairs in product(LAYOUTS, (False, True)):
            if (layout, pairs) == (adapter.layout, adapter.interleaved_pairs):
                continue
            other = replace(adapter, layout=layout, interleaved_pairs=pairs)
            if not any(self.differing(other, at_scores)[0] for at_scores in (False, True)):
                fields = [f"layout={layout!r}"] if layout != adapter.layout else []
                fields += [f"interleaved_pairs={pairs}"] if pairs != adapter.interleaved_pairs else []
                return ", ".join(fields)
        return None

    def message(
        self, adapter: Adapter, wrong: list[int], error: Exception | None, at_scores: bool, fitting: str | None
    ) -> str:
        """Return the message of the error: the wrong fields of the adapter, and what to write instead."""
        name = type(self.base).__name__
        unrotated = [] if fitting is not None or not at_scores else [i for i in wrong if i in self.unrotated(adapter)]
        if fitting is not None:
            remedy = f"Adapter({fitting}) fits."
        elif unrotated:
            remedy = (
                f"Layers {', '.join(map(str, unrotated))} do not rotate at all: give rotates=<the attribute of an "
                "attention that says whether it rotates, or a function of the attention>."
            )
        else:
            remedy = (
                f"No other layout= ({', '.join(LAYOUTS)}) or interleaved_pairs= fits. Either `rotary` is not the "
                "module that rotates, or the family does more to queries and keys after it rotates them "
                "(weighted_norm_after_rotation=True), or it rotates the other way round."
            )
        layers = "any layer" if len(wrong) == len(self.native) else f"layers {', '.join(map(str, wrong))}"
        why = f" ({type(error).__name__}: {error})" if error is not None else ""
        return (
            f"The adapter says layout={adapter.layout!r} and interleaved_pairs={adapter.interleaved_pairs}, and a "
            f"rotation {'at the scores' if at_scores else 'before the cache'} made so is not that of {name} in "
            f"{layers}{why}. {remedy}"
        )

    def _under(self, scheme: type[Native], adapter: Adapter, layers: list[int] | None) -> QueriesAndKeys:
        """Return queries and keys under a scheme in some layers, and restore the model."""
        with trial_patch(self.model, scheme, adapter, self.settings, layers):
            return _run(self.base, adapter, self.inputs)[0]


@contextmanager
def trial_patch(
    model: PreTrainedModel, scheme: type[Native], adapter: Adapter, settings: Settings, layers: list[int] | None = None
) -> Iterator[None]:
    """Patch a model for a `with` block, without any check of its adapter.

    Args:
        model: the outer model, unwrapped and unpatched.
        scheme: the scheme to apply.
        adapter: the description of the family.
        settings: the arguments of `patch_model`; backend and submodule are used.
        layers: the layers to patch; None for all.
    """
    options = {"theta": 10000.0, "original_max_position_embeddings": LENGTH}
    target = resolve(model, adapter, layers, settings.submodule)
    tried = Settings("replace", settings.backend, adapter, layers, settings.submodule)
    trial = plan(target, *build(scheme, options, target, "replace"), tried)
    trial.apply()
    try:
        yield
    finally:
        trial.undo()


def our_implementation(base: Any, backend: str | None) -> str:
    """Return the name of this library's attention function for a backend; None takes the model's implementation."""
    return backend_for(backend or compat.attention_implementation(base.config)).implementation


def without_rotation(base: Any, adapter: Adapter) -> type[Native]:
    """Return the native rotation with frequencies of zero."""
    first = next(iter(adapter.attentions(base)))
    native = native_rotation(base, adapter, adapter.layer_types(base, base.config)[first], False, None)
    return type("Unrotated", (native,), {"unrotated": True})


def native_rotation(
    base: Any, adapter: Adapter, layer_type: str | None, at_scores: bool, attention: Any
) -> type[Native]:
    """Return a scheme with the frequencies of the native rotary module."""
    rotary = getattr(base, str(adapter.rotary))
    prefix = "" if layer_type is None else f"{layer_type}_"
    # None without an attention
    width = getattr(attention, "qk_head_dim", None) if adapter.scaling_includes_mscale else None
    members = {
        "inverse": frequencies_of(rotary, layer_type)[0].detach().float().cpu(),
        "factor": float(getattr(rotary, f"{prefix}attention_scaling", 1.0)),
        "scale_factor": 1.0 if width is None else float(attention.scaling * width**0.5) ** 0.5,
        "at_scores": at_scores,
    }
    return type("Native", (Native,), members)


def _close(computed: tuple[Tensor, Tensor], native: tuple[Tensor, Tensor]) -> bool:
    for ours, theirs in zip(computed, native, strict=True):
        tolerance = TOLERANCE.get(theirs.dtype, EXACT) * float(theirs.float().abs().max())
        if ours.shape != theirs.shape or float((ours.float() - theirs.float()).abs().max()) > tolerance:
            return False
    return True


def _run(
    base: Any, adapter: Adapter, feed: dict[int, Tensor] | None, implementation: str | None = None
) -> tuple[QueriesAndKeys, dict[int, Tensor]]:
    """Return queries and keys of each layer in a pass over a few tokens, and the inputs of the attentions.

    Args:
        base: the model that holds the layers.
        adapter: the description of its family.
        feed: inputs that replace those of the attentions; None to keep them.
        implementation: name of the attention function to use; None for the current one.
    """
    seen: QueriesAndKeys = {}
    inputs: dict[int, Tensor] = {}
    with (
        torch.no_grad(), evaluating(base), capturing(base, adapter, seen, inputs, feed),
        using_attention(base.config, implementation),
    ):  # fmt: skip
        base(**arguments(base), use_cache=False)
    return seen, inputs


def arguments(base: Any) -> dict[str, Tensor]:
    """Return the input ids, the positions and the mask of a run, each `[1, LENGTH]`.

    On the meta device the mask is `[1, 1, LENGTH, LENGTH]`, since Transformers would look at values to build it.
    """
    positions = torch.tensor([POSITIONS], device=base.device)
    if positions.is_meta:
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=positions.device)
        return {"input_ids": positions, "position_ids": positions, "attention_mask": mask}
    # Without a mask, Transformers takes a gap between positions for the start of another document.
    mask = torch.ones_like(positions)
    return {"input_ids": (positions + 1) % base.config.vocab_size, "position_ids": positions, "attention_mask": mask}


@contextmanager
def using_attention(config: Any, implementation: str | None) -> Iterator[None]:
    """Make an unpatched model call this library's attention function, which then computes what Transformers' does."""
    before = compat.attention_implementation(config)
    if implementation is not None:
        compat.store_implementation(config, implementation)  # setattr is for models under construction
    try:
        yield
    finally:
        compat.store_implementation(config, before)


@contextmanager
def capturing(
    base: Any, adapter: Adapter, seen: QueriesAndKeys, inputs: dict[int, Tensor], feed: dict[int, Tensor] | None
) -> Iterator[None]:
    """Capture the inputs of each attention, and its queries and keys; with `feed`, replace the inputs."""
    attentions, handles = adapter.attentions(base), []
    for index, attention in attentions.items():

        def replace_input(_: Any, args: tuple, kwargs: dict[str, Any], index: int = index) -> Any:
            names = [*range(len(args)), *kwargs]
            values = dict(zip(names, (*args, *kwargs.values()), strict=True))
            name = next(n for n, value in values.items() if _is_hidden(value))
            inputs[index] = values[name]
            if feed is not None:
                values[name] = feed[index]
            return tuple(values[n] for n in range(len(args))), {n: values[n] for n in kwargs}

        handles.append(attention.register_forward_pre_hook(replace_input, with_kwargs=True))
        attention.__dict__["pe_seen"] = lambda query, key, index=index: seen.update({index: (query, key)})
    try:
        yield
    finally:
        for attention, handle in zip(attentions.values(), handles, strict=True):
            handle.remove()
            del attention.__dict__["pe_seen"]


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()
