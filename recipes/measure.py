"""What is measured on held-out text before, while and after a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from .engines import Engine
from .log import Log
from .recipe import Phase, Recipe


def longest(phases: list[Phase]) -> int:
    """The length in tokens whose distances the phases train."""
    return max(phase.length if phase.pose is None else phase.pose.target for phase in phases)


class Measure:
    """The evaluation that a recipe asks for; does nothing where it asks for none.

    `documents` gives the held-out text.
    """

    def __init__(self, recipe: Recipe, engine: Engine, tokenizer: Any, documents: Callable[[], list[str]]) -> None:
        self.wanted, self.engine, self.tokenizer, self.documents = recipe.evaluation, engine, tokenizer, documents
        self.target = longest(recipe.phases) if recipe.phases else max(self.wanted.lengths)
        self.first: list[dict[str, Any]] = []
        self.last: int | None = None
        self.lengths = self.wanted.lengths

    def settle(self, model: Any) -> None:
        """Choose the lengths where the recipe names none; `model` is as it was loaded."""
        from pe_patch.evaluation.subject import windows

        self.lengths = self.lengths or sorted({windows(model)[0] or self.target, self.target})

    def original(self, model: Any) -> None:
        """Measure the model as it was loaded, if so asked; kept until there is a log."""
        if self.wanted.every and self.wanted.original:
            if self.engine.accelerator.is_main_process:
                rows = self._rows(model.to(self.engine.accelerator.device))
                self.first = [{"step": 0, "original": True, **row} for row in rows]
            self.engine.accelerator.wait_for_everyone()

    def at_the_start(self, model: Any, log: Log) -> None:
        for row in self.first:
            log.write("evaluation", row)
        if self.wanted.every and self.wanted.before:
            self.during(model, log, 0)

    def during(self, model: Any, log: Log, step: int) -> None:
        """Measure now: on one process, unless each has only a part of the model."""
        accelerator, together = self.engine.accelerator, self.engine.sharded
        if accelerator.is_main_process or together:
            whole = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
            for row in self._rows(whole):
                log.write("evaluation", {"step": step, "original": False, **row})
        accelerator.wait_for_everyone()
        self.last = step

    def at_the_end(self, model: Any, log: Log, step: int) -> None:
        """Measure what came out, unless that was just done."""
        if self.wanted.every and self.last != step:
            self.during(model, log, step)

    def _rows(self, model: Any) -> Iterator[dict[str, Any]]:
        # Imported late: it brings plotting and metrics along, which a run that never evaluates has no use for.
        from pe_patch.evaluation import evaluate

        results = evaluate(
            model,
            self.tokenizer,
            tasks=self.wanted.tasks,
            lengths=self.lengths,
            samples=self.wanted.samples,
            text=self.documents(),
            beyond_window=True,
            progress=False,
        )
        return (asdict(row) for row in results.rows)
