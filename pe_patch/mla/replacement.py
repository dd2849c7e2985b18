"""An attention whose projections a scheme replaces: what is swapped, and the forward that stands there then."""

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
    """The forward of an attention that projects through the module a scheme has put in: `module(hidden, cos, sin)`
    gives queries and the two tensors to cache, and the scheme's `attend` what follows."""

    child: str
    output: str
    layout: str
    scale: float
    """What the softmax scale is multiplied by."""
    residual_dropout: str | None
    arguments: tuple[str, ...]
    """Names of the native forward's positional arguments."""
    __name__ = "latent forward"

    def __call__(self, attention: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        kwargs |= dict(zip(self.arguments, args, strict=False))
        hidden, mask = kwargs.pop("hidden_states"), kwargs.pop("attention_mask", None)
        cos, sin = (HALF[self.layout](one) for one in kwargs.pop("position_embeddings"))
        cache = compat.take_cache(kwargs, "cache", f"{type(attention).__name__}.forward")
        kwargs.pop("cache", None)
        query, key, value = getattr(attention, self.child)(hidden, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        dropout = attention.attention_dropout if attention.training else 0.0
        output, weights = function(
            attention, query, key, value, mask, scaling=attention.scaling * self.scale, dropout=dropout, **kwargs
        )
        output = getattr(attention, self.output)(output.reshape(*hidden.shape[:-1], -1).contiguous())
        if self.residual_dropout is not None:
            share = getattr(attention, self.residual_dropout)
            output = nn.functional.dropout(output, share, attention.training)
        return output, weights


HALF: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda table: table[..., : table.shape[-1] // 2],
    "interleaved": lambda table: table[..., ::2],
}
"""One number for each frequency, out of cos or sin as a family lays them out."""


class Kept(nn.Module):
    """The weights of a module that is out of use, by their names; not itself, so that nothing takes it for a layer."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        for name, parameter in of.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in of.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in of._non_persistent_buffers_set)
        for name, child in of.named_children():
            self.add_module(name, Kept(child))


def taken_names(attention: nn.Module, adapter: Adapter) -> list[str]:
    """The modules of an attention whose work a replacement does."""
    assert adapter.projections is not None
    names = [*adapter.projections.taken, *(adapter.projections.norms or ())]
    return [name for name in names if isinstance(getattr(attention, name, None), nn.Module)]


def replacement_swaps(
    attentions: list[Any], adapter: Adapter, scheme: Scheme, modules: dict[int, nn.Module], arguments: tuple[str, ...]
) -> tuple[list[Swap], dict[str, nn.Module]]:
    """The swaps that put `modules` in the place of projections, and what they replace, by name."""
    swaps: list[Swap] = []
    original: dict[str, nn.Module] = {}
    assert adapter.projections is not None
    for index, module in modules.items():
        attention, names = attentions[index], adapter.projections
        old = {name: getattr(attention, name) for name in taken_names(attention, adapter)}
        module.train(attention.training)
        module.requires_grad_(any(p.requires_grad for one in old.values() for p in one.parameters()))
        for name, one in old.items():
            original[f"layers_{index}_{name}"] = Kept(one)
            swaps.append(Removal.of(attention, name))
        swaps.append(Swap.of(attention, scheme.name, module))
        groups = getattr(module, "groups", None)
        if groups not in (None, getattr(attention, "num_key_value_groups", None)):
            swaps.append(Swap.of(attention, "num_key_value_groups", groups, direct=True))
        forward = ReplacedForward(
            scheme.name,
            names.output,
            adapter.layout,
            cast(ProjectionScheme, scheme).rescaling,
            names.residual_dropout,
            arguments,
        )
        swaps.append(bind(attention, "forward", forward))
    return swaps, original


def no_early_cache(head: Any, inner: Callable[..., Any], *_: Any, **__: Any) -> None:
    """Stands before what `generate` sizes a static cache by, which are the config's heads: the cache finds its shape in
    the first pass instead."""
    return None


def native_latent_swaps(attentions: dict[int, Any], scheme: Scheme) -> list[Swap]:
    """The swaps by which layers that hold latents hand them to the attention function as they are cached."""
    swaps = []
    for index, attention in attentions.items():
        if not hasattr(type(attention), "expand_kv"):
            raise UnsupportedError(
                f"Layer {index} ({type(attention).__name__}) holds latents but has no expand_kv to take over, so "
                f"{scheme.name!r} would have no effect there."
            )
        swaps.append(Swap.of(attention, scheme.name, NativeHeads(attention).train(attention.training)))
        swaps.append(bind(attention, "expand_kv", keep_latents))
    return swaps
