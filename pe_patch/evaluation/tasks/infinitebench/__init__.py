"""InfiniteBench, and variants of its generated tasks that need no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...question_task import QuestionTask
from .generated import GENERATED, CallChain, ListFind, NoiseDigits, NoisePasskey
from .published import PUBLISHED, InfiniteBenchTask

__all__ = ["GROUPS", "INFINITEBENCH", "CallChain", "InfiniteBenchTask", "ListFind", "NoiseDigits", "NoisePasskey"]

INFINITEBENCH: Mapping[str, type[QuestionTask]] = {**PUBLISHED, **GENERATED}
GROUPS: Mapping[str, Sequence[str]] = {"infinitebench": tuple(PUBLISHED), "infinitebench_offline": tuple(GENERATED)}
