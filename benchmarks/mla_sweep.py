"""Conversions to latent attention at equal size of the cache, untuned and healed: the demo's model, real text.

    python benchmarks/mla_sweep.py                        # every run; finished ones are kept in results/mla_sweep.json
    python benchmarks/mla_sweep.py --quick --output trial  # two steps, to see that it runs
    python benchmarks/mla_sweep.py --page                 # docs/mla.md and its pictures from the results alone

Every conversion is calibrated, healed and judged on the same text. The original is trained as long, as a control.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine
from mla_sweep_page import write_page
from rich.console import Console

from pe_patch import patched
from pe_patch.compare.demo import BASE, load_base
from pe_patch.convert.measure import Ruler, share_name
from pe_patch.convert.sweep import converted_row, original_row
from pe_patch.data.packaged import shipped_recipes
from pe_patch.data.text import load_documents
from pe_patch.errors import OptionError
from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.model import EvaluatedModel
from pe_patch.evaluation.results import write_atomically
from pe_patch.mla.checks import METHODS
from pe_patch.training.recipe import Recipe
from pe_patch.training.run import Run, load_recipe

RECIPE = shipped_recipes()["tiny_mla_heal"]
RATIOS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
KINDS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "mha2mla, split": {"method": "mha2mla", "svd": "split"},
}
CONTROL = "original"


@dataclass(frozen=True)
class Setting:
    """How long and how conversions are healed, and on how much they are judged; the rest is the recipe's."""

    steps: int = 200
    batch: int = 4
    learning_rate: float = 5e-4
    distill: float = 4.0
    """Weight of the divergence from the original; the loss on the text has weight 1."""
    questions: int = 200
    spots: int = 64
    curve_every: int = 40
    """Steps between measurements of the runs at 1/4."""
    rope_questions: int = 50
    rope_spots: int = 32
    """On how much the rotary widths are compared, before healing."""
    seed: int = 0


class Healing(Run):
    """The recipe's run, measured on the way by the benchmark's own ruler."""

    ruler: Ruler
    curve: list[dict[str, Any]]

    def note(self, model: Any, log: Any, step: int) -> None:
        """In place of the recipe's own measuring."""
        self.measure.last = step
        self.curve.append({"step": step, **_brief(self.ruler.measure(model).to_dict())})


@dataclass
class Material:
    """What `converted_row` asks for its ruler."""

    ruler: Ruler


class Bench:
    """The text, tokenized once, and what one run does with it."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        self.model, self.tokenizer = load_base(BASE)
        corpus = Corpus.load(self.tokenizer, "stdlib", needed=256)
        train = load_documents("stdlib", split="train")
        self.ruler = Ruler(self.tokenizer, corpus, 256, setting.questions, setting.spots, setting.seed)
        self.curve_ruler = Ruler(self.tokenizer, corpus, 256, 50, setting.spots, setting.seed)
        # Rotary widths are chosen on text that nothing is judged on.
        other = Corpus.load(self.tokenizer, train[-40:], needed=256)
        self.other = Ruler(self.tokenizer, other, 256, setting.rope_questions, setting.rope_spots, setting.seed)
        material: Any = Material(self.ruler)
        self.original = original_row(self.model, material)
        self.calibration = self._calibration()

    def _calibration(self) -> list[list[int]]:
        recipe = self.recipe({}, 0)
        assert recipe.scheme is not None
        return Healing(recipe).tokens(recipe.scheme.calibration_tokens)

    def recipe(self, options: dict[str, Any] | None, every: int) -> Recipe:
        """The heal recipe with this benchmark's settings; no options train the original."""
        of = self.setting
        told = {
            "output": self.folder, "progress": "false", "seed": of.seed, "distill.weight": of.distill,
            "phases.0.steps": of.steps, "phases.0.batch": of.batch, "phases.0.learning_rate": of.learning_rate,
            "phases.0.warmup": min(10, of.steps // 2), "evaluation.every": every or "null",
        }  # fmt: skip
        recipe = load_recipe(RECIPE, [f"{key}={value}" for key, value in told.items()])
        if options is None:
            recipe.scheme = None
        elif options:
            assert recipe.scheme is not None
            recipe.scheme.options = options
        return recipe

    def rope_dims(self, kind: str, ratio: float) -> list[dict[str, Any]]:
        """Every rotary width that fits, untuned, on text that nothing is judged on; a quarter of the calibration."""
        material: Any = Material(self.other)
        found, original = [], original_row(self.model, material)
        for rope_dim in (2, 4, 8, 16, 32, 64, 128):
            options = {**KINDS[kind], "cache_ratio": ratio, "rope_dim": rope_dim}
            started = time.perf_counter()
            try:
                with patched(self.model, "mla", calibration=self.calibration[::4], **options):
                    row = converted_row(self.model, material, original, started)
            except OptionError:
                continue
            found.append({"rope_dim": rope_dim, "kv_rank": row["kv_rank"], **_brief(row)})
        return found

    def heal(self, kind: str, options: dict[str, Any] | None, every: int) -> dict[str, Any]:
        """One conversion (or, without options, the original), measured as it is and after training."""
        run = Healing(self.recipe(options, every))
        run.ruler, run.curve = self.curve_ruler, []
        if every:
            measure: Any = run.measure
            measure.during = run.note
            run.note(run.model, None, 0)
        untuned = self.row(run.model, options)
        started, worked = time.perf_counter(), time.process_time()
        model = run.run().eval()
        return {
            "kind": kind,
            "options": options,
            "seconds": round(time.perf_counter() - started, 1),
            "processor_seconds": round(time.process_time() - worked, 1),
            "untuned": untuned,
            "healed": self.row(model, options),
            "curve": run.curve,
        }

    def row(self, model: Any, options: dict[str, Any] | None) -> dict[str, Any]:
        """A model against the original, and its mean loss at each place, so that two can be compared place by place."""
        material: Any = Material(self.ruler)
        found = original_row(model, material)
        if options is not None:
            found = converted_row(model, material, self.original, time.perf_counter())
        found["loss_change"] = found["loss"] / self.original["loss"] - 1
        return {**found, "spots": self.spots(model)}

    def spots(self, model: Any) -> list[float]:
        """Mean loss at each place, so that two models can be compared place by place."""
        of = self.ruler
        pieces, _ = of.corpus.spots(of.length, 128, of.spots, of.seed)
        return [round(float(loss), 5) for loss in EvaluatedModel(model, self.tokenizer).losses(pieces, 128).mean(1)]


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    return {"loss": row["loss"], "retrieval": row["retrieval"]}


def plan(ropes: dict[str, dict[str, list[dict[str, Any]]]]) -> Iterator[tuple[str, dict[str, Any] | None, bool]]:
    """What is healed: kind, options, and whether its course is followed.

    The rotary width is the one with the least loss before healing; at 1/4 and 1/8 half of it as well.
    """
    yield CONTROL, None, True
    for ratio in (1 / 4, 1 / 8, 1 / 2, 1 / 16):
        for kind, base in KINDS.items():
            if ratio not in (1 / 4, 1 / 8) and "svd" in base:
                continue
            tried = ropes[kind][share_name(ratio)]
            best = min(tried, key=lambda one: one["loss"])["rope_dim"]
            halves = [best // 2] if ratio in (1 / 4, 1 / 8) and base.get("svd") is None and best > 2 else []
            for rope_dim in [best, *halves]:
                yield kind, {**base, "cache_ratio": ratio, "rope_dim": rope_dim}, ratio == 1 / 4


def load(file: Path, setting: Setting) -> dict[str, Any]:
    """The runs of this setting that are there already."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    same = found.get("setting") == json.loads(json.dumps(asdict(setting)))
    return found if same else {"setting": asdict(setting), "ropes": {}, "runs": []}


def measure(setting: Setting, folder: Path, console: Console) -> dict[str, Any]:
    """Every run that is not there yet; the results are written after each."""
    file = folder / "mla_sweep.json"
    result, started = load(file, setting), time.perf_counter()
    working = tempfile.TemporaryDirectory()
    bench = Bench(setting, Path(working.name))
    corpus, calibration = bench.ruler.corpus, bench.calibration
    result |= {
        "machine": machine(),
        "original": bench.original,
        "text": {"name": corpus.name, "hash": corpus.hash, "rope_dims": "the last 40 documents that are trained on"},
        "calibration_tokens": sum(map(len, calibration)),
        "recipe": RECIPE.name,
    }

    def save() -> None:
        write_atomically(file, json.dumps(result, indent=1) + "\n")

    for kind, ratio in ((kind, ratio) for kind in KINDS for ratio in RATIOS):
        if share_name(ratio) not in result["ropes"].setdefault(kind, {}):
            result["ropes"][kind][share_name(ratio)] = bench.rope_dims(kind, ratio)
            save()
    console.print(f"Rotary widths tried in {time.perf_counter() - started:.0f} s")
    done = [(run["kind"], run["options"]) for run in result["runs"]]
    for kind, options, followed in plan(result["ropes"]):
        if (kind, options) in done:
            continue
        run = bench.heal(kind, options, setting.curve_every if followed else 0)
        result["runs"].append(run)
        save()
        before, after = run["untuned"], run["healed"]
        told = "" if options is None else f" at {share_name(options['cache_ratio'])}, rope_dim {options['rope_dim']}"
        console.print(
            f"{kind}{told}: loss {before['loss']:.4f} -> {after['loss']:.4f} ({after['loss_change']:+.1%}), retrieval "
            f"{before['retrieval']:.3f} -> {after['retrieval']:.3f}, {run['seconds']:.0f} s",
            highlight=False,
        )
    working.cleanup()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two steps, few questions")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pe_patch").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    few = {"steps": 2, "questions": 5, "spots": 2, "curve_every": 1, "rope_questions": 5, "rope_spots": 2}
    setting = Setting(**few) if given.quick else Setting()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.page:
        result = json.loads((given.output / "mla_sweep.json").read_text(encoding="utf-8"))
    else:
        result = measure(setting, given.output, Console())
    docs = given.output / "docs" if given.quick else RESULTS.parent.parent / "docs"
    print("written to", write_page(result, docs))


if __name__ == "__main__":
    main()
