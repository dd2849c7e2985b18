"""Time and memory of a conversion to latent attention: Llama 3.2 1B's shapes, random weights, float32.

python benchmarks/mla_convert.py           # takes some minutes: the model reads the calibration tokens once
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from typing import Any

import torch
from measure import save
from transformers import LlamaConfig, LlamaForCausalLM

from pe_patch import describe, patch_model
from pe_patch.evaluation.memory import PeakMemory

SHAPES: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
OPTIONS: dict[str, Any] = {"kv_rank": 192, "rope_dim": 64}
"""A quarter of the cache: 256 numbers of 1024 for each token and layer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens, in rows of 512")
    parser.add_argument("--method", default="transmla", choices=["transmla", "mha2mla", "svd"])
    given = parser.parse_args()
    logging.getLogger("pe_patch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES)).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(3, SHAPES["vocab_size"], (given.tokens // 512, 512), generator=torch.Generator().manual_seed(1))
    parameters = sum(p.numel() for p in model.parameters())
    started, worked = time.perf_counter(), time.process_time()
    with PeakMemory(torch.device("cpu")) as memory:
        patch_model(model, "mla", method=given.method, calibration=ids, **OPTIONS)
    found = {
        "method": given.method,
        "parameters": parameters,
        "calibration_tokens": ids.numel(),
        "seconds": round(time.perf_counter() - started),
        "processor_seconds": round(time.process_time() - worked),
        "weights_before_gib": round(weights / 2**30, 2),
        "memory_above_weights_gib": round((memory.bytes or 0) / 2**30, 2),
        "memory_of_the_process_at_its_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        **OPTIONS,
        "cached": describe(model).effective["cached_per_token_and_layer"],
    }
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value}")
    print("written to", save("mla_convert", found))


if __name__ == "__main__":
    main()
