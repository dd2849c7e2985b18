"""Find the requested tasks in lm-eval, and report a task that it cannot prepare."""

from __future__ import annotations

import contextlib
import hashlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from ...errors import PePatchError, UnknownNameError, nearest

RULER = Path(lm_eval.tasks.__file__).parent / "ruler"


@cache
def default_task_manager(folder: str | None) -> TaskManager:
    """Return all tasks of lm-eval and of a folder. Cached, because reading the task files takes seconds."""
    return TaskManager(include_path=folder)


class RequestedTasks:
    """The tasks that a caller requested.

    Args:
        tasks: Names of tasks, groups and tags, paths of task files, or task dicts.
        tokenizer: Folder in which RULER's tasks find the tokenizer.
        folder: Folder with the user's task files, or None.

    Raises:
        UnknownNameError: lm-eval has no task of this name.
    """

    def __init__(self, tasks: Sequence[str | Mapping[str, Any]], tokenizer: Path, folder: str | None) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        for task in tasks:
            if isinstance(task, str) and not self.has_lengths(task) and not Path(task).is_file():
                self._check_name(task)

    def has_lengths(self, task: str | Mapping[str, Any]) -> bool:
        """Return True if the task generates its documents at a requested length, as RULER's tasks do."""
        return isinstance(task, str) and task in self._ruler.task_index

    def manager(self, task: str | Mapping[str, Any], length: int | None) -> TaskManager:
        """Return the manager that can load a task; `length` is None for tasks without lengths."""
        if length is not None:
            return self._ruler_at(length)
        return default_task_manager(self._folder) if isinstance(task, str) else TaskManager(include_defaults=False)

    def file_hashes(self, task: str | Mapping[str, Any]) -> list[str]:
        """Return the hashes of the user's task files, which lm-eval's version does not cover."""
        files = [Path(task)] if isinstance(task, str) and Path(task).is_file() else []
        below = sorted(Path(self._folder).rglob("*")) if self._folder else []
        files += [path for path in below if path.is_file() and "__pycache__" not in path.parts]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    @contextlib.contextmanager
    def loading_errors(self, task: str | Mapping[str, Any]) -> Iterator[None]:
        """Turn an error while lm-eval prepares a task into a `PePatchError` that names the task and its data set."""
        try:
            yield
        except PePatchError:
            raise
        except Exception as error:
            owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
            if not any(isinstance(owner, TaskManager) for owner in owners):
                raise
            name, source = _task_in_preparation(owners) or (
                task if isinstance(task, str) else str(task.get("task")),
                "",
            )
            raise PePatchError(
                f"lm-eval could not prepare the task {name!r}{source}: {type(error).__name__}: {error}.{_remedy(error)}"
            ) from error

    @cached_property
    def _ruler(self) -> TaskManager:
        return TaskManager(include_defaults=False, include_path=RULER)

    def _ruler_at(self, length: int) -> TaskManager:
        metadata: Any = {"tokenizer": str(self._tokenizer), "max_seq_lengths": [length]}
        return TaskManager(include_defaults=False, include_path=RULER, metadata=metadata)

    def _check_name(self, name: str) -> None:
        known = default_task_manager(self._folder).all_tasks
        if name not in known:
            raise UnknownNameError(
                f"lm-eval has no task {name!r}.{nearest(name, known)} `lm-eval ls tasks` lists its {len(known)} tasks, "
                "groups and tags. For a task of your own, give the path of its file, or its folder as include_path."
            )


def _task_in_preparation(owners: Sequence[Any]) -> tuple[str, str] | None:
    """Return the name of the task that lm-eval was preparing, and words for its data set."""
    config = next((owner.config for owner in reversed(owners) if isinstance(owner, Task)), None)
    if config is None:
        return None
    source = "" if not config.dataset_path else f" from its data set {config.dataset_path!r}"
    return str(config.task), source


def _remedy(error: Exception) -> str:
    if isinstance(error, ImportError):
        return " Install the package that the error names."
    if isinstance(error, OSError):  # the hub and `datasets` raise its subclasses ConnectionError and FileNotFoundError
        return (
            " Data sets come from the Hugging Face hub: run the task once with a network, or point HF_HOME to a cache "
            "that holds this data set. Tasks that generate their data, such as niah_single_1, need none."
        )
    return ""
