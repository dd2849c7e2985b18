"""What schemes cost in generation: a prompt of 512 tokens and 64 decode steps against the same model unpatched.

    python benchmarks/decode.py                # 4 layers, hidden 512, SDPA, one thread

Schemes that act at the scores (those that follow the length, ALiBi, remapped ones) touch every key at every step.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from measure import ratio, save, side_by_side
from patch_cost import LENGTH, SIZES, STEPS, WINDOW, decode
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from pe_patch import patch_model

SCHEMES: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4},
    "dynamic_ntk": {},
    "dynamic_yarn": {},
    "alibi": {},
    "self_extend": {},
    "sinusoidal": {},
    "nope": {},
}
ROUNDS = 5


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=WINDOW)).eval()


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("pe_patch").setLevel(logging.ERROR)  # these models are not trained for anything
    ids = torch.randint(3, SIZES["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(1))
    work = {"unpatched": decode(build(), ids)}
    for name, options in SCHEMES.items():
        work[name] = decode(patch_model(build(), name, **options), ids)
    seconds = side_by_side(work, ROUNDS)
    rows = {name: ratio(seconds, name, "unpatched") for name in SCHEMES}
    table = Table("scheme", f"time over the unpatched model, {WINDOW} + {STEPS} tokens")
    for name, cost in rows.items():
        table.add_row(name, f"{cost:.2f} x")
    Console().print(table)
    print("written to", save("decode", {"prompt": WINDOW, "steps": STEPS, "rounds": ROUNDS, "ratio": rows}))


if __name__ == "__main__":
    main()
