"""Extend a pretrained model: retrieval, loss by position and cost of each scheme at the window and beyond it.

    python benchmarks/real/extension.py smollm2                       # 8,192, 16,384 and 32,768 tokens
    python benchmarks/real/extension.py smollm2 --cases yarn ntk      # two rows of the table
    python benchmarks/real/extension.py smollm2 --trained "yarn, trained"=runs/smollm2_yarn_32k/model
    python benchmarks/real/extension.py smollm2 --draw                # table and picture from the stored results

A scheme has the options for the longest length also at shorter ones, and answers the same questions about the same
text as the others. A measurement is stored as soon as it is made, so that a stopped run continues. Gemma's schemes
change its full-attention layers only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import MODELS, RESULTS, TEXT, TITLES, machine, read, write
from extension_page import draw, markdown
from measures import corpus, loss, retrieval, text_of

from pe_patch import describe, patch_model
from pe_patch.checkpoints.sources import load
from pe_patch.patching.api import find_patch

Options = dict[str, Any]
Layers = Callable[[Any], list[int] | None]


@dataclass(frozen=True)
class Amount:
    """The number of questions and texts at one length."""

    needle: int
    """Questions about one of eight facts; eight of them share a text."""
    passkey: int
    """Questions about the only fact, each about its own text."""
    english: int = 1
    """English texts for the loss."""
    code: int = 0
    """Texts of Python code for the loss."""


@dataclass(frozen=True)
class Plan:
    """The lengths and schemes to measure for one model."""

    window: int
    amounts: dict[int, Amount]
    """By length."""
    layers: Layers = lambda config: None
    """Returns the layers to patch, from the config; None for all."""

    trained: Amount | None = None
    """The amounts at the longest length for a trained model, where untrained ones answer next to nothing."""

    def of(self, trained: bool) -> dict[int, Amount]:
        """Return the amounts by length, for a trained or an untrained model."""
        return self.amounts | ({self.longest: self.trained} if trained and self.trained else {})

    @property
    def longest(self) -> int:
        """The longest length."""
        return max(self.amounts)

    def cases(self) -> dict[str, tuple[str, Options]]:
        """Return scheme and options by label. `rope` is the model as it is."""
        factor, half = self.longest / self.window, self.window // 2
        scaled = ("yarn", "ntk", "linear", "llama3", "dynamic_ntk", "self_extend")
        over = {"over": {"rope_type": "yarn", "factor": factor}}
        return {
            "unpatched": ("rope", {}),
            **{name: (name, {"factor": factor}) for name in scaled},
            "rerope": ("rerope", {"window": half}),
            "dca": ("dca", {}),
            "string over yarn": ("string", {"window": half, "shift": self.longest // 3, **over}),
            "lm_infinite": ("lm_infinite", {"window": self.window}),
        }


def full_attention(config: Any) -> list[int]:
    """Return the layers that do not slide."""
    return [index for index, kind in enumerate(config.layer_types) if kind == "full_attention"]


PLANS = {
    "smollm2": Plan(
        8_192,
        {
            512: Amount(16, 5, 4, 4),
            2_048: Amount(16, 5, 4, 4),
            8_192: Amount(16, 5),
            16_384: Amount(8, 2),
            32_768: Amount(8, 0),
        },
        trained=Amount(8, 10, 1, 1),
    ),
    "gemma3": Plan(
        32_768, {2_048: Amount(16, 5, 4), 32_768: Amount(8, 2), 65_536: Amount(8, 0), 131_072: Amount(8, 0)},
        layers=full_attention,
    ),
}  # fmt: skip


def pieces(amount: Amount) -> Iterator[tuple[str, int]]:
    """Yield the measurements of a length as (name, amount)."""
    for name in ("english", "needle", "passkey", "code"):
        if count := getattr(amount, name):
            yield name, count


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    plan, stored = PLANS[arguments.model], f"extension_{arguments.model}"
    content = read(stored) or {"model": TITLES[arguments.model], "window": plan.window, "cases": {}}
    labels = [] if arguments.draw else arguments.cases or plan.cases()
    cases = {label: plan.cases()[label] for label in labels}
    folders = dict(each.rsplit("=", 1) for each in arguments.trained)
    for label in [*folders] if folders else [*cases]:
        folder = Path(folders.get(label, arguments.models / arguments.model))
        model, tokenizer = load(str(folder), arguments.dtype, "cpu")
        if label in cases and label != "unpatched":
            layers = plan.layers(model.config)
            chosen: Options = {} if layers is None else {"layers": layers}
            scheme, options = cases[label]
            patch_model(model, scheme, **options, **chosen)
        case = content["cases"].setdefault(label, {})
        effective = describe(model).effective if find_patch(model) is not None else {}
        case |= {"dtype": arguments.dtype, "machine": machine(), "scheme": effective}
        for length, amount in plan.of(trained=label in folders).items():
            if length > arguments.up_to:
                continue
            for name, count in pieces(amount):
                key = f"{name} {length}"
                if key in case.setdefault("measured", {}):
                    continue
                started = time.perf_counter()
                if name in ("english", "code"):
                    text = corpus(tokenizer, text_of(arguments.text, name), plan.longest)
                    found = loss(model, tokenizer, text, length, plan.longest, count)
                else:
                    text = corpus(tokenizer, text_of(arguments.text, "english"), plan.longest)
                    found = retrieval(model, tokenizer, text, name, length, count)
                case["measured"][key] = found
                shown = found.get("score", found.get("loss"))
                print(f"{label}, {key}: {shown:.3f} in {time.perf_counter() - started:.0f} s", flush=True)
                write(stored, content)
    (RESULTS / f"{stored}.md").write_text(markdown(content), encoding="utf-8")
    (RESULTS / f"{stored}.png").write_bytes(draw(content))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(PLANS))
    parser.add_argument("--cases", nargs="+", help="labels of cases; default: all")
    parser.add_argument("--trained", nargs="+", default=[], metavar="LABEL=FOLDER", help="measure these models instead")
    parser.add_argument("--up-to", type=int, default=10**9, help="leave out greater lengths")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--text", type=Path, default=TEXT)
    arguments = parser.parse_args()
    known = PLANS[arguments.model].cases()
    if unknown := [label for label in arguments.cases or () if label not in known]:
        parser.error(f"No such case: {unknown[0]}. Cases: {', '.join(known)}.")
    return arguments


if __name__ == "__main__":
    main()
