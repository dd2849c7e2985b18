"""List the evaluation tasks by name, and the groups of tasks."""

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
from .long_generation import LONG_GENERATION
from .needle import NEEDLE, Needle, Passkey
from .ruler import RULER, RULER_GROUPS

__all__ = ["GROUPS", "TASKS", "Needle", "Passkey", "Task", "find_task", "find_tasks"]


class Task(Protocol):
    """The interface of a task: a dataclass whose fields are its options."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One clause for lists of tasks."""
    paper: ClassVar[str]
    retrieves: ClassVar[bool]
    """True if a good score requires the model to read the text."""

    def work_units(self, context: EvaluationContext, length: int) -> Iterator[WorkUnit]:
        """Yield the pieces of work for one length in tokens."""
        ...


TASKS: Mapping[str, type[Task]] = {
    Perplexity.name: Perplexity,
    **NEEDLE,
    **HEAT_MAP,
    **RULER,
    **KEY_VALUE,
    **CODE,
    **LONG_GENERATION,
    **longbench.LONGBENCH,
    **infinitebench.INFINITEBENCH,
}
GROUPS: Mapping[str, Sequence[str]] = {
    "heat_map": tuple(HEAT_MAP),
    **RULER_GROUPS,
    **longbench.GROUPS,
    **infinitebench.GROUPS,
}
"""Groups of tasks, which `find_tasks` takes like a task name."""


def find_task(task: str | Task, options: Mapping[str, Any] | None = None) -> Task:
    """Return a task by name with its options, or the given instance; see `find_tasks`."""
    (result,) = find_tasks([task], options)
    return result


def find_tasks(tasks: Sequence[str | Task], options: Mapping[str, Any] | None = None) -> list[Task]:
    """Return the tasks for a list of names, group names and instances.

    Args:
        tasks: names of tasks or groups, and instances, which are returned as they are.
        options: options by name; each named task takes those that it has.

    Raises:
        UnknownNameError: if a name is neither a task nor a group.
        OptionError: if no task takes one of the options.
    """
    selected: list[Task] = []
    unused = dict(options or {})
    for task in tasks:
        if not isinstance(task, str):
            selected.append(task)
            continue
        if task not in TASKS and task not in GROUPS:
            raise unknown("task", task, [*TASKS, *GROUPS])
        for name in GROUPS.get(task, (task,)):
            taken = {key: value for key, value in (options or {}).items() if key in option_names(TASKS[name])}
            unused = {key: value for key, value in unused.items() if key not in taken}
            selected.append(TASKS[name](**taken))
    if unused:
        known = sorted({name for task in selected for name in option_names(type(task))})
        option = next(iter(unused))
        raise OptionError(
            f"None of the tasks takes the option {option!r}.{nearest(option, known)} They take: {', '.join(known)}."
        )
    return selected


def option_names(task: type[Any]) -> list[str]:
    """Return the names of a task's options."""
    return [entry.name for entry in fields(task)]
