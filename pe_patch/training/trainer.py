"""Train the phases of a recipe with Transformers' Trainer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, TrainerCallback, get_scheduler
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .. import compat
from ..attention.parallel import ulysses_of
from .checkpoints import Progress, complete_checkpoints, prune, publish
from .chunked import Scorer
from .data import IGNORED
from .guard import (
    INTERRUPTED_EXIT_CODE,
    TERMINATED_EXIT_CODE,
    EvaluationError,
    Signal,
    Terminated,
    TrainingError,
    fault,
)
from .launch import Launch, attention_of, set_rows
from .log import Log
from .loss import Score
from .memory import offload_activations
from .recipe import Phase, Recipe, RecipeError

STOPS: dict[int, tuple[str, int]] = {
    SIGTERM: ("SIGTERM", TERMINATED_EXIT_CODE),
    SIGINT: ("SIGINT", INTERRUPTED_EXIT_CODE),
}
"""Name and exit code by signal."""
ACCURACY_STEPS = 25
"""Steps over which `until_accuracy` averages."""
WEIGHTS = "weights.safetensors"
"""File of a checkpoint with the weights as the model holds them, if they are not sharded."""

MicroBatches = list[dict[str, Tensor]]
"""One process's share of a step: batches with `input_ids`, `labels` and `position_ids`, each `[rows, length]`."""

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
    """Sums over all processes and micro-batches of one step: nats, and the number of correct predictions."""

    loss: float
    correct: float
    divergence: float
    taught: float
    """The number of targets that the divergence sums over."""


class Step(NamedTuple):
    """Hold all micro-batches of one optimiser step, on this process's device. Trainer treats it as one batch."""

    batches: MicroBatches


class Steps:
    """The steps of all phases, from the trainer's progress on, as the data loader that Trainer iterates over once."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[MicroBatches]:
        trainer = self.trainer
        while trainer.progress.phase < len(trainer.recipe.phases):
            number = trainer.progress.phase
            for batches in trainer.batches(number, trainer.progress.phase_step):
                yield batches
                if trainer.progress.phase != number:  # the phase has reached its accuracy
                    break


class RecipeTrainer(transformers.Trainer):
    """Transformers' Trainer on the phases of a recipe.

    A batch of Trainer is a whole step of this process. Phases differ in their number of micro-batches, and Trainer
    accumulates over a constant one, so `training_step` runs the micro-batches itself.

    Args:
        model: the model to train.
        launch: how the script was launched, with Trainer's arguments.
        recipe: the recipe of the run.
        batches: returns this process's micro-batches for each step of a phase from a step on.
        log: the log of the run.
        progress: the progress of the run, which the trainer updates.
        facts: returns what a resumed run must share with this one.
        teacher: the teacher of a distillation.
        evaluate: measures the model at a step and writes to the log; None never measures.
        start: measures the model before the first step; None never measures.
        signal: records signals that end the run.
    """

    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    callback_handler: Any

    def __init__(
        self,
        model: Any,
        launch: Launch,
        recipe: Recipe,
        batches: Callable[[int, int], Iterator[MicroBatches]],
        *,
        log: Log | None = None,
        progress: Progress | None = None,
        facts: Callable[[], dict[str, Any]] = dict,
        teacher: Any = None,
        evaluate: Callable[[Any, int], None] | None = None,
        start: Callable[[Any], None] | None = None,
        signal: Signal | None = None,
    ) -> None:
        compat.check_trainer(transformers.Trainer, compat.TRAINER_METHODS)
        self.launch, self.recipe, self.batches, self.step_log = launch, recipe, batches, log
        self.progress, self.facts, self.measure = progress or Progress(), facts, evaluate
        self.signal = signal or Signal()
        self.terminating: int = 0
        """Number of the signal that ends the run after this step; 0 to go on."""
        self.checkpoints = Path(recipe.output) / "checkpoints"
        self.unfinished = self.checkpoints / ".unfinished"
        self.scorer = Scorer(model, recipe.loss, recipe.distill, teacher)
        self.values: dict[str, Any] = {}
        """Values of the current step for the log."""
        self.started = 0.0
        self.rates = [learning_rates(phase) for phase in recipe.phases]
        use_cache = model.config.use_cache
        super().__init__(model, launch.arguments, callbacks=[PhaseCallback(self, start)])
        model.config.use_cache = use_cache  # Trainer turns it off, which would be saved with the model
        self.remove_callback(PrinterCallback)
        if launch.deepspeed is not None:
            unset_hf_deepspeed_config()  # otherwise Transformers loads the models of evaluations in parts
        if log is not None:
            log.track = self._track

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.recipe.phases[self.progress.phase]

    def _track(self, values: dict[str, float]) -> None:
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, values)

    # Set-up

    def get_train_dataloader(self) -> Any:
        return Steps(self)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the matrices; vectors, such as norms and biases, have no weight decay."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's estimate does not know phases, and walks through all parameters at each step

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.launch.cut_by_heads:
            parallelism = self.accelerator.parallelism_config
            # accelerate accepts only Transformers' names here, and counts sequences by sizes that are optional.
            parallelism.sp_handler.sp_attn_implementation = attention_of(self.model)
            parallelism.dp_replicate_size, parallelism.dp_shard_size = 1, self.launch.data_world
        # Under Ulysses, Trainer would wrap the loader in one that cuts sequences; `inputs` cuts them here.
        model, _ = super()._prepare_for_training(max_steps, [], resume_from_checkpoint)
        if self.launch.deepspeed is not None:
            unset_hf_deepspeed_config()
        self.callback_handler.train_dataloader = train_dataloader
        model.train()  # a loaded model is in evaluation mode: no dropout, no gradient checkpointing
        self.scorer.learn(model)
        return model, train_dataloader

    def prepare(self) -> Any:
        """Prepare model and optimiser without training, and return the prepared model."""
        return self._prepare_for_training(self.args.max_steps, Steps(self), None)[0]

    # One step

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Return one step, and the number of its targets over all processes."""
        self.started = time.perf_counter()
        batches = next(epoch_iterator, None)
        return ([], None) if batches is None else self.load(batches)

    def load(self, batches: MicroBatches) -> tuple[list[Step], Tensor]:
        """Move a step's micro-batches to the device; return them, and the number of targets over all processes."""
        inputs = [self.inputs(batch) for batch in batches]
        count = torch.stack([(batch["shift_labels"] != IGNORED).sum() for batch in inputs]).sum().double()
        if self.launch.cut_by_ring:  # each process of a ring counts its whole sequences, before they are cut
            count = count / self.launch.parts
        stop = (float(self.signal.received == number) for number in STOPS)
        # A signal may reach only one process, but all must stop together.
        targets, *stopped = self.launch.sum(torch.stack([count, *(count.new_tensor(value) for value in stop)]))
        self.terminating = next((number for number, value in zip(STOPS, stopped, strict=True) if value), 0)
        return [Step(inputs)], targets

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch to this process's device, shift its labels, and cut it for Ulysses.

        Returns:
            `input_ids` and `position_ids`, `[rows, part]`, and `shift_labels`, the label of each token's successor.
        """
        batch = {key: value.to(self.launch.device) for key, value in batch.items()}
        labels = batch.pop("labels")
        whole = {**batch, "shift_labels": F.pad(labels[:, 1:], (0, 1), value=IGNORED)}
        if not self.launch.cut_by_heads:
            return whole
        rows, length = labels.shape
        parts = self.launch.parts
        if length % parts:
            raise RecipeError(f"A sequence of {length} tokens cannot be cut into {parts} equal parts.")
        handler = self.accelerator.parallelism_config.sp_handler
        set_rows(ulysses_of(handler.sp_attn_implementation), rows)
        index = self.launch.rank % parts
        return {name: tensor.chunk(parts, 1)[index].contiguous() for name, tensor in whole.items()}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the passes of one step, and return its mean loss over the targets of all processes."""
        rate = self.rates[self.progress.phase](self.progress.phase_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = self.passes(model, inputs, num_items_in_batch)
        targets = max(1, int(num_items_in_batch))
        self.values = {"loss": sums.loss / targets}
        if sums.taught:
            self.values["divergence"] = sums.divergence / sums.taught
        if self.phase.until_accuracy is not None:
            self.values["accuracy"] = sums.correct / targets
        self.values |= {"targets": int(num_items_in_batch), "learning_rate": rate}
        return torch.tensor(self.values["loss"], device=self.args.device)

    def passes(self, model: nn.Module, step: Step, targets: Tensor) -> Sums:
        """Run the forward and backward passes of a step and return their sums over all processes."""
        model.train()
        scores = []
        for index, batch in enumerate(step.batches):
            last = index == len(step.batches) - 1
            with self._micro_step(model, batch, last):
                objective, score = self._score(model, batch)
                loss = objective / targets.clamp(min=1).to(objective.dtype)
                self._backward(model, loss * self.launch.gradient_factor, last)
            scores.append(torch.stack([value.double() for value in score]))
        return Sums(*self.launch.sum(torch.stack(scores).sum(0)).tolist())

    def _score(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Score]:
        """Return the loss to minimise, and its parts: the cross-entropy and, with `distill`, the divergence."""
        # A part of a sequence always needs its positions.
        pass_positions = self.recipe.data.boundaries or self.launch.parts > 1
        keywords = model_inputs(batch, boundaries=pass_positions, skips=self.phase.pose is not None)
        with offload_activations() if self.recipe.model.activation_offload else nullcontext():
            return self.scorer(
                model,
                keywords,
                batch["shift_labels"],
                shifted=True,
                vocabulary=self.phase.vocabulary,
                accuracy=self.phase.until_accuracy is not None,
                learn_from=batch.get("learn_from"),
            )

    @contextmanager
    def _micro_step(self, model: Any, batch: dict[str, Tensor], last: bool) -> Iterator[None]:
        """Return a context for the passes of a micro-batch; gradients synchronise on the last one of a step."""
        joined: AbstractContextManager[Any] = nullcontext()
        if self.launch.deepspeed is not None:
            model.set_gradient_accumulation_boundary(is_boundary=last)
        elif not last:
            joined = self.accelerator.no_sync(model)
        ring: AbstractContextManager[Any] = nullcontext()
        if self.launch.cut_by_ring:
            tensors = list(batch.values())
            ring = self.accelerator.maybe_context_parallel(
                buffers=tensors, buffer_seq_dims=[1] * len(tensors), no_restore_buffers=set(tensors)
            )
        with joined, ring:
            yield

    def _backward(self, model: Any, loss: Tensor, last: bool) -> None:
        if self.launch.deepspeed is None:
            self.accelerator.backward(loss)
            return
        # accelerate's backward also takes the step, before the loss could be checked.
        model.backward(loss, scale_wrt_gas=False)
        if not last:
            model.step()  # this only counts the micro-batch

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.launch.deepspeed is None:
            return super()._clip_grad_norm(model)
        if not self._steps_in_torch(model):
            return None  # DeepSpeed clips when it steps, since only then it knows the norm
        _set_clipping(model, 0.0)
        return nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Return the norm of the gradient, after checking it and the loss.

        Trainer calls this before the optimiser's step. Under DeepSpeed, this takes the step.
        """
        loss = self.values["loss"]
        if self.launch.deepspeed is None or self._steps_in_torch(model):
            if grad_norm is None:
                grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
            self._refuse_fault(fault(loss, norm, self.progress, self.recipe.guard))
            if self.launch.deepspeed is not None:
                model.step()
        else:
            self._refuse_fault(fault(loss, 0.0, self.progress, self.recipe.guard))
            _set_clipping(model, self.args.max_grad_norm)
            model.step()
            norm = float(model.get_global_grad_norm())
            self._refuse_fault(fault(loss, norm, Progress(), self.recipe.guard), taken=True)
        self.values["gradient_norm"] = norm
        return norm

    def _steps_in_torch(self, model: Any) -> bool:
        """Return whether DeepSpeed left optimiser and gradients unchanged (ZeRO-0)."""
        return isinstance(model.optimizer, torch.optim.Optimizer)

    def _refuse_fault(self, problem: str | None, *, taken: bool = False) -> None:
        if problem is None:
            return
        step = "this step changed the weights, and was not saved" if taken else "this step was not taken"
        raise TrainingError(
            f"Step {self.progress.step + 1}: {problem}; {step}. {self._last_checkpoint()} Try a smaller learning_rate, "
            "a longer warmup, or mixed_precision=no."
        )

    def _last_checkpoint(self) -> str:
        saved = complete_checkpoints(self.checkpoints)
        # A checkpoint is written only if all weights are finite.
        return f"The last good checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."

    def rehearse(self, model: Any, batches: MicroBatches) -> float:
        """Run one micro-batch of the current phase twice and take a step at learning rate 0.

        Returns:
            The seconds of the second micro-batch.
        """
        seconds = 0.0
        for _ in range(2):
            started = time.perf_counter()
            (step,), targets = self.load(batches[:1])
            sums = self.passes(model, step, targets)
            if self.launch.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        self.values = {"loss": sums.loss / max(1, int(targets))}
        self._get_grad_norm(model, self._clip_grad_norm(model))
        self.optimizer.step()
        model.zero_grad()
        return seconds

    # Evaluations and checkpoints

    def _run_epoch(self, **arguments: Any) -> None:
        if self.progress.phase == len(self.recipe.phases):  # the checkpoint is of the last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(**arguments)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Measure during training; on failure, save a checkpoint and raise `TrainingError`."""
        self.control.should_evaluate = False
        if self.measure is None:
            return {}
        step = self.progress.step
        try:
            self.measure(self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=True), step)
        except EvaluationError as error:
            saved = self.save_checkpoint()
            raise TrainingError(
                f"The evaluation at step {step} failed: {error} Checkpoint saved to {saved}. Correct the evaluation "
                "section, or disable it with evaluation.every=null, and rerun with resume=auto."
            ) from error
        return {}

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.unfinished)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        saved = self.save_checkpoint()
        if self.terminating:
            name = STOPS[self.terminating][0]
            raise Terminated(
                f"{name} received at step {self.progress.step}; checkpoint saved to {saved}. Rerun with resume=auto.",
                STOPS[self.terminating][1],
            )

    def save_checkpoint(self) -> Path:
        """Write a checkpoint, complete or not at all, delete the oldest ones, and return its path.

        Raises:
            TrainingError: a weight is not finite, or the checkpoint cannot be written.
        """
        self.refuse_broken_weights()
        saved = self.checkpoints / f"step-{self.progress.step:06d}"
        try:
            if self.launch.is_main:
                shutil.rmtree(self.unfinished, ignore_errors=True)
                self.unfinished.mkdir(parents=True)
            self.launch.wait()
            super()._save_checkpoint(self.model_wrapped, None)
            self.launch.wait()  # every process writes its random state
            if self.launch.is_main:
                written = self.unfinished / f"checkpoint-{self.state.global_step}"
                publish(written, self.checkpoints, self.progress, self.recipe, self.facts())
                shutil.rmtree(self.unfinished)
                prune(self.checkpoints, self.recipe.checkpoints.keep)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own I/O errors
            shutil.rmtree(self.unfinished, ignore_errors=True)
            raise TrainingError(
                f"The checkpoint of step {self.progress.step} could not be written ({type(error).__name__}: {error}). "
                f"{self._last_checkpoint()} Free some space or correct the folder, and rerun with resume=auto."
            ) from error
        self.launch.wait()
        return saved

    def refuse_broken_weights(self) -> None:
        """Raise `TrainingError` on every process if a weight is not finite on some process."""
        finite = all(
            bool(tensor.isfinite().all())
            for parameter in self.model_wrapped.parameters()
            if parameter.requires_grad and (tensor := _local(parameter)).is_floating_point()
        )
        if self.launch.failed_anywhere(not finite):
            raise TrainingError(
                f"Step {self.progress.step}: after this step some weights are not finite, so they were not saved. "
                f"{self._last_checkpoint()} Try a smaller learning_rate, a longer warmup, or mixed_precision=no."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights of a checkpoint as the model holds them. FSDP2 and DeepSpeed write theirs elsewhere."""
        assert output_dir is not None
        if self.launch.uses_fsdp or self.launch.deepspeed is not None or not self.launch.is_main:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tensors = _own_tensors(self.accelerator.unwrap_model(self.model))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(Path(output_dir) / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint; Trainer itself would ignore missing and unexpected ones."""
        if self.launch.uses_fsdp:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored, own = load_file(str(Path(resume_from_checkpoint) / WEIGHTS)), _own_tensors(self.model)
        if stored.keys() != own.keys():
            different = ", ".join(sorted(stored.keys() ^ own.keys())[:5])
            raise RecipeError(f"{resume_from_checkpoint} holds the weights of another model: {different} differ.")
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != stored[name].shape or tensor.dtype != stored[name].dtype:
                    raise RecipeError(f"{resume_from_checkpoint} holds another shape or dtype of {name}.")
                tensor.copy_(stored[name])

    # The trained model

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Return all weights on the main process if the weights are sharded, and None otherwise."""
        if not self.launch.sharded:
            return None
        if self.launch.deepspeed is not None:
            return compat.consolidated_state_dict(self.model_wrapped)
        return self.accelerator.get_state_dict(self.model_wrapped)

    def unwrapped(self) -> Any:
        """Return the model as it was before training prepared it."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)

    def release_optimizer(self) -> None:
        """Free the memory of the optimiser after training."""
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.accelerator.free_memory()


class PhaseCallback(TrainerCallback):
    """Log each step, end phases, and ask for evaluations, checkpoints and the end of the run."""

    def __init__(self, trainer: RecipeTrainer, start: Callable[[Any], None] | None) -> None:
        self.trainer, self.start = trainer, start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.start is not None and self.trainer.progress.step == 0:
            accelerator = self.trainer.accelerator
            self.start(accelerator.unwrap_model(self.trainer.model_wrapped, keep_fp32_wrapper=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, progress, phase = self.trainer, self.trainer.progress, self.trainer.phase
        # A Trainer that no longer calls `_get_grad_norm` would train without the guard.
        assert "gradient_norm" in trainer.values, "This version of Transformers does not check the gradient's norm."
        seconds, tokens = time.perf_counter() - trainer.started, phase.batch * phase.length
        progress.step, progress.phase_step = progress.step + 1, progress.phase_step + 1
        progress.tokens += tokens
        values = {"step": progress.step, "phase": progress.phase, **trainer.values, "tokens": progress.tokens}
        values |= {"tokens_per_second": tokens / seconds, "seconds": seconds, "memory": trainer.launch.memory()}
        if trainer.step_log is not None:
            trainer.step_log.step(values)
        if "accuracy" in values:
            progress.recent = [*progress.recent, values["accuracy"]][-ACCURACY_STEPS:]
        if self._ended(phase):
            progress.next_phase()
        recipe, step = trainer.recipe, progress.step
        over = progress.phase == len(recipe.phases)
        # After the last step the model is saved before it is measured.
        control.should_evaluate = bool(recipe.evaluation.every) and step % recipe.evaluation.every == 0 and not over
        every = recipe.checkpoints.every
        control.should_save = bool(every and step % every == 0) or bool(trainer.terminating)
        control.should_training_stop = over

    def _ended(self, phase: Phase) -> bool:
        """Return whether the phase is over; raise `TrainingError` if it missed its accuracy."""
        progress, recent = self.trainer.progress, self.trainer.progress.recent
        if phase.until_accuracy is not None and len(recent) == ACCURACY_STEPS:
            if sum(recent) / ACCURACY_STEPS >= phase.until_accuracy:
                if self.trainer.step_log is not None:
                    self.trainer.step_log.skip(phase.steps - progress.phase_step)
                return True
        if progress.phase_step < phase.steps:
            return False
        if phase.until_accuracy is not None:
            raise TrainingError(
                f"Phase {progress.phase} reached an accuracy of {sum(recent) / len(recent):.3f} in {phase.steps} "
                f"steps, below until_accuracy={phase.until_accuracy}. Allow more steps, or try another seed."
            )
        return True


def _set_clipping(engine: Any, norm: float) -> None:
    compat.set_gradient_clipping(engine, norm)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = norm


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that determine a model, by name, without other names of the same tensor.

    Frozen 4-bit weights are left out: they come from the model's source, and their format is bitsandbytes' own.
    """
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers()) if type(tensor).__name__ != "Params4bit"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in held:
            held.remove(id(tensor))
            tensors[name] = tensor.detach()
    return tensors
