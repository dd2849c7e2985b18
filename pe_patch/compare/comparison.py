"""Collect the results of a comparison: scores, costs, and the table of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.results import Pivot, Results, pivots
from . import timing
from .compared_scheme import ComparedScheme
from .settings import Folder, Settings, read_json
from .worker import rows_of

Line = dict[str, Any]


@dataclass
class Comparison:
    """The finished results of a comparison."""

    settings: Settings
    rows: Results
    """All measurements, in the order of the compared schemes; `scheme` is the label of a scheme and its stage."""
    facts: dict[str, dict[str, Any]]
    """By the same label: parameters, cache bytes, peak memory, time ratios, training seconds."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """Schemes that cannot work on this model, with the reason."""
    failures: dict[str, str] = field(default_factory=dict)
    """Schemes whose run failed, with the reason."""

    def table(self) -> list[Line]:
        """Return one line for each scheme and stage: a dict from column to value, None where there is no value.

        `forward`, `decode` and `train` are times relative to the unpatched model. `loss` and `retrieval` map a length
        to a
        score. `loss_change` is the loss at the window minus that of the unpatched model before training. `why` is the
        reason if a line has no numbers.
        """
        lines: list[Line] = []
        for compared in self.settings.contenders:
            labels = [self.settings.label(compared, stage) for stage in self.settings.stages]
            measured = [label for label in labels if label in self.facts]
            own_lines = [self._line(label, compared) for label in measured]
            if len(measured) < len(labels):
                reason = self.unsupported.get(compared.label) or self.failures.get(compared.label)
                missing = compared.label if not measured else labels[-1]
                own_lines.append(
                    {"scheme": missing, "options": dict(compared.options), "why": reason or "not measured yet"}
                )
            lines += own_lines
        self._add_changes(lines)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the table, the settings and the failures, as a dict for JSON."""
        return {
            "settings": self.settings.record(),
            "table": self.table(),
            "facts": self.facts,
            "unsupported": self.unsupported,
            "failures": self.failures,
            "retrieval": [f"{pivot.task}: {pivot.measure}" for pivot in self._retrieval()],
            "measured_on": self.rows.values("measured_on"),
        }

    def _line(self, label: str, compared: ComparedScheme) -> Line:
        facts = self.facts[label]
        return {
            "scheme": label,
            "options": dict(compared.options),
            "why": None,
            **{name: facts.get(name) for name in COSTS},
            "loss": _scores(self._loss(), label),
            "retrieval": _mean_scores(self._retrieval(), label),
        }

    def _loss(self) -> Pivot | None:
        """Return the loss on the same tokens at every length if there is one, or any loss."""
        losses = [pivot for pivot in pivots(self.rows) if not pivot.higher_is_better]
        return next((pivot for pivot in losses if "fixed" in pivot.measure), losses[0] if losses else None)

    def _retrieval(self) -> list[Pivot]:
        return [pivot for pivot in pivots(self.rows) if pivot.higher_is_better]

    def _add_changes(self, lines: Sequence[Line]) -> None:
        start = self.settings.label(self.settings.contenders[0], self.settings.stages[0])
        losses = {line["scheme"]: line["loss"].get(self.settings.short) for line in lines if line["why"] is None}
        for line in lines:
            if line["why"] is None:
                mine, theirs = losses[line["scheme"]], losses.get(start)
                line["loss_change"] = None if mine is None or theirs is None else mine - theirs


COSTS = (
    "forward", "decode", "train", "timed_at", "parameters_added", "peak_memory", "cache_bytes_per_token", "positions",
    "training_seconds",
)  # fmt: skip


def load(settings: Settings, folder: Folder) -> Comparison:
    """Load the finished results of a comparison from its folder."""
    rows = Results()
    facts: dict[str, dict[str, Any]] = {}
    times = timing.read(folder)["times"]
    for compared in settings.contenders:
        own_folder = folder.of(compared)
        for stage, stage_folder in rows_of(settings, compared, folder):
            label = settings.label(compared, stage)
            if (stage_folder / "results.jsonl").exists():
                rows += Results.load(stage_folder)
            facts[label] = read_json(stage_folder / "facts.json") | _times(times.get(compared.label))
            if stage == "after":
                facts[label]["training_seconds"] = read_json(own_folder / "training.json")["seconds"]
    return Comparison(settings, rows, facts, folder.unsupported(settings.contenders), _failures(settings, folder))


def _failures(settings: Settings, folder: Folder) -> dict[str, str]:
    failures = folder.failures(settings.contenders)
    timed = folder.root / "timing-failed.json"
    return failures | ({"timing": read_json(timed)["reason"]} if timed.exists() else {})


def _times(timed: dict[str, Any] | None) -> dict[str, Any]:
    if timed is None:
        return {}
    return {**{name: timed[name] for name in timing.WORK}, "timed_at": timed["length"]}


def _scores(pivot: Pivot | None, label: str) -> dict[int, float]:
    if pivot is None or label not in pivot.cells:
        return {}
    cells = zip(pivot.lengths, pivot.cells[label], strict=True)
    return {length: cell.score for length, cell in cells if cell is not None}


def _mean_scores(tasks: Sequence[Pivot], label: str) -> dict[int, float]:
    """Return the mean over tasks, at the lengths that all tasks have."""
    by_task = [_scores(pivot, label) for pivot in tasks]
    shared = set.intersection(*map(set, by_task)) if by_task else set()
    return {length: sum(scores[length] for scores in by_task) / len(by_task) for length in sorted(shared)}
