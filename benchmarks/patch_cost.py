"""What a patch costs: our YaRN on a loaded model against the same model built with Transformers' own YaRN.

python benchmarks/patch_cost.py            # 4 layers, hidden 512, 2048 tokens, SDPA, one thread
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import ratio, save, side_by_side
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from pe_patch import compat, describe, patch_model

LENGTH, FACTOR, WINDOW, STEPS = 2048, 4.0, 512, 64
TARGET = 1.02
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": WINDOW, "rope_theta": 10000.0}


def build(ours: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = dict(SIZES)
    if ours:
        settings |= {"max_position_embeddings": WINDOW}
    else:
        settings |= {"max_position_embeddings": int(FACTOR * WINDOW), "rope_parameters": YARN}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    return patch_model(model, "yarn", factor=FACTOR) if ours else model


def forward(model: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Any:
        return model(ids, use_cache=False)

    return call


def train_step(model: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], Any]:
    def call() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return call


def decode(model: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> None:
        output = model(ids[:, :WINDOW], use_cache=True)
        for index in range(WINDOW, WINDOW + STEPS):
            keyword = compat.cache_keyword(model, compat.cache_of(output))
            output = model(ids[:, index : index + 1], use_cache=True, **keyword)

    return call


WORK = {"forward": (forward, 31), "train step": (train_step, 11), f"prefill and {STEPS} decode steps": (decode, 21)}


def import_seconds(code: str) -> float:
    timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    folder = Path(__file__).parent.parent
    runs = [
        float(
            subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True, cwd=folder).stdout
        )
        for _ in range(5)
    ]
    return statistics.median(runs)


def main() -> None:
    torch.set_num_threads(1)
    ids = torch.randint(3, SIZES["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(1))
    ours, theirs = build(True), build(False)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits), "the two do not compute the same"
    table = Table("work", "pe_patch [ms]", "Transformers [ms]", "ratio", f"target {TARGET}")
    rows = {}
    for name, (prepare, rounds) in WORK.items():
        seconds = side_by_side({"ours": prepare(ours, ids), "theirs": prepare(theirs, ids)}, rounds)
        cost = ratio(seconds, "ours", "theirs")
        medians = {key: 1000 * statistics.median(value) for key, value in seconds.items()}
        rows[name] = {"ratio": cost, "rounds": rounds, **{f"{key}_ms": value for key, value in medians.items()}}
        met = "met" if cost <= TARGET else "missed"
        table.add_row(name, f"{medians['ours']:.1f}", f"{medians['theirs']:.1f}", f"{cost:.3f}", met)
    host = import_seconds("from transformers import PreTrainedModel")
    added = import_seconds("from transformers import PreTrainedModel; import pe_patch") - host
    rows["import"] = {"transformers_s": host, "added_s": added}
    Console().print(table)
    Console().print(f"import pe_patch adds {added:.2f} s to {host:.2f} s of transformers (target 0.3)")
    Console().print(str(describe(ours)), markup=False, highlight=False)
    print("written to", save("patch_cost", {"length": LENGTH, "sizes": SIZES, "rows": rows}))


if __name__ == "__main__":
    main()
