"""Compare the memory that the planners estimate with what a pass and a training step take.

    python benchmarks/memory.py                                            # a small Llama on the CPU
    python benchmarks/memory.py --device cuda --model build/real/models/smollm2 --lengths 8192 32768

Reading: a forward pass over one sequence that fills a cache and returns one row of logits (`sequence_bytes`, by which
an evaluation chooses its batch). Training: forward, backward and the step of AdamW over one sequence, with gradient
checkpointing and the loss in chunks (`training.plan.needed`, by which a recipe is refused). Both are without the
weights. On a GPU the peak is that of PyTorch's allocator; on a CPU each measurement runs in a new process, and the
peak is its resident set, which also holds what the allocator does not give back.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import RESULTS, save
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pe_patch import patch_model
from pe_patch.evaluation.model import cache_size, sequence_bytes
from pe_patch.training.chunked import Scorer
from pe_patch.training.plan import needed
from pe_patch.training.run import load_recipe

KINDS = ("reading", "training")


def build(name: str, dtype: torch.dtype, device: str) -> Any:
    """Return the model under YaRN x4."""
    if name == "small":
        sizes: dict[str, Any] = {
            "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1_536, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8_192,
        }  # fmt: skip
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
        model.to(dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    patch_model(model, "yarn", factor=4.0)
    return model.to(device)


def estimate_and_run(kind: str, name: str, length: int, device: str) -> dict[str, Any]:
    """Return the estimate and the measured peak in bytes, both without the weights."""
    model = build(name, torch.bfloat16 if device == "cuda" else torch.float32, device)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    if kind == "reading":
        model.eval()
        estimate = sequence_bytes(model, length, cache_size(model).bytes, 1)
        before = start(device)
        with torch.inference_mode():
            held = model(ids, use_cache=True, logits_to_keep=1)
    else:
        recipe = load_recipe("yarn_llama_32k", [f"phases.0.length={length}", "phases.0.micro_batch=1"])
        recipe.mixed_precision = "no" if device == "cpu" else recipe.mixed_precision
        estimate = needed(model, recipe, recipe.phases[0], groups=1, parts=1, shards=1).total
        model.train().gradient_checkpointing_enable()
        scorer = Scorer(model, recipe.loss)
        scorer.learn(model)
        before = start(device)
        optimizer = torch.optim.AdamW(model.parameters())
        loss = scorer(model, {"input_ids": ids}, ids)[0] / (length - 1)
        loss.backward()
        optimizer.step()
        held = loss
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * highest()
    del held
    return {"kind": kind, "length": length, "estimate": estimate, "measured": peak - before}


def start(device: str) -> int:
    """Return the memory in use, and count the peak from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def highest() -> int:
    """Return the highest resident set of this process in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def row(kind: str, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a new process, so that its peak memory belongs to this measurement."""
    command = [sys.executable, __file__, "--child", f"{kind} {length}"]
    command += ["--model", arguments.model, "--device", arguments.device]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr[-2_000:])
    return json.loads(run.stdout.splitlines()[-1])


def markdown(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Return the rows as a table."""
    lines = [
        f"Model {Path(arguments.model).name} under `yarn` x4 on {arguments.device}; MB without the weights.",
        "",
        "| | tokens | estimated | measured | estimated / measured |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in rows:
        share = each["estimate"] / each["measured"]
        sizes = f"{each['estimate'] / 1e6:,.0f} | {each['measured'] / 1e6:,.0f}"
        lines.append(f"| {each['kind']} | {each['length']:,} | {sizes} | {share:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="a folder, or `small` for 8 layers with random weights")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2_048, 8_192])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, length = arguments.child.split()
        print(json.dumps(estimate_and_run(kind, arguments.model, int(length), arguments.device)))
        return
    rows = [row(kind, length, arguments) for kind in KINDS for length in arguments.lengths]
    save("memory", {"model": arguments.model, "device": arguments.device, "rows": rows}, arguments.output)
    (arguments.output / "memory.md").write_text(markdown(rows, arguments), encoding="utf-8")
    print(markdown(rows, arguments))


if __name__ == "__main__":
    main()
