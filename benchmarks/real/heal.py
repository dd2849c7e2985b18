"""Change the mechanism of SmolLM2, and heal it: latent attention at three sizes of the cache, ALiBi, and NoPE layers.

    python benchmarks/real/heal.py mla                # TransMLA, MHA2MLA and SVD at 1/2, 1/4 and 1/8 of the cache
    python benchmarks/real/heal.py swaps              # RoPE to ALiBi, and to no positions in every fourth layer
    python benchmarks/real/heal.py mla --cases "svd 1/4"

Every case is measured as it is changed and after training by recipes/configs/smollm2_heal.yaml, on the texts and
questions of `extension.py`. A case is stored when it is complete; a stopped training resumes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import MODELS, RESULTS, TEXT, TITLES, machine, read, write
from measures import corpus, loss, retrieval, text_of

from pe_patch import compat
from pe_patch.checkpoints.sources import load
from pe_patch.evaluation.model import cache_size
from pe_patch.training.recipe import Scheme
from pe_patch.training.run import Run, load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "configs" / "smollm2_heal.yaml"
SPOTS = 32_768
"""Length of the pieces of text of `extension.py`, so that the targets are the same."""
CACHED = 8_192
"""Tokens in the cache when decoding is timed."""
ORIGINAL = "original"
FRACTIONS = {"1/2": 0.5, "1/4": 0.25, "1/8": 0.125}


PUBLISHED = [
    "",
    "## What MHA2MLA's authors report of SmolLM 135M",
    "",
    "arXiv 2502.14837v1, table 1: mean accuracy in percent on MMLU, ARC, PIQA, HellaSwag, OpenBookQA and Winogrande, "
    "with 2.25 billion tokens of training.",
    "",
    "| cache | mean accuracy |",
    "| --- | ---: |",
    "| all, not trained | 44.50 |",
    "| all, trained as long | 44.25 |",
    "| 31.25 % (a latent of 32 and 4 of 32 rotary pairs for each head) | 43.06 |",
    "| 18.75 % | 41.84 |",
    "| 12.5 % | 40.97 |",
    "",
    "What differs here: SmolLM2 Instruct in 4-bit weights instead of SmolLM; 122,880 tokens of training, not 2.25 "
    "billion; loss and retrieval, because this training is too short for the accuracy on such tasks to come back; the "
    "original model as a teacher, which the authors do not use; and shares of 1/2, 1/4 and 1/8.",
]


@dataclass(frozen=True)
class Case:
    """A change of mechanism."""

    scheme: str
    options: dict[str, Any] = field(default_factory=dict)
    calibration: int | None = None
    steps: int = 60
    teacher: bool = True


CASES: dict[str, dict[str, Case]] = {
    "mla": {
        f"{method} {name}": Case("mla", {"method": method, "cache_ratio": share}, calibration=32_768)
        for name, share in FRACTIONS.items()
        for method in ("transmla", "mha2mla", "svd")
    },
    "swaps": {
        "alibi": Case("alibi", steps=200, teacher=False),
        "nope, every fourth layer": Case("nope", {"layers": list(range(3, 30, 4))}, steps=200, teacher=False),
    },
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    stored = f"heal_{arguments.kind}"
    content = read(stored) or {"model": TITLES["smollm2"], "dtype": "float32, trained in bfloat16", "cases": {}}
    if ORIGINAL not in content["cases"]:
        model, tokenizer = load(str(arguments.models / "smollm2"), "float32", "cpu")
        content["cases"][ORIGINAL] = {"before": measured(model, tokenizer, arguments.text), **cost(model)}
        write(stored, content)
    for label in arguments.cases or CASES[arguments.kind]:
        if label in content["cases"]:
            continue
        case, started = CASES[arguments.kind][label], time.perf_counter()
        run = Run(recipe_of(case, arguments.runs / label.replace("/", "_").replace(" ", "_").replace(",", "")))
        before = measured(run.model.eval(), run.tokenizer, arguments.text)
        print(f"{label}: {sentence(before)}", flush=True)
        model = run.run().eval()
        after = measured(model, run.tokenizer, arguments.text)
        content["cases"][label] = {
            "scheme": case.scheme, "options": case.options, "steps": case.steps,
            "tokens": case.steps * 2 * 1024, "before": before, "after": after, **cost(model),
            "minutes": round((time.perf_counter() - started) / 60, 1), "machine": machine(),
        }  # fmt: skip
        print(f"{label}: {sentence(before)}; healed: {sentence(after)}", flush=True)
        write(stored, content)
    (RESULTS / f"{stored}.md").write_text(markdown(arguments.kind, content), encoding="utf-8")


def recipe_of(case: Case, output: Path) -> Any:
    """Return the recipe with the scheme of a case."""
    recipe = load_recipe(RECIPE, [f"output={output}", f"phases.0.steps={case.steps}", f"evaluation.every={case.steps}"])
    recipe.scheme = Scheme(name=case.scheme, options=dict(case.options), calibration_tokens=case.calibration)
    if not case.teacher:
        recipe.distill = None
    return recipe


def measured(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Return loss on English and code, and retrieval, within the window."""
    found: dict[str, Any] = {}
    for kind in ("english", "code"):
        text = corpus(tokenizer, text_of(folder, kind), SPOTS)
        found[kind] = loss(model, tokenizer, text, 2_048, SPOTS, 4)
    text = corpus(tokenizer, text_of(folder, "english"), SPOTS)
    for length in (512, 2_048):
        found[f"needle {length}"] = retrieval(model, tokenizer, text, "needle", length, 16)
    found["passkey 2048"] = retrieval(model, tokenizer, text, "passkey", 2_048, 5)
    return found


@torch.inference_mode()
def cost(model: Any) -> dict[str, Any]:
    """Return the size of the cache and the tokens per second of decoding behind `CACHED` tokens."""
    size, ids = cache_size(model), torch.randint(100, 40_000, (1, CACHED), generator=torch.manual_seed(0))
    cache = compat.cache_of(model(input_ids=ids, use_cache=True, logits_to_keep=1))
    seconds = []
    for index in range(12):
        started = time.perf_counter()
        model(
            input_ids=ids[:, :1], past_key_values=cache, use_cache=True, cache_position=torch.tensor([CACHED + index])
        )
        seconds.append(time.perf_counter() - started)
    return {
        "cache_numbers": size.numbers, "cache_bytes": size.bytes, "cached_tokens": CACHED,
        "tokens_per_second": round(1 / statistics.median(seconds[2:]), 1),
    }  # fmt: skip


def sentence(found: dict[str, Any]) -> str:
    """Return losses and scores in words."""
    return (
        f"English {found['english']['loss']:.3f}, code {found['code']['loss']:.3f}, one of eight facts "
        f"{found['needle 512']['score']:.2f} at 512 and {found['needle 2048']['score']:.2f} at 2,048 tokens, the only "
        f"fact {found['passkey 2048']['score']:.2f}"
    )


def markdown(kind: str, content: dict[str, Any]) -> str:
    """Return one line for each case."""
    titles = {
        "mla": "SmolLM2 converted to multi-head latent attention",
        "swaps": "SmolLM2 with other positions",
    }
    original = content["cases"][ORIGINAL]
    lines = [
        f"# {titles[kind]}",
        "",
        f"{content['model']}, {content['dtype']}, seed 0. Before / after healing. Loss of the last 2,047 tokens of 4 "
        "texts of 2,048 tokens (nats per token); share of 16 questions about one of eight facts at 512 and at 2,048 "
        f"tokens, and of 5 about the only fact at 2,048. Decoding: tokens per second behind {CACHED:,} cached tokens. "
        "Training has read English and code of the same kind as the held-out text, so that a loss below the original's "
        "is due to the kind of text and not to a better mechanism.",
        "",
        "| case | numbers cached per token | tokens trained | English | code | 1 of 8, 512 | 1 of 8, 2,048 | "
        "only fact | decoding |",
        "| --- | ---: | ---: | --- | --- | --- | --- | --- | ---: |",
    ]
    for label, case in content["cases"].items():
        cells = []
        for name, value in (("english", "loss"), ("code", "loss"), ("needle 512", "score"), ("needle 2048", "score"),
                            ("passkey 2048", "score")):  # fmt: skip
            digits = 3 if value == "loss" else 2
            found = [case[when][name][value] for when in ("before", "after") if when in case]
            cells.append(" / ".join(f"{each:.{digits}f}" for each in found))
        share = f"{case['cache_numbers']:,} ({case['cache_numbers'] / original['cache_numbers']:.0%})"
        ends = f"{case['tokens_per_second']}"
        lines.append(f"| {label} | {share} | {case.get('tokens', 0):,} | {' | '.join(cells)} | {ends} |")
    return "\n".join(lines + (PUBLISHED if kind == "mla" else [])) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(CASES))
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--runs", type=Path, default=Path("build/real/runs"), help="folder for the trained models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--text", type=Path, default=TEXT)
    arguments = parser.parse_args()
    known = CASES[arguments.kind]
    if unknown := [label for label in arguments.cases or () if label not in known]:
        parser.error(f"No such case: {unknown[0]}. Cases: {', '.join(known)}.")
    return arguments


if __name__ == "__main__":
    main()
