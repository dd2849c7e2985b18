"""What a run would take: by arithmetic, before anything is allocated, and measured on one step for a dry run."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ..evaluation.model import free_bytes
from .data import mix_notes, mix_table
from .log import gigabytes, table
from .recipe import Phase, Recipe, RecipeError

if TYPE_CHECKING:
    from .trainer import Trainer

LAYER = 17
"""Numbers that a layer keeps for its backward pass, for each token and each of the hidden dimensions, where attention
keeps no scores (Korthikanti et al. 2022, arXiv 2205.05198, equation 1: 34 bytes in two-byte numbers)."""
WIDE = 160
"""Characters of a line where nothing says how wide the screen is."""
MOMENTS = {"adamw": 8, "adamw_8bit": 2}
"""Bytes of the optimiser's state for each trained number."""


@dataclass(frozen=True)
class Need:
    """Bytes that training takes on one device beside the weights, by the usual arithmetic."""

    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.gradients + self.optimizer + self.activations + self.logits


def needed(model: Any, recipe: Recipe, phase: Phase, *, groups: int, parts: int, shards: int) -> Need:
    """What a phase needs of one device, where `groups` see different sequences, each sequence is cut into `parts`, and
    gradients and optimiser are shared by `shards` processes."""
    config = model.config.get_text_config()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = MOMENTS[recipe.optimizer.name] * sum(parameter.numel() for parameter in trained)
    rows = phase.micro_batch or max(1, phase.batch // groups)
    tokens = rows * math.ceil(phase.length / parts)
    half = recipe.mixed_precision == "bf16" or recipe.model.dtype == "bfloat16"
    number = 2 if half else 4
    layers, again = config.num_hidden_layers, recipe.model.gradient_checkpointing
    kept = layers + LAYER if again else layers * LAYER
    if recipe.model.activation_offload:
        kept = LAYER
    chunk = min(tokens, recipe.loss.chunk) if recipe.loss.chunk else tokens
    return Need(
        gradients=sum(parameter.numel() * parameter.element_size() for parameter in trained) // shards,
        optimizer=state // shards,
        activations=kept * tokens * config.hidden_size * number,
        logits=3 * 4 * chunk * config.vocab_size,  # float32: the logits, their softmax and its gradient
    )


def refuse_what_cannot_fit(trainer: Trainer) -> None:
    """Raise `RecipeError` where a phase cannot fit the memory there is, before anything is trained or written."""
    recipe, engine = trainer.recipe, trainer.engine
    if not recipe.guard.memory:
        return
    device, model = engine.accelerator.device, trainer.model
    weights = 0
    if device.type != next(model.parameters()).device.type:  # they have not been moved there yet
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // engine.shards
    free = free_bytes(device)
    if device.type == "cpu":
        free //= engine.local_world
    for number, phase in enumerate(recipe.phases):
        need = needed(model, recipe, phase, groups=engine.data_world, parts=engine.parts, shards=engine.shards)
        if need.total + weights > free:
            raise RecipeError(
                f"phases.{number}: {phase.length:,} tokens do not fit: by arithmetic a step takes "
                f"{gigabytes(need.total + weights)} beside what is in use (gradients {gigabytes(need.gradients)}, "
                f"optimiser {gigabytes(need.optimizer)}, activations {gigabytes(need.activations)}, logits "
                f"{gigabytes(need.logits)}), and {device} has {gigabytes(free)} free for it. {_remedies(recipe, phase)}"
            )


def _remedies(recipe: Recipe, phase: Phase) -> str:
    offers = [
        (phase.micro_batch != 1, "micro_batch: 1"),
        (not recipe.model.gradient_checkpointing, "model.gradient_checkpointing: true"),
        (not recipe.model.activation_offload, "model.activation_offload: true"),
        (recipe.loss.chunk == 0, "loss.chunk: 1024"),
        (recipe.lora is None, "lora: {rank: 8}"),
        (recipe.optimizer.name == "adamw", "optimizer.name: adamw_8bit"),
        (True, "a shorter length (with pose: {target: ...} it trains the same distances)"),
        (True, "more devices (recipes/accelerate)"),
    ]
    return f"Try {', '.join(offer for open_, offer in offers if open_)}. guard.memory: false tries it all the same."


@dataclass(frozen=True)
class Measured:
    """One micro-batch of a phase, run."""

    seconds: float
    steps_seconds: float
    """By arithmetic, of all steps of the phase."""
    memory: int


def show(trainer: Trainer) -> None:
    """Print steps, tokens, the mix, the memory of each device and the time, from a step that is run for each phase."""
    recipe, main = trainer.recipe, trainer.accelerator.is_main_process
    console = Console(quiet=not main)
    if not console.is_terminal:
        console = Console(quiet=not main, width=WIDE)
    parameters = list(trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in parameters)
    refuse_what_cannot_fit(trainer)
    trainer.prepare()
    rows = []
    for number, phase in enumerate(recipe.phases):
        found = _run(trainer, number)
        rows.append(
            {
                "phase": number,
                "length": phase.length,
                "positions": phase.length if phase.pose is None else phase.pose.target,
                "steps": phase.steps,
                "sequences": phase.steps * phase.batch,
                "tokens": phase.steps * phase.batch * phase.length,
                "micro-batch": f"{found.seconds:.2f} s",
                "time": duration(found.steps_seconds),
                "memory": gigabytes(found.memory),
            }
        )
        seconds = found.steps_seconds
        rows[-1]["seconds"] = seconds
    total = sum(row.pop("seconds") for row in rows)
    for number in range(len(rows)):
        data = trainer.data(number)
        console.print(table(f"What phase {number} draws from", mix_table(data)))
        for note in mix_notes(data):
            console.print(note)
    console.print(table("What would be trained", rows))
    console.print(
        f"{sum(row['steps'] for row in rows):,} steps at most, {sum(row['tokens'] for row in rows):,} tokens, "
        f"about {duration(total)}. {trained:,} of {whole:,} parameters are trained."
    )
    if recipe.evaluation.every:
        lengths = ", ".join(f"{length:,}" for length in trainer.measure.lengths)
        console.print(
            f"The evaluation ({', '.join(recipe.evaluation.tasks)} at {lengths} tokens) was prepared: its text and "
            "questions are there."
        )
    console.print(
        f"Time: the second of two micro-batches of each phase on {trainer.engine.describe()}, times their number; "
        f"without evaluation, checkpoints and loading. Memory: the peak of {trainer.engine.memory_of} after a step."
    )


def _run(trainer: Trainer, number: int) -> Measured:
    """Two micro-batches of a phase's first step, the second timed, and a step of the optimiser at a rate of zero."""
    phase, accumulation = trainer.recipe.phases[number], 1
    seconds = 0.0
    for batches in trainer.batches(number):
        accumulation = len(batches)
        for _ in range(2):
            started = time.perf_counter()
            trainer.gradients(batches[:1], phase)
            if trainer.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        trainer.engine.clip(trainer.recipe.optimizer.clip)
        trainer.engine.step()
        break
    return Measured(seconds, seconds * accumulation * phase.steps, trainer.engine.memory())


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
