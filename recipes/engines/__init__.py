"""How one optimiser step is spread over processes, chosen by how the script was launched."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from .engine import IGNORED, Engine

__all__ = ["IGNORED", "Engine", "choose_engine"]


def choose_engine(**arguments: Any) -> Engine:
    """The engine for the launch that this process is part of; `arguments` are those of `accelerate.Accelerator`."""
    return Engine(Accelerator(**arguments))
