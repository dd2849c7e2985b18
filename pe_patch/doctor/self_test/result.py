"""What a self-test found, as a table and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "failed", "skipped"]

TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0"}
"""The versions that the tests of this release run with, as in constraints.txt."""

COLOURS: dict[Status, str] = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


@dataclass(frozen=True)
class Check:
    """One comparison."""

    model: str
    mechanism: str
    """The mechanism of the scheme, such as "bias"; "native" is the model without a patch."""
    scheme: str
    check: str
    """What is compared, in a few words."""
    status: Status
    difference: float | None = None
    """The largest difference, relative to the largest logit where that exceeds 1; None if there is nothing to
    compare."""
    tolerance: float | None = None
    message: str = ""
    """Where the largest difference is, or why the check failed or was skipped."""

    @property
    def subject(self) -> str:
        """Name the model and the scheme in words."""
        under = "without a patch" if self.mechanism == "native" else f"under {self.scheme!r} ({self.mechanism})"
        return f"{self.model} {under}"


@dataclass(frozen=True)
class SelfTest:
    """The checks of a self-test in the order in which they ran, the versions they ran with, and the time they took."""

    versions: dict[str, str]
    checks: list[Check]
    seconds: float

    @property
    def passed(self) -> bool:
        """Return whether something was checked and no check failed."""
        return self.first_failure is None and any(check.status == "ok" for check in self.checks)

    @property
    def first_failure(self) -> Check | None:
        """Return the first check that failed, or None."""
        return next((check for check in self.checks if check.status == "failed"), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain lists, dicts, numbers and strings."""
        return {
            "passed": self.passed,
            "versions": dict(self.versions),
            "tested_versions": dict(TESTED),
            "seconds": round(self.seconds, 2),
            "summary": self.summary(),
            "checks": [asdict(check) for check in self.checks],
        }

    def summary(self) -> str:
        """Say in a sentence that all is well, or what differs first, where, by how much, and what to do."""
        failure = self.first_failure
        counts = {name: sum(check.status == name for check in self.checks) for name in COLOURS}
        if failure is None:
            skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
            return f"All {counts['ok']} checks passed{skipped}."
        if failure.difference is None:
            what = f'First failure, on {failure.subject}: "{failure.check}" could not be checked: {failure.message}.'
        else:
            what = (
                f'First difference, on {failure.subject}: "{failure.check}" does not hold. The logits differ by '
                f"{failure.difference:.3g} {failure.message}; {failure.tolerance:.3g} is allowed."
            )
        return f"{what} {counts['failed']} of {sum(counts.values())} checks failed. {self.remedy()}"

    def remedy(self) -> str:
        """Say what to do about a failure with these versions."""
        # A build for one device has the same version with an ending, such as 2.13.0+cpu.
        other = [name for name in TESTED if self.versions.get(name, "").partition("+")[0] != TESTED[name]]
        wanted = " ".join(f"{name}=={TESTED[name]}" for name in other)
        if not other:
            return (
                "These are the versions that this release of pe_patch is tested with: please report this result "
                "(pe-patch selftest --json). Do not rely on the patched model until it is explained."
            )
        installed = ", ".join(f"{name} {self.versions.get(name)} (tested: {TESTED[name]})" for name in other)
        return (
            f"Not the versions that this release of pe_patch is tested with: {installed}. Run "
            f"`pip install {wanted}`, or upgrade pe_patch, and run the self-test again."
        )


def installed_versions() -> dict[str, str]:
    """Return the versions of pe_patch and of the libraries that it changes the behaviour of."""
    found = {}
    for name in ("pe_patch", *TESTED):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def render(result: SelfTest) -> Group:
    """Return the versions, a line for each check, and the summary, for a terminal."""
    named = ", ".join(f"{name} {value}" for name, value in result.versions.items())
    parts: list[RenderableType] = [Text(named, style="dim")]
    for model in dict.fromkeys(check.model for check in result.checks):
        parts.append(_table(model, [check for check in result.checks if check.model == model]))
    style = "bold green" if result.passed else "bold red"
    return Group(*parts, Text(result.summary(), style=style), Text(f"{result.seconds:.0f} s", style="dim"))


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
        said = Text(check.status, style=COLOURS[check.status])
        if check.status != "ok":
            said.append(f": {check.message}", style="default")
        table.add_row(
            check.mechanism if first else "", Text(check.scheme if first else ""), check.check,
            _number(check.difference), _number(check.tolerance), said,
        )  # fmt: skip
        last = check.scheme
    return table


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
