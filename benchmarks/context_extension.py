"""The demo's model taken from 256 to 2048 tokens in nine ways: before training, after it, and what it costs at 256.

    python benchmarks/context_extension.py                     # finished ways are kept and not done again
    python benchmarks/context_extension.py --ways yarn pi --samples 16 --output trial

Each way is a recipe of `recipes/configs`, as it is but for what WAYS says, trained and measured on one thread.
Questions and scored tokens are the same for every way and length; they come from files that no model was trained on.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from context_extension_results import draw, markdown
from measure import RESULTS, machine
from rich.console import Console

import pe_patch
from pe_patch.compare.demo import BASE, load_base
from pe_patch.evaluation import evaluate
from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.results import write_atomically
from pe_patch.evaluation.tasks import Needle
from pe_patch.training.run import load_recipe, train

LENGTHS = (256, 512, 1024, 2048, 4096)
WAYS: dict[str, tuple[str, list[str]]] = {
    "none": ("tiny_yarn", ["scheme=null"]),
    "pi": ("tiny_pi", []),
    "ntk": ("tiny_ntk", []),
    "yarn": ("tiny_yarn", []),
    "pi + pose": ("tiny_pose", ["scheme.name=linear"]),
    "yarn + pose": ("tiny_pose", []),
    "longlora": ("tiny_longlora", []),
    "longrope": ("tiny_longrope", []),
    "drope": ("tiny_drope", []),
}
"""The recipe, and what is changed in it."""


def measured(model: Any, tokenizer: Any, corpus: Corpus, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Retrieval and loss at every length."""
    options: dict[str, Any] = {
        "seed": 0, "text": corpus, "control_length": max(LENGTHS), "beyond_window": True, "progress": False,
    }  # fmt: skip
    needles = evaluate(model, tokenizer, [Needle(wording="tokens")], LENGTHS, samples=given.samples, **options)
    losses = evaluate(
        model, tokenizer, [Perplexity(measures=("fixed",), spots=given.spots)], LENGTHS, samples=given.spots,
        retrieval=False, **options,
    )  # fmt: skip
    rows = []
    for length in LENGTHS:
        answered, (text,) = needles.cell(task="needle", length=length), losses.select(task="perplexity", length=length)
        assert answered is not None
        rows.append(
            {
                "length": length,
                "answered": answered.score, "low": answered.low, "high": answered.high, "questions": answered.samples,
                "loss": text.score, "loss_low": text.low, "loss_high": text.high, "measured_on": text.measured_on,
            }
        )  # fmt: skip
    return rows


def run(way: str, corpus: Corpus, given: argparse.Namespace) -> dict[str, Any]:
    """Measure, train, measure."""
    name, changes = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        told = [*changes, f"output={folder}/run", f"seed={given.seed}", "progress=false", "trackers=[]"]
        recipe = load_recipe(name, told)
        model, tokenizer = load_base(BASE)
        if recipe.scheme is not None:
            from pe_patch.training.models import options_of

            pe_patch.patch_model(model, recipe.scheme.name, **options_of(recipe.scheme))
        before = measured(model, tokenizer, corpus, given)
        started = time.process_time()
        trained = train(recipe).eval()
        seconds = time.process_time() - started
        AcceleratorState._reset_state(True)
        phase = recipe.phases[0]
        return {
            "recipe": name, "changes": changes, "before": before, "after": measured(trained, tokenizer, corpus, given),
            "steps": phase.steps, "tokens": phase.steps * phase.batch * phase.length, "length": phase.length,
            "processor_seconds": round(seconds, 1),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--samples", type=int, default=128, help="questions at each length")
    parser.add_argument("--spots", type=int, default=64, help="places in the text whose last 128 tokens are scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pe_patch").setLevel(logging.ERROR)  # it is taken past its window on purpose
    given.output.mkdir(parents=True, exist_ok=True)
    path, console = given.output / "context_extension.json", Console(stderr=True)
    setting = {"samples": given.samples, "spots": given.spots, "seed": given.seed, "lengths": list(LENGTHS)}
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"setting": setting, "ways": {}}
    if found["setting"] != setting:
        parser.error(f"{path} was made with other settings; give another --output.")
    _, tokenizer = load_base(BASE)
    corpus = Corpus.load(tokenizer, "stdlib", needed=max(LENGTHS))
    for way in given.ways:
        if way not in found["ways"]:
            started = time.perf_counter()
            found["ways"][way] = run(way, corpus, given)
            found |= {"machine": machine(), "text": {"name": corpus.name, "hash": corpus.hash}}
            write_atomically(path, json.dumps(found, indent=1) + "\n")
            console.print(f"{way}: {time.perf_counter() - started:.0f} s", highlight=False)
    found["ways"] = {way: found["ways"][way] for way in WAYS if way in found["ways"]}
    write_atomically(given.output / "context_extension.md", markdown(found))
    write_atomically(given.output / "context_extension.png", draw(found))
    Console().print(markdown(found), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
