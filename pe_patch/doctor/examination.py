"""Examine a checkpoint or a live model and collect the findings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import PePatchError, UnsupportedError
from ..patching.api import find_patch
from ..patching.record import RECORD_KEY
from ..schemes.config_formats import TYPES, Reading
from .claims import TYPES_OF_TRANSFORMERS, read_claim, rope_dicts
from .converted import announced_keys, check_converted
from .effect import compare, effective
from .examined import ExaminedModel, from_model, from_path, quiet
from .files import check_files
from .finding import SEVERITIES, Diagnosis, Finding
from .lengths import check_lengths
from .patched import check_live, check_missing, check_record


def examine(subject: str | Path | Any) -> list[Finding]:
    """Return the faults of a checkpoint or a live model, without changing it.

    Args:
        subject: a checkpoint folder, a config.json, a hub name or a live model.

    Returns:
        The findings, errors first; an empty list if there are none.

    Raises:
        OptionError: if the path does not exist.
        CheckpointError: if the config cannot be read.
    """
    return diagnose(subject).findings


def diagnose(subject: str | Path | Any) -> Diagnosis:
    """Return the faults together with the checks made and the numbers in effect.

    Takes and raises the same as `examine`. Loads no weights and changes nothing.
    """
    examined = from_path(subject) if isinstance(subject, str | Path) else from_model(subject)
    with quiet():
        findings, checked = _run_checks(examined)
        numbers = {} if examined.record else effective(examined)
    order = {severity: rank for rank, severity in enumerate(SEVERITIES)}
    findings = sorted(dict.fromkeys(findings), key=lambda finding: order[finding.severity])
    return Diagnosis(examined.name, examined.family, transformers.__version__, findings, checked, numbers)


def _run_checks(examined: ExaminedModel) -> tuple[list[Finding], list[str]]:
    """Return the findings, and the names of the checks made."""
    findings: list[Finding] = []
    checked = ["the live model's config" if examined.live else "keys of the config"]
    patch = find_patch(examined.model) if examined.live else None
    if patch is not None:
        findings += check_live(examined, patch)
        checked.append(f"the swaps of the patch {patch.scheme.name!r}")
    elif examined.record and examined.live:
        findings += check_missing(examined)
    elif examined.record:
        findings += check_record(examined)
        findings += _add_refusal(examined, []) if examined.refusal and not findings else []
        checked.append("the record of the patch, applied to the model without weights")
    else:
        reading, faults = read_claim(examined)
        findings += [*faults, *check_lengths(examined)]
        if examined.refusal is not None:
            findings = _add_refusal(examined, findings)
        else:
            findings += _compare_with_claim(examined, reading, findings, checked)
    findings += _check_precision(examined)
    if examined.gguf is not None and announced_keys(examined.gguf):
        findings += check_converted(examined.gguf)
        checked.append("the keys that the export beside the file announces")
    if examined.files or examined.folder:
        findings += check_files(examined)
        checked += [*examined.files, *(["names and types of the weights"] if _has_weights(examined) else [])]
    return findings, checked


def _has_weights(examined: ExaminedModel) -> bool:
    return examined.folder is not None and any(examined.folder.glob("*.safetensors"))


def _compare_with_claim(
    examined: ExaminedModel, reading: Reading | None, findings: list[Finding], checked: list[str]
) -> list[Finding]:
    """Compare the built rotary modules with the claim of the config, if it makes one."""
    rotations = examined.rotations()
    if rotations:
        modules = ", ".join(sorted({rotation.name for rotation in rotations}))
        checked.append(f"frequencies of {modules}" if reading else f"dtype of the frequencies of {modules}")
    else:
        checked.append("that the model has no rotary module")
    errors = {finding.code for finding in findings if finding.severity == "error"}
    differences = compare(examined, reading) if reading else []
    # A missing window or a base written twice also changes the frequencies. Report that as one fault.
    consequence = {"window_missing": "scaling_ignored", "theta_lost": "theta_lost"}
    explained = {consequence.get(code) for code in errors}
    return [finding for finding in differences if finding.code not in explained]


def _add_refusal(examined: ExaminedModel, findings: list[Finding]) -> list[Finding]:
    """Add that Transformers does not load the model: to the first error, or as a separate finding."""
    error = examined.refusal
    message = " ".join(str(error).split())[:300]
    if "auto_map" in examined.raw_config and isinstance(error, UnsupportedError):
        remedy = "Load the model and examine it live."
        custom_code = Finding("not_examined", "note", "auto_map", "a model with custom code", message, remedy)
        return [*findings, custom_code]
    refusal = f"Transformers {transformers.__version__} refuses it"
    if not isinstance(error, PePatchError):
        refusal += f" with {type(error).__name__}"
    for index, finding in enumerate(findings):
        if finding.severity == "error":
            extended = replace(finding, in_effect=f"{finding.in_effect}; {refusal}: {message}")
            return [*findings[:index], extended, *findings[index + 1 :]]
    return [*findings, _does_not_load(examined, f"{refusal}: {message}")]


def _does_not_load(examined: ExaminedModel, in_effect: str) -> Finding:
    types = [(path, entries.get("rope_type", entries.get("type"))) for path, entries in rope_dicts(examined.raw_config)]
    unknown = [(path, rope_type) for path, rope_type in types if rope_type not in (None, *TYPES_OF_TRANSFORMERS)]
    where, claimed = "config", f"a model of the family {examined.raw_config.get('model_type')!r}"
    remedy = "Correct what the message names."
    if unknown:
        where, claimed = f"{unknown[0][0]}.rope_type", f"rope_type {unknown[0][1]!r}"
        remedy = _replace_type(str(unknown[0][1]))
    elif examined.raw_text_config is not examined.raw_config and types and not types[0][0].startswith("text_config"):
        remedy = f"Move {types[0][0]} into text_config, the config of the language model."
    return Finding("does_not_load", "error", where, claimed, in_effect, remedy)


def _replace_type(rope_type: str) -> str:
    """Return the remedy for a rope_type that Transformers does not know."""
    if rope_type == RECORD_KEY:
        return f"Restore config.{RECORD_KEY}, the saved record of the patch, and load with pe_patch.load_patched."
    types = sorted(TYPES_OF_TRANSFORMERS)
    same = [name for name in types if TYPES.get(name) == TYPES.get(rope_type) is not None]
    return f'Write "rope_type": "{same[0]}", its name in Transformers.' if same else f"Write one of {', '.join(types)}."


def _check_precision(examined: ExaminedModel) -> list[Finding]:
    """Find frequencies of a live model that were cast to half precision with its weights."""
    findings = []
    for rotation in examined.rotations() if examined.live else ():
        if rotation.inv_freq.dtype not in (torch.float32, torch.float64):
            dtype = str(rotation.inv_freq.dtype).removeprefix("torch.")
            step = torch.finfo(rotation.inv_freq.dtype).eps / 2
            error = (
                f"wrong by up to {step:.1%} each: {step * (examined.window or 4096):.1f} radians at the window's end"
            )
            findings.append(Finding(
                "low_precision", "error", f"{rotation.name}.inv_freq", "float32 frequencies", f"{dtype}, {error}",
                "Load with from_pretrained(..., dtype=torch.bfloat16), which keeps them in float32, instead of "
                "model.to(torch.bfloat16); or use patch_model(model, ...), whose frequencies stay float32 under casts.",
            ))  # fmt: skip
    return findings
