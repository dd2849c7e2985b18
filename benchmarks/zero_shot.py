"""Every training-free scheme on the demo's model at four and eight times its window: retrieval and perplexity.

    python benchmarks/zero_shot.py                             # 35 questions, 16 places in the text, one thread
    python benchmarks/zero_shot.py --schemes yarn dca --samples 10 --spots 2 --output trial

Each scheme has the options that the target asks for, also where it is measured within the window. Questions and scored
tokens are the same for every scheme; both come from files that the model was not trained on.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine
from rich.console import Console
from zero_shot_results import draw, markdown

from pe_patch import describe, evaluate, patched
from pe_patch.compare.demo import BASE, load_base
from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.results import Results, write_atomically
from pe_patch.evaluation.tasks import Needle

WINDOW, FACTORS = 256, (4, 8)
Options = Callable[[int], dict[str, Any]]


def none(factor: int) -> dict[str, Any]:
    return {}


def factor_alone(factor: int) -> dict[str, Any]:
    return {"factor": factor}


def over_yarn(**options: Any) -> Options:
    return lambda factor: {**options, "over": {"rope_type": "yarn", "factor": float(factor)}}


CASES: dict[str, tuple[str, Options]] = {
    "unpatched": ("rope", none),  # bit for bit the model as it is
    "linear": ("linear", factor_alone),
    "ntk": ("ntk", factor_alone),
    "ntk_by_parts": ("ntk_by_parts", factor_alone),
    "yarn": ("yarn", factor_alone),
    "dynamic_ntk": ("dynamic_ntk", none),
    "dynamic_ntk, factor": ("dynamic_ntk", factor_alone),
    "dynamic_yarn": ("dynamic_yarn", none),
    "resonance over yarn": ("resonance", over_yarn()),
    "clipped_rope over yarn": ("clipped_rope", over_yarn(dims=5)),
    "rerope": ("rerope", none),
    "rerope, log_scaling": ("rerope", lambda factor: {"log_scaling": True}),
    "leaky_rerope": ("leaky_rerope", lambda factor: {"k": 2 * factor - 1}),
    "self_extend": ("self_extend", factor_alone),
    "dca": ("dca", none),
    "string": ("string", none),
    "string over yarn": ("string", over_yarn()),
    "lm_infinite": ("lm_infinite", none),
}
"""Label, scheme and options for a factor. What does not depend on the factor is measured once."""

LEFT_OUT = {"longrope": "its factors are searched for one model, and none were for this one"}
NOTES = (
    "Schemes `over yarn` are over `yarn` with the factor of the target. No options: the defaults.",
    "The scored tokens are the same in every cell, so differences between cells are surer than each by itself; the "
    "picture shows them.",
    "`dynamic_ntk` follows the length by itself; a `factor` makes its base grow faster.",
    "`linear` is not meant to go without training and is here to compare.",
    "`clipped_rope` tapers 5 of 16 frequencies, the share that its default of 20 is of 64 (heads of 128).",
    "`leaky_rerope`: the least whole `k` at which its distances reach the target within the window.",
    "`string` by itself lowers distances by 43 and so reaches 299 tokens; over `yarn` it reaches the target.",
    "`lm_infinite` attends to the last 256 tokens and the first 10 and cannot see what stands between.",
    *(f"`{name}` is left out: {reason}." for name, reason in LEFT_OUT.items()),
)


def measure(model: Any, tokenizer: Any, corpus: Corpus, label: str, given: argparse.Namespace, bar: bool) -> Any:
    """Rows of one scheme: {factor, length, retrieval, perplexity ...}."""
    scheme, options = CASES[label]
    same = len({json.dumps(options(factor)) for factor in FACTORS}) == 1
    for factors in [FACTORS] if same else [(factor,) for factor in FACTORS]:
        chosen, started = options(factors[0]), time.perf_counter()
        with patched(model, scheme, **chosen):
            settled = describe(model).effective
            found = evaluate(
                model,
                tokenizer,
                [Needle(wording="tokens"), Perplexity(measures=("fixed",), spots=given.spots)],
                [WINDOW, *[WINDOW * factor for factor in factors]],
                samples=given.samples,
                seed=given.seed,
                text=corpus,
                control_length=WINDOW * max(FACTORS),  # so that the scored tokens are the same for every target
                beyond_window=True,
                label=label,
                progress=bar,
            )
        stated = {name: value for name, value in chosen.items() if name not in ("factor", "over")}
        stated |= {name: settled[name] for name in SETTLED if name in settled}
        for factor in factors:
            for length in (WINDOW, WINDOW * factor):
                yield {
                    "label": label, "scheme": scheme, "factor": factor, "length": length, "options": chosen,
                    "stated": stated, "seconds": time.perf_counter() - started, **scores(found, length),
                }  # fmt: skip


SETTLED = ("group", "near_window", "chunk_size", "local_window", "shift")
"""What `describe` says a scheme made of its options."""


def scores(found: Results, length: int) -> dict[str, Any]:
    """Retrieval with its exact interval, and perplexity with the interval of the loss it is the exponential of."""
    answered = found.cell(task="needle", length=length)
    assert answered is not None
    (text,) = found.select(task="perplexity", length=length)
    return {
        "retrieval": {
            "score": answered.score, "low": answered.low, "high": answered.high, "questions": answered.samples,
        },
        "loss": {
            "score": text.score, "low": text.low, "high": text.high, "tokens": text.samples,
            "by_spot": text.details["loss_by_spot"],
        },
        "perplexity": text.details["perplexity"],
        "measured_on": text.measured_on,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--samples", type=int, default=35, help="questions at each length")
    parser.add_argument("--spots", type=int, default=16, help="places in the text whose last 128 tokens are scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pe_patch").setLevel(logging.ERROR)  # it is taken past its window on purpose
    console, started = Console(stderr=True), time.perf_counter()
    model, tokenizer = load_base(BASE)
    corpus = Corpus.load(tokenizer, "stdlib", needed=WINDOW * max(FACTORS))
    rows = []
    for number, label in enumerate(given.schemes, 1):
        rows += list(measure(model, tokenizer, corpus, label, given, console.is_terminal))
        took = time.perf_counter() - started
        console.print(f"{number} of {len(given.schemes)}: {label}, {took:.0f} s so far", highlight=False)
    result = {
        "machine": machine(),
        "setting": {"samples": given.samples, "spots": given.spots, "seed": given.seed, "window": WINDOW},
        "text": {"name": corpus.name, "hash": corpus.hash},
        "seconds": round(time.perf_counter() - started, 1),
        "notes": NOTES,
        "rows": rows,
    }
    given.output.mkdir(parents=True, exist_ok=True)
    write_atomically(given.output / "zero_shot.json", json.dumps(result, indent=2) + "\n")
    table = markdown(result)
    write_atomically(given.output / "zero_shot.md", table)
    draw(result, given.output / "zero_shot.png")
    Console().print(table, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
