"""Time each scheme relative to the unpatched model, in one process and in turns, so that load affects all equally."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .. import compat
from ..checkpoints import sources
from ..errors import PePatchError, silence_log_warnings
from ..patching.api import patched
from ..patching.targets import unwrap
from . import facts
from .compared_scheme import ComparedScheme
from .settings import Folder, Settings, load_recipe, read_json, write_json

DECODED = 5
"""Decoding steps in each round, of which the median counts."""
WORK = ("forward", "decode", "train")
"""The timed operations."""


@dataclass
class Seconds:
    """Times of one scheme in seconds, one for each round."""

    forward: list[float] = field(default_factory=list)
    """A forward pass over one sequence without a cache, with logits at its last position only."""
    decode: list[float] = field(default_factory=list)
    """One decoding step with the sequence in the cache."""
    train: list[float] = field(default_factory=list)
    """Forward and backward pass over one sequence of the training's last phase."""


def time_all(settings: Settings, folder: Folder) -> None:
    """Time all schemes that work on the model, and write `timing.json`."""
    with silence_log_warnings():
        _time_all(settings, folder)


def _time_all(settings: Settings, folder: Folder) -> None:
    model, _ = sources.load(settings.model, settings.dtype, settings.device)
    unsupported = folder.unsupported(settings.contenders)
    everyone = [entry for entry in settings.contenders if entry.label not in unsupported]
    lengths = {entry.label: length for entry in everyone if (length := _length(settings, model, entry)) is not None}
    trained = None if settings.training is None else load_recipe(settings.training).phases[-1].length
    base = settings.contenders[0]
    # A scheme without positions for the greatest length is compared with the model at its own last length.
    cases = {(base.label, length): base for length in lengths.values()}
    cases |= {(entry.label, lengths[entry.label]): entry for entry in everyone if entry.label in lengths}
    seconds = {case: Seconds() for case in cases}
    for number in range(settings.rounds):
        order = list(cases) if number % 2 == 0 else list(reversed(cases))
        for label, length in order:
            with applied(model, cases[label, length]):
                _time_round(model, length, trained, seconds[label, length])
            gc.collect()
    times = {}
    for label, length in cases:
        if length == lengths[label]:
            ours, theirs = seconds[label, length], seconds[base.label, length]
            times[label] = {"length": length, **ratios(ours, theirs), "seconds": vars(ours)}
    write_json(folder.root / "timing.json", {"threads": torch.get_num_threads(), "trained": trained, "times": times})


def ratios(ours: Seconds, theirs: Seconds) -> dict[str, float | None]:
    """Return the median over rounds of our time divided by theirs in the same round; None if not timed."""
    medians: dict[str, float | None] = {}
    for name in WORK:
        pairs = list(zip(getattr(ours, name), getattr(theirs, name), strict=True))
        medians[name] = statistics.median(a / b for a, b in pairs) if pairs else None
    return medians


def read(folder: Folder) -> dict[str, Any]:
    """Return the content of `timing.json`, or no times if it does not exist."""
    file = folder.root / "timing.json"
    return read_json(file) if file.exists() else {"times": {}}


@contextmanager
def applied(model: Any, compared: ComparedScheme) -> Iterator[None]:
    """Patch the model with a scheme within the block."""
    with nullcontext() if compared.scheme is None else patched(model, **compared.arguments()):
        yield


def _length(settings: Settings, model: Any, compared: ComparedScheme) -> int | None:
    """Return the greatest length in tokens that the scheme has positions for, or None."""
    with applied(model, compared):
        return max(facts.within(settings.lengths, facts.bound(model)), default=None)


def _time_round(model: Any, length: int, trained: int | None, seconds: Seconds) -> None:
    """Time one round of one scheme. Each operation runs once before it is timed."""
    model.eval()
    with torch.inference_mode():
        facts.forward(model, length)
        seconds.forward.append(_seconds_of(model, lambda: facts.forward(model, length)))
        seconds.decode.append(_decode(model, length))
    if trained is not None:
        model.train()
        _backward(model, trained)
        seconds.train.append(_seconds_of(model, lambda: _backward(model, trained)))
        model.zero_grad(set_to_none=True)
        model.eval()


def _decode(model: Any, length: int) -> float:
    """Return the median time of a decoding step; each step is removed from the cache again."""
    cache = compat.cache_of(facts.forward(model, length - 1, use_cache=True))
    if cache is None or not hasattr(cache, "crop"):
        raise PePatchError(f"{type(model).__name__} has no cache that can be cropped, so decoding cannot be timed.")
    ids = facts.token_ids(model, 1)

    def step() -> None:
        model(input_ids=ids, use_cache=True, **compat.cache_keyword(unwrap(model), cache))

    times = []
    for _ in range(1 + DECODED):
        times.append(_seconds_of(model, step))
        cache.crop(-1)
    return statistics.median(times[1:])


def _backward(model: Any, length: int) -> None:
    ids = facts.token_ids(model, length)
    logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()


def _seconds_of(model: Any, call: Callable[[], Any]) -> float:
    _synchronise(model)
    start = time.perf_counter()
    call()
    _synchronise(model)
    return time.perf_counter() - start


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
