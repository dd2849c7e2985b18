"""What an examination found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import printable

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


def one_line(text: str) -> str:
    """Return text that may quote a checkpoint as one line that is safe to print."""
    return printable(" ".join(text.split("\n")), keep="")


@dataclass(frozen=True)
class Finding:
    """One fault: what is claimed, what is in effect instead, and what to do."""

    code: str
    """The kind of fault in a word, such as "theta_lost"."""
    severity: Severity
    """An "error" is where the model does not do what its config says, a "warning" where it may not do what is meant."""
    where: str
    """The key of the config, the file or the module."""
    claimed: str
    in_effect: str
    remedy: str

    def __post_init__(self) -> None:
        for name in ("where", "claimed", "in_effect", "remedy"):
            object.__setattr__(self, name, one_line(getattr(self, name)))


@dataclass(frozen=True)
class Diagnosis:
    """All that an examination found, what it looked at, and the numbers in effect."""

    subject: str
    family: str
    transformers: str
    findings: list[Finding]
    checked: list[str]
    """What was looked at, in words."""
    effective: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By layer type ("all" where there are none): the base, the window, the factor on cos and sin, the wavelengths."""

    def __post_init__(self) -> None:
        for name in ("subject", "family"):
            object.__setattr__(self, name, one_line(getattr(self, name)))

    @property
    def healthy(self) -> bool:
        """Whether no fault is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists, dicts, numbers and strings."""
        return asdict(self) | {"healthy": self.healthy}
