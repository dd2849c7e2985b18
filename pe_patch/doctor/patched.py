"""Whether a patch is what its record says: in a checkpoint, and at the joints of a live model."""

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
from ..patching.build import Patch
from ..patching.config import RECORD_KEY, VERSION
from ..schemes.registry import SCHEMES
from ..schemes.rope import Rotation
from .effect import numbers_told, plain_base
from .finding import Finding
from .subject import Subject, Turning, build_empty, quiet

REMEDY = "Save the patched model again with save_pretrained, or patch the original model again."


def check_record(subject: Subject) -> list[Finding]:
    """The record of a checkpoint: a scheme that exists, options that it takes, and a model that it fits."""
    record: Any = subject.record
    if fault := _fault(record):
        return [fault]
    if subject.model is None:
        return []
    plain = _turnings_without_record(subject)
    framework = {key: record[key] for key in ("layers", "submodule", "keep_native", "strict") if key in record}
    try:
        with quiet():
            restore_patch(subject.model, record["scheme"], record["options"], framework)
    except PePatchError as error:
        claimed = f"{record['scheme']}({', '.join(f'{key}={value}' for key, value in record['options'].items())})"
        return [_faulty(".options", claimed, f"cannot be applied: {error}")]
    patch = find_patch(subject.model)
    assert patch is not None
    return [*_window(subject, patch), *(f for turning in plain for f in _disagrees(patch, turning))]


def _fault(record: Any) -> Finding | None:
    """What is wrong with a record, whatever the model."""
    parts = record if isinstance(record, dict) else {}
    if missing := {"scheme", "options", "native"} - parts.keys():
        return _faulty("", "a record of a patch", f"it lacks {', '.join(sorted(missing))}")
    scheme = str(record["scheme"])
    if scheme not in SCHEMES:
        remedy = "Correct the name (pe-patch list schemes shows all), or import what defines the scheme first."
        return _faulty(".scheme", f"scheme {scheme!r}", f"no such scheme.{nearest(scheme, SCHEMES)}", remedy)
    if record.get("version", 0) > VERSION:
        return _faulty("", f"version {record['version']}", f"versions up to {VERSION} are read", "Upgrade pe_patch.")
    try:
        SCHEMES[scheme].check_options(record["options"])
    except OptionError as error:
        return _faulty(".options", f"scheme {scheme!r}", str(error))
    return None


def _faulty(part: str, claimed: str, in_effect: str, remedy: str = REMEDY) -> Finding:
    return Finding("record_faulty", "error", f"config.{RECORD_KEY}{part}", claimed, in_effect, remedy)


def _turnings_without_record(subject: Subject) -> list[Turning]:
    """What plain Transformers, which does not read the record, would turn by; nothing where it refuses to load."""
    said = {key: value for key, value in subject.said.items() if key != RECORD_KEY}
    plain = Subject(subject.name, said)
    try:
        with quiet():
            plain.config = type(subject.config).from_dict(said)
            plain.model = build_empty(plain.config, said)
            return plain.turnings()
    except Exception:  # refusing is what such a checkpoint is to do
        return []


def _disagrees(patch: Patch, turning: Turning) -> Iterator[Finding]:
    scheme = patch.scheme_by_layer_type.get(turning.kind)
    if not isinstance(scheme, Rotation) or keeps_rotation(scheme) or patch.arguments.get("layers") is not None:
        return
    expected, factor = scheme.frequencies(None)
    same = expected.shape == turning.inv_freq.shape and torch.allclose(expected, turning.inv_freq, rtol=1e-5, atol=0)
    if not same or not math.isclose(factor, turning.attention_factor, rel_tol=1e-5):
        plain = "plain RoPE" if plain_base(turning.inv_freq) else "other numbers"
        yield Finding(
            "record_disagrees", "error", f"config.{RECORD_KEY}, rope_parameters",
            f"{scheme.name}({scheme.extra_repr()}) in the record",
            f"load_patched turns by it, and Transformers without pe_patch by {plain}: "
            + numbers_told(turning.inv_freq, turning.attention_factor),
            REMEDY,
        )  # fmt: skip


def _window(subject: Subject, patch: Patch) -> Iterator[Finding]:
    window, written = patch.scheme.effective_window, subject.text.get("max_position_embeddings")
    if window is not None and written is not None and written != window:
        yield Finding(
            "factor_mismatch", "error", "max_position_embeddings", f"max_position_embeddings={written}",
            f"{patch.scheme.name!r} reaches {window} tokens", f'Write "max_position_embeddings": {window}.',
        )  # fmt: skip


def check_live(subject: Subject, patch: Patch) -> list[Finding]:
    """Whether everything that a patch put in place is still there."""
    findings = []
    names = {id(module): name for name, module in patch.model.named_modules()}
    for swap in patch.swaps:
        if _matters(swap) and not _same(current := _current(swap), swap.replacement):
            owner = names.get(id(swap.owner), "config") or type(patch.model).__name__
            findings.append(Finding(
                "patch_overwritten", "error", f"{owner}.{swap.attribute}",
                f"{patch.scheme.name!r}: {_told(swap.replacement)}", _told(current),
                "Change nothing beneath a patch: unpatch_model(model), then patch_model(model, ...) again.",
            ))  # fmt: skip
    return findings


def _matters(swap: Swap) -> bool:
    """What a wrapper may put itself round is not compared, nor what follows the choice of an attention."""
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


def _told(value: Any) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else str(value)


def check_missing(subject: Subject) -> list[Finding]:
    """A live model whose config records a patch that it does not carry."""
    record = subject.record
    name = record.get("scheme") if isinstance(record, dict) else record
    return [Finding(
        "record_faulty", "error", f"config.{RECORD_KEY}", f"a patch with {name!r}", "the model carries no patch",
        "Load the checkpoint with pe_patch.load_patched instead of from_pretrained.",
    )]  # fmt: skip
