"""Time one decoding step under each scheme, relative to the unpatched model in the same run.

    python benchmarks/decode.py                                # 2,048 and 8,192 cached tokens, one thread, 20 minutes
    python benchmarks/decode.py --lengths 32768 --schemes dynamic_ntk self_extend dca
    python benchmarks/decode.py --device cuda --lengths 8192 32768 131072 --batch 1 8

Two layers with 8 heads of 64. On a CPU the time is that of the processor, so that other work on the machine matters
less. The ratio is the median over the rounds, whose steps alternate between the models. Memory is that of the cache:
keys, values, and the encoded keys that pe_patch keeps beside them.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine, save
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pe_patch import patch_model
from pe_patch.evaluation.charts import dots
from pe_patch.patching.cache_record import RECORD

WINDOW, CHUNK, STEPS = 2_048, 2_048, 3
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": WINDOW,
}  # fmt: skip
UNPATCHED = "unpatched"
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "rope": ("rope", {}),
    "yarn, x16": ("yarn", {"factor": 16.0}),
    'yarn, factor="auto"': ("yarn", {"factor": "auto"}),
    "dynamic_ntk": ("dynamic_ntk", {}),
    "dynamic_yarn": ("dynamic_yarn", {}),
    "longrope": ("longrope", {"factor": 16.0, "long_factor": [1.0 + n / 2 for n in range(32)]}),
    "self_extend": ("self_extend", {"factor": 64.0}),
    "rerope": ("rerope", {}),
    "leaky_rerope": ("leaky_rerope", {"k": 64}),
    "dca": ("dca", {}),
    "string": ("string", {}),
    "lm_infinite, window 1,024": ("lm_infinite", {"window": 1_024}),
    "xpos": ("xpos", {}),
    "shaw": ("shaw", {}),
    "transformer_xl": ("transformer_xl", {}),
    "alibi": ("alibi", {}),
    "t5": ("t5", {}),
    "kerple": ("kerple", {}),
    "sandwich": ("sandwich", {}),
    "fire": ("fire", {}),
    "rope_alibi": ("rope_alibi", {}),
    "nope": ("nope", {}),
}
DEVICE = {"cpu": torch.float32, "cuda": torch.bfloat16}


def build(device: str, scheme: str) -> LlamaForCausalLM:
    """Return the model on a device, under a scheme or unpatched."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model = model.to(device, DEVICE[device])
    if scheme != UNPATCHED:
        name, options = SCHEMES[scheme]
        patch_model(model, name, **options)
    return model


@torch.no_grad()
def filled(model: LlamaForCausalLM, length: int, batch: int) -> DynamicCache:
    """Return a cache that the model has filled with random tokens."""
    ids = torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    for part in ids.to(model.device).split(CHUNK, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def step(model: LlamaForCausalLM, cache: DynamicCache, batch: int) -> float:
    """Return the seconds of a step, the mean of `STEPS`."""
    token = torch.full((batch, 1), 5, device=model.device)
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(STEPS):
        model(token, past_key_values=cache, logits_to_keep=1)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / STEPS


def bytes_per_token(cache: Any) -> int:
    """Return the bytes of a token of one row: keys, values and encoded keys."""
    plain = sum(layer.keys[:1, :, 0].nbytes + layer.values[:1, :, 0].nbytes for layer in cache.layers)
    record = getattr(cache, RECORD, None)
    return plain + (0 if record is None else record.encoded.bytes_per_token)


def measure(device: str, length: int, batch: int, schemes: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Return time and memory by scheme, at one length and batch."""
    found: dict[str, dict[str, Any]] = {}
    plain = build(device, UNPATCHED)
    plain_cache = filled(plain, length, batch)
    for name in schemes:
        model = build(device, name)
        cache = filled(model, length, batch)
        ratios, seconds = [], []
        for number in range(rounds + 1):
            pair = [step(model, cache, batch), step(plain, plain_cache, batch)]
            if number:  # the first round encodes the keys of the whole prompt
                ratios.append(pair[0] / pair[1])
                seconds.append(pair[0])
        found[name] = {
            "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
            "milliseconds": 1e3 * statistics.median(seconds), "cache_bytes_per_token": bytes_per_token(cache),
        }  # fmt: skip
        print(f"{length:,} tokens, batch {batch}, {name}: {found[name]['ratio']:.2f} x", flush=True)
        del model, cache
    return found


def markdown(content: dict[str, Any]) -> str:
    """Return the ratios as a table with a column for each length and batch."""
    cases = content["cases"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    lines = [
        f"A decoding step over the unpatched model's: median of {content['rounds']} rounds, and their range; 2 layers, "
        f"8 heads of 64; {content['machine']['gpu'] or content['machine']['cpu']}, {content['machine']['threads']} "
        "thread(s).",
        "",
        f"| scheme | {' | '.join(cases)} | cache, bytes per token |",
        "| --- |" + " ---: |" * (len(cases) + 1),
    ]
    for name in names:
        cells, size = [], 0
        for case in cases.values():
            row = case.get(name)
            cells.append("-" if row is None else f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})")
            size = size if row is None else row["cache_bytes_per_token"]
        lines.append(f"| {name} | {' | '.join(cells)} | {size:,} |")
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any], file: Path) -> None:
    """Draw the ratios, one panel for each length and batch."""
    rows = [
        {"label": name, "column": title, "value": row["ratio"], "low": row["low"], "high": row["high"],
         "number": f"{row['ratio']:.2f}"}
        for title, case in content["cases"].items()
        for name, row in case.items()
    ]  # fmt: skip
    subtitle = "Time of a step over that of the unpatched model: median, and range of the rounds."
    file.write_bytes(dots(rows, name="decode", title="One decoding step", subtitle=subtitle).png())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEVICE), default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2_048, 8_192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pe_patch").setLevel(logging.ERROR)  # these models are not trained for anything
    content: dict[str, Any] = {"rounds": arguments.rounds, "cases": {}}
    for length in arguments.lengths:
        for batch in arguments.batch:
            found = measure(arguments.device, length, batch, arguments.schemes, arguments.rounds)
            content["cases"][f"{length:,} tokens, batch {batch}"] = found
    content |= {"device": arguments.device, "dtype": str(DEVICE[arguments.device]), "machine": machine()}
    name = "decode" if arguments.device == "cpu" else "decode_cuda"
    arguments.output.mkdir(parents=True, exist_ok=True)
    save(name, content, arguments.output)
    (arguments.output / f"{name}.md").write_text(markdown(content), encoding="utf-8")
    draw(content, arguments.output / f"{name}.png")


if __name__ == "__main__":
    main()
