"""Test that the public names have types: no `Any` in a signature or a field where a type can be given."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pe_patch

EXCEPTIONS = {
    ("load_patched", "return"): "the checkpoint names the class, as for from_pretrained of Transformers' auto classes",
    ("load_patched", "from_pretrained_kwargs"): "forwarded to keywords that have different types",
    ("load_adapter", "peft_options"): "forwarded to keywords of PEFT that have different types",
    ("patched", "arguments"): "forwarded to keywords of patch_model that have different types",
}
"""Where `Any` is allowed, by function and parameter, with the reason."""


def annotations() -> Iterator[tuple[str, str, str]]:
    """Yield the owner, the name and the annotation of all parameters, returns and fields of the public names."""
    for name in pe_patch.__all__:
        value: Any = getattr(pe_patch, name)
        if inspect.isfunction(value):
            yield from ((name, parameter, str(kind)) for parameter, kind in value.__annotations__.items())
        for cls in value.__mro__ if inspect.isclass(value) else ():
            if cls.__module__.startswith("pe_patch"):
                yield from members(cls)


def members(cls: type) -> Iterator[tuple[str, str, str]]:
    """Yield the same of a class's own public fields, methods and properties."""
    for field, kind in vars(cls).get("__annotations__", {}).items():
        if not field.startswith("_"):
            yield cls.__qualname__, field, str(kind)
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else inspect.unwrap(getattr(member, "__func__", member))
        if inspect.isfunction(function) and (name in ("__init__", "__call__") or not name.startswith("_")):
            for parameter, kind in function.__annotations__.items():
                yield f"{cls.__qualname__}.{name}", parameter, str(kind)


def test_public_signatures_name_their_types():
    untyped = {(owner, name) for owner, name, kind in annotations() if re.search(r"\bAny\b", kind)}
    assert untyped == set(EXCEPTIONS)


def test_signatures_of_functions_methods_properties_and_fields_are_read():
    names = {(owner, name) for owner, name, _ in annotations()}
    for expected in (
        ("patch_model", "options"),
        ("Scheme.attend", "engine"),
        ("Scheme.check_options", "options"),
        ("Scheme.resolved_options", "return"),
        ("YaRN.__init__", "factor"),
        ("Description", "options"),
    ):
        assert expected in names
