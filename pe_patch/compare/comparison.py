"""What a comparison found: the rows, what each scheme costs, and the table made of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.results import Pivot, Results, pivots
from . import timing
from .contender import Contender
from .settings import Folder, Settings, read_json
from .worker import rows_of

Line = dict[str, Any]


@dataclass
class Comparison:
    """Everything that is finished of a comparison."""

    settings: Settings
    rows: Results
    """Every measurement, in the order of the contenders; `scheme` is the label of a contender and its stage."""
    facts: dict[str, dict[str, Any]]
    """By the same label: parameters, bytes in the cache, peak memory, time ratios, seconds of training."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """Contenders that cannot work on this model, with the reason."""
    failures: dict[str, str] = field(default_factory=dict)
    """Contenders that something went wrong with, with the reason."""

    def table(self) -> list[Line]:
        """One line for each contender and stage: a dict from column to value, None where there is none.

        `forward`, `decode` and `train` are times over that of the model as it is. `loss` and `retrieval` map a length
        to a score; `loss_change` is the loss at the window less that of the model as it is, before any training. `why`
        says why a line has no numbers.
        """
        found = []
        for contender in self.settings.contenders:
            labels = [self.settings.label(contender, stage) for stage in self.settings.stages]
            measured = [label for label in labels if label in self.facts]
            lines = [self._line(label, contender) for label in measured]
            if len(measured) < len(labels):
                reason = self.unsupported.get(contender.label) or self.failures.get(contender.label)
                missing = contender.label if not measured else labels[-1]
                lines.append(
                    {"scheme": missing, "options": dict(contender.options), "why": reason or "not measured yet"}
                )
            found += lines
        self._add_changes(found)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The table, the settings and what went wrong (JSON-able)."""
        return {
            "settings": self.settings.record(),
            "table": self.table(),
            "facts": self.facts,
            "unsupported": self.unsupported,
            "failures": self.failures,
            "retrieval": [f"{pivot.task}: {pivot.measure}" for pivot in self._asked()],
            "measured_on": self.rows.values("measured_on"),
        }

    def _line(self, label: str, contender: Contender) -> Line:
        known = self.facts[label]
        return {
            "scheme": label,
            "options": dict(contender.options),
            "why": None,
            **{name: known.get(name) for name in COSTS},
            "loss": _scores(self._loss(), label),
            "retrieval": _mean_scores(self._asked(), label),
        }

    def _loss(self) -> Pivot | None:
        """Loss on the same tokens at every length, or whichever loss there is."""
        found = [pivot for pivot in pivots(self.rows) if not pivot.higher_is_better]
        return next((pivot for pivot in found if "fixed" in pivot.measure), found[0] if found else None)

    def _asked(self) -> list[Pivot]:
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
    """What is finished in a folder, so far."""
    rows, known = Results(), {}
    times = timing.read(folder)["times"]
    for contender in settings.contenders:
        here = folder.of(contender)
        for stage, place in rows_of(settings, contender, folder):
            label = settings.label(contender, stage)
            if (place / "results.jsonl").exists():
                rows += Results.load(place)
            known[label] = read_json(place / "facts.json") | _times(times.get(contender.label))
            if stage == "after":
                known[label]["training_seconds"] = read_json(here / "training.json")["seconds"]
    everyone = settings.contenders
    return Comparison(settings, rows, known, folder.unsupported(everyone), _failures(settings, folder))


def _failures(settings: Settings, folder: Folder) -> dict[str, str]:
    found = folder.failures(settings.contenders)
    timed = folder.root / "timing-failed.json"
    return found | ({"timing": read_json(timed)["reason"]} if timed.exists() else {})


def _times(found: dict[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {**{name: found[name] for name in timing.WORK}, "timed_at": found["length"]}


def _scores(pivot: Pivot | None, label: str) -> dict[int, float]:
    if pivot is None or label not in pivot.cells:
        return {}
    cells = zip(pivot.lengths, pivot.cells[label], strict=True)
    return {length: cell.score for length, cell in cells if cell is not None}


def _mean_scores(asked: Sequence[Pivot], label: str) -> dict[int, float]:
    """The mean over the tasks, at lengths where every task was asked."""
    each = [_scores(pivot, label) for pivot in asked]
    shared = set.intersection(*map(set, each)) if each else set()
    return {length: sum(scores[length] for scores in each) / len(each) for length in sorted(shared)}
