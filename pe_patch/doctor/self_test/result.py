"""The result of a self-test, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "failed", "skipped"]

TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0"}
"""The versions that this release is tested with, as in constraints.txt."""

COLOURS: dict[Status, str] = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


@dataclass(frozen=True)
class Check:
    """One comparison."""

    model: str
    mechanism: str
    """The mechanism of the scheme, for example "bias"; "native" is the unpatched model."""
    scheme: str
    check: str
    """The comparison, in a few words."""
    status: Status
    difference: float | None = None
    """The largest difference, relative to the largest logit if that exceeds 1; None if nothing was compared."""
    tolerance: float | None = None
    message: str = ""
    """The place of the largest difference, or the reason why the check failed or was skipped."""

    @property
    def subject(self) -> str:
        """The model and the scheme, in words."""
        under = "without a patch" if self.mechanism == "native" else f"under {self.scheme!r} ({self.mechanism})"
        return f"{self.model} {under}"


@dataclass(frozen=True)
class SelfTest:
    """The checks of a self-test in order, with the installed versions and the time taken."""

    versions: dict[str, str]
    checks: list[Check]
    seconds: float

    @property
    def passed(self) -> bool:
        """True if at least one check passed and none failed."""
        return self.first_failure is None and any(check.status == "ok" for check in self.checks)

    @property
    def first_failure(self) -> Check | None:
        """The first check that failed, or None."""
        return next((check for check in self.checks if check.status == "failed"), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain lists, dicts, numbers and strings."""
        return {
            "passed": self.passed,
            "versions": dict(self.versions),
            "tested_versions": dict(TESTED),
            "seconds": round(self.seconds, 2),
            "summary": self.summary(),
            "checks": [asdict(check) for check in self.checks],
        }

    def summary(self) -> str:
        """Return one sentence on success, or the first failure with its size, place and remedy."""
        failure = self.first_failure
        counts = {name: sum(check.status == name for check in self.checks) for name in COLOURS}
        if failure is None:
            skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
            return f"All {counts['ok']} checks passed{skipped}."
        if failure.difference is None:
            first = f'First failure, on {failure.subject}: "{failure.check}" could not be checked: {failure.message}.'
        else:
            first = (
                f'First difference, on {failure.subject}: "{failure.check}" does not hold. The logits differ by '
                f"{failure.difference:.3g} {failure.message}; {failure.tolerance:.3g} is allowed."
            )
        return f"{first} {counts['failed']} of {sum(counts.values())} checks failed. {self.remedy()}"

    def remedy(self) -> str:
        """Return what to do about a failure with these versions."""
        # A build for one device adds a suffix to the version, for example 2.13.0+cpu.
        other = [name for name in TESTED if self.versions.get(name, "").partition("+")[0] != TESTED[name]]
        wanted = " ".join(f"{name}=={TESTED[name]}" for name in other)
        if not other:
            return (
                "This release of pe_patch is tested with these versions: please report this result "
                "(pe-patch selftest --json). Do not rely on the patched model until the difference is explained."
            )
        installed = ", ".join(f"{name} {self.versions.get(name)} (tested: {TESTED[name]})" for name in other)
        return (
            f"This release of pe_patch is tested with other versions: {installed}. Run "
            f"`pip install {wanted}`, or upgrade pe_patch, and run the self-test again."
        )


def installed_versions() -> dict[str, str]:
    """Return the versions of pe_patch and of the libraries that it changes."""
    versions = {}
    for name in ("pe_patch", *TESTED):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def render(result: SelfTest) -> Group:
    """Lay out the versions, a table of checks for each model, and the summary for a terminal."""
    versions = ", ".join(f"{name} {value}" for name, value in result.versions.items())
    blocks: list[RenderableType] = [Text(versions, style="dim")]
    for model in dict.fromkeys(check.model for check in result.checks):
        blocks.append(_table(model, [check for check in result.checks if check.model == model]))
    style = "bold green" if result.passed else "bold red"
    return Group(*blocks, Text(result.summary(), style=style), Text(f"{result.seconds:.0f} s", style="dim"))


def _table(model: str, checks: list[Check]) -> Table:
    table = Table(title=Text(model), title_justify="left")
    for name in ("mechanism", "scheme", "check"):
        table.add_column(name)
    for name in ("largest difference", "allowed"):
        table.add_column(name, justify="right")
    table.add_column("result", overflow="fold")
    last = ""
    for check in checks:
        first = check.scheme != last
        status = Text(check.status, style=COLOURS[check.status])
        if check.status != "ok":
            status.append(f": {check.message}", style="default")
        table.add_row(
            check.mechanism if first else "", Text(check.scheme if first else ""), check.check,
            _number(check.difference), _number(check.tolerance), status,
        )  # fmt: skip
        last = check.scheme
    return table


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
