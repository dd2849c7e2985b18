"""Train or fine-tune a causal language model from a recipe, with the positional scheme that the recipe names.

accelerate launch recipes/finetune.py recipes/configs/tiny_yarn.yaml seed=1 phases.0.steps=100
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from transformers import set_seed

from ..checkpoints.exporters.export import check_export
from ..compat import require_extra
from ..data.text import Skipped, iter_documents
from ..errors import PePatchError, TerminationSignal, sigterm_raises
from . import finish, output_checks, plan
from .checkpoints import (
    Progress,
    check_resumable,
    complete_checkpoints,
    find_checkpoint,
    set_aside,
)
from .data import PhaseData, check_ids, check_unchanged, data_notes, first_tokens, load_corpora, micro_batches
from .guard import INTERRUPTED_EXIT_CODE, TERMINATED_EXIT_CODE, PostTrainingError, Signal, Terminated
from .launch import Launch
from .log import Log
from .measure import Measure
from .models import build_teacher, build_tokenizer, check_average, load_model, refuse_documents_that_leak, with_scheme
from .reading import load_recipe, save_recipe
from .recipe import Recipe, RecipeError
from .trainer import MicroBatches, RecipeTrainer

__all__ = ["Recipe", "Run", "load_recipe", "main", "train"]


EXIT_CODES: dict[type[PePatchError], int] = {RecipeError: 2, Terminated: TERMINATED_EXIT_CODE, PePatchError: 1}


class Run:
    """One run of one recipe: build everything, check it, and train."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.output, self.folder = recipe, Path(recipe.output), Path(recipe.output) / "checkpoints"
        output_checks.check_folders(recipe)
        self.checkpoint = None if recipe.dry_run else find_checkpoint(recipe, self.folder)
        self.signal, self.progress = Signal(), Progress()
        self.trainer: RecipeTrainer | None = None
        self.launch = Launch(recipe)
        self.skipped: list[Skipped] = []
        """Skipped parts of the held-out text."""
        set_seed(recipe.seed)
        self.tokenizer = build_tokenizer(recipe, lambda: self._documents("train"))
        self.corpora = load_corpora(recipe.data, recipe.phases, self.tokenizer, progress=recipe.progress)
        for number in range(len(recipe.phases)):
            self.data(number)  # raises if a source has no text for a phase, before the model loads
        if self.checkpoint is not None:
            check_resumable(self.checkpoint, recipe, self.facts())
            check_unchanged(self.corpora, recipe, self.tokenizer, self.checkpoint, write=False)
        self.measure = Measure(recipe, self.launch, self.tokenizer, lambda: self._documents("test"))
        self.model = load_model(recipe, self.tokenizer)
        check_ids(self.corpora, recipe, self.tokenizer, self.model)
        self.measure.choose_lengths(self.model)
        self.measure.check(self.model)
        if self.checkpoint is None and not recipe.dry_run:
            self.measure.original(self.model)
        scheme, device = recipe.scheme, self.launch.device
        calibration = self.tokens(None if scheme is None else scheme.calibration_tokens)
        warm_start = self.tokens(None if scheme is None else scheme.warm_start_tokens)
        groups = self.launch.data_world
        self.model = with_scheme(self.model, recipe, calibration, warm_start, device, groups)
        refuse_documents_that_leak(self.model, recipe, groups)
        self.launch.refuse(recipe, self.model)
        check_average(recipe, self.model, self.launch.sharded)
        for target in recipe.export:
            check_export(self.model, target)
        self.measure.check_positions(self.model)
        output_checks.check_inputs(recipe)
        output_checks.check_saved(self)
        output_checks.check_room(self)
        self.teacher = None if recipe.distill is None else build_teacher(recipe, self.model, device)

    def tokens(self, count: int | None) -> list[list[int]]:
        """Return the first `count` tokens of the first phase, in rows, for calibration or a warm start; none for
        None."""
        return [] if count is None else first_tokens(self.data(0), count)

    def facts(self) -> dict[str, Any]:
        """Return what a resumed run must share with this one, apart from the recipe."""
        kind = self.launch.describe().rpartition(", ")[2] if self.launch.world > 1 else "one process"
        return {"processes": self.launch.world, "parallelism": kind}

    def show_plan(self) -> Any:
        """Measure one step, print the plan and cost of the run, and return the untrained model."""
        plan.show(self)
        return self.model

    def run(self) -> Any:
        """Train all phases, from a checkpoint if the recipe resumes, and return the model as saved."""
        recipe = self.recipe
        if recipe.phases:
            plan.refuse_what_cannot_fit(self)
        with self._locked():
            if self.launch.is_main:
                save_recipe(recipe, self.output / "recipe.yaml")
                check_unchanged(self.corpora, recipe, self.tokenizer, self.checkpoint, write=True)
                if self.checkpoint is not None:
                    for moved in set_aside(self.folder, self.checkpoint):
                        print(f"Moved a checkpoint of later steps to {moved}.", file=sys.stderr)
            if self.checkpoint is not None:
                self.progress = check_resumable(self.checkpoint, recipe, {})
            total = sum(phase.steps for phase in recipe.phases[self.progress.phase :])
            total += self.progress.step - self.progress.phase_step
            log = Log(
                self.output / "log.jsonl",
                writes=self.launch.is_main,
                from_step=self.progress.step,
                trained=self.progress.phase == len(recipe.phases),
                total_steps=total,
                progress=recipe.progress,
            )
            with log as self.log, self.signal:
                if self.checkpoint is None and recipe.phases:
                    log.notes(self.data_notes())
                self.trainer = self.build_trainer() if recipe.phases else None
                if self.trainer is not None:
                    self.trainer.train(None if self.checkpoint is None else str(self.checkpoint))
                else:
                    self._measure_untrained()
                saved, trained = finish.save(self)
            finish.finish(self, trained)
            return saved

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other runs out of the output folder, from the main process."""
        problem: RecipeError | None = None
        lock = FileLock(self.output / ".lock")
        if self.launch.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
                if find_checkpoint(self.recipe, self.folder) != self.checkpoint:
                    problem = RecipeError(f"output: another run wrote checkpoints to {self.folder} in the meantime.")
            except Timeout:
                problem = RecipeError(f"output: another run is writing to {self.output}. Give another output.")
            except RecipeError as error:
                problem = error
        try:
            if self.launch.failed_anywhere(problem is not None):
                raise problem or RecipeError("The main process cannot write to the output.")
            yield
        finally:
            lock.release()

    def _measure_untrained(self) -> None:
        """Measure a model whose scheme needs no training."""
        assert self.recipe.scheme is not None
        self.log.console.print(f"No training: saving the model with {self.recipe.scheme.name}.")
        self.model.to(self.launch.device)
        self.measure.everywhere, self.measure.autocast = False, self.measure.mixed
        self.measure.at_the_start(self.model, self.log)

    def build_trainer(self) -> RecipeTrainer:
        """Return the trainer of the phases."""
        log = getattr(self, "log", None)
        return RecipeTrainer(
            self.model,
            self.launch,
            self.recipe,
            self.batches,
            log=log,
            progress=self.progress,
            facts=self.facts,
            teacher=self.teacher,
            evaluate=None if log is None else lambda model, step: self.measure.during(model, log, step),
            start=None if log is None else lambda model: self.measure.at_the_start(model, log),
            signal=self.signal,
        )

    def data(self, phase: int) -> PhaseData:
        """Return the sequences of a phase."""
        recipe = self.recipe
        seed, boundaries = (recipe.seed, phase), recipe.data.boundaries
        return PhaseData(self.corpora, self.tokenizer, recipe.phases[phase], seed=seed, boundaries=boundaries)

    def batches(self, phase: int, first_step: int = 0) -> Iterator[MicroBatches]:
        """Yield this process's micro-batches for each step of a phase."""
        return micro_batches(
            self.data(phase),
            first_step=first_step,
            rank=self.launch.data_rank,
            world=self.launch.data_world,
            workers=self.recipe.data.workers,
        )

    def how_to_resume(self) -> str:
        """Return a sentence that names the newest checkpoint."""
        saved = complete_checkpoints(self.folder)
        if not saved:
            return "There is no checkpoint yet: rerun to start again."
        return f"The last checkpoint is {saved[-1]}. Rerun with resume=auto."

    def data_notes(self) -> list[str]:
        """Return sentences on how rows begin, what was skipped, and control tokens in the text."""
        notes = data_notes(self.corpora, self.recipe, self.tokenizer)
        held_out = [f"{self.recipe.data.source}: {record}." for record in self.skipped]
        return notes + [note for note in held_out if note not in notes]

    def _documents(self, split: Literal["train", "test"]) -> Iterator[str]:
        data, skipped = self.recipe.data, self.skipped if split == "test" else []
        return iter_documents(
            data.source, split=split, text_column=data.text_column, limit=data.limit, streaming=data.streaming,
            encoding=data.encoding, skip_unreadable=data.skip_unreadable, skipped=skipped,
        )  # fmt: skip


def train(recipe: Recipe) -> Any:
    """Run the recipe and return the trained model, also saved in `<output>/model`. A dry run trains nothing."""
    require_extra("train")  # the picture comes last, and nothing may be lost then
    run = Run(recipe)
    if recipe.dry_run:
        return run.show_plan()
    try:
        return run.run()
    except (KeyboardInterrupt, TerminationSignal) as error:
        why, code = _cause(error)
        raise Terminated(f"{why} after step {run.progress.step}. {run.how_to_resume()}", code) from error


def _cause(error: BaseException) -> tuple[str, int]:
    """Return what ended a run, in words, and the exit code for it."""
    if isinstance(error, TerminationSignal):
        return "SIGTERM received", TERMINATED_EXIT_CODE
    return "Interrupted", INTERRUPTED_EXIT_CODE


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: the words after the command; None takes `sys.argv`.

    Returns:
        0 after a complete run, 2 for an invalid recipe, 1 for a failed run, 143 for a run that SIGTERM ended, and 130
        for a run that was interrupted.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="Path of a YAML file, such as recipes/configs/tiny_yarn.yaml")
    parser.add_argument(
        "overrides", nargs="*", help="Set recipe values: key=value or nested.key=value, with or without a leading --."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Print the plan and its cost, and exit without training."
    )
    known, dashed = parser.parse_known_args(arguments)
    overrides = [*known.overrides, *dashed, *["dry_run=true"] * known.dry_run]
    try:
        with sigterm_raises():
            train(load_recipe(known.recipe, overrides))
    except tuple(EXIT_CODES) as error:
        print(error, file=sys.stderr)
        if isinstance(error, PostTrainingError | Terminated):
            return error.exit_code
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except OSError as error:  # a full disk, a folder that became read-only, a hub that does not answer
        print(
            f"The run failed: {type(error).__name__}: {error}. Correct this and rerun with resume=auto.",
            file=sys.stderr,
        )
        return 1
    except (KeyboardInterrupt, TerminationSignal) as error:
        why, code = _cause(error)
        print(f"{why} before the first step. Nothing was trained: rerun to start again.", file=sys.stderr)
        return code
    return 0
