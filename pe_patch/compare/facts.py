"""Measure what a scheme adds to a model: parameters, cache bytes, memory of a forward pass, and its last position."""

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
"""Tokens of a first forward pass, after which memory is counted."""


def parameters(model: Any) -> int:
    """Count the parameters that take part in the forward pass, without originals that a patch keeps for its undo."""
    return sum(
        parameter.numel() for name, parameter in model.named_parameters() if "position_schemes.original." not in name
    )


def bound(model: Any) -> int | None:
    """Return the maximum number of positions of a model, or None if it is unlimited."""
    patch = find_patch(model)
    if patch is not None:
        return patch.scheme.effective_window if patch.scheme.hard_window else None
    return None


def within(lengths: tuple[int, ...], most: int | None) -> tuple[int, ...]:
    """Return the lengths that the model has positions for."""
    return lengths if most is None else tuple(length for length in lengths if length <= most)


@torch.inference_mode()
def measure(model: Any, untouched_parameters: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Measure everything that does not depend on the values of the weights.

    `peak_memory` is the memory that a forward pass over one sequence adds, at the greatest length that the model has
    positions for. Only its last position is turned into logits.

    Args:
        model: the model, patched or not.
        untouched_parameters: the parameter count of the unpatched model.
        lengths: the lengths of the comparison in tokens.

    Returns:
        A dict for JSON, with sizes in bytes.
    """
    most = bound(model)
    longest = max(within(lengths, most), default=None)
    cache = cache_size(model) if keeps_cache(model) else None
    measured: dict[str, Any] = {
        "parameters": parameters(model),
        "parameters_added": parameters(model) - untouched_parameters,
        "cache_bytes_per_token": None if cache is None else cache.bytes,
        "positions": most,
        "peak_memory": None,
        "peak_memory_length": longest,
        "memory_kind": "",
    }
    if longest is not None:
        forward(model, min(WARM_UP, longest))  # do not count tables that are built once
        measured["peak_memory"], measured["memory_kind"] = peak_memory(model, lambda: forward(model, longest))
    return measured


def peak_memory(model: Any, call: Callable[[], Any]) -> tuple[int | None, str]:
    """Return the peak of tensor memory in bytes during a call, above its start, and a description of the measure.

    On a CPU this adds up all allocations. The resident memory of a process says little about a small model, because
    freed memory is reused.
    """
    if model.device.type != "cpu":
        with PeakMemory(model.device) as peak:
            call()
        return peak.bytes, peak.kind
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # at lower levels the profiler writes a start message to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events]
    return max(accumulate(sizes, initial=0)), "tensors' memory above start"


def token_ids(model: Any, length: int) -> torch.Tensor:
    """Return ids `[1, length]`; their values affect neither time nor memory."""
    size = model.config.get_text_config().vocab_size
    return (torch.arange(length, device=model.device) % size)[None]


def forward(model: Any, length: int, *, use_cache: bool = False) -> Any:
    """Run a forward pass over `length` tokens, with logits at the last position only."""
    return model(input_ids=token_ids(model, length), use_cache=use_cache, logits_to_keep=1)
