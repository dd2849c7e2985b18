"""Attention under every scheme against plain causal attention of the same shape: time and memory, by length.

    python benchmarks/attention.py                          # one CPU thread, fp32, 8 heads of 64, 1k to 16k tokens
    python benchmarks/attention.py --lengths 1024 8192 --schemes alibi shaw
    python benchmarks/attention.py --device cuda --dtype bfloat16 --backends sdpa flex flash

One run measures everything side by side: PyTorch's causal `scaled_dot_product_attention` again and again between the
schemes, and ratios are of the least time of each. On one CPU thread that is the time the processor worked. What a
scheme does to queries and keys, such as rotating them, is inside the timed region. Memory is what is allocated above
the inputs at the highest point, output and gradients included. Besides, what people use instead: a dense mask, the
attention modules of BLOOM and T5 in Transformers, and Self-Extend over two dense score matrices as its authors have it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler is here for the memory alone

import torch
from alternatives import ALTERNATIVES, fits
from attention_results import draw, table
from measure import machine
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pe_patch import SCHEMES, AttentionShape, Positions, Scheme, UnsupportedError
from pe_patch.attention.engine import Engine
from pe_patch.attention.interface import BACKENDS, check_backend

HEADS, WIDTH, TRAINED = 8, 64, 4096
SHAPE = AttentionShape(
    hidden_size=HEADS * WIDTH, num_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH, rotary_dim=WIDTH,
    rotary_start=0, rope_theta=10000.0, trained_length=TRAINED, num_layers=1,
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"

KINDS = {"forward": False, "forward + backward": True}
"""What is measured, and whether gradients are."""
LONGEST = {"cope": 4096}
"""Schemes without a fast form, which would take long."""
BEYOND_8K = ("alibi", "t5", "shaw", "self_extend", "lm_infinite")
"""One of each structure."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

ROWS: dict[str, tuple[str, dict[str, Any], bool]] = {
    # what the table calls it: scheme, options, whether its own parameters are trained
    "nope": ("nope", {}, False),
    "rope": ("rope", {}, False),
    "yarn": ("yarn", {"factor": 4}, False),
    "xpos": ("xpos", {}, False),
    "rope_alibi": ("rope_alibi", {}, False),
    "alibi": ("alibi", {}, False),
    "sandwich": ("sandwich", {}, False),
    "t5, frozen": ("t5", {}, False),
    "t5": ("t5", {}, True),
    "kerple, frozen": ("kerple", {}, False),
    "kerple": ("kerple", {}, True),
    "fire": ("fire", {}, True),
    "shaw": ("shaw", {}, True),
    "transformer_xl": ("transformer_xl", {}, True),
    "cope": ("cope", {}, True),
    "rerope": ("rerope", {"window": 1024}, False),
    "leaky_rerope": ("leaky_rerope", {"window": 1024}, False),
    "self_extend": ("self_extend", {"group": 8, "window": 1024}, False),
    "dca": ("dca", {"chunk_size": 3072, "local_window": 512}, False),
    "string": ("string", {"shift": 2048}, False),
    "lm_infinite": ("lm_infinite", {"window": 1024, "sinks": 10}, False),
}


def built(name: str, options: dict[str, Any], trained: bool, device: torch.device) -> Scheme:
    """A scheme whose parameters are random rather than the zeros it starts with."""
    torch.manual_seed(0)
    scheme = SCHEMES[name](SHAPE, **options)
    for parameter in scheme.parameters():
        nn.init.normal_(parameter, 0.5, 0.1) if parameter.ndim == 1 else nn.init.normal_(parameter, 0, 0.1)
        parameter.requires_grad_(trained)
    return scheme.to(device)


def attention_of(scheme: Scheme, backend: str, length: int, device: torch.device) -> Attention:
    """One layer's attention as a patched model calls it, on projected queries, keys and values."""
    module = nn.Module()
    module.__dict__.update(is_causal=True, pe_layer=0)
    core = Engine(module, None, WIDTH**-0.5, 0.0, BACKENDS[backend], {})
    at = torch.arange(length, device=device)[None]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        positions = Positions(at, at)
        positions = positions._replace(prepared=scheme.prepare(positions))
        return scheme("attend", query, key, value, positions, core)[0]

    return attend


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What everything is compared with."""
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def inputs(length: int, options: argparse.Namespace, trained: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(3)]
    return [one.to(options.device, getattr(torch, options.dtype)).requires_grad_(trained) for one in made]


def step(attention: Attention, sides: list[Tensor], backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            attention(*sides)
        return
    output = attention(*sides)
    output.backward(torch.ones_like(output))
    for side in sides:
        side.grad = None


def seconds(attention: Attention, sides: list[Tensor], backward: bool) -> float:
    synchronise = torch.cuda.synchronize if sides[0].is_cuda else lambda: None
    alone = not sides[0].is_cuda and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter  # what else runs on the machine does not count
    synchronise()
    start = clock()
    step(attention, sides, backward)
    synchronise()
    return clock() - start


def allocated(attention: Attention, sides: list[Tensor], backward: bool) -> int:
    """Bytes allocated above the inputs at the highest point."""
    if sides[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(attention, sides, backward)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(attention, sides, backward)
    assert profile.profiler is not None
    recorded: Any = profile.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in recorded.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


class Plain:
    """Least seconds of the plain attention at one length, measured again and again between the others."""

    def __init__(self, length: int, options: argparse.Namespace) -> None:
        self.length, self.options, self.calls = length, options, 0
        self.least: dict[str, float] = {}

    def measure(self) -> None:
        """One more time, or at long lengths before every fourth of the others."""
        self.calls += 1
        if self.length > 4096 and self.calls % 4 != 1:
            return
        for kind, backward in KINDS.items():
            sides = inputs(self.length, self.options, backward)
            taken = seconds(plain, sides, backward)
            self.least[kind] = min(taken, self.least.get(kind, taken))


def measure(label: str, attention: Attention, length: int, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"scheme": label, "length": length}
    for kind, backward in KINDS.items():
        sides = inputs(length, options, backward)
        if length <= 4096 or sides[0].is_cuda:
            seconds(attention, sides, backward)  # warm-up
        taken = min(seconds(attention, sides, backward) for _ in range(rounds if backward else rounds + 1))
        size = sum(side.numel() * side.element_size() for side in sides) * 4 / 3
        memory = allocated(attention, sides, backward)
        found[kind] = {"seconds": taken, "bytes": memory, "of_qkv_and_output": memory / size}
    return found


def candidates(options: argparse.Namespace, length: int) -> list[tuple[str, Attention | str]]:
    """Everything to measure at one length: an attention, or the reason why there is none."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    found: list[tuple[str, Attention | str]] = []
    for backend in options.backends:
        for label, (name, given, trained) in ROWS.items():
            if options.schemes and name not in options.schemes:
                continue
            if length > LONGEST.get(name, length) or (length > 8192 and label not in BEYOND_8K):
                continue
            scheme = built(name, given, trained, device)
            shown = label if len(options.backends) == 1 else f"{label} ({backend})"
            try:
                check_backend(BACKENDS[backend], scheme)
            except UnsupportedError as error:
                found.append((shown, str(error)))
            else:
                found.append((shown, attention_of(scheme, backend, length, device)))
    if not options.schemes:
        for label, make in ALTERNATIVES.items():
            fitting = fits(label, length, HEADS, options.memory * 2**30)
            found.append((label, make(length, HEADS, WIDTH, device, dtype) if fitting is None else fitting))
    return found


def run(options: argparse.Namespace) -> None:
    console, rows = Console(), []
    for length in options.lengths:
        baseline, own = Plain(length, options), []
        rounds = options.rounds if length <= 4096 else max(1, options.rounds - 1) if length <= 8192 else 1
        found = candidates(options, length)
        for label, attention in track(found, description=f"{length:,} tokens", console=console):
            row: dict[str, Any] = {"scheme": label, "length": length}
            baseline.measure()
            if isinstance(attention, str):
                own.append(row | {"left_out": attention})
                continue
            try:
                own.append(measure(label, attention, length, rounds, options))
            except UnsupportedError as error:
                own.append(row | {"left_out": str(error)})
        for row in own:
            if "left_out" in row:
                console.print(f"{row['scheme']}: left out, {row['left_out']}")
                continue
            for kind in KINDS:
                row[kind] |= {"plain_seconds": baseline.least[kind]}
                row[kind]["ratio"] = row[kind]["seconds"] / baseline.least[kind]
            shown = (
                f"{kind} {row[kind]['ratio']:.2f}x time, {row[kind]['of_qkv_and_output']:.2f}x memory" for kind in KINDS
            )
            console.print(f"{row['scheme']}: {'; '.join(shown)}")
        rows += own
        written = write(rows, options)  # what is done is kept if the rest is not waited for
        console.print(f"Written: {written}, and the same as .md and .png")


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> Path:
    """JSON, table and picture under results/."""
    setting = {"heads": HEADS, "head_dim": WIDTH, "dtype": options.dtype, "device": options.device, "batch": 1}
    result = {"machine": machine(), "setting": setting, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{options.name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(result))
    draw(result, file.with_suffix(".png"))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--schemes", nargs="+", choices=sorted({name for name, *_ in ROWS.values()}))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backends", nargs="+", default=["sdpa"], choices=list(BACKENDS))
    parser.add_argument("--rounds", type=int, default=2, help="of the backward pass; fewer at 8k tokens, one beyond")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=12, help="GiB that an alternative may take")
    parser.add_argument("--name", default="attention", help="of the files under results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
