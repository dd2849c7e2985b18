"""What a checkpoint's config claims beside what the built model does, each difference with its remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import PePatchError, UnsupportedError
from ..patching.api import find_patch
from ..patching.config import RECORD_KEY
from ..schemes.config_formats import TYPES, Reading
from .claims import TYPES_OF_TRANSFORMERS, read_claim, rope_dicts
from .effect import compare, effective
from .files import check_files
from .finding import SEVERITIES, Diagnosis, Finding, Severity
from .lengths import check_lengths
from .patched import check_live, check_missing, check_record
from .self_test import selftest
from .subject import Subject, from_model, from_path, quiet

__all__ = ["Diagnosis", "Finding", "Severity", "diagnose", "examine", "selftest"]


def examine(subject: str | Path | Any) -> list[Finding]:
    """The faults of a checkpoint folder, a config.json, a hub name or a live model; an empty list where there are none.

    Raises:
        OptionError: where the path leads nowhere.
        CheckpointError: where there is no config that can be read.
    """
    return diagnose(subject).findings


def diagnose(subject: str | Path | Any) -> Diagnosis:
    """The same with what was looked at and the numbers in effect. Nothing is changed, and no weights are loaded."""
    patient = from_path(subject) if isinstance(subject, str | Path) else from_model(subject)
    with quiet():
        findings, checked = _look(patient)
        numbers = {} if patient.record else effective(patient)
    order = {severity: rank for rank, severity in enumerate(SEVERITIES)}
    findings = sorted(dict.fromkeys(findings), key=lambda finding: order[finding.severity])
    return Diagnosis(patient.name, patient.family, transformers.__version__, findings, checked, numbers)


def _look(subject: Subject) -> tuple[list[Finding], list[str]]:
    findings: list[Finding] = []
    checked = ["the live model's config" if subject.live else "keys of the config"]
    patch = find_patch(subject.model) if subject.live else None
    if patch is not None:
        findings += check_live(subject, patch)
        checked.append(f"the patch {patch.scheme.name!r} at its joints")
    elif subject.record and subject.live:
        findings += check_missing(subject)
    elif subject.record:
        findings += check_record(subject)
        findings += _refused(subject, []) if subject.refusal and not findings else []
        checked.append("the record of the patch, applied to the model without weights")
    else:
        reading, faults = read_claim(subject)
        findings += [*faults, *check_lengths(subject)]
        if subject.refusal is not None:
            findings = _refused(subject, findings)
        else:
            findings += _compared(subject, reading, findings, checked)
    findings += _precision(subject)
    if subject.files or subject.folder:
        findings += check_files(subject)
        checked += [*subject.files, *(["names and types of the weights"] if _weights(subject) else [])]
    return findings, checked


def _weights(subject: Subject) -> bool:
    return subject.folder is not None and any(subject.folder.glob("*.safetensors"))


def _compared(subject: Subject, reading: Reading | None, findings: list[Finding], checked: list[str]) -> list[Finding]:
    """The built modules beside the claim, where there are both."""
    turnings = subject.turnings()
    if turnings:
        modules = ", ".join(sorted({turning.name for turning in turnings}))
        checked.append(f"frequencies of {modules}" if reading else f"dtype of the frequencies of {modules}")
    else:
        checked.append("that nothing in the model rotates by a module")
    told = {finding.code for finding in findings if finding.severity == "error"}
    found = compare(subject, reading) if reading else []
    # a window that is missing, or a base written twice, moves the frequencies too: that is one fault
    cause = {"window_missing": "scaling_ignored", "theta_lost": "theta_lost"}
    return [finding for finding in found if finding.code not in {cause.get(code) for code in told}]


def _refused(subject: Subject, findings: list[Finding]) -> list[Finding]:
    """That Transformers does not load it: added to the fault that says why, or a finding of its own."""
    error = subject.refusal
    message = " ".join(str(error).split())[:300]
    if "auto_map" in subject.said and isinstance(error, UnsupportedError):
        own = Finding("not_examined", "note", "auto_map", "a model with code of its own", message, "Examine it live.")
        return [*findings, own]
    refusal = f"Transformers {transformers.__version__} refuses it"
    if not isinstance(error, PePatchError):
        refusal += f" with {type(error).__name__}"
    for index, finding in enumerate(findings):
        if finding.severity == "error":
            told = replace(finding, in_effect=f"{finding.in_effect}; {refusal}: {message}")
            return [*findings[:index], told, *findings[index + 1 :]]
    return [*findings, _does_not_load(subject, f"{refusal}: {message}")]


def _does_not_load(subject: Subject, in_effect: str) -> Finding:
    types = [(path, entries.get("rope_type", entries.get("type"))) for path, entries in rope_dicts(subject.said)]
    foreign = [(path, kind) for path, kind in types if kind not in (None, *TYPES_OF_TRANSFORMERS)]
    where, claimed = "config", f"a model of the family {subject.said.get('model_type')!r}"
    remedy = "Correct what the message names."
    if foreign:
        where, claimed = f"{foreign[0][0]}.rope_type", f"rope_type {foreign[0][1]!r}"
        remedy = _same_scheme(str(foreign[0][1]))
    elif subject.text is not subject.said and types and not types[0][0].startswith("text_config"):
        remedy = f"Move {types[0][0]} into text_config, whose model it is for."
    return Finding("does_not_load", "error", where, claimed, in_effect, remedy)


def _same_scheme(kind: str) -> str:
    """What to write in the place of a type that Transformers does not know."""
    if kind == RECORD_KEY:
        return f"Restore config.{RECORD_KEY}, the record of the patch, as it was saved, and use pe_patch.load_patched."
    types = sorted(TYPES_OF_TRANSFORMERS)
    same = [name for name in types if TYPES.get(name) == TYPES.get(kind) is not None]
    return f'Write "rope_type": "{same[0]}", its name in Transformers.' if same else f"Write one of {', '.join(types)}."


def _precision(subject: Subject) -> list[Finding]:
    """Frequencies of a live model that were cast along with its weights."""
    findings = []
    for turning in subject.turnings() if subject.live else ():
        if turning.inv_freq.dtype not in (torch.float32, torch.float64):
            dtype = str(turning.inv_freq.dtype).removeprefix("torch.")
            step = torch.finfo(turning.inv_freq.dtype).eps / 2
            error = f"wrong by up to {step:.1%} each: {step * (subject.window or 4096):.1f} radians at the window's end"
            findings.append(Finding(
                "low_precision", "error", f"{turning.name}.inv_freq", "float32 frequencies", f"{dtype}, {error}",
                "Load with from_pretrained(..., dtype=torch.bfloat16), which keeps them in float32, instead of "
                "model.to(torch.bfloat16); or patch_model(model, ...), whose frequencies no cast reaches.",
            ))  # fmt: skip
    return findings
