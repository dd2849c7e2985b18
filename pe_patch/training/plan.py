"""Estimate what a run needs, before anything is allocated, and measure one step for a dry run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .. import compat
from ..evaluation.model import free_bytes
from ..evaluation.progress import duration
from .checkpoints import Progress
from .data import mix_notes, mix_table
from .log import gigabytes, table
from .recipe import Phase, Recipe, RecipeError

if TYPE_CHECKING:
    from .run import Run
    from .trainer import RecipeTrainer

LAYER = 17
"""Numbers that a layer keeps for its backward pass, per token and hidden dimension, if attention keeps no scores
(Korthikanti et al. 2022, arXiv 2205.05198, equation 1: 34 bytes in two-byte numbers)."""
WIDE = 160
"""Line width in characters if the output is not a terminal."""
MOMENTS = {"adamw": 8, "adamw_8bit": 2}
"""Bytes of optimiser state per trained parameter."""


@dataclass(frozen=True)
class Need:
    """Estimated bytes that training needs on one device, without the weights."""

    gradients: int
    optimizer: int
    activations: int
    logits: int
    mask: int
    """The dense masks `[rows, 1, length, length]` that keep packed documents apart."""

    @property
    def total(self) -> int:
        return self.gradients + self.optimizer + self.activations + self.logits + self.mask


def needed(model: Any, recipe: Recipe, phase: Phase, *, groups: int, parts: int, shards: int) -> Need:
    """Estimate the memory that a phase needs on one device.

    Args:
        model: the model to train.
        recipe: the recipe of the run.
        phase: the phase to estimate.
        groups: number of process groups that see different sequences.
        parts: number of parts that each sequence is cut into.
        shards: number of processes that share gradients and optimiser state.
    """
    config = model.config.get_text_config()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = MOMENTS[recipe.optimizer.name] * sum(parameter.numel() for parameter in trained)
    if recipe.optimizer.name == "adamw_8bit":  # Transformers keeps the moments of embeddings in float32
        embeddings = model.get_input_embeddings().weight
        state += (MOMENTS["adamw"] - MOMENTS["adamw_8bit"]) * embeddings.numel() * embeddings.requires_grad
    rows = phase.micro_batch or max(1, phase.batch // groups)
    tokens = rows * math.ceil(phase.length / parts)
    half = recipe.mixed_precision == "bf16" or recipe.model.dtype == "bfloat16"
    bytes_per_number = 2 if half else 4
    layers, checkpointed = config.num_hidden_layers, recipe.model.gradient_checkpointing
    kept = layers + LAYER if checkpointed else layers * LAYER
    if recipe.model.activation_offload:
        kept = LAYER
    chunk = min(tokens, recipe.loss.chunk) if recipe.loss.chunk else tokens
    return Need(
        gradients=sum(parameter.numel() * parameter.element_size() for parameter in trained) // shards,
        optimizer=state // shards,
        activations=kept * tokens * config.hidden_size * bytes_per_number,
        logits=3 * 4 * chunk * config.vocab_size,  # float32: the logits, their softmax and its gradient
        mask=_mask_bytes(model, recipe, phase, rows),
    )


def _mask_bytes(model: Any, recipe: Recipe, phase: Phase, rows: int) -> int:
    """Return the size of the masks of a pass: one per kind of layer, in bytes for SDPA and in numbers for eager.

    Flash and FlexAttention build none, and attention without a mask needs none.
    """
    config = model.config.get_text_config()
    implementation = str(compat.attention_implementation(config) or "sdpa")
    if "flash" in implementation or "flex" in implementation:
        return 0
    eager = "eager" in implementation
    if not eager and (not recipe.data.boundaries or phase.pose is not None):
        return 0
    kinds = len(compat.attending_layer_types(config))
    return kinds * rows * phase.length**2 * (next(model.parameters()).element_size() if eager else 1)


def refuse_what_cannot_fit(run: Run, released: int = 0) -> None:
    """Raise `RecipeError` if the estimated memory of a phase exceeds the free memory.

    Args:
        run: the run.
        released: bytes in use that will be free when it trains.
    """
    recipe, launch = run.recipe, run.launch
    if not recipe.guard.memory:
        return
    device, model = launch.device, run.model
    weights = 0
    if device.type != next(model.parameters()).device.type:  # the weights are not on the device yet
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // launch.shards
    free = free_bytes(device) + released
    if device.type == "cpu":
        free //= launch.local_world
    for number, phase in enumerate(recipe.phases):
        need = needed(model, recipe, phase, groups=launch.data_world, parts=launch.parts, shards=launch.shards)
        if need.total + weights > free:
            raise RecipeError(
                f"phases.{number}: {phase.length:,} tokens do not fit in memory. A step needs an estimated "
                f"{gigabytes(need.total + weights)} in addition to what is in use (gradients "
                f"{gigabytes(need.gradients)}, optimiser {gigabytes(need.optimizer)}, activations "
                f"{gigabytes(need.activations)}, logits {gigabytes(need.logits)}, masks {gigabytes(need.mask)}); "
                f"{device} has {gigabytes(free)} free. {_remedies(recipe, phase, need)}"
            )


def _remedies(recipe: Recipe, phase: Phase, need: Need) -> str:
    offers = [
        (phase.micro_batch != 1, "micro_batch: 1"),
        (not recipe.model.gradient_checkpointing, "model.gradient_checkpointing: true"),
        (not recipe.model.activation_offload, "model.activation_offload: true"),
        (recipe.loss.chunk == 0, "loss.chunk: 1024"),
        (need.mask > need.activations, "model.attention: flash_attention_2, which builds no mask"),
        (recipe.lora is None, "lora: {rank: 8}"),
        (recipe.optimizer.name == "adamw", "optimizer.name: adamw_8bit"),
        (True, "a shorter length (pose: {target: ...} still trains the same distances)"),
        (True, "more devices (recipes/accelerate)"),
    ]
    return f"Try {', '.join(offer for useful, offer in offers if useful)}. guard.memory: false skips this check."


@dataclass(frozen=True)
class Measured:
    """Measurement of one micro-batch of a phase."""

    seconds: float
    """Time of one micro-batch."""
    steps_seconds: float
    """Estimated time of all steps of the phase."""
    memory: int
    """Peak memory in bytes."""


def show(run: Run) -> None:
    """Run one step of each phase and print steps, tokens, mixture, memory per device and time."""
    recipe, main = run.recipe, run.launch.is_main
    console = Console(quiet=not main)
    if not console.is_terminal:
        console = Console(quiet=not main, width=WIDE)
    parameters = list(run.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in parameters)
    refuse_what_cannot_fit(run)
    trainer = run.build_trainer()
    model = trainer.prepare()
    rows = []
    for number, phase in enumerate(recipe.phases):
        measured = _measure(run, trainer, model, number)
        rows.append(
            {
                "phase": number,
                "length": phase.length,
                "positions": phase.length if phase.pose is None else phase.pose.target,
                "steps": phase.steps,
                "sequences": phase.steps * phase.batch,
                "tokens": phase.steps * phase.batch * phase.length,
                "micro-batch": f"{measured.seconds:.2f} s",
                "time": duration(measured.steps_seconds),
                "memory": gigabytes(measured.memory),
            }
        )
        seconds = measured.steps_seconds
        rows[-1]["seconds"] = seconds
    total = sum(row.pop("seconds") for row in rows)
    for number in range(len(rows)):
        data = run.data(number)
        console.print(table(f"Mixture of phase {number}", mix_table(data)))
        for note in mix_notes(data):
            console.print(note)
    for note in run.data_notes():
        console.print(note, markup=False)
    console.print(table("Training plan", rows))
    console.print(
        f"{sum(row['steps'] for row in rows):,} steps at most, {sum(row['tokens'] for row in rows):,} tokens, "
        f"about {duration(total)}. {trained:,} of {whole:,} parameters are trained."
    )
    if recipe.evaluation.every:
        lengths = ", ".join(f"{length:,}" for length in run.measure.lengths)
        console.print(
            f"The evaluation ({', '.join(recipe.evaluation.tasks)} at {lengths} tokens) is ready: its text and "
            "questions are available."
        )
    console.print(
        f"Time: the second of two micro-batches of each phase on {run.launch.describe()}, multiplied by the number "
        "of micro-batches; without evaluation, checkpoints and loading. Memory: the peak of "
        f"{run.launch.memory_of} after a step."
    )


def _measure(run: Run, trainer: RecipeTrainer, model: Any, number: int) -> Measured:
    """Run a phase's first step with two micro-batches at learning rate 0, and time the second micro-batch."""
    phase = run.recipe.phases[number]
    trainer.progress = Progress(phase=number)
    batches = next(run.batches(number))
    seconds = trainer.rehearse(model, batches)
    return Measured(seconds, seconds * len(batches) * phase.steps, run.launch.memory())
