"""The training loop: phases of steps, each step over all processes and micro-batches as if they were one batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from rich.console import Console
from torch import Tensor
from transformers import get_scheduler

from pe_patch.errors import PePatchError
from pe_patch.text import load_documents

from .checkpoints import Progress, complete_checkpoints, find_checkpoint, load_checkpoint, save_checkpoint
from .data import Corpus, PhaseData, first_tokens, micro_batches
from .log import Log, table
from .loss import Score, count_targets, next_token_score
from .models import build_model, build_teacher, build_tokenizer, parameter_groups
from .reading import save_recipe
from .recipe import Phase, Recipe

ACCURACY_STEPS = 25
"""Over how many steps `until_accuracy` is judged."""

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)

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


class TrainingError(PePatchError, RuntimeError):
    """Training cannot go on: the loss is no longer a number, or what a phase was to reach was not reached."""


def learning_rates(phase: Phase) -> Callable[[int], float]:
    """The learning rate as a function of the phase's step, counted from zero; Transformers' own schedules."""
    name, options = SCHEDULES[phase.schedule](phase)
    # A stand-in optimiser: the function alone is wanted, so that a rate depends on the step and on nothing else.
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler: Any = get_scheduler(name, stand_in, phase.warmup, phase.steps, scheduler_specific_kwargs=options)
    multiplier = scheduler.lr_lambdas[0]
    return lambda step: phase.learning_rate * multiplier(step)


def model_inputs(batch: dict[str, Tensor], *, boundaries: bool) -> dict[str, Any]:
    """What a forward pass is given. There is no attention mask and no cache: only then does Transformers take positions
    that start again for packed documents, and keep attention from crossing between them.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    return {**inputs, "position_ids": batch["position_ids"]} if boundaries else inputs


class Trainer:
    """One run of one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.output = recipe, Path(recipe.output)
        trackers: Any = recipe.trackers or None
        self.accelerator: Any = Accelerator(
            mixed_precision=recipe.mixed_precision, log_with=trackers, project_dir=recipe.output
        )
        set_seed(recipe.seed)
        texts = self._documents("train")
        self.tokenizer = build_tokenizer(recipe, texts)
        self.corpus = Corpus(texts, self.tokenizer)
        self.progress = Progress()
        self.model = build_model(recipe, self.tokenizer, *self._calibration())
        taught = recipe.distill is not None and not recipe.dry_run
        self.teacher: Any = build_teacher(recipe, self.model, self.accelerator.device) if taught else None

    def _calibration(self) -> tuple[dict[str, Any], Any]:
        """What the scheme is calibrated on, as its option, and where; nothing where the recipe does not ask for it."""
        recipe = self.recipe
        if recipe.scheme is None or recipe.scheme.calibration_tokens is None:
            return {}, None
        data = self._data(recipe.phases[0], (recipe.seed, 0))
        return {"calibration": first_tokens(data, recipe.scheme.calibration_tokens)}, self.accelerator.device

    def show_plan(self) -> Any:
        """Print steps and tokens; returns the untrained model."""
        phases = self.recipe.phases
        rows = [
            {
                "phase": number,
                "length": phase.length,
                "steps": phase.steps,
                "sequences": phase.steps * phase.batch,
                "tokens": phase.steps * phase.batch * phase.length,
            }
            for number, phase in enumerate(phases)
        ]
        parameters = list(self.model.parameters())
        if self.accelerator.is_main_process:
            console = Console()
            console.print(table("What would be trained", rows))
            console.print(
                f"{sum(row['steps'] for row in rows):,} steps at most, {sum(row['tokens'] for row in rows):,} tokens, "
                f"from a text of {len(self.corpus.stream):,} tokens in {len(self.corpus.documents):,} documents. "
                f"{sum(p.numel() for p in parameters if p.requires_grad):,} of {sum(p.numel() for p in parameters):,} "
                "parameters are trained."
            )
        return self.model

    def run(self) -> Any:
        """Train all phases, from the newest checkpoint if so asked; returns the model as it was saved."""
        recipe, folder = self.recipe, self.output / "checkpoints"
        checkpoint = find_checkpoint(recipe, folder)
        groups = parameter_groups(self.model, recipe.optimizer.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.optimizer.betas)
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if checkpoint is not None:
            self.progress = load_checkpoint(self.accelerator, checkpoint, recipe)
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, self.output / "recipe.yaml")
        if recipe.trackers:
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
        self.model.train()  # a loaded model is in evaluation mode: no dropout, no gradient checkpointing
        with log as self.log:
            while self.progress.phase < len(recipe.phases):
                self._phase(recipe.phases[self.progress.phase], folder)
        return self._finish()

    def _phase(self, phase: Phase, folder: Path) -> None:
        """The rest of the phase that `progress` is in."""
        progress, rate, started = self.progress, learning_rates(phase), time.perf_counter()
        for batches in self._batches(phase):
            for group in self.optimizer.param_groups:
                group["lr"] = rate(progress.phase_step)
            values = self._step(batches, phase)
            seconds = time.perf_counter() - started
            tokens = phase.batch * phase.length
            progress.step, progress.phase_step = progress.step + 1, progress.phase_step + 1
            progress.tokens += tokens
            at = {"step": progress.step, "phase": progress.phase}
            speed = {"tokens": progress.tokens, "tokens_per_second": tokens / seconds, "seconds": seconds}
            self.log.step({**at, **values, "learning_rate": rate(progress.phase_step - 1), **speed})
            ended = self._ended(phase)
            if ended:
                progress.phase, progress.phase_step, progress.recent = progress.phase + 1, 0, []
            self._now_and_then(folder)
            if ended:
                return
            started = time.perf_counter()

    def _data(self, phase: Phase, seed: tuple[int, int]) -> PhaseData:
        return PhaseData(self.corpus, self.tokenizer, phase, seed=seed, boundaries=self.recipe.data.boundaries)

    def _batches(self, phase: Phase) -> Iterator[list[dict[str, Tensor]]]:
        recipe, progress = self.recipe, self.progress
        return micro_batches(
            self._data(phase, (recipe.seed, progress.phase)),
            first_step=progress.phase_step,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=recipe.data.workers,
        )

    def _step(self, batches: list[dict[str, Tensor]], phase: Phase) -> dict[str, Any]:
        """One optimiser step: the mean loss over the targets of all processes and micro-batches."""
        accelerator, distill = self.accelerator, self.recipe.distill
        batches = [{key: value.to(accelerator.device) for key, value in batch.items()} for batch in batches]
        targets = accelerator.reduce(torch.stack([count_targets(batch["labels"]) for batch in batches]).sum())
        sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                score = self._score(batch, phase)
                loss = score.loss if distill is None else score.loss + distill.weight * score.divergence
                # Gradients are averaged over the processes; a sum is wanted.
                accelerator.backward(loss * accelerator.num_processes / targets.clamp(min=1))
            sums += torch.stack([value.detach().double() for value in score])
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
        loss, accuracy, divergence = (accelerator.reduce(sums) / targets.clamp(min=1)).tolist()
        self._refuse_nan(loss, float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        extra = {} if distill is None else {"divergence": divergence}
        if phase.until_accuracy is not None:
            self.progress.recent = [*self.progress.recent, accuracy][-ACCURACY_STEPS:]
            extra["accuracy"] = accuracy
        return {"loss": loss, **extra, "targets": int(targets), "gradient_norm": float(norm)}

    def _score(self, batch: dict[str, Tensor], phase: Phase) -> Score:
        """The model's predictions, against the text and, with `distill`, against the teacher's."""
        inputs = model_inputs(batch, boundaries=self.recipe.data.boundaries)
        options: dict[str, Any] = {"vocabulary": phase.vocabulary, "accuracy": phase.until_accuracy is not None}
        if self.recipe.distill is not None:
            with torch.no_grad():
                options["teacher"] = self.teacher(**inputs).logits
            options["temperature"] = self.recipe.distill.temperature
        return next_token_score(self.model(**inputs).logits, batch["labels"], **options)

    def _refuse_nan(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        saved = complete_checkpoints(self.output / "checkpoints")
        kept = f"The last good checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."
        raise TrainingError(
            f"Step {self.progress.step + 1}: the loss is {loss}, the norm of its gradient {norm}; nothing was updated. "
            f"{kept} Try a smaller learning_rate, a longer warmup, or mixed_precision=no."
        )

    def _ended(self, phase: Phase) -> bool:
        """Whether the phase is over; an accuracy that was not reached in time is an error."""
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
                f"{phase.steps} steps, {phase.until_accuracy} was asked for. Allow more steps, or try another seed."
            )
        return True

    def _now_and_then(self, folder: Path) -> None:
        """Evaluation and checkpoint, each at its own interval."""
        step, recipe = self.progress.step, self.recipe
        if recipe.evaluation.every and step % recipe.evaluation.every == 0:
            self._evaluate()
        if recipe.checkpoints.every and step % recipe.checkpoints.every == 0:
            save_checkpoint(self.accelerator, folder, self.progress, recipe)

    def _evaluate(self) -> None:
        """Loss and retrieval on held-out text; on one process, unless each has only a part of the model."""
        accelerator, sharded = self.accelerator, self.accelerator.distributed_type in SHARDED
        if accelerator.is_main_process or sharded:
            model = self.model if sharded else accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
            for row in self._measure(model).rows:
                self.log.write("evaluation", {"step": self.progress.step, **asdict(row)})
        accelerator.wait_for_everyone()

    def _measure(self, model: Any) -> Any:
        # Imported late: it brings plotting and metrics along, which a run that never evaluates has no use for.
        from pe_patch.evaluation import evaluate
        from pe_patch.evaluation.subject import windows

        wanted, target = self.recipe.evaluation, self.recipe.phases[-1].length
        return evaluate(
            model,
            self.tokenizer,
            tasks=wanted.tasks,
            lengths=wanted.lengths or sorted({windows(model)[0] or target, target}),
            samples=wanted.samples,
            text=self._documents("test"),
            beyond_window=True,
            progress=False,
        )

    def _documents(self, split: Literal["train", "test"]) -> list[str]:
        data = self.recipe.data
        return load_documents(data.source, split=split, text_column=data.text_column, limit=data.limit)

    def _finish(self) -> Any:
        recipe, step = self.recipe, self.progress.step
        if recipe.evaluation.every and step % recipe.evaluation.every:
            self._evaluate()
        weights = self.accelerator.get_state_dict(self.model) if self.accelerator.distributed_type in SHARDED else None
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False).eval()
        if recipe.lora is not None and recipe.lora.merge:
            model = model.merge_and_unload()
        if self.accelerator.is_main_process:
            model.save_pretrained(self.output / "model", state_dict=weights)
            self.tokenizer.save_pretrained(self.output / "model")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # takes the process group down, so nothing may come after it
        return model
