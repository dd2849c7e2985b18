"""The result of an examination: findings and a diagnosis."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import printable

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


def one_line(text: str) -> str:
    """Return text on one line and safe to print, even if it quotes a checkpoint."""
    return printable(" ".join(text.split("\n")), keep="")


@dataclass(frozen=True)
class Finding:
    """One fault: the claim of the config, the behaviour in effect, and the remedy."""

    code: str
    """The kind of fault, for example "theta_lost"."""
    severity: Severity
    """An "error" contradicts the config; a "warning" may not be intended; a "note" is for information."""
    where: str
    """The config key, the file or the module."""
    claimed: str
    in_effect: str
    remedy: str

    def __post_init__(self) -> None:
        for name in ("where", "claimed", "in_effect", "remedy"):
            object.__setattr__(self, name, one_line(getattr(self, name)))


@dataclass(frozen=True)
class Diagnosis:
    """All findings of an examination, the checks made, and the numbers in effect."""

    subject: str
    family: str
    transformers: str
    findings: list[Finding]
    checked: list[str]
    """The checks made, in words."""
    effective: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The base, windows, factor on cos and sin, and wavelengths, by layer type ("all" without layer types)."""

    def __post_init__(self) -> None:
        for name in ("subject", "family"):
            object.__setattr__(self, name, one_line(getattr(self, name)))

    @property
    def healthy(self) -> bool:
        """True if no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain lists, dicts, numbers and strings."""
        return asdict(self) | {"healthy": self.healthy}
