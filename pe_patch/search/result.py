"""The result of a search, as files, as data and as a table."""

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
    """The scored candidates of a search and the known schemes to compare them with.

    A score is a mean loss in nats per token; lower is better.
    """

    method: str
    target: Target
    known: Mapping[str, Factors]
    """The factors of PI, NTK and YaRN."""
    measured_on: str
    """The tokens whose loss is the score, in words."""
    model: str
    settings: Mapping[str, Any]
    baselines: dict[str, float] = field(default_factory=dict)
    """The scores of PI, NTK and YaRN without a search."""
    history: list[Scored] = field(default_factory=list)
    """The candidates in the order of scoring."""

    @property
    def best(self) -> Scored:
        """The candidate with the lowest score; the first one if several tie."""
        return min(self.history, key=lambda scored: scored.score)

    @property
    def options(self) -> dict[str, Any]:
        """The options for `patch_model(model, "longrope", **options)`."""
        return self.target.options(self.best.factors)

    @property
    def curve(self) -> list[float]:
        """The lowest score up to each generation."""
        last = self.history[-1].generation
        return [
            min(scored.score for scored in self.history if scored.generation <= generation)
            for generation in range(last + 1)
        ]

    @property
    def beaten(self) -> str:
        """The name of the best baseline if it scores lower than the best candidate, or an empty string."""
        name = min(self.baselines, key=lambda known: self.baselines[known])
        return name if self.baselines[name] < self.best.score else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the data that `--json` prints."""
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

        Args:
            folder: the output folder.
            overwrite: True to write to a folder that does not hold a search.

        Returns:
            The paths of both files.

        Raises:
            OutputError: if the folder holds something other than a search and `overwrite` is False.
        """
        from .picture import search_chart  # imports altair, which only saving needs

        check_output(folder, SEARCH, overwrite=overwrite)
        Path(folder).mkdir(parents=True, exist_ok=True)
        picture = Path(folder) / "search.png"
        chart = search_chart(
            f"{self.method}: {self.target.window:,} to {self.target.length:,} tokens",
            f"Loss in nats per token, {self.measured_on}. Dashed lines: known schemes without a search. "
            f"{len(self.history)} candidates for {self.model}, not trained.",
            history=self.history,
            curve=self.curve,
            baselines=self.baselines,
            factors=self.known,
            best=self.best.factors,
        )
        write_atomically(picture, chart.png())
        return {"best": write_best(Path(folder), self.options), "picture": picture}


def write_best(folder: Path, options: Mapping[str, Any]) -> Path:
    """Write the options of the best candidate so far to `best.json`."""
    path = folder / "best.json"
    write_atomically(path, json.dumps(options, indent=2) + "\n")
    return path


def result_table(result: SearchResult) -> Table:
    """Return a table of the best candidate and the known schemes."""
    target = result.target
    table = Table(title=f"{result.method} at {target.length:,} tokens, {target.factor:g} times the window")
    table.title_justify = table.caption_justify = "left"
    table.caption = f"Loss: nats per token, {result.measured_on}; nothing was trained."
    for name in ("", "loss", "factors, fastest pair first"):
        table.add_column(name, justify="right" if name == "loss" else "left")
    for paper, score in result.baselines.items():
        table.add_row(f"{paper} (scheme {KNOWN[paper]})", f"{score:.4f}", _sample(result.known[paper]))
    best = result.best
    table.add_row(f"searched, generation {best.generation}", f"{best.score:.4f}", _sample(best.factors))
    return table


def _sample(factors: Sequence[float]) -> str:
    """Return at most nine evenly spaced factors as text."""
    count = min(len(factors), 9)
    return " ".join(f"{factors[round(i * (len(factors) - 1) / max(1, count - 1))]:.2f}" for i in range(count))
