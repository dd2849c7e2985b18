"""Train a patched model with LongLoRA's shifted sparse attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from .. import compat
from ..attention.backends import Backend, Output, backend_for
from ..attention.engine import Engine
from ..attention.kernels.shifted import shifted
from ..core.swaps import Swap, apply_all, do_or_repeat, undo_all
from ..errors import OptionError, PePatchError, UnsupportedError, quoted
from ..mla.protocol import converts
from ..patching.api import find_patch
from ..patching.patch import Patch

SLICED = ("sdpa", "eager")
"""Backends whose masks are tensors that can be sliced by group."""
REMEDY = "train with full attention (leave shifted_groups out)"


@dataclass(frozen=True)
class Shift:
    """Shifted attention of one layer, in training mode. Positions must already be in queries and keys."""

    groups: int
    heads: int

    def __call__(self, engine: Engine, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Output:
        if not engine.module.training:
            return engine.native_attention(query, key, value, mask)
        self._check(engine, query, key, mask)
        if key.shape[1] % 2:  # otherwise the two halves would share a key head
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
            engine = replace(engine, module=cast(Any, _Ungrouped(engine.module)))

        def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return replace(engine, mask=mask).native_attention(query, key, value, mask)[0]

        return shifted(attention, query, key, value, mask, self.groups), None

    def _check(self, engine: Engine, query: Tensor, key: Tensor, mask: Any) -> None:
        name, length = type(engine.module).__name__, query.shape[2]
        _check_backend(engine.backend)
        if query.shape[1] != self.heads:
            raise UnsupportedError(
                f"Shifted attention shifts half of {self.heads} heads, but {name} received {query.shape[1]}: it does "
                f"not support heads spread over processes (Ulysses, tensor parallelism); {REMEDY}."
            )
        if key.shape[2] != length:
            raise UnsupportedError(
                f"Shifted attention needs whole sequences, but {name} has {key.shape[2]} keys for {length} queries. "
                "Train with use_cache=False, or call model.eval()."
            )
        if length % (2 * self.groups):
            raise UnsupportedError(
                f"A sequence of {length} tokens cannot be cut into {self.groups} groups of an even size; give a length "
                f"that is a multiple of {2 * self.groups}."
            )
        if engine.extra.get("sliding_window") is not None or engine.extra.get("s_aux") is not None:
            raise UnsupportedError(
                f"{name} has a sliding window or sinks, which shifted attention would drop; {REMEDY}."
            )
        if not engine.causal or (mask is not None and mask.shape[1] != 1):
            raise UnsupportedError(
                f"{name} is not causal or has a mask per head; shifted attention is causal; {REMEDY}."
            )


class _Ungrouped:
    """A layer with one key head for each query head, as its attention function sees it."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def shift_attention(model: Any, groups: int) -> Any:
    """Train a patched model with shifted sparse attention.

    In training mode each token attends within its group, and half of the heads use groups shifted by half a group. In
    evaluation mode attention is full. Saving the model does not save this; `unshift_attention` and `unpatch_model`
    remove it, and another `patch_model` starts without it.

    Args:
        model: a model patched by `patch_model`; changed in place.
        groups: number of groups in a sequence, at least 2. Sequences must be a multiple of 2 `groups` tokens long.

    Returns:
        The model.

    Raises:
        OptionError: `groups` or the number of heads does not work.
        UnsupportedError: the scheme acts on the scores, or attention is not plain causal attention.

    Source: LongLoRA, arXiv 2309.12307, section 3.2.
    """
    patch = find_patch(model)
    if patch is None:
        raise PePatchError(
            "This model is not patched. Call patch_model(model, 'linear', factor=...) first, or use 'rope' to keep its "
            "positions."
        )
    heads = patch.shape.num_heads
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 2:
        raise OptionError(f"groups={quoted(groups)}: give a whole number of at least 2; 1 is full attention.")
    if heads % 2:
        raise OptionError(
            f"Shifted attention needs an even number of heads; {patch.base.config.model_type} has {heads}; {REMEDY}."
        )
    attentions = patch.adapter.attentions(patch.base)
    _check_backend(backend_for(compat.attention_implementation(patch.base.config)))
    _check_layers(patch, attentions)
    if any("pe_shift" in attention.__dict__ for attention in attentions.values()):
        unshift_attention(model)
    swaps = [Swap.of(attention, "pe_shift", Shift(groups, heads), direct=True) for attention in attentions.values()]
    try:
        patch.swaps = [*patch.swaps, *swaps]
        apply_all(swaps)
    except BaseException:
        _remove(patch, swaps)
        raise
    return model


def unshift_attention(model: Any) -> Any:
    """Undo `shift_attention` and return the model. The patch stays."""
    patch = find_patch(model)
    ours = [] if patch is None else [swap for swap in patch.swaps if swap.attribute == "pe_shift"]
    if patch is None or not ours:
        raise PePatchError("The attention of this model is not shifted.")
    do_or_repeat(lambda: _remove(patch, ours))
    return model


def _remove(patch: Patch, swaps: list[Swap]) -> None:
    undo_all(swaps)
    patch.swaps = [swap for swap in patch.swaps if not any(swap is removed for removed in swaps)]


def _check_backend(backend: Backend) -> None:
    if backend.name not in SLICED:
        raise UnsupportedError(
            f"Shifted attention slices the mask into groups, which {backend.name} does not allow. Call "
            "model.set_attn_implementation('sdpa'), which without a mask runs the same kernels on a GPU."
        )


def _check_layers(patch: Any, attentions: dict[int, Any]) -> None:
    """Raise unless each layer attends plainly to queries and keys that already contain their positions."""
    config, name = patch.base.config, patch.base.config.model_type
    if patch.adapter.vision_encoder is not None:
        raise UnsupportedError(f"{name} reads images; shifted attention supports causal language models.")
    if converts(patch.scheme) or patch.shape.latent_rank:
        raise UnsupportedError(
            f"The layers of {name} attend to latents, which shifted attention does not support; {REMEDY}."
        )
    for index, attention in attentions.items():
        scheme = attention.__dict__["pe_scheme"]
        if scheme is not None:
            under = "" if scheme.name == patch.scheme.name else f" under {patch.scheme.name!r}"
            raise UnsupportedError(
                f"{scheme.name!r}{under} acts on the scores of layer {index} of {name}, where groups would hide keys "
                "that it needs. Shifted attention takes schemes that act before the scores (a static rotation such as "
                f"'linear', 'ntk' or 'yarn'; 'nope'; absolute positions); or {REMEDY}."
            )
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [layer for layer in attentions.values() if getattr(layer, "sliding_window", None) is not None]
    if (
        layer_types != {"full_attention"}
        or windows
        or any(getattr(layer, "sinks", None) is not None for layer in attentions.values())
    ):
        raise UnsupportedError(
            f"{name} has layers with a sliding window, chunks or sinks, which shifted attention would drop; {REMEDY}."
        )
