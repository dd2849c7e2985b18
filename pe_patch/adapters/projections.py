"""How the attention of a family projects queries, keys and values, and the weights it does that with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.projections import Projections
from ..core.scheme import AttentionShape
from ..errors import UnsupportedError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LoadedLinear = tuple[Tensor, Tensor | None]
"""Weight `[rows, hidden]` and bias `[rows]`."""


@dataclass(frozen=True)
class ProjectionNames:
    """What an attention calls its modules, all of which compute what Llama's do."""

    output: str = "o_proj"
    """The linear layer after the attention, which stays as it is."""
    norms: tuple[str, str] | None = None
    """Modules that normalise each head of the queries and of the keys before they rotate; where they are not there, the
    model does not normalise."""
    residual_dropout: str | None = None
    """Attribute of the attention with the share of its output that training drops."""

    @property
    def taken(self) -> tuple[str, ...]:
        """The modules whose place latents take, without the norms."""
        raise NotImplementedError

    def parts(self, attention: nn.Module, shape: AttentionShape, empty: bool) -> list[LoadedLinear]:
        """Weight and bias of the queries, the keys and the values."""
        raise NotImplementedError

    def read(self, attention: nn.Module, shape: AttentionShape, empty: bool = False) -> Projections:
        """The weights of one attention, as views where the family keeps each projection in one piece; of an `empty`
        model, sizes are all there is to read."""
        check_unquantised(attention)
        (query, query_bias), (key, key_bias), (value, value_bias) = self.parts(attention, shape, empty)
        query_norm, key_norm = (getattr(attention, name, None) for name in self.norms or ("", ""))
        return Projections(
            query=query,
            key=key,
            value=value,
            query_bias=query_bias,
            key_bias=key_bias,
            value_bias=value_bias,
            heads=shape.num_heads,
            kv_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            rotary_dim=shape.rotary_dim,
            interleaved=shape.interleaved,
            query_norm=query_norm,
            key_norm=key_norm,
        )


@dataclass(frozen=True)
class Separate(ProjectionNames):
    """A linear layer for each of queries, keys and values, whose rows are head after head."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"

    @property
    def taken(self) -> tuple[str, ...]:
        return self.query, self.key, self.value

    def parts(self, attention: nn.Module, shape: AttentionShape, empty: bool) -> list[LoadedLinear]:
        heads = (shape.num_heads, shape.num_key_value_heads, shape.num_key_value_heads)
        rows = [count * shape.head_dim for count in heads]
        return [linear(attention, name, count, empty) for name, count in zip(self.taken, rows, strict=True)]


@dataclass(frozen=True)
class Fused(ProjectionNames):
    """One linear layer for all three, whose rows are [all queries | all keys | all values]."""

    module: str = "qkv_proj"
    per_head: bool = False
    """The rows are [query | key | value] of the first head, then of the second."""

    @property
    def taken(self) -> tuple[str, ...]:
        return (self.module,)

    def parts(self, attention: nn.Module, shape: AttentionShape, empty: bool) -> list[LoadedLinear]:
        counts = (shape.num_heads, shape.num_key_value_heads, shape.num_key_value_heads)
        weight, bias = linear(attention, self.module, sum(counts) * shape.head_dim, empty)

        def cut(rows: Tensor) -> tuple[Tensor, ...]:
            if not self.per_head:
                return rows.split([count * shape.head_dim for count in counts])
            apart = rows.view(shape.num_heads, 3, shape.head_dim, *rows.shape[1:])
            return tuple(apart[:, part].flatten(0, 1) for part in range(3))

        biases = (None, None, None) if bias is None else cut(bias)
        return list(zip(cut(weight), biases, strict=True))


UNQUANTISED = "load the model unquantised, convert it, and quantise the result"


def check_unquantised(module: Any) -> None:
    """Raise where the config of a model or of one of its attentions says that it was loaded quantised."""
    found = getattr(getattr(module, "config", None), "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise UnsupportedError(
        f"{type(module).__name__} belongs to a model that was loaded quantised ({getattr(method, 'value', method)}), "
        f"whose weights cannot be read as numbers: {UNQUANTISED}."
    )


def linear(attention: nn.Module, name: str, rows: int, empty: bool = False) -> LoadedLinear:
    """Weight and bias of one projection, detached; an error that names it where it is not a plain linear layer."""
    module = getattr(attention, name, None)
    layer = getattr(attention, "layer_idx", None)
    place = f"{name} of {type(attention).__name__}" + (f" in layer {layer}" if layer is not None else "")
    if module is None:
        raise UnsupportedError(
            f"There is no {name}: {type(attention).__name__} is not the attention of this family as Transformers "
            "builds it; convert the model before anything else replaces its projections."
        )
    for applies, why in OBSTACLES:
        if applies(module) and not (empty and applies is _is_away):
            kind = f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
            raise UnsupportedError(f"{place} is {kind}, {why(module)}.")
    weight, bias = module.weight.detach(), module.bias
    if weight.shape[0] != rows:
        raise UnsupportedError(
            f"{place} has {weight.shape[0]} rows where the config's heads make {rows}; a model whose heads were pruned "
            "or are shared out over processes cannot be converted."
        )
    return weight, None if bias is None else bias.detach()


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer")


def _is_special(module: nn.Module) -> bool:
    """Subclasses of nn.Linear hold quantised weights (bitsandbytes, fp8) or compute something else."""
    weight = getattr(module, "weight", None)
    return type(module) is not nn.Linear or not isinstance(weight, Tensor) or weight.dtype not in DTYPES


def _is_wrapped(module: nn.Module) -> bool:
    """torchao keeps nn.Linear and quantises in a subclass of Tensor; a tensor spread over processes is one too."""
    return type(module.weight) not in (nn.Parameter, Tensor)


def _is_away(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


OBSTACLES: tuple[tuple[Callable[[Any], bool], Callable[[Any], str]], ...] = (
    (_is_adapter, lambda module: "which adapts another layer (PEFT): call merge_and_unload() first"),
    (
        _is_special,
        lambda module: (
            f"not a plain nn.Linear in floating point ({UNQUANTISED}; undo whatever else replaced the layer)"
        ),
    ),
    (
        _is_wrapped,
        lambda module: (
            f"but its weight is of {type(module.weight).__name__}, quantised or spread over processes: "
            f"{UNQUANTISED}, or load it whole on one device"
        ),
    ),
    (
        _is_away,
        lambda module: (
            "but its weight is on the meta device, offloaded or not loaded yet: load the whole model into "
            "memory, without a device_map that offloads, and convert that"
        ),
    ),
)
"""What keeps a layer's weights from being read, and what to do about it; the first that applies is told."""
