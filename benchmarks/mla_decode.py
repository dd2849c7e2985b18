"""One decoding step of one attention layer of DeepSeek-V3's kind, absorbed, against what Transformers does with it and
against multi-head attention of the same width.

    python benchmarks/mla_decode.py            # 16 heads, rank 512, rotary 64, one thread

The layers are called as the model calls them, their caches (Transformers' DynamicCache, float32) filled with random
numbers and cropped after each step, so that appending to the cache is part of the step for all three. The clock is
processor time of the one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from measure import ratio, save
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from pe_patch import Positions, compat, patch_model

HEADS, HIDDEN, RANK, ROPE, NOPE = 16, 2048, 512, 64, 128
LENGTHS = {1024: 7, 2048: 7, 4096: 5, 8192: 5, 16384: 3}
"""Cached tokens, and rounds of all three in turn."""
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 32768,
}  # fmt: skip
ABSORBED, NATIVE, FULL = "absorbed", "Transformers' DeepSeek-V3", "multi-head, full cache"


def deepseek() -> PreTrainedModel:
    torch.manual_seed(0)
    experts: dict[str, Any] = {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    latent: dict[str, Any] = {
        "kv_lora_rank": RANK,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": NOPE,
        "v_head_dim": NOPE,
    }
    config = DeepseekV3Config(**SIZES, **experts, **latent, q_lora_rank=None, first_k_dense_replace=1)
    return DeepseekV3ForCausalLM(config).eval()


def multi_head() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=HIDDEN // HEADS)).eval()


def step(model: Any, cached: int, shapes: tuple[tuple[int, int], ...]) -> Callable[[], Tensor]:
    """A decoding step of the model's only attention over `cached` tokens; shapes are (heads, width) of the cache."""
    attention: Any = model.base_model.layers[0].self_attn
    rotary: Any = model.base_model.rotary_emb
    generator = torch.Generator().manual_seed(1)
    cache = DynamicCache()
    key, value = (torch.randn(1, heads, cached, width, generator=generator) for heads, width in shapes)
    cache.update(key, value, 0)
    hidden = torch.randn(1, 1, HIDDEN, generator=generator)
    at, keys = torch.tensor([[cached]]), torch.arange(cached + 1)[None]
    rotation, positions = rotary(hidden, at), Positions(at, keys, cached=True)
    cached_as = compat.cache_keyword(attention, cache)

    def run() -> Tensor:
        output, _ = attention(
            hidden_states=hidden, position_embeddings=rotation, attention_mask=None, pe_positions=positions,
            **cached_as,
        )  # fmt: skip
        cache.crop(-1)
        return output

    return run


def measured(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each, called in turns; one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for call in work.values():
        call()
    for _ in range(rounds):
        for name, call in work.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return seconds


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    native, full = deepseek(), multi_head()
    patched = deepseek()
    patch_model(patched, "mla")
    latent, heads = ((1, RANK), (1, ROPE)), ((HEADS, HIDDEN // HEADS),) * 2
    rows = []
    table = Table("cached tokens", "absorbed, ms", NATIVE, FULL, "output differs by", title="one step, one layer")
    for cached, rounds in LENGTHS.items():
        work = {
            ABSORBED: step(patched, cached, latent), NATIVE: step(native, cached, latent),
            FULL: step(full, cached, heads),
        }  # fmt: skip
        expected = work[NATIVE]()
        error = float((work[ABSORBED]() - expected).abs().max() / expected.abs().max())
        seconds = measured(work, rounds)
        row = {
            "cached": cached, "rounds": rounds,
            "milliseconds": {name: [1e3 * each for each in taken] for name, taken in seconds.items()},
            "times_faster_than_native": ratio(seconds, NATIVE, ABSORBED),
            "times_faster_than_multi_head": ratio(seconds, FULL, ABSORBED), "relative_error": error,
        }  # fmt: skip
        rows.append(row)
        ours = sorted(seconds[ABSORBED])[rounds // 2]
        table.add_row(
            str(cached), f"{1e3 * ours:.1f}", f"{row['times_faster_than_native']:.1f} x",
            f"{row['times_faster_than_multi_head']:.1f} x", f"{error:.0e}",
        )  # fmt: skip
    Console().print(table)
    sizes = {"heads": HEADS, "hidden": HIDDEN, "rank": RANK, "rotary": ROPE, "nope": NOPE, "values": NOPE}
    print("written to", save("mla_decode", {"sizes": sizes, "dtype": "float32", "rows": rows}))


if __name__ == "__main__":
    main()
