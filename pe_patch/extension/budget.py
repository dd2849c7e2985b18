"""Read a time budget, and estimate how long a model takes to read a text."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import OptionError

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
PROBES = (512, 2048)
"""Tokens of the two readings that are timed, at most half of the window and the window."""


def parse_seconds(name: str, value: str | float) -> float:
    """Return a time in seconds from a number of seconds or a word such as 90s, 10m or 1.5h.

    Raises:
        OptionError: it is not a time above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(value).strip().lower())
    seconds = float(match[1]) * UNITS[match[2]] if match else 0.0
    if seconds <= 0:
        raise OptionError(f"{name} must be a time such as 90s, 10m or 2h, got {value!r}.")
    return seconds


@dataclass(frozen=True)
class ReadingTime:
    """The seconds that a model takes to read a text: a part by token, and a part by pair of tokens (attention)."""

    by_token: float
    by_pair: float

    def of(self, length: int) -> float:
        """Return the seconds for one text of `length` tokens."""
        return self.by_token * length + self.by_pair * length**2


def time_reading(model: Any, window: int) -> ReadingTime:
    """Time two readings of a model within its window.

    Args:
        model: The model without a patch.
        window: Its window in tokens.
    """
    long = min(PROBES[1], window)
    short = max(1, min(PROBES[0], long // 2))
    first, second = (_seconds(model, length) for length in (short, long))
    # first = a short + b short^2, second = a long + b long^2
    by_pair = max(0.0, (second / long - first / short) / max(1, long - short))
    return ReadingTime(max(second / long - by_pair * long, 1e-9), by_pair)


@torch.inference_mode()
def _seconds(model: Any, length: int) -> float:
    """Return the shorter time of two readings; the first one also warms the kernels up."""
    ids = torch.ones(1, length, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
