"""Schemes that need training against no positions at all: one small Llama, trained from scratch on real text.

    python benchmarks/training.py                          # every scheme, 3 seeds; finished runs are kept
    python benchmarks/training.py --schemes rope fire --seeds 0
    python benchmarks/training.py --quick --output trial    # two steps, to see that it runs

The model starts from the same weights and sees the same text in the same order under every scheme of one seed, so that
differences to `nope` are taken seed by seed. Everything but the scheme is the same, and nothing was tuned for one.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from measure import RESULTS, machine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from training_results import draw, markdown
from transformers import LlamaConfig, LlamaForCausalLM

from pe_patch import evaluate, patch_model
from pe_patch.data.text import load_documents
from pe_patch.evaluation.corpus import Corpus as HeldOut
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.results import write_atomically
from pe_patch.training.data import Corpus, PhaseData, micro_batches
from pe_patch.training.loss import count_targets, next_token_score
from pe_patch.training.models import train_tokenizer
from pe_patch.training.recipe import Phase, Source
from pe_patch.training.trainer import learning_rates

SCHEMES: dict[str, dict[str, Any]] = {
    "nope": {"scheme": "nope"},
    "integer": {"scheme": "integer"},
    "one_hot": {"scheme": "one_hot"},
    "learned": {"scheme": "learned"},
    "sinusoidal": {"scheme": "sinusoidal"},
    "rope": {"scheme": "rope"},
    "xpos": {"scheme": "xpos"},
    "alibi": {"scheme": "alibi"},
    "rope_alibi": {"scheme": "rope_alibi"},
    "t5": {"scheme": "t5"},
    "kerple, log": {"scheme": "kerple", "kind": "log"},
    "kerple, power": {"scheme": "kerple", "kind": "power"},
    "sandwich": {"scheme": "sandwich"},
    "fire": {"scheme": "fire"},
    "shaw": {"scheme": "shaw"},
    "transformer_xl": {"scheme": "transformer_xl"},
    "cope": {"scheme": "cope"},
}
ONE_ROW_EACH = ("one_hot", "learned")
"""They have a vector for each position of the window and none beyond it."""


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, and how it is judged."""

    vocabulary: int = 512
    hidden: int = 64
    mlp: int = 192
    layers: int = 2
    heads: int = 4
    window: int = 128
    batch: int = 8
    steps: int = 200
    learning_rate: float = 4e-3
    """Its course is a cosine to `floor` times this after `warmup` steps."""
    warmup: int = 20
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    targets: int = 64
    """Held-out tokens scored at each of `spots` places: the same at every length."""
    spots: int = 128

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.window


class Bench:
    """The text, tokenized once, and what one run does with it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        texts = load_documents("stdlib", split="train")
        self.tokenizer: Any = train_tokenizer(texts, setting.vocabulary)
        self.corpus = Corpus(texts, self.tokenizer)
        self.held_out = HeldOut.load(self.tokenizer, "stdlib", needed=2 * setting.window)

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Train one model and measure it within its window and at twice that."""
        setting, model = self.setting, self.build(seed)
        plain = sum(weight.numel() for weight in model.parameters())
        patch_model(model, **SCHEMES[name])
        own = sum(weight.numel() for weight in model.parameters()) - plain
        started = time.perf_counter()
        last = self.train(model, seed)
        seconds = time.perf_counter() - started
        found = evaluate(
            model,
            self.tokenizer,
            Perplexity(measures=("fixed",), targets=setting.targets, spots=setting.spots),
            [setting.window] if name in ONE_ROW_EACH else [setting.window, 2 * setting.window],
            control_length=2 * setting.window,  # the same targets for those that are not measured there
            text=self.held_out,
            retrieval=False,
            beyond_window=True,
            progress=False,
        )
        return {
            "scheme": name,
            "seed": seed,
            "seconds": seconds,
            "parameters": own,
            "training_loss": last,
            "loss": {str(row.length): row.score for row in found.rows},
            "measured_on": [row.measured_on for row in found.rows],
        }

    def build(self, seed: int) -> Any:
        """Fresh weights; input embeddings of unit variance, so that what is added to them can be of unit size."""
        setting = self.setting
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=setting.hidden, intermediate_size=setting.mlp,
            num_hidden_layers=setting.layers, num_attention_heads=setting.heads, num_key_value_heads=setting.heads,
            max_position_embeddings=setting.window, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(cast(torch.nn.Embedding, model.get_input_embeddings()).weight)
        return model

    def train(self, model: Any, seed: int) -> float:
        """The recipes' data, loss and schedule in a bare loop; returns the mean loss of the last tenth of the steps."""
        setting = self.setting
        phase = Phase(
            length=setting.window, batch=setting.batch, steps=setting.steps, learning_rate=setting.learning_rate,
            schedule="cosine", warmup=setting.warmup, floor=setting.floor, mixture={"text": Source(share=1)},
        )  # fmt: skip
        data = PhaseData(self.corpus, self.tokenizer, phase, seed=(seed,), boundaries=False)
        rate = learning_rates(phase)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": setting.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer, losses = torch.optim.AdamW(groups, lr=0.0, betas=setting.betas), []
        model.train()
        for step, (batch,) in enumerate(micro_batches(data, first_step=0, rank=0, world=1)):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            loss = next_token_score(logits, batch["labels"], vocabulary=None, accuracy=False).loss
            loss = loss / count_targets(batch["labels"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        recent = losses[-max(1, len(losses) // 10) :]
        return sum(recent) / len(recent)


def student(count: int) -> float:
    """The 97.5 % quantile of Student's t with `count` - 1 degrees of freedom, for the counts that occur here."""
    return {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(count, math.nan)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error (NaN of a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def summary(runs: list[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    """One row for each scheme: means over the seeds, and differences to `nope` seed by seed."""
    by_seed = {(run["scheme"], run["seed"]): run for run in runs}
    rows = []
    for name in dict.fromkeys(run["scheme"] for run in runs):
        own = [run for run in runs if run["scheme"] == name]
        row: dict[str, Any] = {"scheme": name, "seeds": len(own), "parameters": own[0]["parameters"]}
        row["seconds"] = sum(run["seconds"] for run in own) / len(own)
        for length in (str(window), str(2 * window)):
            pairs = [(run["loss"].get(length), by_seed.get(("nope", run["seed"]))) for run in own]
            if any(loss is None for loss, _ in pairs):
                continue
            mean, error = mean_and_error([loss for loss, _ in pairs])
            gaps = [loss - base["loss"][length] for loss, base in pairs if base is not None]
            gap, gap_error = mean_and_error(gaps) if gaps else (math.nan, math.nan)
            half = student(len(gaps)) * gap_error
            row[length] = {
                "loss": mean,
                "error": error,
                "to_nope": gap,
                "to_nope_error": gap_error,
                "half_width": half,
                "verdict": verdict(gap, half),
            }
        rows.append(row)
    return rows


def verdict(gap: float, half: float) -> str:
    """Whether the 95 % interval of a difference to `nope`, `gap` +- `half`, leaves zero out."""
    if math.isnan(half) or abs(gap) <= half:
        return "not significant"
    return "better" if gap < 0 else "worse"


def load(file: Path, setting: Setting) -> list[dict[str, Any]]:
    """The runs that are already there, if they were made with this setting."""
    if not file.is_file():
        return []
    found = json.loads(file.read_text())
    same = found["setting"] == json.loads(json.dumps(asdict(setting)))
    return found["runs"] if same else []


def save(folder: Path, setting: Setting, bench: Bench, runs: list[dict[str, Any]]) -> dict[str, Any]:
    order = list(SCHEMES)
    runs = sorted(runs, key=lambda run: (order.index(run["scheme"]), run["seed"]))
    result = {
        "machine": machine(),
        "setting": asdict(setting),
        "tokens": setting.tokens,
        "text": {"name": bench.held_out.name, "hash": bench.held_out.hash, "training": len(bench.corpus.stream)},
        "schemes": summary(runs, setting.window),
        "runs": runs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "training.json", json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Setting.steps, help="another number starts over")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two steps, a few targets")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pe_patch").setLevel(logging.ERROR)  # that these models must be trained is what is done here
    setting = Setting(steps=2, warmup=1, spots=2) if given.quick else Setting(steps=given.steps)
    bench, runs = Bench(setting), load(given.output / "training.json", setting)
    done = {(run["scheme"], run["seed"]) for run in runs}
    todo = [(name, seed) for seed in given.seeds for name in given.schemes if (name, seed) not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(todo))
        for name, seed in todo:
            bar.update(task, description=f"{name}, seed {seed}")
            runs.append(bench.run(name, seed))
            losses = ", ".join(f"{loss:.4f} at {length}" for length, loss in runs[-1]["loss"].items())
            bar.console.print(f"{name}, seed {seed}: {losses}, {runs[-1]['seconds']:.1f} s", highlight=False)
            save(given.output, setting, bench, runs)
            bar.advance(task)
    result = save(given.output, setting, bench, runs)
    table = markdown(result)
    write_atomically(given.output / "training.md", table)
    draw(result, given.output / "training.png")
    Console().print(table, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
