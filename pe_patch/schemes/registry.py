"""The registry of schemes, and the lookup of a scheme by object, name, class or dict."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from ..core.checks import to_builtin
from ..core.registry import Registry
from ..core.scheme import AttentionShape, Scheme
from ..errors import OptionError, OptionValueError, UnknownNameError, quoted, unknown
from .config_formats import Specification, read

SchemeClass = TypeVar("SchemeClass", bound=Scheme)

SCHEMES: Registry[type[Scheme]] = Registry("pe_patch.schemes")
"""Every registered scheme class by its name."""
ALIASES: Mapping[str, str] = MappingProxyType({"pi": "linear", "dynamic": "dynamic_ntk", "p_rope": "proportional"})
"""Other names of schemes."""


def register_scheme(scheme: type[SchemeClass]) -> type[SchemeClass]:
    """Register a scheme class under its `name`, so that its name works everywhere.

    Use it as a decorator. A package registers a scheme for everyone who installs it by an entry point of the group
    `pe_patch.schemes` that names the class or its module.

    Raises:
        OptionValueError: the class is no scheme, has no name, or has the name of another registered scheme.
    """
    if not (isinstance(scheme, type) and issubclass(scheme, Scheme)):
        raise OptionValueError(f"register_scheme takes a subclass of Scheme, got {quoted(scheme)}.")
    name = scheme.__dict__.get("name")
    if not isinstance(name, str) or not name:
        raise OptionValueError(f'{scheme.__name__} has no name to register it by. Add name = "my_scheme" to the class.')
    known = SCHEMES.get(name)
    again = known is not None and (known.__module__, known.__qualname__) == (scheme.__module__, scheme.__qualname__)
    if name in ALIASES or (known is not None and not again):
        owner = "pe_patch" if name in ALIASES or SCHEMES.is_builtin(name) else f"{known.__module__}"
        raise OptionValueError(f"{name!r} is the name of a scheme of {owner}; give {scheme.__name__} another name.")
    SCHEMES.add(name, scheme)
    return scheme


def find_scheme(
    scheme: Any, options: Mapping[str, Any], shape: AttentionShape | None = None
) -> tuple[type[Scheme], dict[str, Any]]:
    """Return a scheme's class and its options, checked against each other.

    Args:
        scheme: a scheme with its options such as `YaRN(factor=4)`, a name or alias, a `Scheme` class, or a dict in any
            config format.
        options: further options; none of them may be given in `scheme` too.
        shape: sizes of the layer, to check a `partial_rotary_factor`; None if unknown.
    """
    options = {option: to_builtin(value) for option, value in options.items()}
    if isinstance(scheme, Scheme):
        if scheme.is_built:
            raise OptionError(
                f"This {type(scheme).__name__} was built for an attention already; give options alone, for example "
                f"{scheme!r}."
            )
        if twice := scheme.options.keys() & options.keys():
            raise OptionError(
                f"The option {sorted(twice)[0]!r} is given twice, in {scheme!r} and beside it; give it once."
            )
        scheme, options = (
            type(scheme),
            {**{name: to_builtin(value) for name, value in scheme.options.items()}, **options},
        )
    if isinstance(scheme, Mapping):
        specification = read(to_builtin(dict(scheme)))
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
    """Return whether two option values are equal; arrays and tensors are only equal to themselves."""
    return one is other or (type(one).__eq__ is not object.__eq__ and (one == other) is True)


def _check_width(specification: Specification, shape: AttentionShape | None) -> None:
    """Raise if a dict rotates a different share of the head than the model."""
    part = specification.partial_rotary_factor
    if part is None or shape is None or specification.scheme == "proportional":
        return
    if int(part * shape.head_dim) != shape.rotary_dim:
        raise OptionValueError(
            f"The dict rotates {part:g} of each head, and this model {shape.rotary_dim} of {shape.head_dim} "
            "dimensions; which ones rotate is fixed when a model is built."
        )
