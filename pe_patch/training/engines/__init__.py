"""Spread one optimiser step over processes: DDP, FSDP2, DeepSpeed or context parallelism."""

from .choose import choose_engine
from .engine import IGNORED, Engine

__all__ = ["IGNORED", "Engine", "choose_engine"]
