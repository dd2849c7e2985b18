"""What a search found, on disk and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..checkpoints.folders import SEARCH, check_output
from ..evaluation.results import write_atomically
from .evolution import Scored
from .space import KNOWN, Factors
from .target import Target


@dataclass(frozen=True)
class SearchResult:
    """The candidates of a search in the order in which they were scored, and what they are to be compared with.

    A score is a mean loss in nats, the less the better. `baselines` has the scores of the schemes PI, NTK and YaRN as
    they are, `known` their factors. `options` are those of the scheme `longrope`.
    """

    method: str
    target: Target
    known: Mapping[str, Factors]
    measured_on: str
    model: str
    settings: Mapping[str, Any]
    baselines: dict[str, float] = field(default_factory=dict)
    history: list[Scored] = field(default_factory=list)

    @property
    def best(self) -> Scored:
        """The candidate with the least score; of several the one scored first."""
        return min(self.history, key=lambda scored: scored.score)

    @property
    def options(self) -> dict[str, Any]:
        """What `patch_model(model, "longrope", **options)` takes."""
        return self.target.options(self.best.factors)

    @property
    def curve(self) -> list[float]:
        """The least score up to each generation."""
        last = self.history[-1].generation
        return [min(one.score for one in self.history if one.generation <= born) for born in range(last + 1)]

    @property
    def beaten(self) -> str:
        """The name of a baseline with a lower score than the best candidate, or an empty string."""
        name = min(self.baselines, key=lambda known: self.baselines[known])
        return name if self.baselines[name] < self.best.score else ""

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        best = self.best
        return {
            "model": self.model,
            "method": self.method,
            "length": self.target.length,
            "window": self.target.window,
            "measured_on": self.measured_on,
            "score": best.score,
            "baselines": dict(self.baselines),
            "critical": best.candidate.critical,
            "generation": best.generation,
            "origin": best.candidate.origin,
            "scored": len(self.history),
            "curve": self.curve,
            "options": self.options,
            "settings": dict(self.settings),
        }

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Path]:
        """Write `best.json` and the picture `search.png`.

        A folder that holds something else than a search raises `OutputError` unless `overwrite=True`.
        """
        from .picture import search_chart

        check_output(folder, SEARCH, overwrite=overwrite)
        Path(folder).mkdir(parents=True, exist_ok=True)
        picture = Path(folder) / "search.png"
        write_atomically(picture, search_chart(self).png())
        return {"best": write_best(Path(folder), self.options), "picture": picture}


def write_best(folder: Path, options: Mapping[str, Any]) -> Path:
    """The options of the best candidate so far, as `best.json`."""
    path = folder / "best.json"
    write_atomically(path, json.dumps(options, indent=2) + "\n")
    return path


def result_table(found: SearchResult) -> Table:
    """The best candidate beside what is known without a search."""
    table = Table(title=f"{found.method} at {found.target.length:,} tokens, {found.target.factor:g} times the window")
    table.title_justify = table.caption_justify = "left"
    table.caption = f"Loss: nats per token, {found.measured_on}; nothing was trained."
    for name in ("", "loss", "factors, fastest pair first"):
        table.add_column(name, justify="right" if name == "loss" else "left")
    for paper, score in found.baselines.items():
        table.add_row(f"{paper} (scheme {KNOWN[paper]})", f"{score:.4f}", _span(found.known[paper]))
    best = found.best
    table.add_row(f"searched, generation {best.generation}", f"{best.score:.4f}", _span(best.factors))
    return table


def _span(factors: Sequence[float]) -> str:
    """A few of the factors, evenly spread."""
    count = min(len(factors), 9)
    return " ".join(f"{factors[round(i * (len(factors) - 1) / max(1, count - 1))]:.2f}" for i in range(count))
