"""The registry of schemes, and the way from a name, class or dict to a class and its options."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from ..core.checks import plain
from ..core.scheme import AttentionShape, Scheme
from ..errors import OptionValueError, UnknownNameError, quoted, unknown
from .config_formats import Specification, read

SchemeClass = TypeVar("SchemeClass", bound=Scheme)

_SCHEMES: dict[str, type[Scheme]] = {}
SCHEMES: Mapping[str, type[Scheme]] = MappingProxyType(_SCHEMES)
"""Every registered scheme by its name."""
ALIASES: Mapping[str, str] = MappingProxyType({"pi": "linear", "dynamic": "dynamic_ntk", "p_rope": "proportional"})
"""Other names of schemes."""


def register_scheme(scheme: type[SchemeClass]) -> type[SchemeClass]:
    """Register a scheme under its `name`, so that everything that takes a scheme's name takes this one; a decorator."""
    _SCHEMES[scheme.name] = scheme
    return scheme


def find_scheme(
    scheme: Any, options: Mapping[str, Any], shape: AttentionShape | None = None
) -> tuple[type[Scheme], dict[str, Any]]:
    """A scheme's class and its options, checked against each other.

    Args:
        scheme: a name or alias, a `Scheme` class, or a dict in any config dialect.
        options: further options; none may also stand in the dict.
        shape: where known, a dict that says how much of the head rotates is compared with it.
    """
    options = {option: plain(value) for option, value in options.items()}
    if isinstance(scheme, Mapping):
        specification = read(plain(dict(scheme)))
        if not isinstance(specification, Specification):
            raise OptionValueError(
                f"This dict has parameters for each layer type ({', '.join(specification)}); give those of one of them."
            )
        for option, value in specification.options.items():
            if not _same(options.setdefault(option, value), value):
                raise OptionValueError(
                    f"{option}={quoted(options[option])} and, in the dict, {quoted(value)}; give it once."
                )
        _check_width(specification, shape)
        scheme = specification.scheme
    if isinstance(scheme, str):
        name = ALIASES.get(scheme, scheme)
        if name not in SCHEMES:
            raise unknown("scheme", scheme, [*SCHEMES, *ALIASES])
        scheme = SCHEMES[name]
    if not (isinstance(scheme, type) and issubclass(scheme, Scheme)):
        raise UnknownNameError(f"A scheme is a name, a Scheme class or a dict, not {quoted(scheme)}.")
    scheme.check_options(options)
    return scheme, options


def _same(one: Any, other: Any) -> bool:
    """Whether two values of an option are one; arrays and tensors are so only where they are the same object."""
    return one is other or (type(one).__eq__ is not object.__eq__ and (one == other) is True)


def _check_width(specification: Specification, shape: AttentionShape | None) -> None:
    """A dict whose `partial_rotary_factor` is not the model's would otherwise be half ignored."""
    part = specification.partial_rotary_factor
    if part is None or shape is None or specification.scheme == "proportional":
        return
    if int(part * shape.head_dim) != shape.rotary_dim:
        raise OptionValueError(
            f"The dict rotates {part:g} of each head, and this model {shape.rotary_dim} of {shape.head_dim} "
            "dimensions; which ones rotate is fixed when a model is built."
        )
