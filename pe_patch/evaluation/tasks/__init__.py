"""The tasks by name, and the groups of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Protocol

from ...errors import OptionError, nearest, unknown
from ..context import EvaluationContext, WorkUnit
from ..perplexity import Perplexity
from . import infinitebench, longbench
from .code import CODE
from .haystack import HEAT_MAP
from .key_value import KEY_VALUE
from .needle import NEEDLE, Needle, Passkey
from .ruler import RULER, RULER_GROUPS

__all__ = ["GROUPS", "TASKS", "Needle", "Passkey", "Task", "find_task", "find_tasks"]


class Task(Protocol):
    """What `evaluate` asks of a task: a name, a clause, and the pieces of work of one length.

    `retrieves` says that a score shows whether the text was read. Options are the fields of its dataclass.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    retrieves: ClassVar[bool]

    def work_units(self, context: EvaluationContext, length: int) -> Iterator[WorkUnit]: ...


TASKS: Mapping[str, type[Task]] = {
    Perplexity.name: Perplexity,
    **NEEDLE,
    **HEAT_MAP,
    **RULER,
    **KEY_VALUE,
    **CODE,
    **longbench.LONGBENCH,
    **infinitebench.INFINITEBENCH,
}
GROUPS: Mapping[str, Sequence[str]] = {
    "heat_map": tuple(HEAT_MAP),
    **RULER_GROUPS,
    **longbench.GROUPS,
    **infinitebench.GROUPS,
}
"""Several tasks by one name."""


def find_task(task: str | Task, options: Mapping[str, Any] | None = None) -> Task:
    """A task by name with the options that it takes, or the instance given; an unknown name raises with the nearest."""
    (found,) = find_tasks([task], options)
    return found


def find_tasks(tasks: Sequence[str | Task], options: Mapping[str, Any] | None = None) -> list[Task]:
    """The tasks of a list of names, group names and instances.

    `options` go to every task named that takes them; one that none takes raises `OptionError`.
    """
    found: list[Task] = []
    unused = dict(options or {})
    for task in tasks:
        if not isinstance(task, str):
            found.append(task)
            continue
        if task not in TASKS and task not in GROUPS:
            raise unknown("task", task, [*TASKS, *GROUPS])
        for name in GROUPS.get(task, (task,)):
            taken = {key: value for key, value in (options or {}).items() if key in option_names(TASKS[name])}
            unused = {key: value for key, value in unused.items() if key not in taken}
            found.append(TASKS[name](**taken))
    if unused:
        known = sorted({name for task in found for name in option_names(type(task))})
        stray = next(iter(unused))
        raise OptionError(
            f"None of the tasks takes the option {stray!r}.{nearest(stray, known)} They take: {', '.join(known)}."
        )
    return found


def option_names(task: type[Any]) -> list[str]:
    """The options of a task."""
    return [entry.name for entry in fields(task)]
