"""LongBench, LongBench v2, and variants of two data sets that need no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...question_task import QuestionTask
from .first import FIRST, FIRST_BY_LENGTH, LongBenchTask
from .offline import OFFLINE, NextLine, ParagraphCount
from .second import LongBench2

__all__ = ["GROUPS", "LONGBENCH", "LongBench2", "LongBenchTask", "NextLine", "ParagraphCount"]

LONGBENCH: Mapping[str, type[QuestionTask]] = {**FIRST, **FIRST_BY_LENGTH, LongBench2.name: LongBench2, **OFFLINE}
GROUPS: Mapping[str, Sequence[str]] = {
    "longbench": tuple(FIRST),
    "longbench_e": tuple(FIRST_BY_LENGTH),
    "longbench_offline": tuple(OFFLINE),
}
