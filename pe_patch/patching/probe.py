"""Check the rotation that an adapter describes, by running the model on a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from ..errors import OptionValueError, PePatchError, UnsupportedError
from ..mla.protocol import converts
from ..mla.streaming import evaluating
from ..schemes.absolute import NoPE
from ..schemes.rotary import Rotary, Rotation
from .build import build
from .patch import Patch, Settings
from .plan import plan
from .targets import device_and_dtype, resolve

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


@dataclass
class Seen:
    """Record the inputs and outputs of the attentions in a run, by layer index."""

    queries_and_keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Queries and keys, each `[batch, heads, tokens, head]`, as the attention multiplies them."""
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Inputs of the attentions, `[batch, tokens, hidden]`."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    """Outputs of the attentions, `[batch, tokens, hidden]`."""


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
        # Without a rotation each layer type keeps its own number of frequencies.
        return (torch.zeros(self.shape.rotary_dim // 2), 1.0) if self.unrotated else (self.inverse, self.factor)

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
    if adapter.rotary is None or adapter.vision_encoder is not None or has_no_values(base):
        return
    trial = RotationTrial.of(patch.model, base, adapter, patch.settings)
    if not trial.native.queries_and_keys:
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
    native: Seen
    """The run of the unpatched model."""

    @classmethod
    def of(cls, model: PreTrainedModel, base: PreTrainedModel, adapter: Adapter, settings: Settings) -> RotationTrial:
        """Run the unpatched model, and return the trial that compares with it.

        Args:
            model: the outer model, unwrapped.
            base: the model that holds the layers.
            adapter: names the layers and their attentions; its rotation is not used.
            settings: the arguments of `patch_model`.
        """
        implementation = our_implementation(base, settings.backend) if adapter.calls_interface else None
        return cls(model, base, settings, run(base, adapter, None, implementation))

    def differing(self, adapter: Adapter, at_scores: bool) -> tuple[list[int], Exception | None]:
        """Return the layers that differ from the native ones, and the error if the model fails to run.

        Queries and keys are compared; at the scores also the outputs, since other parts of an attention may use the
        rotation too.
        """
        if at_scores and (adapter.bars_rotation_at_scores or not adapter.forwards_kwargs):
            return [], None
        base = self.base
        layer_types, attentions = adapter.layer_types(base, base.config), adapter.attentions(base)
        wrong: list[int] = []
        for layer_type in dict.fromkeys(layer_types):
            known = self.native.queries_and_keys
            layers = [i for i, other in enumerate(layer_types) if other == layer_type and i in known]
            if all(adapter.skips_rope(attentions[i]) for i in layers):
                continue
            scheme = native_rotation(base, adapter, layer_type, at_scores, attentions[layers[0]])
            try:
                rotated = self._under(scheme, adapter, None if len(set(layer_types)) == 1 else layers)
            except PePatchError:
                raise
            except Exception as error:  # a layout of another shape raises somewhere in the family's code
                return layers, error
            wrong += [i for i in layers if not self._equal(rotated, i, at_scores)]
        return sorted(wrong), None

    def _equal(self, rotated: Seen, index: int, outputs: bool) -> bool:
        """Return whether one layer computes what it does natively."""
        if index not in rotated.queries_and_keys:
            return False
        pairs = zip(rotated.queries_and_keys[index], self.native.queries_and_keys[index], strict=True)
        if not all(_close(ours, theirs) for ours, theirs in pairs):
            return False
        return not outputs or _close(rotated.outputs[index], self.native.outputs[index], by_column=False)

    def distance(self, adapter: Adapter) -> float:
        """Return how far queries and keys are from the native ones if they are rotated at the scores, summed."""
        layer_type = adapter.layer_types(self.base, self.base.config)[next(iter(self.native.queries_and_keys))]
        attention = next(iter(adapter.attentions(self.base).values()))
        rotated = self._under(native_rotation(self.base, adapter, layer_type, True, attention), adapter, None)
        return sum(
            float((ours.float() - theirs.float()).abs().sum())
            for index, native in self.native.queries_and_keys.items()
            for ours, theirs in zip(rotated.queries_and_keys[index], native, strict=True)
        )

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
            for i in layers:
                both = zip(early.queries_and_keys[i], late.queries_and_keys[i], strict=True)
                wrong += [] if all(_close(ours, theirs) for ours, theirs in both) else [i]
        return sorted(wrong)

    def unrotated(self, adapter: Adapter) -> list[int]:
        """Return the layers whose queries and keys do not change if every frequency is zero."""
        rotated = self._under(without_rotation(self.base, adapter), adapter, None)
        return [i for i in self.native.queries_and_keys if self._equal(rotated, i, False)]

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
        layers = self.in_words(wrong)
        why = f" ({type(error).__name__}: {error})" if error is not None else ""
        return f"{different(adapter, name, layers, at_scores)}{why}. {remedy}"

    def in_words(self, layers: list[int]) -> str:
        """Return layers in words."""
        everywhere = len(layers) == len(self.native.queries_and_keys)
        return "every layer" if everywhere else f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"

    def _under(self, scheme: type[Scheme], adapter: Adapter, layers: list[int] | None) -> Seen:
        """Run the model under a scheme in some layers, with the native inputs of each attention, and restore it."""
        with trial_patch(self.model, scheme, adapter, self.settings, layers):
            return run(self.base, adapter, self.native.inputs)


def different(adapter: Adapter, name: str, layers: str, at_scores: bool) -> str:
    """Return the first sentence of an error, without its full stop: where the rotation of an adapter differs.

    Args:
        adapter: the adapter.
        name: class name of the base model.
        layers: the layers that differ, in words.
        at_scores: whether it rotates at the scores.
    """
    where = "at the scores" if at_scores else "before the cache"
    return (
        f"A rotation {where} with layout={adapter.layout!r} and interleaved_pairs={adapter.interleaved_pairs} differs "
        f"from that of {name} in {layers}"
    )


@contextmanager
def trial_patch(
    model: PreTrainedModel, scheme: type[Scheme], adapter: Adapter, settings: Settings, layers: list[int] | None = None
) -> Iterator[None]:
    """Patch a model for a `with` block, without any check of its adapter.

    Args:
        model: the outer model, unwrapped and unpatched.
        scheme: the scheme to apply.
        adapter: the description of the family.
        settings: the arguments of `patch_model`; backend and submodule are used.
        layers: the layers to patch; None for all.
    """
    rotates = issubclass(scheme, Rotary)
    options: dict[str, Any] = {"theta": 10000.0, "original_max_position_embeddings": LENGTH} if rotates else {}
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


def without_rotation(base: Any, adapter: Adapter) -> type[Scheme]:
    """Return the native rotation with frequencies of zero, or no positions for a family that does not rotate."""
    if adapter.rotary is None:
        return NoPE
    first = next(iter(adapter.attentions(base)))
    native = native_rotation(base, adapter, adapter.layer_types(base, base.config)[first], False, None)
    return type("Unrotated", (native,), {"unrotated": True})


def native_rotation(
    base: Any, adapter: Adapter, layer_type: str | None, at_scores: bool, attention: Any
) -> type[Native]:
    """Return a scheme with the frequencies of the native rotary module."""
    rotary = adapter.rotary_module(base)
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


def _close(ours: Tensor, theirs: Tensor, by_column: bool = True) -> bool:
    """Return whether two tensors `[..., width]` are equal up to rounding.

    Args:
        ours: the tensor to check.
        theirs: the expected one.
        by_column: compare with the largest entry of each column, so that a column with large entries, such as the key
            biases of some models, hides no difference in the others. Otherwise with the largest entry of all.
    """
    if ours.shape != theirs.shape:
        return False
    expected = theirs.float().flatten(0, -2)
    largest = expected.abs().amax(0) if by_column else expected.abs().max()
    allowed = TOLERANCE.get(theirs.dtype, EXACT) * largest
    return bool(((ours.float().flatten(0, -2) - expected).abs().amax(0) <= allowed).all())


def run(base: Any, adapter: Adapter, feed: dict[int, Tensor] | None, implementation: str | None = None) -> Seen:
    """Run a model on a few tokens, and return what its attentions receive and return.

    Args:
        base: the model that holds the layers.
        adapter: the description of its family.
        feed: inputs that replace those of the attentions; None to keep them.
        implementation: name of the attention function to use; None for the current one.
    """
    seen = Seen()
    with (
        torch.no_grad(), evaluating(base), _capturing(base, adapter, seen, feed),
        using_attention(base.config, implementation),
    ):  # fmt: skip
        base(**arguments(base), **without_cache(base))
    return seen


def without_cache(base: Any) -> dict[str, bool]:
    """Return the keyword by which a base model keeps no cache, if it has one."""
    return {"use_cache": False} if compat.cache_argument(type(base).forward) else {}


def has_no_values(base: Any) -> bool:
    """Return whether weights are on the meta device and no hook of accelerate loads them."""
    hooks = (compat.execution_hook(module) for module in base.modules())
    return any(parameter.is_meta for parameter in base.parameters()) and not any(hooks)


def arguments(base: Any) -> dict[str, Tensor]:
    """Return the input ids, the positions if the model takes them, and the mask of a run, each `[1, LENGTH]`.

    On the meta device the mask is `[1, 1, LENGTH, LENGTH]`, since Transformers would look at values to build it.
    """
    positions = torch.tensor([POSITIONS], device=device_and_dtype(base)[0])
    if positions.is_meta:
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=positions.device)
        return {"input_ids": positions, "position_ids": positions, "attention_mask": mask}
    # Without a mask, Transformers takes a gap between positions for the start of another document.
    mask = torch.ones_like(positions)
    size = base.get_input_embeddings().weight.shape[0]
    given = {"input_ids": (positions + 2) % size, "position_ids": positions, "attention_mask": mask}
    names = compat.argument_names(type(base).forward)
    return {name: value for name, value in given.items() if name != "position_ids" or name in names}


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
def _capturing(base: Any, adapter: Adapter, seen: Seen, feed: dict[int, Tensor] | None) -> Iterator[None]:
    """Capture what each attention receives and returns; with `feed`, replace its input."""
    attentions, handles = adapter.attentions(base), []
    for index, attention in attentions.items():

        def replace_input(_: Any, args: tuple, kwargs: dict[str, Any], index: int = index) -> Any:
            names = [*range(len(args)), *kwargs]
            values = dict(zip(names, (*args, *kwargs.values()), strict=True))
            name = next((n for n, value in values.items() if _is_hidden(value)), None)
            if name is None:
                raise UnsupportedError(
                    f"{type(_).__name__} receives no hidden states of the shape [batch, tokens, hidden]."
                )
            seen.inputs[index] = values[name]
            if feed is not None:
                values[name] = feed[index]
            return tuple(values[n] for n in range(len(args))), {n: values[n] for n in kwargs}

        def keep_output(_: Any, __: Any, result: Any, index: int = index) -> None:
            seen.outputs[index] = result[0] if isinstance(result, tuple | list) else result

        handles += [
            attention.register_forward_pre_hook(replace_input, with_kwargs=True),
            attention.register_forward_hook(keep_output),
        ]
        attention.__dict__["pe_seen"] = lambda query, key, index=index: seen.queries_and_keys.update(
            {index: (query, key)}
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in attentions.values():
            attention.__dict__.pop("pe_seen", None)


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()
