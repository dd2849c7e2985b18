"""A scheme as a part of the heads sees it: what processes that share the heads of an attention each work with."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import UnsupportedError

SHARED: Mapping[str, int] = MappingProxyType({})
"""What a scheme has for each head where heads share everything."""

RUNGS = ("attend", "encode", "bias", "of", "features", "fall", "bias_block")
"""What is handed queries and keys, and may know of heads."""


class Heads(NamedTuple):
    """Query heads `start` to `stop` of the whole model, and with how many key heads they come."""

    start: int
    stop: int
    key_heads: int

    @property
    def count(self) -> int:
        return self.stop - self.start


def declared(cls: type) -> bool:
    """Whether a scheme's class says what it keeps for each head, and nothing below it has changed what that is for."""
    order = cls.__mro__
    says = next((place for place, owner in enumerate(order) if "per_head" in owner.__dict__), None)
    if says is None or order[says].__dict__["per_head"] is None:
        return False
    owners = (next((place for place, owner in enumerate(order) if rung in owner.__dict__), says) for rung in RUNGS)
    return all(place >= says for place in owners)


def part(scheme: Any, heads: Heads) -> Any:
    """The scheme for a range of its heads.

    Slopes, tables and parameters are slices (`Scheme.per_head` names them and the dimension of the heads). All
    parameters are views of the whole ones, which gradients flow to; hooks on these are not called where a kernel takes
    gradients of its own. Everything else is the same object.

    Raises:
        UnsupportedError: the scheme does not say what it keeps for each head.
    """
    if not declared(type(scheme)):
        raise UnsupportedError(
            f"{scheme.name!r} does not say which of its numbers belong to one head, and its heads are split over "
            "processes here: declare per_head = {attribute: dimension of the heads} on the class ({} where all heads "
            "share everything), or keep the heads together."
        )
    view: Any = copy(scheme)
    parameters, modules = scheme.__dict__["_parameters"], scheme.__dict__["_modules"]
    whole: Mapping[str, int] = scheme.per_head
    cut = {name: _cut(scheme, name, dimension, heads) for name, dimension in whole.items()}
    view.__dict__["_parameters"] = {
        name: cut.pop(name) if name in cut else parameter if parameter is None else parameter.view_as(parameter)
        for name, parameter in parameters.items()
    }
    view.__dict__["_modules"] = {
        name: part(module, heads) if hasattr(module, "per_head") else module for name, module in modules.items()
    }
    view.__dict__.update(cut)
    view.__dict__["shape"] = replace(scheme.shape, num_heads=heads.count, num_key_value_heads=heads.key_heads)
    view.__dict__["_constants"] = scheme.__dict__["_constants_of_parts"].setdefault(heads, {})
    return view


def _cut(scheme: Any, name: str, dimension: int, heads: Heads) -> Any:
    """Some heads' share of an attribute, which has one or several entries for each head along a dimension."""
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
