"""Tokens a second of a recipe and of Transformers' Trainer: same model, sequences, optimiser and schedule, in turns.

    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --length 256 --batch 16 --rounds 5

Packed sequences with their boundaries kept, float32, on one thread. A step lasts from the moment its batch is there
to that of the next, so that fetching, passes, clipping, update and log all count; the first step of a run does not.
Both must reach the same loss, or they did not do the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sized
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from measure import save
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from pe_patch.training.recipe import Data, Model, Phase, Recipe, Source
from pe_patch.training.run import Run

RATE, CLIP, BETAS = 1e-4, 1.0, (0.9, 0.95)
Clock = tuple[float, float]
"""Seconds of the wall and of the processor."""


def now() -> Clock:
    return time.perf_counter(), time.process_time()


def recipe(options: argparse.Namespace, output: str) -> Recipe:
    phase = Phase(
        length=options.length, batch=options.batch, steps=options.steps, mixture={"text": Source(share=1)},
        learning_rate=RATE, schedule="constant", warmup=0,
    )  # fmt: skip
    return Recipe(
        output=output, model=Model(source=options.model), data=Data(source=options.data), phases=[phase],
        trackers=[], progress=False,
    )  # fmt: skip


class Ours(Run):
    """A run of a recipe, which notes when each batch is there."""

    begins: list[Clock]

    def batches(self, phase: int, first_step: int = 0) -> Iterator[list[dict[str, Any]]]:
        self.begins = []
        for one in super().batches(phase, first_step):
            self.begins.append(now())
            yield one


class Begins(TrainerCallback):
    def __init__(self) -> None:
        self.begins: list[Clock] = []

    def on_step_begin(self, *given: Any, **named: Any) -> None:
        self.begins.append(now())


class Theirs(transformers.Trainer):
    def _get_train_sampler(self, *given: Any) -> Any:
        return SequentialSampler(cast(Sized, self.train_dataset))


def run_ours(options: argparse.Namespace, folder: str) -> tuple[list[Clock], list[float]]:
    trainer = Ours(recipe(options, folder))
    trainer.run()
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().split("\n") if line]
    return trainer.begins, [line["loss"] for line in lines if line["event"] == "step"]


def run_theirs(options: argparse.Namespace, folder: str) -> tuple[list[Clock], list[float]]:
    source = Run(recipe(options, folder))
    data, begins = source.data(0), Begins()
    source.model.config.use_cache = False  # as in the recipes; without it Transformers keeps documents apart
    arguments = TrainingArguments(
        output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch, learning_rate=RATE,
        lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=0.0, max_grad_norm=CLIP,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch",
    )  # fmt: skip
    sequences: Any = [data[number] for number in range(options.steps * options.batch)]
    trainer = Theirs(
        source.model, arguments, train_dataset=sequences, callbacks=[begins], data_collator=default_data_collator
    )
    trainer.train()
    return begins.begins, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="training_speed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"recipe": run_ours, "Transformers' Trainer": run_theirs}
    seconds: dict[str, list[Clock]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {}
    for turn in range(options.rounds):
        for name in list(ways) if turn % 2 == 0 else list(reversed(ways)):
            with tempfile.TemporaryDirectory() as folder:
                begins, losses[name] = ways[name](options, folder)
            pairs = list(pairwise(begins[1:]))
            seconds[name] += [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]
    ours, theirs = losses.values()
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    if apart > 1e-3:
        raise SystemExit(f"The losses differ by {apart:.1%}: {ours} and {theirs}. This compares different work.")
    tokens = options.length * options.batch
    found = {
        name: {
            "tokens_per_second": tokens / statistics.median(wall for wall, _ in steps),
            "tokens_per_processor_second": tokens / statistics.median(used for _, used in steps),
            "seconds": steps,
            "loss": losses[name],
        }
        for name, steps in seconds.items()
    }
    for name, values in found.items():
        print(f"{name:22} {values['tokens_per_second']:8.0f} tokens/s, "
              f"{values['tokens_per_processor_second']:8.0f} per second of the processor")  # fmt: skip
    mine, other = found.values()
    ratios = {key: mine[key] / other[key] for key in ("tokens_per_second", "tokens_per_processor_second")}
    print("recipe over Transformers' Trainer:", ratios, "losses apart by", apart)
    print(save(options.name, {"settings": vars(options), "ratio": ratios, "loss_apart": apart, "ways": found}))


if __name__ == "__main__":
    main()
