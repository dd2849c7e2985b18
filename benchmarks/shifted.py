"""A training step with shifted sparse attention against one with full attention: time and memory.

    python benchmarks/shifted.py                            # 8,192 tokens in 4 groups
    python benchmarks/shifted.py --length 4096 --groups 8

Forward and backward of a Llama of 2 layers, hidden size 256 and 4 heads under linear scaling, float32, one thread, in
turns: time is the processor's. Memory is what the backward pass keeps, in bytes, counted tensor by tensor.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import save
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaModel

from pe_patch import patch_model
from pe_patch.training.shifted_attention import shift_attention


def build(length: int, attention: str) -> Any:
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=length // 4, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config._attn_implementation = attention
    return patch_model(LlamaModel(config), "linear", factor=4).train()


def step(model: Any, ids: torch.Tensor) -> tuple[float, int]:
    """Seconds of the processor, and bytes of what was kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    start = time.process_time()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids).last_hidden_state.square().mean()
    size = sum(kept.values())
    loss.backward()
    return time.process_time() - start, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--name", default="shifted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {"full": build(options.length, options.attention), "shifted": build(options.length, options.attention)}
    shift_attention(models["shifted"], options.groups)
    ids = torch.randint(256, (1, options.length), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        for name in list(models) if turn % 2 == 0 else list(reversed(models)):
            measured = step(models[name], ids)
            if turn:  # the first warms up
                found[name].append(measured)
    times = {name: statistics.median(seconds for seconds, _ in steps) for name, steps in found.items()}
    sizes = {name: steps[0][1] for name, steps in found.items()}
    for name in models:
        print(f"{name:8} {times[name]:6.2f} s of the processor, {sizes[name] / 1e9:5.2f} GB kept")
    ratios = {"time": times["shifted"] / times["full"], "memory": sizes["shifted"] / sizes["full"]}
    print(ratios)
    print(save(options.name, {"settings": vars(options), "steps": found, "ratio": ratios}))


if __name__ == "__main__":
    main()
