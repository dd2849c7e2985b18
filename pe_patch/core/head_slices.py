"""Slice a scheme to the heads of one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from .. import compat
from ..errors import UnsupportedError

SHARED: Mapping[str, int] = MappingProxyType({})
"""`Scheme.head_sharded_attributes` of a scheme whose heads share everything."""

HOOKS = ("attend", "encode", "bias", "score_bias", "bias_as_head_dims", "min_slope", "bias_block")
"""Hooks that get queries and keys, and so may depend on the index of a head."""


class Heads(NamedTuple):
    """A range of query heads of the model, and the number of key heads that belong to it."""

    start: int
    stop: int
    key_heads: int

    @property
    def count(self) -> int:
        return self.stop - self.start


def declares_head_sharding(cls: type) -> bool:
    """Return whether a class declares `head_sharded_attributes`, and that no subclass below it overrides a hook."""
    order = cls.__mro__
    says = next((place for place, owner in enumerate(order) if "head_sharded_attributes" in owner.__dict__), None)
    if says is None or order[says].__dict__["head_sharded_attributes"] is None:
        return False
    owners = (next((place for place, owner in enumerate(order) if hook in owner.__dict__), says) for hook in HOOKS)
    return all(place >= says for place in owners)


def slice_heads(scheme: Any, heads: Heads) -> Any:
    """Return the scheme sliced to a range of its heads.

    `Scheme.head_sharded_attributes` names the slopes, tables and parameters to slice, and the dimension of their heads.
    Parameters are views of the full ones, so gradients reach those. Hooks on a full parameter do not run for kernels
    that compute their own gradients. Everything else is shared.

    Raises:
        UnsupportedError: the scheme does not say what it keeps for each head.
    """
    if not declares_head_sharding(type(scheme)):
        raise UnsupportedError(
            f"{scheme.name!r} is split by heads over processes here and does not declare which attributes have entries "
            "for each head: declare head_sharded_attributes = {attribute: dimension of the heads} on the class ({} "
            "where all heads share everything), or keep the heads together."
        )
    view: Any = copy(scheme)
    parameters, modules = compat.own_parameters(scheme), compat.submodules(scheme)
    whole: Mapping[str, int] = scheme.head_sharded_attributes
    cut = {name: _cut(scheme, name, dimension, heads) for name, dimension in whole.items()}
    sliced = {
        name: cut.pop(name) if name in cut else parameter if parameter is None else parameter.view_as(parameter)
        for name, parameter in parameters.items()
    }
    compat.replace_parameters(view, sliced)
    parts = {
        name: slice_heads(module, heads) if hasattr(module, "head_sharded_attributes") else module
        for name, module in modules.items()
    }
    compat.replace_submodules(view, parts)
    view.__dict__.update(cut)
    view.__dict__["shape"] = replace(scheme.shape, num_heads=heads.count, num_key_value_heads=heads.key_heads)
    view.__dict__["_constants"] = scheme.__dict__["_constants_of_parts"].setdefault(heads, {})
    return view


def _cut(scheme: Any, name: str, dimension: int, heads: Heads) -> Any:
    """Return the entries of some heads of an attribute that has one or several for each head."""
    value, count = getattr(scheme, name), scheme.shape.num_heads
    if not isinstance(value, Tensor):
        return value[heads.start : heads.stop]
    width, left = divmod(value.shape[dimension], count)
    if left or not width:
        raise UnsupportedError(
            f"{name} of {scheme.name!r} has {value.shape[dimension]} entries in dimension {dimension}, which {count} "
            "heads do not share equally."
        )
    return value.narrow(dimension, heads.start * width, heads.count * width)
