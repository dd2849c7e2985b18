"""Interrupting an operation at the n-th line of pe_patch that it executes, and what a model looked like before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import pe_patch

PACKAGE = str(Path(pe_patch.__file__).parent)


class Lines:
    """Counts the lines of pe_patch that run in this thread, and raises at one of them."""

    def __init__(self, stop: int | None = None, failure: type[BaseException] = KeyboardInterrupt) -> None:
        self.stop, self.failure, self.count, self.place = stop, failure, 0, ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.stop:
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self.failure(self.place)
        return self._line


def run(work: Callable[[], Any], lines: Lines) -> BaseException | None:
    """Do `work` while `lines` watches; return what it raised."""
    before = sys.gettrace()
    sys.settrace(lines)
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        return error
    finally:
        sys.settrace(before)
    return None


def count(work: Callable[[], Any]) -> int:
    """Return how many lines `work` runs."""
    lines = Lines()
    run(work, lines)
    return lines.count


CONTAINERS = ("_modules", "_parameters", "_buffers")


def state(model: Any) -> dict[str, Any]:
    """Every attribute of every module as the object that it is, and all orders; compared by `differing`."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: {k: v for k, v in vars(m).items() if k not in CONTAINERS} for name, m in modules.items()},
        "tensors": {name: (t, t.requires_grad) for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "registered": {name: [list(vars(m)[each].items()) for each in CONTAINERS] for name, m in modules.items()},
        "hooks": {name: [len(v) for k, v in vars(m).items() if k.endswith("hooks")] for name, m in modules.items()},
        "saved": list(model.state_dict()),
        "configs": [dict(vars(m.config)) for m in modules.values() if hasattr(m, "config")],
        "written": model.config.to_dict(),
    }


def _same(one: Any, other: Any) -> bool:
    """Whether two states hold the same objects in the same order; a module's own values may be equal instead."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return sorted(map(str, one)) == sorted(map(str, other)) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, str | int | float | torch.dtype) and one == other


def differing(one: Any, other: Any, path: str = "") -> str:
    """Where two states first differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{path}: {sorted(map(str, one.keys() ^ other.keys()))}"
        return next((found for key in one if (found := differing(one[key], other[key], f"{path}/{key}"))), "")
    return "" if _same(one, other) else path


def outline(model: Any) -> Any:
    """What two patches of the same kind have in common, whichever objects they are made of."""
    return (
        [(name, type(m).__name__, sorted(vars(m)), list(m._modules)) for name, m in model.named_modules()],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        list(model.state_dict()),
        model.config.to_dict(),
    )
