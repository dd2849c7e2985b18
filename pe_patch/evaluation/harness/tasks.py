"""Which tasks lm-eval has, which of them are made to a length, and what is said when one cannot be prepared."""

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


@cache
def every_task(folder: str | None) -> TaskManager:
    """All of lm-eval's tasks, and those of a folder; to read their files takes seconds."""
    return TaskManager(include_path=folder)


RULER = Path(lm_eval.tasks.__file__).parent / "ruler"


class Tasks:
    """The tasks that were asked for; an unknown name raises `UnknownNameError`.

    `tokenizer` is the folder where RULER's tasks find a tokenizer, `folder` one with task files of the user's own.
    """

    def __init__(self, tasks: Sequence[str | Mapping[str, Any]], tokenizer: Path, folder: str | None) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        for task in tasks:
            if isinstance(task, str) and not self.made_to_length(task) and not Path(task).is_file():
                self._check_name(task)

    def made_to_length(self, task: str | Mapping[str, Any]) -> bool:
        """Whether a task makes its own documents, at a length that it is told."""
        return isinstance(task, str) and task in self._ruler.task_index

    def manager(self, task: str | Mapping[str, Any], length: int | None) -> TaskManager:
        """Where lm-eval finds a task."""
        if length is not None:
            return self._ruler_at(length)
        return every_task(self._folder) if isinstance(task, str) else TaskManager(include_defaults=False)

    def files(self, task: str | Mapping[str, Any]) -> list[str]:
        """The contents of the user's own task files, as hashes: what lm-eval's version does not tell."""
        own = [Path(task)] if isinstance(task, str) and Path(task).is_file() else []
        below = sorted(Path(self._folder).rglob("*")) if self._folder else []
        own += [path for path in below if path.is_file() and "__pycache__" not in path.parts]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in own]

    @contextlib.contextmanager
    def loading_errors(self, task: str | Mapping[str, Any]) -> Iterator[None]:
        """Say which task and which data set it was when lm-eval fails to prepare a task; let all else through."""
        try:
            yield
        except PePatchError:
            raise
        except Exception as error:
            frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
            if not any(isinstance(owner, TaskManager) for owner in frames):
                raise
            name, source = _prepared(frames) or (task if isinstance(task, str) else str(task.get("task")), "")
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
        known = every_task(self._folder).all_tasks
        if name not in known:
            raise UnknownNameError(
                f"lm-eval has no task {name!r}.{nearest(name, known)} `lm-eval ls tasks` lists its {len(known)} tasks, "
                "groups and tags; a task of your own is given by its file's path, or include_path says where it is."
            )


def _prepared(owners: Sequence[Any]) -> tuple[str, str] | None:
    """The task that was being prepared, and words for its data set."""
    config = next((owner.config for owner in reversed(owners) if isinstance(owner, Task)), None)
    if config is None:
        return None
    source = "" if not config.dataset_path else f" from its data set {config.dataset_path!r}"
    return str(config.task), source


def _remedy(error: Exception) -> str:
    if isinstance(error, ImportError):
        return " Install what it names."
    if isinstance(error, OSError):  # what the hub and data sets raise, ConnectionError and FileNotFoundError among it
        return (
            " Data sets come from the Hugging Face hub: run it once where there is a network, or point HF_HOME to a "
            "cache that holds this one. Tasks that make their own data, such as niah_single_1, need none."
        )
    return ""
