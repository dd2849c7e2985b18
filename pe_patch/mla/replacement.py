"""The swaps that replace an attention's projections by a scheme's module, and the forward that calls this module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import compat
from ..adapters import Adapter
from ..core.scheme import Scheme
from ..core.swaps import Removal, Swap, bind
from ..errors import UnsupportedError
from .native import NativeHeads, keep_latents
from .protocol import ProjectionScheme


@dataclass(frozen=True)
class ReplacedForward:
    """The forward of an attention whose projections a scheme replaces.

    The scheme's module is called as `module(hidden, cos, sin)`, and returns queries and the two tensors to cache. The
    scheme's `attend` computes the attention.
    """

    child: str
    """Attribute of the scheme's module."""
    output: str
    """Attribute of the output projection."""
    layout: str
    """How the family lays out cos and sin: "halves" or "interleaved"."""
    scale: float
    """Factor on the softmax scale."""
    residual_dropout: str | None
    """Attribute of the attention with the dropout probability of its output; None if the family has none."""
    arguments: tuple[str, ...]
    """Names of the native forward's positional arguments."""
    __name__ = "latent forward"

    def __call__(self, attention: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        kwargs |= dict(zip(self.arguments, args, strict=False))
        hidden, mask = kwargs.pop("hidden_states"), kwargs.pop("attention_mask", None)
        cos, sin = (HALF[self.layout](table) for table in kwargs.pop("position_embeddings"))
        cache = compat.take_cache(kwargs, "cache", f"{type(attention).__name__}.forward")
        kwargs.pop("cache", None)
        query, key, value = getattr(attention, self.child)(hidden, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS[compat.attention_implementation(attention.config)]
        dropout = attention.attention_dropout if attention.training else 0.0
        output, weights = function(
            attention, query, key, value, mask, scaling=attention.scaling * self.scale, dropout=dropout, **kwargs
        )
        output = getattr(attention, self.output)(output.reshape(*hidden.shape[:-1], -1).contiguous())
        if self.residual_dropout is not None:
            probability = getattr(attention, self.residual_dropout)
            output = nn.functional.dropout(output, probability, attention.training)
        return output, weights


HALF: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda table: table[..., : table.shape[-1] // 2],
    "interleaved": lambda table: table[..., ::2],
}
"""Functions that reduce cos or sin in each layout to one value for each frequency, `[..., rotary_dim / 2]`."""


class FrozenOriginal(nn.Module):
    """The weights of a replaced module, under their names.

    It has no forward and another class than the module, so that other libraries do not treat it as a layer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=compat.is_persistent(module, name))
        for name, child in module.named_children():
            self.add_module(name, FrozenOriginal(child))


def replaced_names(attention: nn.Module, adapter: Adapter) -> list[str]:
    """Return the names of the submodules of an attention that a scheme's module replaces."""
    assert adapter.projections is not None
    names = [*adapter.projections.taken, *(adapter.projections.norms or ())]
    return [name for name in names if isinstance(getattr(attention, name, None), nn.Module)]


def replacement_swaps(
    attentions: dict[int, Any],
    adapter: Adapter,
    scheme: Scheme,
    modules: dict[int, nn.Module],
    arguments: tuple[str, ...],
) -> tuple[list[Swap], dict[str, nn.Module]]:
    """Return the swaps that replace projections by `modules`, and the replaced weights by name.

    Args:
        attentions: the attention modules by layer index.
        adapter: the adapter of the family.
        scheme: the scheme, which names the attribute of the new module.
        modules: the new module of each converted layer.
        arguments: names of the native forward's positional arguments.
    """
    swaps: list[Swap] = []
    original: dict[str, nn.Module] = {}
    assert adapter.projections is not None
    for index, module in modules.items():
        attention, names = attentions[index], adapter.projections
        replaced = {name: getattr(attention, name) for name in replaced_names(attention, adapter)}
        module.train(attention.training)
        module.requires_grad_(any(p.requires_grad for child in replaced.values() for p in child.parameters()))
        for name, child in replaced.items():
            original[f"layers_{index}_{name}"] = FrozenOriginal(child)
            swaps.append(Removal.of(attention, name))
        swaps.append(Swap.of(attention, scheme.name, module))
        groups = getattr(module, "groups", None)
        if groups not in (None, getattr(attention, "num_key_value_groups", None)):
            swaps.append(Swap.of(attention, "num_key_value_groups", groups, direct=True))
        forward = ReplacedForward(
            scheme.name,
            names.output,
            adapter.layout,
            cast(ProjectionScheme, scheme).softmax_rescale,
            names.residual_dropout,
            arguments,
        )
        swaps.append(bind(attention, "forward", forward))
    return swaps, original


def skip_static_cache_allocation(model: Any, inner: Callable[..., Any], *_: Any, **__: Any) -> None:
    """Do nothing, in place of the method by which `generate` allocates a static cache early.

    That method takes the shape from the config's heads. Without it, the cache takes its shape from the first pass.
    """
    return None


def native_latent_swaps(attentions: dict[int, Any], scheme: Scheme) -> list[Swap]:
    """Return the swaps by which natively latent layers pass their cached tensors on without expanding them.

    Raises:
        UnsupportedError: a layer has no `expand_kv`.
    """
    swaps = []
    for index, attention in attentions.items():
        if not hasattr(type(attention), "expand_kv"):
            raise UnsupportedError(
                f"Layer {index} ({type(attention).__name__}) has latent attention without an expand_kv method to "
                f"replace, so {scheme.name!r} would have no effect there."
            )
        swaps.append(Swap.of(attention, scheme.name, NativeHeads(attention).train(attention.training)))
        swaps.append(bind(attention, "expand_kv", keep_latents))
    return swaps
