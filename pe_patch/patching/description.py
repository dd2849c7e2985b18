"""What a patched model is: what was swapped for what, and the numbers in effect."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..adapters.adapter import RotaryJoint, TypedJoint
from ..core.scheme import Scheme, overrides
from ..core.swaps import ABSENT, GIVEN_UP, Removal, Swap
from ..errors import PePatchError
from ..mla.protocol import converts
from .api import find_patch
from .build import Patch


@dataclass(frozen=True)
class Replaced:
    """One attribute that a patch replaced."""

    where: str
    old: str
    new: str


@dataclass(frozen=True)
class Description:
    """A patch in words and numbers; `str()` is a table for people, `to_dict()` is for machines."""

    model: str
    family: str
    scheme: str
    options: dict[str, Any]
    layers: list[int]
    num_layers: int
    backend: str
    keep_native: bool
    effective: dict[str, Any]
    """Theta, trained and effective window, attention factor, wavelengths: what the scheme really uses."""
    replaced: list[Replaced] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists, dicts, numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        options = ", ".join(f"{key}={_short(value)}" for key, value in self.options.items())
        title = f"{self.model} ({self.family}): {self.scheme}({options})"
        facts = Table(title=title, title_justify="left", show_header=False, box=None)
        touched = f"{len(self.layers)} of {self.num_layers}"
        facts.add_row("layers", touched if len(self.layers) == self.num_layers else f"{touched}: {self.layers}")
        facts.add_row("attention", self.backend)
        facts.add_row("native positions", "kept" if self.keep_native else "replaced")
        for key, value in self.effective.items():
            facts.add_row(key.replace("_", " "), _short(value))
        swaps = Table("replaced", "was", "is", box=None, header_style="bold")
        for item in self.replaced:
            swaps.add_row(item.where, item.old, item.new)
        console = Console(file=io.StringIO(), width=140, markup=False, force_jupyter=False, force_terminal=False)
        console.print(facts)
        console.print()
        console.print(swaps)
        file = console.file
        assert isinstance(file, io.StringIO)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def describe(model: Any) -> Description:
    """Describe the patch that a model carries.

    Raises:
        PePatchError: where it carries none, or one that was interrupted half way.
    """
    patch = find_patch(model)
    if patch is None:
        raise PePatchError("This model carries no patch; patch_model(model, scheme, ...) first.")
    if not patch.whole:
        raise PePatchError(
            f"Patching this model with {patch.scheme.name!r}, or undoing it, was interrupted half way: "
            "unpatch_model(model) finishes the undo."
        )
    return Description(
        model=type(patch.head).__name__,
        family=patch.base.config.model_type,
        scheme=patch.scheme.name,
        options=dict(patch.scheme.recorded),
        layers=list(patch.layers),
        num_layers=patch.shape.num_layers,
        backend=str(patch.base.config._attn_implementation),
        keep_native=patch.keep_native or (converts(patch.scheme) and not overrides(patch.scheme, "angles")),
        effective=effective(patch.scheme) | _window_source(patch) | _cache(patch),
        replaced=_replaced(patch),
    )


EFFECTIVE = {
    "theta": ("base", "theta"),
    "factor": ("fixed_factor", "extension"),
    "trained_window": ("trained_window", "window"),
    "attention_factor": ("attention_scaling",),
}
"""Attributes of schemes that hold the number in effect, after defaults and the model's config."""


def effective(scheme: Scheme) -> dict[str, Any]:
    """The numbers that a scheme really uses, by name."""
    numbers: dict[str, Any] = {}
    for name, attributes in EFFECTIVE.items():
        values = (getattr(scheme, attribute, None) for attribute in attributes)
        value = next((value for value in values if value is not None), None)
        if value is not None:
            numbers[name] = value
    inner: Any = getattr(scheme, "inner", None)
    if getattr(inner, "trained_window", None) is not None:  # the model was trained with the rotation underneath
        numbers["trained_window"] = getattr(scheme, "reads", None) or inner.trained_window
    numbers |= scheme.settled
    numbers["effective_window"] = scheme.effective_window if scheme.effective_window is not None else "unbounded"
    inv_freq = getattr(scheme, "inv_freq", None)
    if inv_freq is not None:
        wavelengths = (6.283185307179586 / inv_freq.double()).tolist()
        numbers["wavelengths_in_tokens"] = [round(value, 2) for value in wavelengths]
    slopes: Any = getattr(scheme, "head_slopes", None)
    if slopes is not None:
        numbers["slopes"] = [round(slope, 6) for slope in slopes]
    if parameters := sum(p.numel() for p in scheme.parameters()):
        numbers["parameters_added"] = parameters
    return numbers


def _window_source(patch: Patch) -> dict[str, Any]:
    """Return where the trained window in use comes from."""
    used, window = effective(patch.scheme).get("trained_window"), patch.window
    if used is None:
        return {}
    if used == (window.scaled_length if patch.composed else window.length):
        source = window.scaled_source if patch.composed else window.source
        return {"trained_window_source": source or window.source}
    return {"trained_window_source": f"an option of {patch.scheme.name}"}


def _cache(patch: Patch) -> dict[str, Any]:
    """What a token leaves in the cache under a scheme that changes that, and the window of a rotation that it keeps."""
    scheme: Any = patch.scheme
    if not converts(scheme):
        return {}
    numbers: dict[str, Any] = {}
    cached, before = getattr(scheme, "cached", None), getattr(scheme, "cached_before", None)
    if cached is not None and before is not None:
        size = len(patch.layers) * patch.base.dtype.itemsize
        numbers["cache_bytes_per_token"] = f"{size * cached:,} (was {size * before:,})"
    own = getattr(patch.base.config, "max_position_embeddings", None)
    if scheme.effective_window is None and own is not None:
        numbers["effective_window"] = own
    return numbers


INTERNAL = (
    "pe_", "config", "position_schemes", "set_attn_implementation", "init_continuous_batching", "save_pretrained",
    "_get_static_cache_init_shape",
)  # fmt: skip


def _replaced(patch: Patch) -> list[Replaced]:
    names = {id(module): name for name, module in patch.head.named_modules()}
    configs = {id(patch.head.config): "config", id(patch.base.config): "config"}
    rows = []
    for swap in patch.swaps:
        is_scheme = swap.attribute == "pe_scheme"
        if swap.attribute.startswith(INTERNAL) and not (is_scheme and swap.replacement is not None):
            continue
        owner = names.get(id(swap.owner)) if isinstance(swap.owner, nn.Module) else configs.get(id(swap.owner))
        attribute = "scores" if is_scheme else swap.attribute.removeprefix("_").removesuffix("_internal")
        where = ".".join(part for part in (owner, attribute) if part)
        old = "as projected" if is_scheme else _name(swap.original)
        rows.append(Replaced(where, old, swap.replacement.name if is_scheme else _new(swap)))
    return rows


def _new(swap: Swap) -> str:
    return "taken away" if isinstance(swap, Removal) else _name(swap.replacement)


def _name(value: Any) -> str:
    if value is ABSENT:
        return "the class's own"
    if value is GIVEN_UP:
        return "not kept"
    if isinstance(value, RotaryJoint):
        scheme = value.__dict__["scheme"]
        return f"RotaryJoint({scheme.name if scheme is not None else 'no rotation'})"
    if isinstance(value, TypedJoint):
        return ", ".join(f"{kind}: {_name(joint)}" for kind, joint in value.joints.items())
    if isinstance(value, nn.Module):
        return type(value).__name__
    if hasattr(value, "function"):
        function = getattr(value.function, "function", value.function)
        return f"pe_patch {function.__name__}"
    return _short(value)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(str(item) for item in value[:3])}, ... {value[-1]}] ({len(value)})"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(item)}" for key, item in value.items())
    return str(value)
