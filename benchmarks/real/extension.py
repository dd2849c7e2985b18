"""Extend a pretrained model without training: retrieval, loss by position and cost of each scheme beyond the window.

    python benchmarks/real/extension.py smollm2 --explore      # what the untouched model can do within its window
    python benchmarks/real/extension.py smollm2                # 8,192, 16,384 and 32,768 tokens
    python benchmarks/real/extension.py gemma3 --schemes unpatched yarn

Every scheme has the options for the longest length, also at shorter ones, and answers the same questions about the same
text. `needle` and `passkey` ask at five depths of one text, which the model reads once. Finished rows stay, so that a
stopped run continues. Gemma's schemes change its full-attention layers only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import MODELS, RESULTS, TEXT, TITLES, machine

from pe_patch import evaluate, patched
from pe_patch.checkpoints.sources import load
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.results import Results

Options = dict[str, Any]
EXPLORED = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "vt", "fwe", "cwe")


@dataclass(frozen=True)
class Plan:
    """The lengths of a model's table, and the options of schemes that depend on its window."""

    window: int
    lengths: tuple[int, ...]
    explored: tuple[int, ...]
    layers: Callable[[Any], Any] = lambda config: None
    """Returns the layers to patch, from the config; None for all."""

    @property
    def factor(self) -> float:
        """The longest length over the window."""
        return self.lengths[-1] / self.window

    def cases(self) -> dict[str, tuple[str, Options]]:
        """Return scheme and options by label. `rope` is the model as it is."""
        scaled = ("linear", "ntk", "dynamic_ntk", "yarn", "llama3", "self_extend")
        window, half = self.window, self.window // 2
        over = {"over": {"rope_type": "yarn", "factor": self.factor}}
        return {
            "unpatched": ("rope", {}),
            **{name: (name, {"factor": self.factor}) for name in scaled},
            "rerope": ("rerope", {"window": half}),
            "dca": ("dca", {}),
            "string over yarn": ("string", {"window": half, "shift": self.lengths[-1] // 3, **over}),
            "lm_infinite": ("lm_infinite", {"window": window}),
        }


def full_attention(config: Any) -> list[int]:
    """Return the layers that do not slide."""
    return [index for index, kind in enumerate(config.layer_types) if kind == "full_attention"]


PLANS = {
    "smollm2": Plan(8_192, (8_192, 16_384, 32_768), (1_024, 2_048, 4_096, 8_192)),
    "gemma3": Plan(32_768, (32_768, 65_536, 131_072), (2_048, 8_192, 32_768), full_attention),
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    plan, name = PLANS[arguments.model], arguments.model
    model, tokenizer = load(str(arguments.models / name), arguments.dtype, "cpu")
    text = f"{arguments.text / 'english'}@split=test"
    shared = {"samples": arguments.samples, "text": text, "seed": 0, "beyond_window": True}
    folder = RESULTS / ("explore" if arguments.explore else "extension") / name
    if arguments.explore:
        lengths = [length for length in arguments.length or plan.explored]
        tasks = ["passkey", "needle", *EXPLORED]
        evaluate(
            model, tokenizer, tasks, lengths, **shared, control_length=lengths[0], label="untouched",
            task_options={"wording": "own"}, output=folder,
        )  # fmt: skip
        return
    loss = Perplexity(measures="position", windows=arguments.windows)
    layers = plan.layers(model.config)
    found = {}
    for label in arguments.schemes or plan.cases():
        scheme, options = plan.cases()[label]
        chosen = {} if layers is None or label == "unpatched" else {"layers": layers}
        with patched(model, scheme, **options, **chosen):
            found[label] = evaluate(
                model, tokenizer, ["passkey", "needle", loss], arguments.length or plan.lengths, **shared,
                label=label, output=folder / label.replace(" ", "_"),
            )  # fmt: skip
    (folder / "table.md").write_text(markdown(name, found), encoding="utf-8")
    (folder / "machine.json").write_text(json.dumps(machine() | {"dtype": arguments.dtype}, indent=2) + "\n")


def markdown(name: str, found: dict[str, Results]) -> str:
    """Return one line for each scheme and length."""
    lines = [
        f"# {TITLES[name]}: beyond the window without training",
        "",
        "Share of questions answered exactly with its 95 % interval; loss in nats per token at the positions from half "
        "the length on, and over all positions; seconds for all rows of the length.",
        "",
        "| scheme | length | passkey | one of 8 facts | loss, second half | loss | seconds |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for label, results in found.items():
        for length in sorted({row.length for row in results.rows}):
            rows = [row for row in results.rows if row.length == length]
            loss = next((row for row in rows if row.task.startswith("perplexity")), None)
            buckets = loss.details["buckets"] if loss is not None else []
            cells = [_retrieval([row for row in rows if row.task == task]) for task in ("passkey", "needle")]
            losses = [f"{buckets[-1]['loss']:.3f}", f"{loss.score:.3f}"] if loss is not None else ["", ""]
            seconds = sum(row.seconds or 0 for row in rows)
            lines.append(f"| {label} | {length:,} | {' | '.join([*cells, *losses])} | {seconds:,.0f} |")
    return "\n".join(lines) + "\n"


def _retrieval(rows: list[Any]) -> str:
    """Return the share of right answers over all depths, with the number of questions."""
    count = sum(row.samples for row in rows)
    return f"{sum(row.score * row.samples for row in rows) / count:.2f} of {count}" if count else ""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(PLANS))
    parser.add_argument("--explore", action="store_true", help="the untouched model within its window, more tasks")
    parser.add_argument("--schemes", nargs="+", help="labels of cases; default: all")
    parser.add_argument("--length", nargs="+", type=int)
    parser.add_argument("--samples", type=int, default=10, help="questions at each length, over five depths")
    parser.add_argument("--windows", type=int, default=1, help="texts for the loss")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--text", type=Path, default=TEXT)
    arguments = parser.parse_args()
    known = PLANS[arguments.model].cases()
    if unknown := [label for label in arguments.schemes or () if label not in known]:
        parser.error(f"No such case: {unknown[0]}. Cases: {', '.join(known)}.")
    return arguments


if __name__ == "__main__":
    main()
