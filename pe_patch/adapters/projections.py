"""Name the query, key, value and output projections of a family's attention, and read their weights."""

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
"""The dtypes of weights that can be read."""
LoadedLinear = tuple[Tensor, Tensor | None]
"""Weight `[rows, hidden]` and bias `[rows]`."""


@dataclass(frozen=True)
class ProjectionNames:
    """Names of the projections of an attention that computes what Llama's does."""

    output: str = "o_proj"
    """The linear layer after the attention, which a conversion keeps."""
    norms: tuple[str, str] | None = None
    """Modules that normalise each head of the queries and of the keys before the rotation. None if the family has none.
    An attention without these attributes does not normalise."""
    residual_dropout: str | None = None
    """Attribute of the attention: the dropout rate of its output. None if the family has none."""

    @property
    def taken(self) -> tuple[str, ...]:
        """Return the names of the modules that latents replace, without the norms."""
        raise NotImplementedError

    def parts(self, attention: nn.Module, shape: AttentionShape, empty: bool) -> list[LoadedLinear]:
        """Return weight and bias of the query, key and value projections, in this order."""
        raise NotImplementedError

    def read(self, attention: nn.Module, shape: AttentionShape, empty: bool = False) -> Projections:
        """Return the weights of one attention, as views if the family stores each projection contiguously.

        Args:
            attention: the attention module.
            shape: sizes of the layer.
            empty: the model is on the meta device, so that only sizes are read.

        Raises:
            UnsupportedError: the weights are quantised, adapted, offloaded or sharded.
        """
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
    """One linear layer each for queries, keys and values, with rows ordered by head."""

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
    """One linear layer for queries, keys and values, with rows [all queries | all keys | all values]."""

    module: str = "qkv_proj"
    per_head: bool = False
    """The rows are [query | key | value] of the first head, then those of the second head, and so on."""

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
    """Raise `UnsupportedError` if the config of a model or of an attention says that it was loaded quantised."""
    quantisation = getattr(getattr(module, "config", None), "quantization_config", None)
    if quantisation is None:
        return
    is_dict = isinstance(quantisation, dict)
    method = quantisation.get("quant_method") if is_dict else getattr(quantisation, "quant_method", None)
    raise UnsupportedError(
        f"{type(module).__name__} belongs to a model that was loaded quantised ({getattr(method, 'value', method)}), "
        f"whose weights cannot be read as numbers: {UNQUANTISED}."
    )


def linear(attention: nn.Module, name: str, rows: int, empty: bool = False) -> LoadedLinear:
    """Return weight and bias of one projection, detached.

    Args:
        attention: the attention module.
        name: its attribute with the projection.
        rows: the expected number of rows.
        empty: accept weights on the meta device.

    Raises:
        UnsupportedError: the projection is not a plain linear layer with this number of rows.
    """
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
    """Return whether a layer is not a plain nn.Linear in floating point.

    Subclasses hold quantised weights (bitsandbytes, fp8) or compute something else.
    """
    weight = getattr(module, "weight", None)
    return type(module) is not nn.Linear or not isinstance(weight, Tensor) or weight.dtype not in DTYPES


def _is_wrapped(module: nn.Module) -> bool:
    """Return whether the weight is a subclass of Tensor: quantised by torchao, or sharded over processes."""
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
"""The reasons why a layer's weights cannot be read, each with its remedy; the first that applies is reported."""
