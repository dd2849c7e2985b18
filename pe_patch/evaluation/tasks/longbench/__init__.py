"""LongBench, the first and the second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pe_patch.evaluation.tasks.data_set import DataSetTask

from .first import FIRST, FIRST_BY_LENGTH, LongBenchTask
from .second import LongBench2

__all__ = ["GROUPS", "LONGBENCH", "LongBench2", "LongBenchTask"]

LONGBENCH: Mapping[str, type[DataSetTask]] = {**FIRST, **FIRST_BY_LENGTH, LongBench2.name: LongBench2}
GROUPS: Mapping[str, Sequence[str]] = {"longbench": tuple(FIRST), "longbench_e": tuple(FIRST_BY_LENGTH)}
