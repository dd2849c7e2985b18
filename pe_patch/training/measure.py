"""What is measured on held-out text before, while and after a model is trained."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..adapters import ADAPTERS
from ..errors import PePatchError
from ..patching.api import find_patch
from .engines import Engine
from .guard import EvaluationError
from .log import Log
from .recipe import Phase, Recipe, RecipeError


def longest(phases: list[Phase]) -> int:
    """The length in tokens whose distances the phases train."""
    return max(phase.length if phase.pose is None else phase.pose.target for phase in phases)


def positions(model: Any) -> int | None:
    """Return the most tokens that a model can read at all, or None if its positions have no end."""
    patch, config = find_patch(model), model.config.get_text_config()
    if patch is not None:
        ends = patch.scheme.hard_window or model.config.pe_patch.get("strict")
        return patch.scheme.effective_window if ends else None
    adapter = ADAPTERS.get(config.model_type)
    return getattr(config, "max_position_embeddings", None) if adapter is not None and adapter.learned else None


class Measure:
    """The evaluation that a recipe asks for; does nothing where it asks for none.

    `documents` gives the held-out text, which is read once.
    """

    def __init__(self, recipe: Recipe, engine: Engine, tokenizer: Any, documents: Callable[[], list[str]]) -> None:
        self.wanted, self.engine, self.tokenizer, self.documents = recipe.evaluation, engine, tokenizer, documents
        self.source = recipe.data.source
        self.mixed = torch.bfloat16 if recipe.mixed_precision == "bf16" else None
        self.autocast: torch.dtype | None = None
        self.target = longest(recipe.phases) if recipe.phases else max(self.wanted.lengths)
        self.first: list[dict[str, Any]] = []
        self.last: int | None = None
        self.lengths = self.wanted.lengths
        self.corpus: Any = None

    def settle(self, model: Any) -> None:
        """Choose the lengths where the recipe names none; `model` is as it was loaded."""
        from ..evaluation.model import windows

        self.lengths = self.lengths or sorted({windows(model)[0] or self.target, self.target})

    def check(self, model: Any) -> None:
        """Prepare the whole evaluation without running the model, so that it cannot fail for want of something later.

        Raises:
            RecipeError: a task does not exist, or a file, text, length or token is missing.
        """
        if not self.wanted.every:
            return
        if self.wanted.samples < 1:
            raise RecipeError(f"evaluation.samples must be at least 1, got {self.wanted.samples}.")
        if self.wanted.original:
            self.check_positions(model)
        from ..evaluation.corpus import Corpus
        from ..evaluation.tasks import find_tasks

        try:
            find_tasks(self.wanted.tasks)  # before the text is read, which takes longer
            self.corpus = Corpus.load(self.tokenizer, self.documents(), needed=max(self.lengths))
            self._evaluate(model, self.corpus, dry_run=True)
        except Exception as error:  # whatever stops it here would stop it after the training
            raise RecipeError(
                f"evaluation: it cannot run: {_said(error)} Correct the evaluation section (tasks: "
                f"{', '.join(self.wanted.tasks)}; lengths: {', '.join(map(str, self.lengths))}; text: the test split "
                f"of {self.source}), or leave it out with evaluation.every: null."
            ) from error
        if not (self.engine.accelerator.is_main_process or self.engine.sharded):
            self.corpus = None  # this process never measures

    def check_positions(self, model: Any) -> None:
        """Raise `RecipeError` where the model, with its scheme, has no positions for a length that is measured."""
        most = positions(model) if self.wanted.every else None
        if most is not None and max(self.lengths) > most:
            raise RecipeError(
                f"evaluation.lengths: {max(self.lengths):,} tokens are more than the {most:,} positions that the model "
                "has. Give smaller lengths, or a scheme with more positions (max_positions, factor)."
            )

    def original(self, model: Any) -> None:
        """Measure the model as it was loaded, if so asked; kept until there is a log."""
        if self.wanted.every and self.wanted.original:
            main = self.engine.accelerator.is_main_process
            rows = self._shared(lambda: list(self._rows(model.to(self.engine.accelerator.device))), main)
            self.first = [{"step": 0, "original": True, **row} for row in rows]

    def at_the_start(self, model: Any, log: Log) -> None:
        for row in self.first:
            log.write("evaluation", row)
        if self.wanted.every and self.wanted.before:
            self.during(model, log, 0)

    def during(self, model: Any, log: Log, step: int) -> None:
        """Measure now: on one process, unless each has only a part of the model.

        Raises `EvaluationError` on every process if it fails on one.
        """
        accelerator, together = self.engine.accelerator, self.engine.sharded

        def measure() -> list[dict[str, Any]]:
            return list(self._rows(accelerator.unwrap_model(model, keep_fp32_wrapper=True)))

        for row in self._shared(measure, accelerator.is_main_process or together):
            log.write("evaluation", {"step": step, "original": False, **row})
        self.last = step

    def at_the_end(self, model: Any, log: Log, step: int) -> None:
        """Measure what was saved; accelerate's own autocast has been taken off that model."""
        self.autocast = self.mixed
        self.during(model, log, step)

    def pending(self, step: int) -> bool:
        """Return whether the recipe wants an evaluation after the last step that has not been made."""
        return bool(self.wanted.every) and self.last != step

    def command(self, folder: Path) -> str:
        """Return what a user types to evaluate the saved model as the recipe would have."""
        words = ["pe-patch", "evaluate", str(folder), "--task", *self.wanted.tasks]
        words += ["--length", *map(str, self.lengths), "--samples", str(self.wanted.samples), "--beyond-window"]
        if self.source != "stdlib":
            words += ["--text", self.source]
        return shlex.join(words)

    def _shared(self, measure: Callable[[], list[dict[str, Any]]], here: bool) -> list[dict[str, Any]]:
        """Measure on the processes that are to; where one fails all raise."""
        rows, problem = [], None
        if here:
            try:
                rows = measure()
            except Exception as error:  # the other processes wait for this one, and must learn of it
                problem = error
        if self.engine.failed_anywhere(problem is not None):
            said = "another process failed." if problem is None else _said(problem)
            raise EvaluationError(said) from problem
        return rows

    def _rows(self, model: Any) -> Iterator[dict[str, Any]]:
        return (asdict(row) for row in self._evaluate(model, self.corpus).rows)

    def _evaluate(self, model: Any, text: Any, *, dry_run: bool = False) -> Any:
        # Imported late: it brings plotting and metrics along, which a run that never evaluates has no use for.
        from ..evaluation import evaluate

        return evaluate(
            model,
            self.tokenizer,
            tasks=self.wanted.tasks,
            lengths=self.lengths,
            samples=self.wanted.samples,
            text=text,
            beyond_window=True,
            progress=False,
            autocast=self.autocast,
            dry_run=dry_run,
        )


def _said(error: BaseException) -> str:
    """Return an exception as a sentence."""
    text = " ".join(str(error).split())[:600]
    named = text if isinstance(error, PePatchError) else f"{type(error).__name__}: {text}"
    return named if named.endswith((".", "!", "?")) else f"{named}."
