"""Describe a patched model: the attributes that were replaced, and the numbers in effect."""

from __future__ import annotations

import io
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from .. import compat
from ..adapters.adapter import PatchedRotaryEmbedding, PerLayerTypeRotary
from ..adapters.inferred import INFERRED, adapter_row
from ..core.scheme import Scheme, overrides
from ..core.swaps import ABSENT, RELEASED, Removal, Swap
from ..errors import PePatchError
from ..mla.protocol import converts
from .api import find_patch
from .patch import Patch


@dataclass(frozen=True)
class Replaced:
    """One attribute that a patch replaced."""

    where: str
    """Path of the attribute in the model."""
    old: str
    """The original, in words."""
    new: str
    """The replacement, in words."""


@dataclass(frozen=True)
class Description:
    """A patch in words and numbers; `str()` gives a table, `to_dict()` gives plain values."""

    model: str
    """Class name of the model."""
    family: str
    """`config.model_type` of the patched stack."""
    scheme: str
    """Name of the scheme."""
    options: dict[str, object]
    """Options of the scheme."""
    layers: list[int]
    """Indices of the patched layers."""
    num_layers: int
    """Number of layers of the model."""
    attending: int
    """Number of layers that attend. It is smaller in a hybrid model, whose other layers have no positions."""
    backend: str
    """Name of the attention implementation."""
    keep_native: bool
    """The native positions remain beside the scheme."""
    effective: dict[str, object]
    """The numbers in effect: theta, trained and effective window in tokens, attention factor, wavelengths."""
    replaced: list[Replaced] = field(default_factory=list)
    """The replaced attributes by which the model computes otherwise."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Paths of all other replaced attributes, by the reason why `replaced` leaves them out."""
    inferred_row: str | None = None
    """The adapter that was inferred, as the expression that builds it; None for a family with a row."""

    def to_dict(self) -> dict[str, object]:
        """Return the description as plain lists, dicts, numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        options = ", ".join(f"{key}={_short(value)}" for key, value in self.options.items())
        title = f"{self.model} ({self.family}): {self.scheme}({options})"
        facts = Table(title=title, title_justify="left", show_header=False, box=None)
        touched = f"{len(self.layers)} of {self.num_layers}"
        if self.attending < self.num_layers:
            touched = f"{len(self.layers)} of the {self.attending} that attend, of {self.num_layers} in all"
        facts.add_row("layers", touched if len(self.layers) == self.num_layers else f"{touched}: {self.layers}")
        if self.inferred_row is not None:
            facts.add_row("adapter", self.inferred_row)
        facts.add_row("attention", self.backend)
        facts.add_row("native positions", "kept" if self.keep_native else "replaced")
        for key, value in self.effective.items():
            facts.add_row(key.replace("_", " "), _short(value))
        swaps = Table("replaced", "was", "is", box=None, header_style="bold")
        for item in _by_layers(self.replaced):
            swaps.add_row(item.where, item.old, item.new)
        console = Console(file=io.StringIO(), width=140, markup=False, force_jupyter=False, force_terminal=False)
        console.print(facts)
        console.print()
        console.print(swaps)
        if self.left_out:
            console.print()
            counts = ", ".join(f"{len(paths)} {reason}" for reason, paths in self.left_out.items())
            console.print(f" Not listed (see left_out): {counts}.")
        file = console.file
        assert isinstance(file, io.StringIO)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def describe(model: nn.Module) -> Description:
    """Return a description of the patch of a model.

    Args:
        model: a patched model, which may be wrapped.

    Raises:
        PePatchError: the model is not patched, or its patch was interrupted.
    """
    patch = find_patch(model)
    if patch is None:
        raise PePatchError("This model carries no patch; patch_model(model, scheme, ...) first.")
    if not patch.whole:
        raise PePatchError(
            f"Patching this model with {patch.scheme.name!r}, or undoing it, was interrupted half way. "
            "Call unpatch_model(model) to finish the undo."
        )
    replaced, left_out = _replaced(patch)
    return Description(
        model=type(patch.model).__name__,
        family=patch.base.config.model_type,
        scheme=patch.scheme.name,
        options=dict(patch.scheme.recorded),
        layers=list(patch.layers),
        num_layers=patch.shape.num_layers,
        attending=len(patch.adapter.attentions(patch.base)),
        backend=str(compat.attention_implementation(patch.base.config)),
        keep_native=patch.keep_native or (converts(patch.scheme) and not overrides(patch.scheme, "angles")),
        effective=effective(patch.scheme)
        | _window_source(patch)
        | _cache(patch)
        | _key_copies(patch)
        | _weights(patch),
        replaced=replaced,
        left_out=left_out,
        inferred_row=adapter_row(patch.adapter) if INFERRED.get(patch.base) == patch.adapter else None,
    )


EFFECTIVE = {
    "theta": ("base", "theta"),
    "factor": ("fixed_factor", "extension"),
    "trained_window": ("trained_window", "window"),
    "attention_factor": ("attention_scaling",),
}
"""For each number in effect, the attributes of schemes that may hold it, in order of preference."""


def effective(scheme: Scheme) -> dict[str, Any]:
    """Return the numbers that a scheme uses, by name."""
    numbers: dict[str, Any] = {}
    for name, attributes in EFFECTIVE.items():
        values = (getattr(scheme, attribute, None) for attribute in attributes)
        value = next((value for value in values if value is not None), None)
        if value is not None:
            numbers[name] = value
    inner: Any = getattr(scheme, "inner", None)
    if getattr(inner, "trained_window", None) is not None:  # the model was trained with the inner scheme
        numbers["trained_window"] = getattr(scheme, "model_window", None) or inner.trained_window
    numbers |= scheme.resolved_options
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
    """Return the source of the trained window that the scheme uses."""
    used, window = effective(patch.scheme).get("trained_window"), patch.window
    if used is None:
        return {}
    if used == (window.scaled_length if patch.composed else window.length):
        source = window.scaled_source if patch.composed else window.source
        return {"trained_window_source": source or window.source}
    return {"trained_window_source": f"an option of {patch.scheme.name}"}


def _weights(patch: Patch) -> dict[str, Any]:
    """Return the type that the weights had in the GGUF file that they are from, if they were quantised there."""
    kind = getattr(patch.model, "dequantised", None)
    return {} if kind is None else {"weights": f"dequantised from {kind}"}


def _key_copies(patch: Patch) -> dict[str, Any]:
    """Return the bytes of the cache per token, with and without copies of encoded keys, for a scheme that uses them."""
    runtime = getattr(patch.base, "pe_runtime", None)
    if runtime is None or not runtime.key_copies or not patch.scheme.key_copies:
        return {}
    copied = {index: scheme for index, scheme in patch.scheme_by_layer.items() if _is_copied(patch, index)}
    if not copied:
        return {}
    size, shapes = patch.base.dtype.itemsize, [scheme.shape for scheme in patch.scheme_by_layer.values()]
    plain = sum(shape.num_key_value_heads * (shape.head_dim + shape.value_dim) * size for shape in shapes)
    copies = sum(
        scheme.key_copies * scheme.shape.num_key_value_heads * scheme.shape.head_dim * size
        for scheme in copied.values()
    )
    return {"cache_bytes_per_token": f"{plain + copies:,}, with encoded keys ({plain:,} with key_copies=False)"}


def _is_copied(patch: Patch, index: int) -> bool:
    """Return whether encoded keys of a layer are kept: not where it slides, and replaces its keys at every step."""
    layers = compat.new_cache(patch.base).layers
    return index >= len(layers) or compat.grows_plainly(layers[index])


def _cache(patch: Patch) -> dict[str, Any]:
    """Return the cache size of a token, and the window of a kept rotation, for a scheme that converts projections."""
    scheme: Any = patch.scheme
    if not converts(scheme):
        return {}
    numbers: dict[str, Any] = {}
    cached, before = getattr(scheme, "cached", None), getattr(scheme, "cached_before", None)
    if cached is not None and before is not None:
        size = len(patch.layers) * patch.base.dtype.itemsize
        numbers["cache_bytes_per_token"] = f"{size * cached:,} (was {size * before:,})"
    window = getattr(patch.base.config, "max_position_embeddings", None)
    if scheme.effective_window is None and window is not None:
        numbers["effective_window"] = window
    return numbers


REASONS: dict[str, tuple[str, ...]] = {
    "attributes of pe_patch itself": ("pe_", "position_schemes"),
    "references to the model's own copy of its config": ("config",),
    "functions that save the patch with the model": ("save_pretrained", "load_adapter", "named_modules"),
    "functions that generation and set_attn_implementation call": (
        "set_attn_implementation", "init_continuous_batching", compat.STATIC_CACHE_SHAPE, compat.GENERATION_POSITIONS,
    ),
}  # fmt: skip
"""The attributes that a description leaves out, by the beginnings of their names."""


def _replaced(patch: Patch) -> tuple[list[Replaced], dict[str, list[str]]]:
    """Return a row for each replaced attribute that changes a result, and the paths of all others by reason."""
    names = {id(module): name for name, module in patch.model.named_modules()}
    configs = {id(patch.model.config): "config", id(patch.base.config): "config"}
    rows: list[Replaced] = []
    left_out: dict[str, list[str]] = {}
    for swap in patch.swaps:
        owner = names.get(id(swap.owner)) if isinstance(swap.owner, nn.Module) else configs.get(id(swap.owner))
        is_scheme = swap.attribute == "pe_scheme"
        reason = next((why for why, beginnings in REASONS.items() if swap.attribute.startswith(beginnings)), None)
        if reason is not None and not (is_scheme and swap.replacement is not None):
            inner = owner if owner is not None else type(swap.owner).__name__
            left_out.setdefault(reason, []).append(".".join(part for part in (inner, swap.attribute) if part))
            continue
        attribute = SHOWN_AS.get(swap.attribute, swap.key)
        where = ".".join(part for part in (owner, attribute) if part)
        old = "as projected" if is_scheme else _name(swap.original)
        rows.append(Replaced(where, old, swap.replacement.name if is_scheme else _new(swap)))
    base = next(name for name, module in patch.model.named_modules() if module is patch.base)
    left_out["attributes of pe_patch itself"].append(".".join(part for part in (base, "pe_patch") if part))
    frozen = {id(parameter) for parameter in patch.frozen}
    if names_of_frozen := [name for name, parameter in patch.model.named_parameters() if id(parameter) in frozen]:
        left_out["native parameters without a use, which no longer train"] = names_of_frozen
    return rows, left_out


def _by_layers(rows: list[Replaced]) -> list[Replaced]:
    """Return the rows with those that say the same of several layers as one: `layers.0 to 29.self_attn.scores`."""
    layers: dict[tuple[str, str, str, str], list[int]] = {}
    for row in rows:
        found = LAYER.fullmatch(row.where)
        before, number, after = found.groups() if found else (row.where, None, "")
        numbers = layers.setdefault((before, after, row.old, row.new), [])
        if number is not None:
            numbers.append(int(number))
    return [
        Replaced(f"{before}{_in_ranges(numbers)}{after}", old, new)
        for (before, after, old, new), numbers in layers.items()
    ]


def _in_ranges(numbers: list[int]) -> str:
    """Return ascending numbers with runs of three and more as ranges: "0 to 4, 7, 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [[f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return ", ".join(part for each in parts for part in each)


LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")
"""A path with the index of a layer."""


SHOWN_AS = {"pe_scheme": "scores", compat.IMPLEMENTATION: "attn_implementation"}


def _new(swap: Swap) -> str:
    return "taken away" if isinstance(swap, Removal) else _name(swap.replacement)


def _name(value: Any) -> str:
    if value is ABSENT:
        return "the class's own"
    if value is RELEASED:
        return "not kept"
    if isinstance(value, PatchedRotaryEmbedding):
        scheme = value.__dict__["scheme"]
        return f"PatchedRotaryEmbedding({scheme.name if scheme is not None else 'no rotation'})"
    if isinstance(value, PerLayerTypeRotary):
        return ", ".join(f"{layer_type}: {_name(module)}" for layer_type, module in value.by_type.items())
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
