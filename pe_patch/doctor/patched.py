"""Check a patch against its record in a checkpoint, and against the modules of a live model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..core.swaps import Swap
from ..errors import OptionError, PePatchError, nearest
from ..mla.protocol import keeps_rotation
from ..patching.api import find_patch, restore_patch
from ..patching.patch import Patch
from ..patching.record import RECORD_KEY, VERSION
from ..schemes.registry import SCHEMES
from ..schemes.rotary import Rotation
from .effect import format_frequencies, plain_base
from .examined import BuiltRotation, ExaminedModel, build_empty, quiet
from .finding import Finding

REMEDY = "Save the patched model again with save_pretrained, or patch the original model again."


def check_record(examined: ExaminedModel) -> list[Finding]:
    """Check that the scheme in a checkpoint's record exists, takes its options, and fits the model.

    Patches the model without weights of `examined`.
    """
    record: Any = examined.record
    if fault := _check_syntax(record):
        return [fault]
    if examined.model is None:
        return []
    native_rotations = _rotations_without_record(examined)
    patch_arguments = {key: record[key] for key in ("layers", "submodule", "keep_native", "strict") if key in record}
    try:
        with quiet():
            restore_patch(examined.model, record["scheme"], record["options"], patch_arguments)
    except PePatchError as error:
        claimed = f"{record['scheme']}({', '.join(f'{key}={value}' for key, value in record['options'].items())})"
        return [_faulty(".options", claimed, f"cannot be applied: {error}")]
    patch = find_patch(examined.model)
    assert patch is not None
    disagreements = (finding for rotation in native_rotations for finding in _disagrees(patch, rotation))
    return [*_window(examined, patch), *disagreements]


def _check_syntax(record: Any) -> Finding | None:
    """Return the first fault of a record that does not depend on the model, or None."""
    entries = record if isinstance(record, dict) else {}
    if missing := {"scheme", "options", "native"} - entries.keys():
        return _faulty("", "a record of a patch", f"it lacks {', '.join(sorted(missing))}")
    scheme = str(record["scheme"])
    if scheme not in SCHEMES:
        remedy = "Correct the name (`pe-patch list schemes` shows all), or import the module that defines the scheme."
        return _faulty(".scheme", f"scheme {scheme!r}", f"no such scheme.{nearest(scheme, SCHEMES)}", remedy)
    if record.get("version", 0) > VERSION:
        in_effect = f"this pe_patch reads versions up to {VERSION}"
        return _faulty("", f"version {record['version']}", in_effect, "Upgrade pe_patch.")
    try:
        SCHEMES[scheme].check_options(record["options"])
    except OptionError as error:
        return _faulty(".options", f"scheme {scheme!r}", str(error))
    return None


def _faulty(key: str, claimed: str, in_effect: str, remedy: str = REMEDY) -> Finding:
    return Finding("record_faulty", "error", f"config.{RECORD_KEY}{key}", claimed, in_effect, remedy)


def _rotations_without_record(examined: ExaminedModel) -> list[BuiltRotation]:
    """Return the rotations that plain Transformers builds, which ignores the record; empty if it refuses to load."""
    raw_config = {key: value for key, value in examined.raw_config.items() if key != RECORD_KEY}
    native = ExaminedModel(examined.name, raw_config)
    try:
        with quiet():
            native.config = type(examined.config).from_dict(raw_config)
            native.model = build_empty(native.config)
            return native.rotations()
    except Exception:  # plain Transformers should refuse such a checkpoint, so this is no fault
        return []


def _disagrees(patch: Patch, rotation: BuiltRotation) -> Iterator[Finding]:
    scheme = patch.scheme_by_layer_type.get(rotation.layer_type)
    if not isinstance(scheme, Rotation) or keeps_rotation(scheme) or patch.settings.layers is not None:
        return
    expected, factor = scheme.frequencies(None)
    same = expected.shape == rotation.inv_freq.shape and torch.allclose(expected, rotation.inv_freq, rtol=1e-5, atol=0)
    if not same or not math.isclose(factor, rotation.attention_factor, rel_tol=1e-5):
        native = "plain RoPE" if plain_base(rotation.inv_freq) else "other frequencies"
        yield Finding(
            "record_disagrees", "error", f"config.{RECORD_KEY}, rope_parameters",
            f"{scheme.name}({scheme.extra_repr()}) in the record",
            f"load_patched uses the record, but Transformers without pe_patch uses {native}: "
            + format_frequencies(rotation.inv_freq, rotation.attention_factor),
            REMEDY,
        )  # fmt: skip


def _window(examined: ExaminedModel, patch: Patch) -> Iterator[Finding]:
    window, written = patch.scheme.effective_window, examined.raw_text_config.get("max_position_embeddings")
    if window is not None and written is not None and written != window:
        yield Finding(
            "factor_mismatch", "error", "max_position_embeddings", f"max_position_embeddings={written}",
            f"{patch.scheme.name!r} reaches {window} tokens", f'Write "max_position_embeddings": {window}.',
        )  # fmt: skip


def check_live(examined: ExaminedModel, patch: Patch) -> list[Finding]:
    """Check that every swap of a patch is still in place."""
    findings = []
    names = {id(module): name for name, module in patch.model.named_modules()}
    for swap in patch.swaps:
        if _is_checked(swap) and not _same(current := _current(swap), swap.replacement):
            owner = names.get(id(swap.owner), "config") or type(patch.model).__name__
            findings.append(Finding(
                "patch_overwritten", "error", f"{owner}.{swap.attribute}",
                f"{patch.scheme.name!r}: {_format_value(swap.replacement)}", _format_value(current),
                "Call unpatch_model(model), then patch_model(model, ...) again. Do not replace modules of a patched "
                "model.",
            ))  # fmt: skip
    return findings


def _is_checked(swap: Swap) -> bool:
    """Return False for swaps that others may change: forwards that wrappers wrap, and the attention implementation."""
    if isinstance(swap.owner, nn.Module):
        return isinstance(swap.replacement, nn.Module | int | float) and not swap.attribute.startswith("_")
    return not swap.attribute.startswith("_")


def _current(swap: Swap) -> Any:
    if swap.direct:
        return swap.owner.__dict__.get(swap.attribute)
    return getattr(swap.owner, swap.attribute, None)


def _same(current: Any, replacement: Any) -> bool:
    if isinstance(replacement, nn.Module):
        return current is replacement
    return current is replacement or bool(current == replacement)


def _format_value(value: Any) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else str(value)


def check_missing(examined: ExaminedModel) -> list[Finding]:
    """Return the finding that the config of a live model records a patch that the model does not have."""
    record = examined.record
    name = record.get("scheme") if isinstance(record, dict) else record
    return [Finding(
        "record_faulty", "error", f"config.{RECORD_KEY}", f"a patch with {name!r}", "the model has no patch",
        "Load the checkpoint with pe_patch.load_patched instead of from_pretrained.",
    )]  # fmt: skip
