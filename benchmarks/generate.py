"""Tokens per second of `model.generate` on SmolLM2 135M after a prompt of 8,192 tokens, under several schemes.

    python benchmarks/generate.py                              # build/real/models/smollm2, 6 minutes on one core
    python benchmarks/generate.py --model demo --prompt 512 --tokens 8
    python benchmarks/generate.py --device cuda --prompt 32768

Reading the prompt and writing the answer are timed apart, and of the answer its second half. The text is random tokens,
since speed does not depend on it. `alibi` is not trained for this model; its time is that of a trained one.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine, save
from transformers import LogitsProcessor, LogitsProcessorList

from pe_patch import describe, patch_model, unpatch_model
from pe_patch.checkpoints.sources import load

SCHEMES: dict[str, dict[str, Any]] = {
    "unpatched": {}, "yarn": {"factor": 4.0}, "dynamic_ntk": {}, "self_extend": {"factor": 4.0}, "dca": {}, "alibi": {},
}  # fmt: skip


class Clock(LogitsProcessor):
    """Note the time at which the logits of each new token are known."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


@torch.no_grad()
def timed(model: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Return the seconds to read a prompt, and the tokens per second of the second half of a greedy generation.

    The first steps are left out: the first one encodes the keys of the whole prompt.
    """
    clock, start = Clock(), time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0, logits_processor=LogitsProcessorList([clock]),
    )  # fmt: skip
    half = len(clock.times) // 2
    return clock.times[0] - start, (len(clock.times) - 1 - half) / max(clock.times[-1] - clock.times[half], 1e-9)


def markdown(content: dict[str, Any]) -> str:
    """Return a table with a line for each scheme."""
    plain = content["schemes"]["unpatched"]
    where = content["machine"]["gpu"] or f"{content['machine']['cpu']}, {content['machine']['threads']} thread(s)"
    lines = [
        f"{content['model']}: a prompt of {content['prompt']:,} tokens and {content['tokens']} new ones, "
        f"{content['dtype']}, {where}.",
        "",
        "| scheme | tokens per second | of unpatched | prompt, seconds | cache, bytes per token |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, row in content["schemes"].items():
        share = row["tokens_per_second"] / plain["tokens_per_second"]
        lines.append(
            f"| {name} | {row['tokens_per_second']:.2f} | {share:.2f} | {row['prompt_seconds']:.1f} | {row['cache']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/real/models/smollm2")
    parser.add_argument("--prompt", type=int, default=8_192)
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pe_patch").setLevel(logging.ERROR)
    model, _ = load(arguments.model, arguments.dtype, arguments.device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, vocabulary, (1, arguments.prompt), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    rows: dict[str, Any] = {}
    for name in dict.fromkeys(("unpatched", *arguments.schemes)):
        if name != "unpatched":
            patch_model(model, name, **SCHEMES[name])
        first, speed = timed(model, ids, arguments.tokens)
        cache = "" if name == "unpatched" else str(describe(model).effective.get("cache_bytes_per_token", ""))
        rows[name] = {
            "prompt_seconds": first, "tokens_per_second": speed, "cache": cache,
        }  # fmt: skip
        if name != "unpatched":
            unpatch_model(model)
        print(f"{name}: {rows[name]['tokens_per_second']:.2f} tokens/s after {first:.1f} s", flush=True)
    content = {
        "model": Path(arguments.model).name, "prompt": arguments.prompt, "tokens": arguments.tokens,
        "dtype": str(model.dtype).removeprefix("torch."), "schemes": rows, "machine": machine(),
    }  # fmt: skip
    name = "generate" if arguments.device == "cpu" else "generate_cuda"
    save(name, content, arguments.output)
    (arguments.output / f"{name}.md").write_text(markdown(content), encoding="utf-8")


if __name__ == "__main__":
    main()
