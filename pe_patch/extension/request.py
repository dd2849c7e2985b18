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


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `extend`. Construction checks what needs no model."""

    model: Any
    tokenizer: Any = None
    target_length: int
    output: str | os.PathLike[str]
    budget: str | float = "10m"
    train: bool = False
    train_budget: str | float = "1h"
    export: Sequence[str] = ()
    text: str = "stdlib"
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for extra in ("report", "train"):  # the page and the card come last, and nothing may be lost then
            require_extra(extra)
        if not isinstance(self.model, str | os.PathLike):
            sources.check_loaded(self.model, self.tokenizer)
            if find_patch(self.model) is not None:
                raise OptionError("extend starts from a model without a patch: call unpatch_model(model) first.")
        for target in self.export:
            if target not in TARGETS:
                raise unknown("export target", target, TARGETS)
        if isinstance(self.target_length, bool) or not isinstance(self.target_length, int) or self.target_length < 1:
            raise OptionError(f"target_length must be a whole number of tokens, got {self.target_length!r}.")
        parse_seconds("budget", self.budget)
        parse_seconds("train_budget", self.train_budget)
        if self.train and self.device is not None:
            raise OptionError(
                "Training runs on the device that accelerate finds, so device has no effect on it. Leave device out, "
                "or set CUDA_VISIBLE_DEVICES."
            )
        if not self.source:
            raise OptionError("The model has no folder that it was loaded from: save it, and give the folder.")
        check_output(self.folder, EXTENSION, inputs=[self.source, self.text], overwrite=self.overwrite)

    @property
    def is_loaded(self) -> bool:
        """True for a loaded model, False for the name of one."""
        return not isinstance(self.model, str | os.PathLike)

    @property
    def source(self) -> str:
        """The folder or hub name of the model."""
        return str(getattr(self.model, "name_or_path", "") or "") if self.is_loaded else str(self.model)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output).expanduser()

    @property
    def seconds(self) -> float:
        """The budget of the measurement."""
        return parse_seconds("budget", self.budget)

    @property
    def train_seconds(self) -> float:
        """The budget of the training."""
        return parse_seconds("train_budget", self.train_budget)

    def lasting(self) -> dict[str, Any]:
        """Return what must be the same when a stopped extension continues."""
        kept = ("target_length", "train", "text", "dtype", "seed")
        times = {"budget": self.seconds, "train_budget": self.train_seconds}
        values = {name: getattr(self, name) for name in kept}
        return {"model": self.source, **values, **times, "export": list(self.export)}
