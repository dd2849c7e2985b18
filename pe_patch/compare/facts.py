"""What a scheme adds to a model: parameters, bytes in the cache, memory of a forward, and where it ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..evaluation.memory import PeakMemory
from ..evaluation.model import cache_size, keeps_cache
from ..patching.api import find_patch

WARM_UP = 16
"""Tokens of a first forward, after which only what a longer one needs is counted."""


def parameters(model: Any) -> int:
    """Parameters that take part in the forward: what a patch took away and kept for its undoing does not count."""
    return sum(each.numel() for name, each in model.named_parameters() if "position_schemes.original." not in name)


def bound(model: Any) -> int | None:
    """The most positions that a model has at all; None where it computes any number of them."""
    patch = find_patch(model)
    if patch is not None:
        return patch.scheme.effective_window if patch.scheme.hard_window else None
    return None


def within(lengths: tuple[int, ...], most: int | None) -> tuple[int, ...]:
    """The lengths that a model has positions for."""
    return lengths if most is None else tuple(length for length in lengths if length <= most)


@torch.inference_mode()
def measure(model: Any, untouched_parameters: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Everything that does not depend on the weights' values (JSON-able); sizes in bytes.

    `peak_memory` is what a forward over one sequence of the greatest length that the model has positions for takes
    beyond what was there before; only its last position is turned into logits.
    """
    most = bound(model)
    longest = max(within(lengths, most), default=None)
    cache = cache_size(model) if keeps_cache(model) else None
    found: dict[str, Any] = {
        "parameters": parameters(model),
        "parameters_added": parameters(model) - untouched_parameters,
        "cache_bytes_per_token": None if cache is None else cache.bytes,
        "positions": most,
        "peak_memory": None,
        "peak_memory_length": longest,
        "memory_kind": "",
    }
    if longest is not None:
        forward(model, min(WARM_UP, longest))  # tables that are made once do not count
        found["peak_memory"], found["memory_kind"] = peak_memory(model, lambda: forward(model, longest))
    return found


def peak_memory(model: Any, call: Callable[[], Any]) -> tuple[int | None, str]:
    """The most bytes that tensors took during a call, above those at its start, and in words what was counted.

    On a processor every allocation is added up: what a process has resident says little of a small model, since memory
    that was freed before is used again unseen.
    """
    if model.device.type != "cpu":
        with PeakMemory(model.device) as peak:
            call()
        return peak.bytes, peak.kind
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below it, the profiler writes to stderr that it was started
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    events.sort(key=lambda each: each.start_ns())
    sizes = [each.nbytes() for each in events]  # pyright: ignore[reportAttributeAccessIssue]
    return max(accumulate(sizes, initial=0)), "tensors' memory above start"


def token_ids(model: Any, length: int) -> torch.Tensor:
    """Any ids [1, length]: neither time nor memory depends on which."""
    size = model.config.get_text_config().vocab_size
    return (torch.arange(length, device=model.device) % size)[None]


def forward(model: Any, length: int, *, use_cache: bool = False) -> Any:
    return model(input_ids=token_ids(model, length), use_cache=use_cache, logits_to_keep=1)
