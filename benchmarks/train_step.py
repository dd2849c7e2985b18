"""One training step of a small patched model under schemes with learned distances: our kernels against the eager form.

    python benchmarks/train_step.py                         # one CPU thread, many short sequences to one long one
    python benchmarks/train_step.py --schemes t5 --rounds 9
    python benchmarks/train_step.py --name trial             # results under another name

Forward and backward of a Llama of 2 layers, hidden size 128 and 4 heads over 2,048 to 4,096 tokens. Candidates are
called in turns, and ratios are of the least processor time of each: to the same scheme with `backend="eager"`, which
builds all scores (up to 1,024 tokens), and to the model as it comes, with its rotation. `train_step_before.json` is of
the kernels that took one sequence of one head at a time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import RESULTS, machine, save
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pe_patch import patch_model

SCHEMES: dict[str, tuple[str, bool]] = {
    # what the table calls it: scheme, whether its own parameters are trained
    "t5": ("t5", True),
    "kerple": ("kerple", True),
    "fire": ("fire", True),
    "transformer_xl": ("transformer_xl", True),
}
SHAPES = ((256, 8), (64, 32), (16, 256), (4, 1024), (1, 4096))
"""Sequences and their tokens."""
LONGEST_EAGER = 1024


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1152, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def step(label: str | None, backend: str | None, ids: torch.Tensor) -> Callable[[], None]:
    """A call that does forward and backward; `label` None is the model as it comes."""
    trained = model()
    if label is not None:
        name, learned = SCHEMES[label]
        patch_model(trained, name, backend=backend)
        scheme = trained.base_model.pe_runtime.scheme
        torch.manual_seed(1)
        for parameter in scheme.parameters():
            nn.init.normal_(parameter, 0.5, 0.1) if parameter.ndim == 1 else nn.init.normal_(parameter, 0, 0.1)
            parameter.requires_grad_(learned)

    def call() -> None:
        trained(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        trained.zero_grad()

    return call


def measure(label: str, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    ids = torch.randint(0, 1152, shape, generator=torch.Generator().manual_seed(2))
    calls = {"ours": step(label, "sdpa", ids), "rope": step(None, None, ids)}
    if shape[1] <= LONGEST_EAGER:
        calls["eager"] = step(label, "eager", ids)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()  # what else runs on the machine does not count
            call()
            if number:
                seconds[name].append(time.process_time() - start)
    least = {name: min(taken) for name, taken in seconds.items()}
    ratios = {f"of_{name}": least["ours"] / least[name] for name in ("eager", "rope") if name in least}
    return {"scheme": label, "sequences": shape[0], "length": shape[1], "seconds": least, **ratios}


def table(result: dict[str, Any]) -> str:
    """Markdown: one row for each scheme, both ratios by shape."""
    host = result["machine"]
    shapes = list(dict.fromkeys((row["sequences"], row["length"]) for row in result["rows"]))
    rows = {(row["scheme"], row["sequences"], row["length"]): row for row in result["rows"]}
    lines = [
        f"# A training step with learned distances\n\n{host['cpu']}, {host['threads']} thread(s); torch {host['torch']}"
        f", transformers {host['transformers']}; a Llama of 2 layers, hidden size 128, 4 heads, forward and backward. "
        "Time over that of `backend=\"eager\"` with the same scheme / over that of the model as it comes (rope). Made "
        "by `benchmarks/train_step.py`.\n"
    ]  # fmt: skip
    lines.append("| scheme | " + " | ".join(f"{batch} x {length:,}" for batch, length in shapes) + " |")
    lines.append("| --- |" + " ---: |" * len(shapes))
    for label in dict.fromkeys(row["scheme"] for row in result["rows"]):
        found = [rows.get((label, *shape)) for shape in shapes]
        pairs = [[row.get(f"of_{name}") for name in ("eager", "rope")] if row else [] for row in found]
        cells = [" / ".join("-" if value is None else f"{value:.2f}" for value in pair) for pair in pairs]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[length for _, length in SHAPES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="train_step", help="of the files under results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, rows = Console(), []
    for shape in SHAPES:
        for label in options.schemes if shape[1] in options.lengths else ():
            rows.append(measure(label, shape, options.rounds))
            shown = ", ".join(f"{name} {taken:.3f} s" for name, taken in rows[-1]["seconds"].items())
            console.print(f"{label}, {shape[0]} x {shape[1]}: {shown}", highlight=False)
    save(options.name, {"rows": rows})
    (RESULTS / f"{options.name}.md").write_text(table({"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
