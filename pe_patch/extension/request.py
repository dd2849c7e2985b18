"""Hold and check the arguments of an extension."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import sources
from ..checkpoints.exporters.export import TARGETS
from ..checkpoints.folders import EXTENSION, check_output
from ..compat import require_extra
from ..errors import OptionError, unknown
from ..patching.api import find_patch
from .budget import parse_seconds


@dataclass(frozen=True)
class Request:
    """The arguments of `extend`."""

    model: Any
    tokenizer: Any
    target_length: int
    output: Path
    budget: float
    """Seconds."""
    train: bool
    train_budget: float
    """Seconds."""
    export: tuple[str, ...]
    text: str
    dtype: str
    device: str | None
    seed: int
    overwrite: bool

    @property
    def source(self) -> str:
        """The folder or hub name of the model."""
        return self.model if isinstance(self.model, str) else str(getattr(self.model, "name_or_path", "") or "")

    def lasting(self) -> dict[str, Any]:
        """Return what must be the same when a stopped extension continues."""
        kept = ("target_length", "budget", "train", "train_budget", "text", "dtype", "seed")
        return {"model": self.source, **{name: getattr(self, name) for name in kept}, "export": list(self.export)}


def make_request(
    model: Any,
    tokenizer: Any = None,
    *,
    target_length: int,
    output: str | os.PathLike[str],
    budget: str | float = "10m",
    train: bool = False,
    train_budget: str | float = "1h",
    export: Sequence[str] = (),
    text: str = "stdlib",
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Request:
    """Check the arguments of `extend` that need no model."""
    for extra in ("report", "train"):  # the page and the card come last, and nothing may be lost then
        require_extra(extra)
    if isinstance(model, str | os.PathLike):
        model = str(model)
    else:
        sources.check_loaded(model, tokenizer)
        if find_patch(model) is not None:
            raise OptionError("extend starts from a model without a patch: call unpatch_model(model) first.")
    for target in export:
        if target not in TARGETS:
            raise unknown("export target", target, TARGETS)
    if isinstance(target_length, bool) or not isinstance(target_length, int) or target_length < 1:
        raise OptionError(f"target_length must be a whole number of tokens, got {target_length!r}.")
    request = Request(
        model, tokenizer, target_length, Path(output).expanduser(), parse_seconds("budget", budget), train,
        parse_seconds("train_budget", train_budget), tuple(export), text, dtype, device, seed, overwrite,
    )  # fmt: skip
    if not request.source:
        raise OptionError("The model has no folder that it was loaded from: save it, and give the folder.")
    check_output(request.output, EXTENSION, inputs=[request.source, text], overwrite=overwrite)
    return request
