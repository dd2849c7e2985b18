"""Compare the frequencies of the built modules with the scheme that the config claims."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..adapters.trained_window import TrainedWindow, trained_window
from ..core.scheme import Scheme
from ..errors import PePatchError
from ..patching.inference import known_adapter
from ..schemes.config_formats import Reading, Specification
from ..schemes.registry import SCHEMES
from ..schemes.rotary import Rotation
from .claims import filled_in, format_value, rope_dicts
from .examined import BuiltRotation, ExaminedModel
from .finding import Finding

DEFAULT_BASE = 10000.0


def claim_of(reading: Reading, rotation: BuiltRotation) -> Specification | None:
    """Return the claim for one rotation; a flat claim on a family with layer types is for the full-attention layers."""
    if isinstance(reading, Specification):
        return reading if rotation.layer_type in (None, "full_attention") else None
    if rotation.layer_type is None:
        return reading.get("full_attention") or next(iter(reading.values()))
    return reading.get(rotation.layer_type)


def compare(examined: ExaminedModel, reading: Reading) -> list[Finding]:
    """Return findings where frequencies, base, factor on cos and sin, or window differ from the claim."""
    rotations = [rotation for rotation in examined.rotations() if claim_of(reading, rotation) is not None]
    if not rotations and not examined.refusal:
        return list(_without_rotation(examined, reading))
    findings: list[Finding] = []
    for rotation in rotations:
        claim = claim_of(reading, rotation)
        if claim is not None and claim.scheme != "nope":
            findings += _Comparison(examined, rotation, claim).findings()
    if getattr(examined.text_config, "alibi", False) and findings == []:
        findings += _without_rotation(examined, reading)
    return findings


def _without_rotation(examined: ExaminedModel, reading: Reading) -> Iterator[Finding]:
    """Find a scaling in the config of a model that has no rotary modules to read it."""
    claims = [reading] if isinstance(reading, Specification) else list(reading.values())
    scaled = [claim for claim in claims if claim.scheme not in ("rope", "nope")]
    if scaled and examined.model is not None:
        adapter = known_adapter(examined.model)
        alibi = getattr(examined.text_config, "alibi", False) or (adapter and adapter.alibi)
        native = "ALiBi" if alibi else "a learned table" if adapter and adapter.learned else "its own code"
        options = ", ".join(f"{key}={value!r}" for key, value in scaled[0].options.items())
        other = "pe_patch has no adapter for this family."
        if adapter is not None:
            other = f"For this scheme on this family: patch_model(model, {scaled[0].scheme!r}, {options})."
        yield Finding(
            "scaling_ignored", "error", next(iter(dict(rope_dicts(examined.raw_config))), "rope_parameters"),
            format_claim(scaled[0]),
            f"nothing: {examined.family} takes positions from {native}, and no module reads the rope parameters",
            f"Remove the key. {other}",
        )  # fmt: skip


def format_claim(claim: Specification) -> str:
    """Return a scheme with its options, for example `yarn(factor=4)`."""
    return f"{claim.scheme}({', '.join(f'{key}={format_value(value)}' for key, value in claim.options.items())})"


def plain_base(inv_freq: Tensor, written: Any = None) -> float | None:
    """Return the base that gives these frequencies without scaling, or None if no base does.

    Args:
        inv_freq: radians per token `[rotary_dim / 2]`.
        written: the base in the config, returned if it gives these frequencies within rounding.
    """
    width, built = 2 * inv_freq.shape[-1], inv_freq.double()
    if width < 4 or built[1] <= 0:
        return None
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    computed = float(built[1]) ** (-1 / float(exponent[1]))
    candidates = [float(written), computed] if isinstance(written, int | float) and written > 0 else [computed]
    fitting = (base for base in candidates if torch.allclose(built, base**-exponent, rtol=_tolerance(inv_freq), atol=0))
    return next(fitting, None)


def _tolerance(inv_freq: Tensor) -> float:
    return 1e-5 if inv_freq.dtype in (torch.float32, torch.float64) else 2e-2


class _Comparison:
    """Compare one built rotation with one claim."""

    def __init__(self, examined: ExaminedModel, rotation: BuiltRotation, claim: Specification) -> None:
        self.examined, self.rotation, self.claim = examined, rotation, claim
        self.parameters = examined.parameters(rotation.layer_type)
        self.plain = plain_base(rotation.inv_freq, self.parameters.get("rope_theta"))
        self.where = f"{rotation.name}.{rotation.layer_type}" if rotation.layer_type else rotation.name
        written = self.parameters.get("rope_theta")
        self.base = float(self.plain or (written if isinstance(written, int | float) else DEFAULT_BASE))
        """The base in effect: from the frequencies if they are unscaled, else the written one."""
        self.claimed_base = float(claim.options.get("theta") or self.base)
        trained = self.parameters.get("original_max_position_embeddings") or examined.window
        self.trained = int(trained or 1)

    def scheme(self, name: str, base: float, **options: Any) -> Rotation | None:
        """Build a rotary scheme for the width of the module; None if the scheme is not rotary."""
        if not issubclass(SCHEMES[name], Rotation):
            return None
        scheme: Scheme = SCHEMES[name](self.examined.shape(self.rotation, base, self.trained), **options)
        return scheme if isinstance(scheme, Rotation) else None

    def claimed(self, base: float) -> Rotation | None:
        """Build the claimed scheme with a base; None if it is not rotary."""
        options = {key: value for key, value in self.claim.options.items() if key != "theta"}
        return self.scheme(self.claim.scheme, base, **options)

    def fits(self, scheme: Rotation | None) -> bool:
        """Return whether a scheme gives the frequencies of the module."""
        if scheme is None:
            return False
        expected, built = scheme.frequencies(None)[0], self.rotation.inv_freq.float()
        return expected.shape == built.shape and torch.allclose(
            expected, built, rtol=_tolerance(self.rotation.inv_freq), atol=0
        )

    def findings(self) -> list[Finding]:
        """Return the differences between the claim and the module."""
        fraction = self.claim.partial_rotary_factor
        head = self.examined.head_dim
        if fraction is not None and head and abs(int(head * fraction) - self.rotation.width) > 1:
            claimed_width = int(head * fraction)
            return [self._finding(
                "scaling_ignored", f"partial_rotary_factor={fraction:g}: {claimed_width} of {head} dimensions rotate",
                f"{self.rotation.width} dimensions rotate", "Write partial_rotary_factor into rope_parameters.",
            )]  # fmt: skip
        try:
            scheme = self.claimed(self.claimed_base)
            other_base = self.claimed(self.base)
        except PePatchError as error:
            return [self._finding("bad_value", format_claim(self.claim), self.built(), str(error))]
        if scheme is None:
            return []
        lost = not math.isclose(self.base, self.claimed_base, rel_tol=1e-3)
        if self.fits(scheme):
            return [*self._other_factor(scheme), *self._other_window(scheme), *self._other_list(scheme)]
        if lost and self.fits(other_base):
            return [self._theta_lost(scheme)]
        ignored = self.plain is not None and self.claim.scheme != "rope"
        findings = []
        if ignored or not lost:
            findings.append(
                self._finding("scaling_ignored", self.numbers(scheme), self.built(scheme), self.remedy(scheme))
            )
        return findings + ([self._theta_lost(scheme)] if lost else [])

    def _finding(self, code: str, claimed: str, in_effect: str, remedy: str) -> Finding:
        return Finding(code, "error", self.where, claimed, in_effect, remedy)

    def built(self, scheme: Rotation | None = None) -> str:
        """Describe the frequencies of the module."""
        prefix = "" if self.plain is None else f"plain RoPE with base {self.plain:.10g}: "
        return prefix + format_frequencies(
            self.rotation.inv_freq.float(), self.rotation.attention_factor, self._pair(scheme)
        )

    def numbers(self, scheme: Rotation) -> str:
        """Describe the claimed frequencies."""
        return f"{format_claim(self.claim)}: {format_frequencies(*scheme.frequencies(None), self._pair(scheme))}"

    def _pair(self, scheme: Rotation | None) -> int:
        """Return the pair whose frequency differs most from the claim; -1, the last pair, if that is unclear."""
        built = self.rotation.inv_freq.float()
        expected = built if scheme is None else scheme.frequencies(None)[0]
        if expected.shape != built.shape or not (built > 0).all() or not (expected > 0).all():
            return -1
        gap = (expected.log() - built.log()).abs()
        return int(gap.argmax()) if float(gap.max() - gap[-1]) > 1e-4 else -1

    def _theta_lost(self, scheme: Rotation) -> Finding:
        reload = " and load the model again" if self.examined.live else ""
        return self._finding(
            "theta_lost", f"base {self.claimed_base:.10g}",
            f"base {self.base:.10g}: {format_frequencies(self.rotation.inv_freq.float(), 1)}",
            f'Write "rope_theta": {self.claimed_base:.10g} into the rope parameters that Transformers reads{reload}.',
        )  # fmt: skip

    def remedy(self, scheme: Rotation) -> str:
        """Return the config lines that give the claimed scheme, or for a live model the call."""
        if self.examined.live:
            options = ", ".join(f"{key}={value!r}" for key, value in self.claim.options.items() if key != "theta")
            return (
                "Transformers reads the config only when it builds the model. Load it again with this config, or call "
                f"patch_model(model, {self.claim.scheme!r}, {options})."
            )
        written = scheme.native()
        if written is None:
            return f"Transformers does not have this scheme. Use patch_model(model, {self.claim.scheme!r}, ...)."
        if self.rotation.layer_type is not None:
            outside = {}
            if written.get("truncate") is False:  # Transformers reads it only beside the dicts of layer types
                outside = {"truncate": written.pop("truncate")}
            existing = getattr(self.examined.text_config, "rope_parameters", None) or {}
            others = {layer_type: dict(value) for layer_type, value in existing.items() if isinstance(value, dict)}
            written = {**others, self.rotation.layer_type: written, **outside}
        place = "text_config" if self.examined.raw_text_config is not self.examined.raw_config else "the config"
        return f'In {place} write "rope_parameters": {json.dumps(written)}, and remove rope_scaling.'

    def _other_factor(self, scheme: Rotation) -> Iterator[Finding]:
        expected, built = scheme.frequencies(None)[1], self.rotation.attention_factor
        if not math.isclose(expected, built, rel_tol=1e-5):
            yield self._finding(
                "attention_factor", f"{format_claim(self.claim)}: cos and sin times {expected:.4f}",
                f"cos and sin times {built:.4f}", f'Write "attention_factor": {expected!r} into rope_parameters.',
            )  # fmt: skip

    def _other_window(self, scheme: Rotation) -> Iterator[Finding]:
        """Check where Dynamic NTK begins: Transformers reads its window only from max_position_embeddings."""
        begins = getattr(self.rotation.module, "original_max_seq_len", scheme.trained_window)
        if self.claim.scheme == "dynamic_ntk" and begins != scheme.trained_window:
            yield self._finding(
                "scaling_ignored", f"dynamic scaling beyond {scheme.trained_window} tokens",
                f"scaling begins beyond {begins} tokens: 'dynamic' reads its window only from max_position_embeddings",
                f'Write "max_position_embeddings": {scheme.trained_window} and remove '
                "original_max_position_embeddings.",
            )  # fmt: skip

    def _other_list(self, scheme: Rotation) -> Iterator[Finding]:
        """Check LongRoPE's list for sequences beyond the window."""
        parameters = self.parameters
        if self.claim.scheme != "longrope" or "original_max_position_embeddings" not in parameters:
            return
        trained = int(parameters["original_max_position_embeddings"])
        config: Any = self.rotation.module.config
        built, _ = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), trained + 1, self.rotation.layer_type)
        expected = scheme.frequencies(scheme.trained_window + 1)[0]
        if trained != scheme.trained_window or not torch.allclose(built, expected, rtol=1e-5, atol=0):
            yield self._finding(
                "scaling_ignored",
                f"long_factor beyond {scheme.trained_window} tokens: {format_frequencies(expected, 1)}",
                f"beyond {trained} tokens: {format_frequencies(built, 1)}", self.remedy(scheme),
            )  # fmt: skip


def format_frequencies(inv_freq: Tensor, factor: float, pair: int = -1) -> str:
    """Describe the frequency of one pair and the factor on cos and sin.

    Args:
        inv_freq: radians per token `[rotary_dim / 2]`.
        factor: the factor on cos and sin; left out if 1.
        pair: the index of the pair; -1 is the slowest.
    """
    frequency = float(inv_freq[pair])
    name = "the slowest pair" if pair == -1 else f"pair {pair}"
    speed = f"turns once in {2 * math.pi / frequency:,.0f} tokens" if frequency > 0 else "does not rotate"
    return f"{name} {speed}" + (f", cos and sin times {factor:.4f}" if factor != 1 else "")


def windows(examined: ExaminedModel, rotation: BuiltRotation) -> dict[str, Any]:
    """Return the trained window without and with scaling, its source, and the window that the config allows."""
    trained = trained_window(examined.model, examined.text_config, rotation.layer_type)
    if filled_in(examined):
        trained = TrainedWindow(source="the config names no window")
    return {
        "trained_window": trained.length,
        "trained_window_source": trained.source,
        "scaled_window": trained.scaled_length,
        "window": examined.window,
    }


def effective(examined: ExaminedModel) -> dict[str, dict[str, Any]]:
    """Return the numbers in effect by layer type, or under "all" without layer types."""
    numbers: dict[str, dict[str, Any]] = {}
    for rotation in examined.rotations():
        parameters, inv_freq = examined.parameters(rotation.layer_type), rotation.inv_freq.double()
        rotating = inv_freq[inv_freq > 0]
        numbers[rotation.layer_type or "all"] = {
            "base": plain_base(rotation.inv_freq, parameters.get("rope_theta")) or parameters.get("rope_theta"),
            **windows(examined, rotation),
            "rotary_dim": rotation.width,
            "attention_factor": rotation.attention_factor,
            "wavelengths_in_tokens": [round(2 * math.pi / value, 2) for value in rotating.tolist()],
            "dtype": str(rotation.inv_freq.dtype).removeprefix("torch."),
        }
    return numbers
