"""RoPE or ALiBi for long generation? Continuations by 2,000 tokens across the window, by the task `long_generation`.

    python benchmarks/questions/generation.py scratch              # about 45 minutes on two cores
    python benchmarks/questions/generation.py smollm2              # about an hour
    python benchmarks/questions/generation.py scratch --steps 2 --tokens 40 --texts 2 --seeds 0 --judge none

`scratch`: models of the demo's size, trained from scratch on Python's standard library at 256 tokens with one scheme
each, continue 192 tokens of held-out code. `smollm2`: SmolLM2 continues English as it is, under YaRN, and in the
variants that `--model LABEL=FOLDER` names, within its window and across it. A judge, SmolLM2 for the first and Gemma 3
270M for the second, reads each continuation within its own window. Tokens are drawn from the nucleus of 0.95.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, SEEDS, interval, machine, read, shown, write
from transformers import AutoTokenizer

from pe_patch import evaluate, patch_model, unpatch_model
from pe_patch.checkpoints.sources import load
from pe_patch.data.packaged import DEMO_MODEL
from pe_patch.evaluation.tasks.long_generation import JUDGED, KEPT, MAIN, LongGeneration
from pe_patch.training.recipe import Data, Model, Optimizer, Phase, Recipe, Scheme, Source, Tokenizer
from pe_patch.training.run import train

WINDOW, PROMPT = 256, 192
SCRATCH = {"rope": ("rope", {}), "alibi": ("alibi", {}), "none": ("nope", {})}
MODELS = Path("build/real/models")
TEXT = "build/real/text/english@split=test"
REAL = "the real text"
OUTSIDE = "words outside the longest repeated span"
MEASURES = {
    MAIN: "different 4-grams",
    OUTSIDE: "outside the longest repeat",
    KEPT: "rare words used",
    JUDGED: "judge's loss",
}
JUDGES = {"scratch": "SmolLM2 135M", "smollm2": "Gemma 3 270M"}


def trained_from_scratch(scheme: str, options: dict[str, Any], seed: int, steps: int, folder: Path) -> Any:
    """Return a Llama of the demo's size, trained with a scheme on text of 256 tokens."""
    config = {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": WINDOW,
        "tie_word_embeddings": True,
    }  # fmt: skip
    phase = Phase(
        length=WINDOW, batch=16, steps=steps, learning_rate=2e-3, schedule="warmup_stable_decay", warmup=min(50, steps),
        floor=0.05, mixture={"text": Source(share=1.0)},
    )  # fmt: skip
    recipe = Recipe(
        output=str(folder), model=Model(config=config), tokenizer=Tokenizer(source=str(DEMO_MODEL)),
        scheme=None if scheme == "rope" else Scheme(name=scheme, options=options), data=Data(source="stdlib"),
        phases=[phase], optimizer=Optimizer(betas=(0.9, 0.98), weight_decay=0.01), seed=seed, progress=False,
    )  # fmt: skip
    return train(recipe).eval()


def measure(
    model: Any, tokenizer: Any, length: int, text: str, seed: int, arguments: argparse.Namespace, judge: Any
) -> dict[str, Any]:
    """Return the measures of one model's continuations and of the real text."""
    task = LongGeneration(tokens=arguments.tokens, texts=arguments.texts, judge=judge)
    started = time.perf_counter()
    results = evaluate(
        model, tokenizer, [task], [length], text=text, seed=seed, beyond_window=True, retrieval=False, label="model"
    )
    scores = {row.measure: row.score for row in results.rows}
    (main,) = results.select(measure=MAIN)
    return {
        "scores": scores, "tokens_per_second": main.details["tokens_per_second"],
        "longest_repeat": [each["generated"]["longest_repeat"] for each in main.details["of_each_text"]],
        "length": length, "seed": seed, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def scratch(arguments: argparse.Namespace, content: dict[str, Any], judge: Any) -> None:
    """Train and measure the small models, and one of them under YaRN without training."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    length = PROMPT + arguments.tokens
    for seed in arguments.seeds:
        for label, (scheme, options) in SCRATCH.items():
            cases = [label, "rope, YaRN untrained"] if label == "rope" else [label]
            if all(f"{case}, {seed}" in content["runs"] for case in cases):
                continue
            with tempfile.TemporaryDirectory() as folder:
                model = trained_from_scratch(scheme, options, seed, arguments.steps, Path(folder) / "run")
            for case in cases:
                if case != label:
                    patch_model(model, "yarn", factor=float(np.ceil(length / WINDOW)))
                found = measure(model, tokenizer, length, "stdlib", seed, arguments, judge)
                if case != label:
                    unpatch_model(model)
                keep(content, arguments, case, seed, found)


def smollm2(arguments: argparse.Namespace, content: dict[str, Any], judge: Any) -> None:
    """Measure SmolLM2 within its window and across it."""
    folders = {"as it is": str(MODELS / "smollm2"), "YaRN untrained": str(MODELS / "smollm2")}
    folders |= dict(each.rsplit("=", 1) for each in arguments.model)
    for label, folder in folders.items():
        model, tokenizer = load(folder, "float32", "cpu")
        if label == "YaRN untrained":
            patch_model(model, "yarn", factor=4.0)
        for length in (4_096, 8_192 + arguments.tokens // 2):
            for seed in arguments.seeds[:1]:
                case = f"{label}, {length:,} tokens"
                if f"{case}, {seed}" not in content["runs"]:
                    keep(
                        content, arguments, case, seed, measure(model, tokenizer, length, TEXT, seed, arguments, judge)
                    )


def keep(content: dict[str, Any], arguments: argparse.Namespace, case: str, seed: int, found: dict[str, Any]) -> None:
    """Store and print a measurement."""
    content["runs"][f"{case}, {seed}"] = {"case": case, **found}
    write(f"generation_{arguments.part}", content, arguments.output)
    scores = ", ".join(f"{title} {found['scores'].get(name, float('nan')):.3f}" for name, title in MEASURES.items())
    print(f"{case}, seed {seed}: {scores}; {found['tokens_per_second']:.0f} tokens/s", flush=True)


def markdown(content: dict[str, Any]) -> str:
    """Return a table with one line for each case, and one for the real text."""
    runs = content["runs"].values()
    cases = list(dict.fromkeys(each["case"] for each in runs))
    lines = [
        f"Continuations of {content['tokens']:,} tokens of {content['texts']} texts; {_seeds(runs)}.",
        "",
        f"| model | {' | '.join(MEASURES.values())} | longest repeat, words | tokens/s |",
        "| --- |" + " ---: |" * (len(MEASURES) + 2),
    ]
    for case in [*cases, REAL]:
        own = [each for each in runs if each["case"] == case or case == REAL]
        suffix = ", of the real text" if case == REAL else ""
        found = [
            [each["scores"][name + suffix] for each in own if name + suffix in each["scores"]] for name in MEASURES
        ]
        cells = [shown(values) for values in found]
        if not suffix:
            cells += [f"{np.mean([n for each in own for n in each['longest_repeat']]):.0f}"]
            cells += [f"{np.mean([each['tokens_per_second'] for each in own]):.0f}"]
        else:
            cells += ["-", "-"]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _seeds(runs: Iterable[dict[str, Any]]) -> str:
    """Return in words over how many seeds the numbers are taken."""
    count = len({each["seed"] for each in runs})
    return "one seed, without an interval" if count == 1 else f"mean of {count} seeds, with its 95 % interval"


def draw(content: dict[str, Any], file: Path) -> None:
    """Draw each measure in a panel, the real text in its last line."""
    from pe_patch.evaluation.charts import dots

    runs = content["runs"].values()
    cases = list(dict.fromkeys(each["case"] for each in runs))
    rows = []
    for name, title in MEASURES.items():
        for case in [*cases, REAL]:
            suffix = ", of the real text" if case == REAL else ""
            chosen = [each for each in runs if case in (each["case"], REAL)]
            values = [each["scores"][name + suffix] for each in chosen if name + suffix in each["scores"]]
            if values:
                mean, half = (float(np.mean(values)), float("nan")) if suffix else interval(values)
                bounds = {} if np.isnan(half) else {"low": mean - half, "high": mean + half}
                rows.append({"label": case, "column": title, "value": mean, "number": f"{mean:.2f}", **bounds})
    subtitle = f"{content['texts']} continuations of {content['tokens']:,} tokens; {_seeds(runs)}."
    file.write_bytes(dots(rows, name="generation", title="Long generation", subtitle=subtitle).png())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(JUDGES))
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--tokens", type=int, default=2_000)
    parser.add_argument("--texts", type=int, help="default: 8, and 4 for smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--model", nargs="+", default=[], metavar="LABEL=FOLDER", help="further variants of SmolLM2")
    parser.add_argument("--judge", help="a folder, or none; default: SmolLM2 or Gemma 3 under build/real/models")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.texts = arguments.texts or (8 if arguments.part == "scratch" else 4)
    default = str(MODELS / ("smollm2" if arguments.part == "scratch" else "gemma3"))
    judge = None if arguments.judge == "none" else load(arguments.judge or default, "float32", "cpu")
    setting = {name: getattr(arguments, name) for name in ("steps", "tokens", "texts")}
    content = read(f"generation_{arguments.part}", arguments.output)
    if {name: content.get(name) for name in setting} != setting:
        content = {**setting, "runs": {}}
    content |= {"machine": machine(), "seeds": arguments.seeds, "judge": JUDGES[arguments.part] if judge else None}
    (scratch if arguments.part == "scratch" else smollm2)(arguments, content, judge)
    name = f"generation_{arguments.part}"
    (arguments.output / f"{name}.md").write_text(markdown(content), encoding="utf-8")
    draw(content, arguments.output / f"{name}.png")


if __name__ == "__main__":
    main()
