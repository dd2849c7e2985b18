"""BLOOM's own attention against the same model patched with our ALiBi: time, memory and error, by length.

    python benchmarks/bloom.py                 # 2 layers, 8 heads, hidden 512, vocabulary 1024, fp32, one thread

Each measurement runs in a process of its own, since a process keeps its peak; memory is that peak above what the
process held with the weights loaded.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from measure import save
from rich.console import Console
from rich.table import Table
from transformers import BloomConfig, BloomForCausalLM

from pe_patch import patch_model

LENGTHS = (512, 2048, 4096, 8192)
TARGET = 6.0
FOLDER = tempfile.gettempdir()


def build() -> BloomForCausalLM:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=1024, hidden_size=512, n_layer=2, n_head=8)).eval()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(kind: str, length: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = build()
    if kind == "patched":
        patch_model(model, "alibi")
    ids = torch.randint(0, 1024, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids[:, :64])
        loaded = resident()
        seconds = []
        for _ in range(3 if length <= 4096 else 1):
            start = time.perf_counter()
            logits = model(ids, use_cache=False).logits
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save(logits, f"{FOLDER}/pe_patch_{kind}_{length}.pt")
    return {"seconds": min(seconds), "bytes_above_weights": peak - loaded}


def compare(length: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind in ("native", "patched"):
        done = subprocess.run([sys.executable, __file__, kind, str(length)], capture_output=True, text=True, check=True)
        rows[kind] = json.loads(done.stdout.splitlines()[-1])
    ours, native = (
        torch.load(f"{FOLDER}/pe_patch_{kind}_{length}.pt", weights_only=True) for kind in ("patched", "native")
    )
    return {
        "length": length,
        **rows,
        "times_faster": rows["native"]["seconds"] / rows["patched"]["seconds"],
        "times_less_memory": rows["native"]["bytes_above_weights"] / rows["patched"]["bytes_above_weights"],
        "largest_difference_of_logits": float((ours - native).abs().max()),
    }


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    table = Table("tokens", "native", "patched", "faster", "native", "patched", "less memory", "logits differ by")
    rows = []
    for length in LENGTHS:
        row = compare(length)
        rows.append(row)
        native, patched = row["native"], row["patched"]
        table.add_row(
            str(length), f"{native['seconds']:.2f} s", f"{patched['seconds']:.2f} s", f"{row['times_faster']:.1f} x",
            f"{native['bytes_above_weights'] / 2**20:.0f} MiB", f"{patched['bytes_above_weights'] / 2**20:.0f} MiB",
            f"{row['times_less_memory']:.1f} x", f"{row['largest_difference_of_logits']:.1e}",
        )  # fmt: skip
    Console().print(table)
    Console().print(f"target at {LENGTHS[-1]} tokens: {TARGET} x on both")
    print("written to", save("bloom", {"rows": rows}))


if __name__ == "__main__":
    main()
