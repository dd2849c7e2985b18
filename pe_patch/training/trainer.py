"""Run the training loop: phases of steps, where each step acts as one batch over all processes and micro-batches."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import get_scheduler

from ..checkpoints.exporters.export import check_export
from ..data.text import Skipped, iter_documents
from . import finish, plan, saving
from .checkpoints import Progress, complete_checkpoints, find_checkpoint, load_checkpoint, save_checkpoint
from .chunked import Scorer
from .data import PhaseData, check_ids, check_unchanged, data_notes, first_tokens, load_corpora, micro_batches
from .engines import IGNORED, choose_engine
from .guard import EvaluationError, Signal, Terminated, TrainingError, fault
from .log import Log
from .loss import Score
from .measure import Measure
from .memory import offload_activations
from .models import build_teacher, build_tokenizer, load_model, parameter_groups, with_scheme
from .optimizers import build_optimizer
from .reading import save_recipe
from .recipe import Phase, Recipe

ACCURACY_STEPS = 25
"""Steps over which `until_accuracy` averages."""

SCHEDULES: dict[str, Callable[[Phase], tuple[str, dict[str, Any]]]] = {
    "constant": lambda phase: ("constant_with_warmup", {}),
    "linear": lambda phase: ("linear", {}),
    "cosine": lambda phase: ("cosine_with_min_lr", {"min_lr_rate": phase.floor}),
    "warmup_stable_decay": lambda phase: (
        "warmup_stable_decay",
        {"num_decay_steps": round(phase.decay * phase.steps), "decay_type": phase.decay_shape,
         "min_lr_ratio": phase.floor},
    ),
}  # fmt: skip


def learning_rates(phase: Phase) -> Callable[[int], float]:
    """Return the learning rate as a function of the phase's step, counted from 0, from Transformers' schedules."""
    name, options = SCHEDULES[phase.schedule](phase)
    # This optimiser only gives access to the schedule's function, so that the rate depends on the step alone.
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler: Any = get_scheduler(name, stand_in, phase.warmup, phase.steps, scheduler_specific_kwargs=options)
    multiplier = scheduler.lr_lambdas[0]
    return lambda step: phase.learning_rate * multiplier(step)


def model_inputs(batch: dict[str, Tensor], *, boundaries: bool, skips: bool = False) -> dict[str, Any]:
    """Return the keyword arguments of a forward pass.

    Without a mask and a cache, Transformers reads positions that are not consecutive as packed documents, and keeps
    attention within each document. Positions that skip within one document therefore need a mask of ones.

    Args:
        batch: `input_ids` and `position_ids`, each `[rows, length]`.
        boundaries: pass the positions, so that attention stays within each document.
        skips: the positions skip within a document (PoSE).
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if skips:
        inputs["attention_mask"] = torch.ones_like(batch["input_ids"])
    return {**inputs, "position_ids": batch["position_ids"]} if boundaries or skips else inputs


class Sums(NamedTuple):
    """Sums over all processes and passes of one step: losses in nats, and counts of targets."""

    loss: Tensor
    correct: Tensor
    divergence: Tensor
    targets: Tensor


class Trainer:
    """One run of one recipe: build everything, check it, and train."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.output, self.folder = recipe, Path(recipe.output), Path(recipe.output) / "checkpoints"
        saving.check_folders(recipe)
        self.checkpoint = None if recipe.dry_run else find_checkpoint(recipe, self.folder)
        self.signal, self.terminating = Signal(), False
        self.skipped: list[Skipped] = []
        """What was skipped of the held-out text."""
        self.trackers = _trackers(recipe)
        self.engine = choose_engine(
            mixed_precision=recipe.mixed_precision, log_with=self.trackers or None, project_dir=recipe.output
        )
        self.accelerator = self.engine.accelerator
        set_seed(recipe.seed)
        self.tokenizer = build_tokenizer(recipe, lambda: self._documents("train"))
        self.corpora = load_corpora(recipe.data, recipe.phases, self.tokenizer, progress=recipe.progress)
        for number in range(len(recipe.phases)):
            self.data(number)  # raises if a source has no text for a phase, before the model loads
        self.progress = Progress()
        self.measure = Measure(recipe, self.engine, self.tokenizer, lambda: self._documents("test"))
        if self.checkpoint is not None:
            check_unchanged(self.corpora, recipe, self.tokenizer, self.checkpoint, write=False)
        self.model = load_model(recipe, self.tokenizer)
        check_ids(self.corpora, recipe, self.tokenizer, self.model)
        self.measure.choose_lengths(self.model)
        self.measure.check(self.model)
        if self.checkpoint is None and not recipe.dry_run:
            self.measure.original(self.model)
        scheme, device = recipe.scheme, self.accelerator.device
        calibration = self.tokens(None if scheme is None else scheme.calibration_tokens)
        warm_start = self.tokens(None if scheme is None else scheme.warm_start_tokens)
        self.model = with_scheme(self.model, recipe, calibration, warm_start, device)
        self.engine.refuse(recipe, self.model)
        for target in recipe.export:
            check_export(self.model, target)
        self.measure.check_positions(self.model)
        saving.check_inputs(recipe)
        saving.check_saved(self)
        saving.check_room(self)
        self.teacher = None if recipe.distill is None else build_teacher(recipe, self.model, device)

    def tokens(self, count: int | None) -> list[list[int]]:
        """Return the first `count` tokens of the first phase, in rows, for calibration or a warm start; none for
        None."""
        return [] if count is None else first_tokens(self.data(0), count)

    def show_plan(self) -> Any:
        """Measure one step, print the plan and cost of the run, and return the untrained model."""
        plan.show(self)
        return self.model

    def run(self) -> Any:
        """Train all phases, from a checkpoint if the recipe resumes, and return the model as saved."""
        recipe, checkpoint = self.recipe, self.checkpoint
        if not recipe.phases:
            return self._without_training()
        plan.refuse_what_cannot_fit(self)
        self.prepare()
        if checkpoint is not None:
            self.progress = load_checkpoint(self.engine, checkpoint, recipe)
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, self.output / "recipe.yaml")
            check_unchanged(self.corpora, recipe, self.tokenizer, checkpoint, write=True)
        if self.trackers:
            self.accelerator.init_trackers("pe_patch")
        total = sum(phase.steps for phase in recipe.phases[self.progress.phase :])
        total += self.progress.step - self.progress.phase_step
        log = Log(
            self.accelerator,
            self.output / "log.jsonl",
            from_step=self.progress.step,
            total_steps=total,
            progress=recipe.progress,
        )
        with log as self.log, self.signal:
            if checkpoint is None:
                log.write("data", {"step": 0, "notes": self.data_notes()})
                self.measure.at_the_start(self.model, log)
            while self.progress.phase < len(recipe.phases):
                self._phase(recipe.phases[self.progress.phase])
            saved, trained = finish.save(self)
        finish.finish(self, trained)
        return saved

    def _without_training(self) -> Any:
        """Measure and save a model whose scheme needs no training."""
        assert self.recipe.scheme is not None
        self.output.mkdir(parents=True, exist_ok=True)
        save_recipe(self.recipe, self.output / "recipe.yaml")
        path = self.output / "log.jsonl"
        log = Log(self.accelerator, path, from_step=0, total_steps=0, progress=self.recipe.progress)
        with log as self.log, self.signal:
            self.log.console.print(f"{self.recipe.scheme.name} needs no training: measuring and saving the model.")
            self.model, self.optimizer = self.engine.prepare(self.model, None)
            self.measure.at_the_start(self.model, self.log)
            saved, trained = finish.save(self)
        finish.finish(self, trained)
        return saved

    def prepare(self) -> None:
        """Build the loss and the optimiser, and prepare model and optimiser for the engine."""
        self.scorer = Scorer(self.model, self.recipe.loss, self.recipe.distill, self.teacher)
        groups = parameter_groups(self.model, self.recipe.optimizer.weight_decay)
        optimizer = build_optimizer(groups, self.recipe.optimizer, sharded=self.engine.sharded)
        self.model, self.optimizer = self.engine.prepare(self.model, optimizer)
        self.model.train()  # a loaded model is in evaluation mode: no dropout, no gradient checkpointing
        self.scorer.learn(self.model)

    def _phase(self, phase: Phase) -> None:
        """Run the remaining steps of a phase."""
        progress, rate, started = self.progress, learning_rates(phase), time.perf_counter()
        for batches in self.batches(progress.phase, progress.phase_step):
            for group in self.optimizer.param_groups:
                group["lr"] = rate(progress.phase_step)
            values = self._step(batches, phase)
            seconds = time.perf_counter() - started
            tokens = phase.batch * phase.length
            progress.step, progress.phase_step = progress.step + 1, progress.phase_step + 1
            progress.tokens += tokens
            at = {"step": progress.step, "phase": progress.phase}
            speed = {"tokens": progress.tokens, "tokens_per_second": tokens / seconds, "seconds": seconds}
            speed["memory"] = self.engine.memory()
            self.log.step({**at, **values, "learning_rate": rate(progress.phase_step - 1), **speed})
            ended = self._ended(phase)
            if ended:
                progress.next_phase()
            self._evaluate_and_save()
            if ended:
                return
            started = time.perf_counter()

    def data(self, phase: int) -> PhaseData:
        """Return the sequences of a phase."""
        recipe = self.recipe
        seed, boundaries = (recipe.seed, phase), recipe.data.boundaries
        return PhaseData(self.corpora, self.tokenizer, recipe.phases[phase], seed=seed, boundaries=boundaries)

    def data_notes(self) -> list[str]:
        """Return sentences on how rows begin, what was skipped, and control tokens in the text."""
        notes = data_notes(self.corpora, self.recipe, self.tokenizer)
        held_out = [f"{self.recipe.data.source}: {record}." for record in self.skipped]
        return notes + [note for note in held_out if note not in notes]

    def batches(self, phase: int, first_step: int = 0) -> Iterator[list[dict[str, Tensor]]]:
        """Yield this process's micro-batches for each step of a phase."""
        return micro_batches(
            self.data(phase),
            first_step=first_step,
            rank=self.engine.data_rank,
            world=self.engine.data_world,
            workers=self.recipe.data.workers,
        )

    def _step(self, batches: list[dict[str, Tensor]], phase: Phase) -> dict[str, Any]:
        """Run one optimiser step on the mean loss over the targets of all processes and micro-batches."""
        sums = self.gradients(batches, phase)
        norm = self.engine.clip(self.recipe.optimizer.clip)
        targets = max(1, int(sums.targets))
        loss = float(sums.loss) / targets
        self._refuse_fault(loss, norm)
        self.engine.step()
        extra = {} if self.recipe.distill is None else {"divergence": float(sums.divergence) / targets}
        if phase.until_accuracy is not None:
            extra["accuracy"] = float(sums.correct) / targets
            self.progress.recent = [*self.progress.recent, extra["accuracy"]][-ACCURACY_STEPS:]
        return {"loss": loss, **extra, "targets": int(sums.targets), "gradient_norm": norm}

    def gradients(self, batches: list[dict[str, Tensor]], phase: Phase) -> Sums:
        """Run the forward and backward passes of a step and return their sums over all processes."""
        engine = self.engine
        inputs = [engine.inputs(batch) for batch in batches]
        count = torch.stack([(batch["shift_labels"] != IGNORED).sum() for batch in inputs]).sum().double()
        terminating = torch.zeros_like(count) + self.signal.received
        # SIGTERM may reach only one process, but all must stop together.
        targets, terminating = engine.reduce(torch.stack((count, terminating)))
        sums = torch.zeros(3, dtype=torch.float64, device=count.device)
        for index, micro_batch in enumerate(inputs):
            with engine.micro_step(last=index == len(inputs) - 1):
                objective, score = self._score(micro_batch, phase)
                engine.backward(objective / targets.clamp(min=1).to(objective.dtype))
            sums += torch.stack([value.double() for value in score])
        self.terminating = bool(terminating)  # not the flag, which a signal may have set since
        loss, correct, divergence = engine.reduce(sums)
        return Sums(loss, correct, divergence, targets)

    def _score(self, inputs: dict[str, Tensor], phase: Phase) -> tuple[Tensor, Score]:
        """Return the loss to minimise, and its parts: the cross-entropy and, with `distill`, the divergence."""
        # A part of a sequence always needs its positions.
        pass_positions = self.recipe.data.boundaries or self.engine.parts > 1
        keywords = model_inputs(inputs, boundaries=pass_positions, skips=phase.pose is not None)
        with offload_activations() if self.recipe.model.activation_offload else nullcontext():
            return self.scorer(
                self.model,
                keywords,
                inputs["shift_labels"],
                shifted=True,
                vocabulary=phase.vocabulary,
                accuracy=phase.until_accuracy is not None,
            )

    def _refuse_fault(self, loss: float, norm: float) -> None:
        problem = fault(loss, norm, self.progress, self.recipe.guard)
        if problem is None:
            return
        saved = complete_checkpoints(self.folder)
        hint = f"The last good checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."
        raise TrainingError(
            f"Step {self.progress.step + 1}: {problem}; this step was not saved. {hint} Try a smaller learning_rate, a "
            "longer warmup, or mixed_precision=no."
        )

    def _ended(self, phase: Phase) -> bool:
        """Return whether the phase is over; raise `TrainingError` if it missed its accuracy."""
        progress = self.progress
        if phase.until_accuracy is not None and len(progress.recent) == ACCURACY_STEPS:
            accuracy = sum(progress.recent) / ACCURACY_STEPS
            if accuracy >= phase.until_accuracy:
                self.log.skip(phase.steps - progress.phase_step)
                return True
        if progress.phase_step < phase.steps:
            return False
        if phase.until_accuracy is not None:
            raise TrainingError(
                f"Phase {progress.phase} reached an accuracy of {sum(progress.recent) / len(progress.recent):.3f} in "
                f"{phase.steps} steps, below until_accuracy={phase.until_accuracy}. Allow more steps, or try another "
                "seed."
            )
        return True

    def _evaluate_and_save(self) -> None:
        """Evaluate and save a checkpoint at their intervals, and raise `Terminated` after SIGTERM."""
        step, recipe = self.progress.step, self.recipe
        every = recipe.checkpoints.every
        # After the last step the model is saved before it is measured.
        more_phases = self.progress.phase < len(recipe.phases)
        if recipe.evaluation.every and step % recipe.evaluation.every == 0 and more_phases:
            self._measure(step)
        if (every and step % every == 0) or self.terminating:
            saved = save_checkpoint(self.engine, self.folder, self.progress, recipe)
            if self.terminating:
                raise Terminated(
                    f"SIGTERM received at step {step}; checkpoint saved to {saved}. Rerun with resume=auto."
                )

    def _measure(self, step: int) -> None:
        """Measure during training; on failure, save a checkpoint and raise `TrainingError`."""
        try:
            self.measure.during(self.model, self.log, step)
        except EvaluationError as error:
            saved = save_checkpoint(self.engine, self.folder, self.progress, self.recipe)
            raise TrainingError(
                f"The evaluation at step {step} failed: {error} Checkpoint saved to {saved}. Correct the evaluation "
                "section, or disable it with evaluation.every=null, and rerun with resume=auto."
            ) from error

    def _documents(self, split: Literal["train", "test"]) -> Iterator[str]:
        data, skipped = self.recipe.data, self.skipped if split == "test" else []
        return iter_documents(
            data.source, split=split, text_column=data.text_column, limit=data.limit, streaming=data.streaming,
            encoding=data.encoding, skip_unreadable=data.skip_unreadable, skipped=skipped,
        )  # fmt: skip


def _trackers(recipe: Recipe) -> list[str]:
    """Return the recipe's trackers; by default tensorboard if it is installed."""
    if recipe.trackers is not None:
        return recipe.trackers
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
