"""How long each scheme takes beside the model as it is: in one process, in turns, so that a busy machine slows all."""

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
from ..checkpoints import loading
from ..errors import PePatchError
from ..patching.api import patched
from ..patching.targets import unwrap
from . import facts
from .contender import Contender
from .settings import Folder, Settings, load_recipe, quiet, read_json, write_json

DECODED = 5
"""Steps of decoding that are timed in each round; their median is that round's."""
WORK = ("forward", "decode", "train")


@dataclass
class Seconds:
    """One contender's times, a number for each round."""

    forward: list[float] = field(default_factory=list)
    """One sequence of the length, without a cache; only its last position is turned into logits."""
    decode: list[float] = field(default_factory=list)
    """One token more, with the length in the cache."""
    train: list[float] = field(default_factory=list)
    """Forward and backward of one sequence of the training's last phase."""


def time_all(settings: Settings, folder: Folder) -> None:
    """Time every contender that works on the model, and write `timing.json`."""
    with quiet():
        _time_all(settings, folder)


def _time_all(settings: Settings, folder: Folder) -> None:
    model, _ = loading.load(settings.model, settings.dtype, settings.device)
    left_out = folder.unsupported(settings.contenders)
    everyone = [one for one in settings.contenders if one.label not in left_out]
    lengths = {one.label: length for one in everyone if (length := _length(settings, model, one)) is not None}
    trained = None if settings.training is None else load_recipe(settings.training).phases[-1].length
    base = settings.contenders[0]
    # a scheme that ends before the greatest length is held against the model at its own
    cases = {(base.label, length): base for length in lengths.values()}
    cases |= {(one.label, lengths[one.label]): one for one in everyone if one.label in lengths}
    seconds = {case: Seconds() for case in cases}
    for number in range(settings.rounds):
        order = list(cases) if number % 2 == 0 else list(reversed(cases))
        for label, length in order:
            with applied(model, cases[label, length]):
                _visit(model, length, trained, seconds[label, length])
            gc.collect()
    found = {}
    for label, length in cases:
        if length == lengths[label]:
            ours, theirs = seconds[label, length], seconds[base.label, length]
            found[label] = {"length": length, **ratios(ours, theirs), "seconds": vars(ours)}
    write_json(folder.root / "timing.json", {"threads": torch.get_num_threads(), "trained": trained, "times": found})


def ratios(ours: Seconds, theirs: Seconds) -> dict[str, float | None]:
    """The median over the rounds of our time over theirs in the same round; None for what was not timed."""
    found: dict[str, float | None] = {}
    for name in WORK:
        pairs = list(zip(getattr(ours, name), getattr(theirs, name), strict=True))
        found[name] = statistics.median(a / b for a, b in pairs) if pairs else None
    return found


def read(folder: Folder) -> dict[str, Any]:
    """What `time_all` wrote; empty where it has not been."""
    file = folder.root / "timing.json"
    return read_json(file) if file.exists() else {"times": {}}


@contextmanager
def applied(model: Any, contender: Contender) -> Iterator[None]:
    with nullcontext() if contender.scheme is None else patched(model, **contender.arguments()):
        yield


def _length(settings: Settings, model: Any, contender: Contender) -> int | None:
    """The greatest length that the contender has positions for."""
    with applied(model, contender):
        return max(facts.within(settings.lengths, facts.bound(model)), default=None)


def _visit(model: Any, length: int, trained: int | None, seconds: Seconds) -> None:
    """One round of one contender; what is called first, unclocked, is what the clock runs for afterwards."""
    model.eval()
    with torch.inference_mode():
        facts.forward(model, length)
        seconds.forward.append(_clock(model, lambda: facts.forward(model, length)))
        seconds.decode.append(_decode(model, length))
    if trained is not None:
        model.train()
        _backward(model, trained)
        seconds.train.append(_clock(model, lambda: _backward(model, trained)))
        model.zero_grad(set_to_none=True)
        model.eval()


def _decode(model: Any, length: int) -> float:
    """The median time of one token more; the cache is cut back after each."""
    cache = compat.cache_of(facts.forward(model, length - 1, use_cache=True))
    if cache is None or not hasattr(cache, "crop"):
        raise PePatchError(f"{type(model).__name__} fills no cache that can be cut back; decoding cannot be timed.")
    ids = facts.token_ids(model, 1)

    def step() -> None:
        model(input_ids=ids, use_cache=True, **compat.cache_keyword(unwrap(model), cache))

    times = []
    for _ in range(1 + DECODED):
        times.append(_clock(model, step))
        cache.crop(-1)
    return statistics.median(times[1:])


def _backward(model: Any, length: int) -> None:
    ids = facts.token_ids(model, length)
    logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()


def _clock(model: Any, call: Callable[[], Any]) -> float:
    _wait(model)
    start = time.perf_counter()
    call()
    _wait(model)
    return time.perf_counter() - start


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
