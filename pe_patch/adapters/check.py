"""Check the names in a user's adapter against the modules of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..errors import OptionValueError, UnsupportedError, nearest, quoted
from .adapter import TABLE, Adapter

LAYOUTS = ("halves", "interleaved", "single", "sin_first", "complex")
FREQUENCIES = "inv_freq"


def check_adapter(base: Any, adapter: Adapter) -> None:
    """Check that every name in the adapter exists on the model.

    Args:
        base: the model that holds the layers.
        adapter: the user's adapter.

    Raises:
        OptionValueError: a name in the adapter does not exist on the model.
        UnsupportedError: the rotary module is not of the kind that the adapter describes, or a layer has no attention.
    """
    for name in ("layers", "attention", "rotary", "learned", "embedding_multiplier"):
        value = getattr(adapter, name)
        if not isinstance(value, str) and not (value is None and name not in ("layers", "attention")):
            raise _wrong(adapter, name, "which is not the name of an attribute")
    if adapter.layout not in LAYOUTS:
        near = nearest(adapter.layout, LAYOUTS)
        raise _wrong(adapter, "layout", f"which is not one of {', '.join(LAYOUTS)}.{near}")
    layers = _reach(base, adapter, "layers", "")
    if not isinstance(layers, nn.ModuleList | nn.Sequential | list | tuple) or not len(layers):
        raise _wrong(adapter, "layers", f"which is a {type(layers).__name__} and not a list of layers")
    attentions = adapter.attentions(base)
    if not attentions and adapter.attention_class is not None:
        raise _wrong(adapter, "attention_class", f"which no module {adapter.attention!r} of a layer has")
    if not attentions:
        raise _missing(adapter, "attention", layers[0], "layer 0", nn.Module)
    for name in ("rotary", "learned", "embedding_multiplier"):
        if name == "rotary" and adapter.rotary_per_attention:
            for index, attention in attentions.items():
                if not hasattr(attention, str(adapter.rotary)):
                    raise _missing(adapter, name, attention, f"the attention of layer {index}")
        elif getattr(adapter, name) is not None:
            if name != "learned" and "." in getattr(adapter, name):
                raise _wrong(
                    adapter, name, f"which must be an attribute of the base model ({type(base).__name__}) itself"
                )
            _reach(base, adapter, name, "")
    if isinstance(adapter.rotates, str):
        for index, attention in attentions.items():
            if not hasattr(attention, adapter.rotates):
                raise _missing(adapter, "rotates", attention, f"the attention of layer {index}")
    _check_rotary(base, adapter, len(layers))


def _check_rotary(base: Any, adapter: Adapter, count: int) -> None:
    """Raise `UnsupportedError` if the rotary module is not of the kind that the adapter describes."""
    if adapter.rotary is None:
        rotary_modules = [name for name, module in base.named_children() if hasattr(module, FREQUENCIES)]
        if rotary_modules and adapter.forward is None:
            raise UnsupportedError(
                f"The adapter says rotary=None, but {type(base).__name__} rotates by its module {rotary_modules[0]!r}, "
                f"and that rotation would remain beside the scheme. Give Adapter(rotary={rotary_modules[0]!r})."
            )
        return
    types = getattr(base.config, "layer_types", None) or ()
    if adapter.rotary_per_layer_type and (not isinstance(types, list | tuple) or len(types) < count):
        raise _wrong(
            adapter,
            "rotary_per_layer_type",
            f"and the config of {type(base).__name__} has no layer_types for {count} layers",
        )
    rotary = adapter.rotary_module(base)
    if adapter.rotary_per_layer_type:
        attending = adapter.attentions(base)
        expected = [f"{kind}_{FREQUENCIES}" for kind in dict.fromkeys(types[index] for index in attending)]
    else:
        expected = [FREQUENCIES]
    if isinstance(getattr(rotary, TABLE, None), Tensor):
        return
    if all(isinstance(getattr(rotary, name, None), Tensor) for name in expected):
        return
    present = sorted(name for name in dir(rotary) if name.endswith(FREQUENCIES) and "original" not in name)
    by_type = {f"{kind}_{FREQUENCIES}" for kind in types}
    if adapter.rotary_per_layer_type and FREQUENCIES in present:
        remedy = "leave rotary_per_layer_type out"
    elif not adapter.rotary_per_layer_type and present and set(present) <= by_type:
        remedy = "give rotary_per_layer_type=True"
    else:
        remedy = "this format is not supported"
    raise UnsupportedError(
        f"The module {adapter.rotary!r} of {type(base).__name__} lacks frequencies under the name "
        f"{' and '.join(expected)}; it has {', '.join(present) or 'none'}: {remedy}."
    )


def _reach(base: Any, adapter: Adapter, field: str, where: str) -> Any:
    """Return the attribute of the base model that a field of the adapter names."""
    owner: Any = base
    for name in getattr(adapter, field).split("."):
        if not hasattr(owner, name):
            raise _missing(adapter, field, owner, where or "the base model", object, name)
        owner = getattr(owner, name)
    return owner


def _missing(
    adapter: Adapter, field: str, owner: Any, where: str, kind: type = object, name: str = ""
) -> OptionValueError:
    """Return the error for a name that `owner` does not have; the message lists the names that it has."""
    names: Iterable[str] = [name for name, _ in owner.named_children()]
    if kind is object:
        names = [*names, *(name for name in vars(owner) if not name.startswith("_"))]
    value = name or str(getattr(adapter, field))
    shown = ", ".join(sorted(name for name, _ in owner.named_children())) or "none"
    return _wrong(
        adapter, field,
        f"and {where} ({type(owner).__name__}) has no {quoted(value)}.{nearest(value, names)} Its modules are: {shown}",
    )  # fmt: skip


def _wrong(adapter: Adapter, field: str, why: str) -> OptionValueError:
    why = why if why.endswith(("?", ".")) else f"{why}."
    return OptionValueError(f"The adapter says {field}={getattr(adapter, field)!r}, {why}")
