"""Find out what the untouched SmolLM2 can do within its own window, task by task and length by length.

    python benchmarks/real/window.py

A control of zero tells nothing, so only tasks that the model can do within its window say something beyond it. The
tasks are the two of the extension table and those of RULER's eleven without files that ask for words or numbers, in the
official words where lm-eval is installed. The effective length of a task is the longest at which it reaches 85 % of
its score at the shortest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import MODELS, RESULTS, TEXT, TITLES, machine, read, write
from measures import corpus, text_of

from pe_patch import evaluate
from pe_patch.checkpoints.sources import load
from pe_patch.errors import PePatchError

TASKS = (
    "passkey",
    "needle",
    "niah_single_1",
    "niah_single_2",
    "niah_multikey_1",
    "niah_multivalue",
    "vt",
    "fwe",
    "cwe",
)
LENGTHS = (512, 1_024, 2_048, 4_096, 8_192)
ENOUGH = 0.85


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(str(arguments.models / "smollm2"), "float32", "cpu")
    text = corpus(tokenizer, text_of(arguments.text, "english"), max(LENGTHS))
    content = read("window") or {"model": TITLES["smollm2"], "machine": machine(), "dtype": "float32", "tasks": {}}
    for length in LENGTHS:
        for task in TASKS:
            found = content["tasks"].setdefault(task, {})
            if str(length) in found or (length > 2_048 and not _worth_asking(found)):
                continue
            try:
                row = evaluate(
                    model, tokenizer, [task], [length], samples=arguments.samples, text=text, seed=0,
                    control_length=length, label="untouched",
                ).cell(task=task)  # fmt: skip
            except PePatchError as error:
                if "tokens are too few" not in str(error):
                    raise
                found[str(length)] = {"refused": str(error)}
            else:
                assert row is not None
                found[str(length)] = {
                    "score": row.score, "low": row.low, "high": row.high, "questions": row.samples,
                    "without_text": row.without_context,
                }  # fmt: skip
            print(task, length, found[str(length)], flush=True)
            write("window", content)
    (RESULTS / "window.md").write_text(markdown(content), encoding="utf-8")


def _worth_asking(found: dict[str, Any]) -> bool:
    """Return True unless the model answered nothing at any shorter length."""
    return any(each.get("score", 0) > 0 for each in found.values())


def effective_length(found: dict[str, Any]) -> int | None:
    """Return the longest length up to which the score stays at `ENOUGH` of that at the shortest; None if that is 0."""
    scores = [(int(length), each["score"]) for length, each in found.items() if "score" in each]
    scores.sort()
    if not scores or not scores[0][1]:
        return None
    best = None
    for length, score in scores:
        if score < ENOUGH * scores[0][1]:
            break
        best = length
    return best


def markdown(content: dict[str, Any]) -> str:
    """Return one line for each task."""
    lines = [
        f"# {content['model']}: what it can do within its window of 8,192 tokens",
        "",
        f"{content['dtype']}, seed 0, {content['machine']['cpu']}. Score with its 95 % interval and the questions; a "
        "task without any right answer up to 2,048 tokens was not asked beyond. Effective: the longest length with "
        f"{ENOUGH:.0%} of the score at the shortest.",
        "",
        "| task |" + "".join(f" {length:,} |" for length in LENGTHS) + " without text | effective |",
        "| --- |" + " --- |" * (len(LENGTHS) + 2),
    ]
    for task, found in content["tasks"].items():
        cells = []
        for length in LENGTHS:
            each = found.get(str(length), {})
            cells.append(
                f"{each['score']:.2f} ({each['low']:.2f} to {each['high']:.2f}, {each['questions']})"
                if "score" in each
                else "too short"
                if "refused" in each
                else "-"
            )
        bare = [each["without_text"] for each in found.values() if each.get("without_text") is not None]
        length = effective_length(found)
        ends = [f"{max(bare):.2f}" if bare else "-", f"{length:,}" if length else "none"]
        lines.append(f"| {task} | {' | '.join([*cells, *ends])} |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5, help="questions at each length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--text", type=Path, default=TEXT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
