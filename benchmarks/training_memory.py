"""What a training step needs beyond the model, with all logits and with a chunk of them: one child process each.

    python benchmarks/training_memory.py                    # 16,384 tokens in chunks, whole logits at half as many
    python benchmarks/training_memory.py --lengths 4096 --vocabulary 32000
    python benchmarks/training_memory.py --whole 16384      # where about 26 GB are free

Forward and backward of a Llama of 2 layers and hidden size 256 in float32 with gradient checkpointing, its loss by
Transformers (`labels=`) and by the recipes (`loss.chunk`). Memory is the process's highest resident set less the one
before the step. A child gets an address space of its own, so that no step can exhaust the machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import torch
from measure import save
from transformers import LlamaConfig, LlamaForCausalLM

from pe_patch.training.chunked import Scorer
from pe_patch.training.recipe import Loss

HIDDEN, CHUNK = 256, Loss().chunk
GIB = 2**30


def build(vocabulary: int, length: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=length, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable()
    return model


def step(way: str, vocabulary: int, length: int) -> dict[str, Any]:
    """One forward and backward pass in this process."""
    model = build(vocabulary, length)
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    scorer = Scorer(model, Loss(chunk=CHUNK))
    scorer.learn(model)
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    if way == "whole":
        loss = model(input_ids=ids, labels=ids).loss
    else:
        loss = scorer(model, {"input_ids": ids}, ids)[0] / (length - 1)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {
        "way": way, "tokens": length, "vocabulary": vocabulary, "bytes": peak - before, "seconds": seconds,
        "loss": float(loss.detach()), "gradient_norm": float(norm),
    }  # fmt: skip


def child(way: str, vocabulary: int, length: int) -> dict[str, Any]:
    """`step` in a process that may not take more than this machine has to spare."""
    logits = 4 * vocabulary * length
    need = 3 * logits + GIB if way == "whole" else 4 * GIB
    free = psutil.virtual_memory().available
    if need > free:
        raise SystemExit(f"{way} logits of {length} tokens need about {need / 1e9:.0f} GB; {free / 1e9:.0f} are free.")
    command = [sys.executable, __file__, "--child", way, "--vocabulary", str(vocabulary), "--lengths", str(length)]
    limit = int(free + 4 * GIB)  # libraries take address space that is never resident
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--whole", type=int, default=8192, help="the longest with whole logits")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--name", default="training_memory")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps(step(options.child, options.vocabulary, options.lengths[0])))
        return
    wanted = [(way, length) for length in options.lengths for way in ("whole", "chunked")]
    steps = []
    for way, length in wanted:
        if way == "chunked" or length <= options.whole:
            steps.append(child(way, options.vocabulary, length))
            print(f"{way:8} {length:6,} tokens: {steps[-1]['bytes'] / 1e9:6.2f} GB, {steps[-1]['seconds']:5.1f} s")
    print(save(options.name, {"chunk": CHUNK, "hidden_size": HIDDEN, "steps": steps}))


if __name__ == "__main__":
    main()
