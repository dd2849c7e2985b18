"""Evaluate a model on held-out text before, during and after training."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..adapters.trained_window import table_window
from ..data.text import with_options
from ..errors import PePatchError
from ..patching.api import find_patch
from .data import refuse_ids
from .guard import EvaluationError
from .launch import Launch
from .log import Log
from .recipe import Phase, Recipe, RecipeError

Progress = bool | Callable[[int, int], None]
"""As the `progress` of `pe_patch.evaluate`."""


def longest(phases: list[Phase]) -> int:
    """Return the longest distance in tokens that the phases train."""
    return max(phase.length if phase.pose is None else phase.pose.target for phase in phases)


def positions(model: Any) -> int | None:
    """Return the maximum number of tokens that a model can read, or None if its positions are unlimited."""
    patch = find_patch(model)
    if patch is not None:
        ends = patch.scheme.hard_window or model.config.pe_patch.get("strict")
        return patch.scheme.effective_window if ends else None
    table = table_window(model.base_model)
    return None if table is None else table[0]


class Measure:
    """The evaluation of a recipe; does nothing if the recipe has none.

    Args:
        recipe: the recipe of the run.
        launch: how the script was launched.
        tokenizer: the tokenizer of the model.
        documents: returns the held-out text; called once.
    """

    def __init__(self, recipe: Recipe, launch: Launch, tokenizer: Any, documents: Callable[[], Iterable[str]]) -> None:
        self.wanted, self.launch, self.tokenizer, self.documents = recipe.evaluation, launch, tokenizer, documents
        self.shown, data = recipe.progress and launch.is_main, recipe.data
        self.source = data.source
        if data.source != "stdlib":  # what the command evaluates must be held out there, too
            column = data.text_column if data.text_column != "text" else None
            self.source = with_options(data.source, split="test", text_column=column, encoding=data.encoding)
        self.mixed = torch.bfloat16 if recipe.mixed_precision == "bf16" else None
        self.autocast: torch.dtype | None = None
        self.target = longest(recipe.phases) if recipe.phases else max(self.wanted.lengths)
        self.first: list[dict[str, Any]] = []
        self.last: int | None = None
        self.lengths = self.wanted.lengths
        self.corpus: Any = None
        self.everywhere = launch.sharded
        """True if all processes measure together, because each holds only a part of the weights."""
        self.batch_size: int | None = None
        """Sequences in a forward pass; None plans it from the free memory."""

    def choose_lengths(self, model: Any) -> None:
        """Choose the lengths if the recipe names none; `model` has its original positions."""
        from ..evaluation.model import windows

        self.lengths = self.lengths or sorted({windows(model)[0] or self.target, self.target})

    def check(self, model: Any) -> None:
        """Prepare the whole evaluation without running the model, so that nothing is missing later.

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
            find_tasks(self.wanted.tasks)  # before reading the text, which takes longer
            self.corpus = Corpus.load(self.tokenizer, self.documents(), needed=max(self.lengths))
            refuse_ids({"the held-out text": int(self.corpus.stream.max())}, self.tokenizer, model)
            self._run_evaluation(model, self.corpus, dry_run=True)
        except Exception as error:  # whatever fails here would fail after training
            raise RecipeError(
                f"evaluation: cannot run: {_as_sentence(error)} Correct the evaluation section (tasks: "
                f"{', '.join(self.wanted.tasks)}; lengths: {', '.join(map(str, self.lengths))}; text: the test split "
                f"of {self.source}), or disable it with evaluation.every: null."
            ) from error
        if not (self.launch.is_main or self.everywhere):
            self.corpus = None  # this process never measures

    def check_positions(self, model: Any) -> None:
        """Raise `RecipeError` if a measured length exceeds the positions of the model with its scheme."""
        most = positions(model) if self.wanted.every else None
        if most is not None and max(self.lengths) > most:
            raise RecipeError(
                f"evaluation.lengths: {max(self.lengths):,} tokens exceed the model's {most:,} positions. Give smaller "
                "lengths, or a scheme with more positions (max_positions, factor)."
            )

    def original(self, model: Any) -> None:
        """Measure the original model if the recipe asks for it; the rows wait for the log."""
        if self.wanted.every and self.wanted.original:
            rows = self._shared(lambda: list(self._rows(model.to(self.launch.device), self.shown)), self.launch.is_main)
            self.first = [{"step": 0, "original": True, **row} for row in rows]

    def at_the_start(self, model: Any, log: Log) -> None:
        """Log the original model's rows, and measure the model before step 1 if the recipe asks for it."""
        for row in self.first:
            log.write("evaluation", row)
        if self.wanted.every and self.wanted.before:
            self.during(model, log, 0)

    def during(self, model: Any, log: Log, step: int) -> None:
        """Measure now, on the main process or, if the weights are sharded, on all processes.

        Args:
            model: the model, without its wrapper for several processes.
            log: the log of the run.
            step: the step to write into the log.

        Raises:
            EvaluationError: the evaluation failed on some process. Every process raises.
        """
        if self.everywhere:
            self._agree_on_batch_size(model)
        rows = self._shared(lambda: list(self._rows(model, log.evaluated)), self.launch.is_main or self.everywhere)
        for row in rows:
            log.write("evaluation", {"step": step, "original": False, **row})
        self.last = step

    def at_the_end(self, model: Any, log: Log, step: int) -> None:
        """Measure the saved model. Its forward has no autocast of accelerate's, so use ours."""
        self.autocast = self.mixed
        self.during(model, log, step)

    def _agree_on_batch_size(self, model: Any) -> None:
        """Choose the batch size that fits on every process; all must run the same forward passes.

        Raises:
            EvaluationError: not even one sequence fits on some process. Every process raises.
        """
        if self.launch.world == 1:
            return
        from ..evaluation.model import EvaluatedModel

        longest, problem = max(self.lengths), None
        try:
            planner = EvaluatedModel(model, self.tokenizer, autocast=self.autocast)
            size = planner.plan_batch_size(longest, logits=planner.logits_at_once(longest))
        except PePatchError as error:  # the other processes wait for this one and must raise too
            size, problem = 0, error
        self.batch_size = self.launch.least(size)
        if not self.batch_size:
            message = "a sequence does not fit on another process." if problem is None else _as_sentence(problem)
            raise EvaluationError(message) from problem

    def pending(self, step: int) -> bool:
        """Return whether the evaluation after the last step is still missing."""
        return bool(self.wanted.every) and self.last != step

    def command(self, folder: Path) -> str:
        """Return the shell command that runs the same evaluation on the saved model."""
        words = ["pe-patch", "evaluate", str(folder), "--task", *self.wanted.tasks]
        words += ["--length", *map(str, self.lengths), "--samples", str(self.wanted.samples), "--beyond-window"]
        if self.source != "stdlib":
            words += ["--text", self.source]
        return shlex.join(words)

    def _shared(self, measure: Callable[[], list[dict[str, Any]]], here: bool) -> list[dict[str, Any]]:
        """Measure on this process if `here`; if one process fails, all raise `EvaluationError`."""
        rows, problem = [], None
        if here:
            try:
                rows = measure()
            except Exception as error:  # the other processes wait for this one and must raise too
                problem = error
        if self.launch.failed_anywhere(problem is not None):
            message = "another process failed." if problem is None else _as_sentence(problem)
            raise EvaluationError(message) from problem
        return rows

    def _rows(self, model: Any, progress: Progress) -> Iterator[dict[str, Any]]:
        return (asdict(row) for row in self._run_evaluation(model, self.corpus, progress).rows)

    def _run_evaluation(self, model: Any, text: Any, progress: Progress = False, *, dry_run: bool = False) -> Any:
        # Import late: this loads plotting and metrics, which a run without evaluation does not need.
        from ..evaluation import evaluate

        return evaluate(
            model,
            self.tokenizer,
            tasks=self.wanted.tasks,
            lengths=self.lengths,
            samples=self.wanted.samples,
            text=text,
            beyond_window=True,
            progress=progress,
            autocast=self.autocast,
            batch_size=self.batch_size,
            dry_run=dry_run,
        )


def _as_sentence(error: BaseException) -> str:
    """Format an exception as a sentence."""
    text = " ".join(str(error).split())[:600]
    named = text if isinstance(error, PePatchError) else f"{type(error).__name__}: {text}"
    return named if named.endswith((".", "!", "?")) else f"{named}."
