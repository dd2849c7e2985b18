"""What a change of the family of scheme costs a trained model, and how fast it comes back: recovery curves.

    python benchmarks/swap.py                                   # every run; what is done is kept
    python benchmarks/swap.py --runs "alibi, warm" "t5, warm"
    python benchmarks/swap.py --base                            # only the small BLOOM that one part starts from
    python benchmarks/swap.py --steps 2 --output trial          # to see that it runs

RoPE for ALiBi, T5's and KERPLE's biases in the demo model, each as the scheme starts by itself and after
`pe_patch.training.warm_start`; and BLOOM's ALiBi for RoPE in a BLOOM of the demo's size, trained first by the recipe
`tiny_bloom`. All by `recipes`, on one thread: steps of 16 x 256 tokens of Python's standard library. Loss and
retrieval are of held-out text at 256 tokens, before the first step and after every 25.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine
from rich.console import Console
from swap_results import draw, markdown
from transformers import AutoModelForCausalLM, AutoTokenizer

from pe_patch import evaluate, patch_model
from pe_patch.data.packaged import DEMO_MODEL
from pe_patch.data.text import load_documents
from pe_patch.evaluation.corpus import Corpus as HeldOut
from pe_patch.evaluation.results import write_atomically
from pe_patch.training.data import Corpus, PhaseData, first_tokens
from pe_patch.training.recipe import Data, Evaluation, Model, Optimizer, Phase, Recipe, Source, Tokenizer
from pe_patch.training.run import load_recipe, train
from pe_patch.training.warm_start import warm_start

LENGTH, BATCH, EVERY = 256, 16, 25
TASKS, SAMPLES = ["perplexity", "needle"], 64
WARM_TOKENS = 16384
TEXT_AND_FACTS = {"text": Source(share=0.6), "needles": Source(share=0.4, kind="needles", needles=(1, 16))}


@dataclass(frozen=True)
class Run:
    """One way to change the scheme of one model."""

    base: str
    scheme: str | None
    """None measures the model as it is, and trains nothing."""
    warm: bool = False
    options: dict[str, Any] = field(default_factory=dict)


WINDOW = {"original_max_position_embeddings": LENGTH}
"""BLOOM's config does not say it."""
RUNS = {
    "rope (original)": Run("demo", None),
    "rope, trained on": Run("demo", "rope"),
    "alibi": Run("demo", "alibi"),
    "alibi, warm": Run("demo", "alibi", warm=True),
    "t5": Run("demo", "t5"),
    "t5, warm": Run("demo", "t5", warm=True),
    "kerple": Run("demo", "kerple"),
    "kerple, warm": Run("demo", "kerple", warm=True),
    "bloom: alibi (original)": Run("bloom", None),
    "bloom: alibi, trained on": Run("bloom", "alibi"),
    "bloom: rope": Run("bloom", "rope", options=WINDOW),
    "bloom: rope, theta 100": Run("bloom", "rope", options={"theta": 100.0, **WINDOW}),
    "bloom: rope beside alibi": Run("bloom", "rope", options={"keep_native": True, **WINDOW}),
}


def recipe(folder: Path, source: str, phases: list[Phase], **more: Any) -> Recipe:
    given = {"model": Model(source=source), "tokenizer": Tokenizer(source="demo")} | more
    return Recipe(
        output=str(folder), phases=phases, data=Data(source="stdlib", boundaries=False), progress=False,
        optimizer=Optimizer(betas=(0.9, 0.98), weight_decay=0.01), **given,
    )  # fmt: skip


def train_bloom(folder: Path) -> None:
    """BLOOM of the demo's size, in `folder / "model"`."""
    options = [f"output={folder}", "progress=false"]
    train(load_recipe(Path(__file__).parents[1] / "recipes/configs/tiny_bloom.yaml", options))


class Bench:
    """The held-out text, read once, and what one run does."""

    def __init__(self, folder: Path, bases: dict[str, str], steps: int, seed: int) -> None:
        self.folder, self.bases, self.steps, self.seed = folder, bases, steps, seed
        self.tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
        self.held_out = HeldOut.load(self.tokenizer, "stdlib", needed=LENGTH)
        self.phase = Phase(
            length=LENGTH, batch=BATCH, steps=steps, learning_rate=1e-3, schedule="warmup_stable_decay", warmup=10,
            decay=0.4, floor=0.05, mixture=TEXT_AND_FACTS,
        )  # fmt: skip

    def run(self, name: str) -> dict[str, Any]:
        """Change the scheme, warm it up if so asked, train, and measure all the while."""
        run = RUNS[name]
        source, started = self.bases[run.base], time.process_time()
        found: dict[str, Any] = {"run": name, "seed": self.seed, **vars(run)}
        curve = []
        folder = self.folder / f"{name_of(name, self.seed)}"
        if run.scheme is not None:
            torch.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_pretrained(source)
            patch_model(model, run.scheme, **run.options)
            if run.warm:
                before = time.process_time()
                report = warm_start(model, self.calibration())
                found |= {"warm_start": vars(report), "warm_start_seconds": time.process_time() - before}
            curve.append({"step": 0, **self.measure(model)})
            source = str(folder / "start")
            model.save_pretrained(source)
        else:
            curve.append({"step": 0, **self.measure(AutoModelForCausalLM.from_pretrained(source))})
            return {**found, "curve": curve, "seconds": time.process_time() - started}
        wanted = recipe(folder / "run", source, [self.phase], seed=self.seed)
        wanted.evaluation = Evaluation(every=EVERY, tasks=TASKS, lengths=[LENGTH], samples=SAMPLES)
        train(wanted)
        lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().split("\n") if line]
        measured = [line for line in lines if line["event"] == "evaluation"]
        for step in dict.fromkeys(line["step"] for line in measured):
            curve.append({"step": step, **summed([line for line in measured if line["step"] == step])})
        return {**found, "curve": curve, "seconds": time.process_time() - started}

    def calibration(self) -> list[list[int]]:
        """Tokens of the training text alone, without hidden facts."""
        corpus = Corpus(load_documents("stdlib", split="train"), self.tokenizer)
        text = Phase(length=LENGTH, batch=1, mixture={"text": Source(share=1)})
        return first_tokens(PhaseData(corpus, self.tokenizer, text, seed=(self.seed,), boundaries=False), WARM_TOKENS)

    def measure(self, model: Any) -> dict[str, float]:
        """What the recipe measures while it trains."""
        model.eval()
        rows = evaluate(
            model, self.tokenizer, TASKS, [LENGTH], samples=SAMPLES, text=self.held_out, beyond_window=True,
            progress=False,
        ).rows  # fmt: skip
        return summed([asdict(row) for row in rows])


def summed(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Nats per token on the same last 128 tokens of 64 places, and the share of questions about 8 hidden facts that
    were answered, at all depths together."""
    loss = [row["score"] for row in rows if "fixed targets" in row["measure"]]
    answers = [row["score"] for row in rows if row["task"] == "needle"]
    return {"loss": loss[0], "retrieval": sum(answers) / len(answers)}


def name_of(run: str, seed: int) -> str:
    """The run as a file's name."""
    return "_".join(re.findall(r"[a-z0-9]+", run)) + f"-{seed}"


def results(folder: Path) -> dict[str, Any]:
    """All runs that are there, in the order of `RUNS`."""
    runs = [json.loads(file.read_text()) for file in folder.glob("*-*.json")]
    return {"runs": sorted(runs, key=lambda run: (list(RUNS).index(run["run"]), run["seed"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("runs/swap"), help="for checkpoints and logs")
    parser.add_argument("--output", type=Path, default=RESULTS / "swap")
    parser.add_argument("--base", action="store_true", help="train the small BLOOM and stop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pe_patch").setLevel(logging.ERROR)  # that these models must be trained is what is done here
    bloom = given.work / "bloom/model"
    if not bloom.is_dir() and (given.base or any(RUNS[name].base == "bloom" for name in given.runs)):
        train_bloom(given.work / "bloom")
    if given.base:
        return
    given.output.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    for seed in given.seeds:
        bench = Bench(given.work, {"demo": str(DEMO_MODEL), "bloom": str(bloom)}, given.steps, seed)
        for name in given.runs:
            file = given.output / f"{name_of(name, seed)}.json"
            if file.is_file():
                console.print(f"{file} is there already", highlight=False)
                continue
            found = bench.run(name)
            write_atomically(file, json.dumps({**found, "machine": machine()}, indent=1) + "\n")
            last = found["curve"][-1]
            console.print(f"{name}, seed {seed}: {last}, {found['seconds']:.0f} s", highlight=False)
    every = results(given.output)
    write_atomically(given.output.with_suffix(".md"), markdown(every))
    draw(every, given.output / "swap.png")


if __name__ == "__main__":
    main()
