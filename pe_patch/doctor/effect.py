"""Whether the built modules turn by what the config claims."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..adapters import ADAPTERS
from ..adapters.trained_window import TrainedWindow, trained_window
from ..core.scheme import Scheme
from ..errors import PePatchError
from ..schemes.config_formats import Reading, Specification
from ..schemes.registry import SCHEMES
from ..schemes.rope import Rotation
from .claims import filled_in, rope_dicts, short
from .finding import Finding
from .subject import Subject, Turning

DEFAULT_BASE = 10000.0


def claim_of(reading: Reading, turning: Turning) -> Specification | None:
    """What is claimed of one kind of layer. A flat claim on a family with layer types speaks of those that look far."""
    if isinstance(reading, Specification):
        return reading if turning.kind in (None, "full_attention") else None
    if turning.kind is None:
        return reading.get("full_attention") or next(iter(reading.values()))
    return reading.get(turning.kind)


def compare(subject: Subject, reading: Reading) -> list[Finding]:
    """Findings where frequencies, their base, the factor on cos and sin, or the window differ from the claim."""
    turnings = [turning for turning in subject.turnings() if claim_of(reading, turning) is not None]
    if not turnings and not subject.refusal:
        return list(_without_rotation(subject, reading))
    findings: list[Finding] = []
    for turning in turnings:
        claim = claim_of(reading, turning)
        if claim is not None and claim.scheme != "nope":
            findings += _Comparison(subject, turning, claim).findings()
    if getattr(subject.text_config, "alibi", False) and findings == []:
        findings += _without_rotation(subject, reading)
    return findings


def _without_rotation(subject: Subject, reading: Reading) -> Iterator[Finding]:
    """A scaling in the config of a model in which nothing would read it."""
    claims = [reading] if isinstance(reading, Specification) else list(reading.values())
    scaled = [claim for claim in claims if claim.scheme not in ("rope", "nope")]
    if scaled and subject.model is not None:
        adapter = ADAPTERS.get(subject.family)
        alibi = getattr(subject.text_config, "alibi", False) or (adapter and adapter.alibi)
        native = "ALiBi" if alibi else "a learned table" if adapter and adapter.learned else "its own code"
        options = ", ".join(f"{key}={value!r}" for key, value in scaled[0].options.items())
        other = "pe_patch has no adapter for this family."
        if adapter is not None:
            other = f"For this scheme on this family: patch_model(model, {scaled[0].scheme!r}, {options})."
        yield Finding(
            "scaling_ignored", "error", next(iter(dict(rope_dicts(subject.said))), "rope_parameters"),
            told(scaled[0]),
            f"nothing: {subject.family} has its positions from {native}, and no module of it reads rotary parameters",
            f"Remove the key. {other}",
        )  # fmt: skip


def told(claim: Specification) -> str:
    """A specification in words."""
    return f"{claim.scheme}({', '.join(f'{key}={short(value)}' for key, value in claim.options.items())})"


def plain_base(inv_freq: Tensor, written: Any = None) -> float | None:
    """The base whose unscaled frequencies these are, or None; the `written` one where it fits."""
    width, built = 2 * inv_freq.shape[-1], inv_freq.double()
    if width < 4 or built[1] <= 0:
        return None
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    told = float(built[1]) ** (-1 / float(exponent[1]))
    candidates = [float(written), told] if isinstance(written, int | float) and written > 0 else [told]
    fitting = (base for base in candidates if torch.allclose(built, base**-exponent, rtol=_tolerance(inv_freq), atol=0))
    return next(fitting, None)


def _tolerance(inv_freq: Tensor) -> float:
    return 1e-5 if inv_freq.dtype in (torch.float32, torch.float64) else 2e-2


class _Comparison:
    """One rotary module beside one claim."""

    def __init__(self, subject: Subject, turning: Turning, claim: Specification) -> None:
        self.subject, self.turning, self.claim = subject, turning, claim
        self.parameters = subject.parameters(turning.kind)
        self.plain = plain_base(turning.inv_freq, self.parameters.get("rope_theta"))
        self.where = f"{turning.name}.{turning.kind}" if turning.kind else turning.name
        written = self.parameters.get("rope_theta")
        self.base = float(self.plain or (written if isinstance(written, int | float) else DEFAULT_BASE))
        """The base in effect, as far as the frequencies tell."""
        self.claimed_base = float(claim.options.get("theta") or self.base)
        trained = self.parameters.get("original_max_position_embeddings") or subject.window
        self.trained = int(trained or 1)

    def scheme(self, name: str, base: float, **options: Any) -> Rotation | None:
        """A rotary scheme of the width that was built; None for one that is none."""
        if not issubclass(SCHEMES[name], Rotation):
            return None
        made: Scheme = SCHEMES[name](self.subject.shape(self.turning, base, self.trained), **options)
        return made if isinstance(made, Rotation) else None

    def claimed(self, base: float) -> Rotation | None:
        options = {key: value for key, value in self.claim.options.items() if key != "theta"}
        return self.scheme(self.claim.scheme, base, **options)

    def fits(self, scheme: Rotation | None) -> bool:
        if scheme is None:
            return False
        expected, built = scheme.frequencies(None)[0], self.turning.inv_freq.float()
        return expected.shape == built.shape and torch.allclose(
            expected, built, rtol=_tolerance(self.turning.inv_freq), atol=0
        )

    def findings(self) -> list[Finding]:
        part = self.claim.partial_rotary_factor
        head = self.subject.head_dim
        if part is not None and head and abs(int(head * part) - self.turning.width) > 1:
            return [self._finding(
                "scaling_ignored", f"partial_rotary_factor={part:g}: {int(head * part)} of {head} dimensions rotate",
                f"{self.turning.width} dimensions rotate", "Write partial_rotary_factor into rope_parameters.",
            )]  # fmt: skip
        try:
            scheme = self.claimed(self.claimed_base)
            other_base = self.claimed(self.base)
        except PePatchError as error:
            return [self._finding("bad_value", told(self.claim), self.built(), str(error))]
        if scheme is None:
            return []
        lost = not math.isclose(self.base, self.claimed_base, rel_tol=1e-3)
        if self.fits(scheme):
            return [*self._other_factor(scheme), *self._other_window(scheme), *self._other_list(scheme)]
        if lost and self.fits(other_base):
            return [self._theta_lost(scheme)]
        ignored = self.plain is not None and self.claim.scheme != "rope"
        found = [self._finding("scaling_ignored", self.numbers(scheme), self.built(scheme), self.remedy(scheme))] if (
            ignored or not lost) else []  # fmt: skip
        return found + ([self._theta_lost(scheme)] if lost else [])

    def _finding(self, code: str, claimed: str, in_effect: str, remedy: str) -> Finding:
        return Finding(code, "error", self.where, claimed, in_effect, remedy)

    def built(self, scheme: Rotation | None = None) -> str:
        """What the module turns by, in words and numbers."""
        what = "" if self.plain is None else f"plain RoPE with base {self.plain:.10g}: "
        return what + numbers_told(self.turning.inv_freq.float(), self.turning.attention_factor, self._pair(scheme))

    def numbers(self, scheme: Rotation) -> str:
        """What is claimed, in words and numbers."""
        return f"{told(self.claim)}: {numbers_told(*scheme.frequencies(None), self._pair(scheme))}"

    def _pair(self, scheme: Rotation | None) -> int:
        """The pair whose frequency differs most from the claim; the last where that cannot be told."""
        built = self.turning.inv_freq.float()
        expected = built if scheme is None else scheme.frequencies(None)[0]
        if expected.shape != built.shape or not (built > 0).all() or not (expected > 0).all():
            return -1
        gap = (expected.log() - built.log()).abs()
        return int(gap.argmax()) if float(gap.max() - gap[-1]) > 1e-4 else -1

    def _theta_lost(self, scheme: Rotation) -> Finding:
        reload = " and load the model again" if self.subject.live else ""
        return self._finding(
            "theta_lost", f"base {self.claimed_base:.10g}",
            f"base {self.base:.10g}: {numbers_told(self.turning.inv_freq.float(), 1)}",
            f'Write "rope_theta": {self.claimed_base:.10g} into the rotary parameters that are read{reload}.',
        )  # fmt: skip

    def remedy(self, scheme: Rotation) -> str:
        """The lines of the config that Transformers does read, or the call for a live model."""
        if self.subject.live:
            options = ", ".join(f"{key}={value!r}" for key, value in self.claim.options.items() if key != "theta")
            return (
                f"A config is read when the model is built: load it again with this config, or "
                f"patch_model(model, {self.claim.scheme!r}, {options})."
            )
        written = scheme.native()
        if written is None:
            return f"Transformers has no such scheme: patch_model(model, {self.claim.scheme!r}, ...)."
        if self.turning.kind is not None:
            outside = {}
            if written.get("truncate") is False:  # read beside the dicts of layer types alone
                outside = {"truncate": written.pop("truncate")}
            own = getattr(self.subject.text_config, "rope_parameters", None) or {}
            others = {kind: dict(value) for kind, value in own.items() if isinstance(value, dict)}
            written = {**others, self.turning.kind: written, **outside}
        place = "text_config" if self.subject.text is not self.subject.said else "the config"
        return f'In {place} write "rope_parameters": {json.dumps(written)}, and remove rope_scaling.'

    def _other_factor(self, scheme: Rotation) -> Iterator[Finding]:
        expected, built = scheme.frequencies(None)[1], self.turning.attention_factor
        if not math.isclose(expected, built, rel_tol=1e-5):
            yield self._finding(
                "attention_factor", f"{told(self.claim)}: cos and sin times {expected:.4f}",
                f"cos and sin times {built:.4f}", f'Write "attention_factor": {expected!r} into rope_parameters.',
            )  # fmt: skip

    def _other_window(self, scheme: Rotation) -> Iterator[Finding]:
        """Dynamic NTK begins where its window ends, which Transformers reads from max_position_embeddings."""
        begins = getattr(self.turning.module, "original_max_seq_len", scheme.trained_window)
        if self.claim.scheme == "dynamic_ntk" and begins != scheme.trained_window:
            yield self._finding(
                "scaling_ignored", f"dynamic scaling beyond {scheme.trained_window} tokens",
                f"scaling begins beyond {begins} tokens: 'dynamic' reads max_position_embeddings and no other window",
                f'Write "max_position_embeddings": {scheme.trained_window} and remove '
                "original_max_position_embeddings.",
            )  # fmt: skip

    def _other_list(self, scheme: Rotation) -> Iterator[Finding]:
        """LongRoPE's list for sequences beyond the window."""
        parameters = self.parameters
        if self.claim.scheme != "longrope" or "original_max_position_embeddings" not in parameters:
            return
        trained = int(parameters["original_max_position_embeddings"])
        config: Any = self.turning.module.config
        built, _ = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), trained + 1, self.turning.kind)
        expected = scheme.frequencies(scheme.trained_window + 1)[0]
        if trained != scheme.trained_window or not torch.allclose(built, expected, rtol=1e-5, atol=0):
            yield self._finding(
                "scaling_ignored", f"long_factor beyond {scheme.trained_window} tokens: {numbers_told(expected, 1)}",
                f"beyond {trained} tokens: {numbers_told(built, 1)}", self.remedy(scheme),
            )  # fmt: skip


def numbers_told(inv_freq: Tensor, factor: float, pair: int = -1) -> str:
    """How fast one pair turns, and the factor on cos and sin, in words."""
    turns = float(inv_freq[pair])
    which = "the slowest pair" if pair == -1 else f"pair {pair}"
    often = f"turns once in {2 * math.pi / turns:,.0f} tokens" if turns > 0 else "stands still"
    return f"{which} {often}" + (f", cos and sin times {factor:.4f}" if factor != 1 else "")


def windows(subject: Subject, turning: Turning) -> dict[str, Any]:
    """Return the window before any scaling, the one with it, what the config allows, and the sources."""
    known = trained_window(subject.model, subject.text_config, turning.kind)
    if filled_in(subject):
        known = TrainedWindow(source="the config names no window")
    return {
        "trained_window": known.length,
        "trained_window_source": known.source,
        "scaled_window": known.scaled_length,
        "window": subject.window,
    }


def effective(subject: Subject) -> dict[str, dict[str, Any]]:
    """The numbers in effect for each kind of layer."""
    found: dict[str, dict[str, Any]] = {}
    for turning in subject.turnings():
        parameters, inv_freq = subject.parameters(turning.kind), turning.inv_freq.double()
        turning_pairs = inv_freq[inv_freq > 0]
        found[turning.kind or "all"] = {
            "base": plain_base(turning.inv_freq, parameters.get("rope_theta")) or parameters.get("rope_theta"),
            **windows(subject, turning),
            "rotary_dim": turning.width,
            "attention_factor": turning.attention_factor,
            "wavelengths_in_tokens": [round(2 * math.pi / value, 2) for value in turning_pairs.tolist()],
            "dtype": str(turning.inv_freq.dtype).removeprefix("torch."),
        }
    return found
