"""RULER (Hsieh et al. 2024, arXiv 2404.06654): thirteen tasks for any length, generated locally.

The random draws and their order are those of NVIDIA's scripts (github.com/NVIDIA/RULER at c3f5e3b). The wording is
RULER's where lm-eval is installed, else ours. A row carries the name RULER only if wording, haystack, sentence
splitter, words to count and questions are all RULER's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .kinds import (
    CommonWordsTask,
    EssayNiahTask,
    FrequentWordsTask,
    HotpotTask,
    LocalTask,
    NiahTask,
    SquadTask,
    TrackingTask,
)
from .niah import SHAPES
from .task import RULER_ITSELF, RulerTask

__all__ = ["RULER", "RULER_GROUPS", "RULER_ITSELF", "THIRTEEN"]

_NIAH = {
    "niah_single_1": "retrieve one number hidden in noise",
    "niah_single_2": "retrieve one number hidden in running text",
    "niah_single_3": "retrieve one UUID hidden in running text",
    "niah_multikey_1": "retrieve one of four numbers hidden in running text",
    "niah_multikey_2": "retrieve one of many numbers, with nothing else in the text",
    "niah_multikey_3": "retrieve one of many UUIDs under UUID keys, with nothing else in the text",
    "niah_multivalue": "retrieve all four numbers of one key hidden in running text",
    "niah_multiquery": "retrieve four numbers of four keys hidden in running text",
}
_ROWS: tuple[tuple[str, type[RulerTask], str, dict[str, Any]], ...] = (
    *(
        (name, EssayNiahTask if SHAPES[name].haystack == "essay" else NiahTask, summary, {"shape": SHAPES[name]})
        for name, summary in _NIAH.items()
    ),
    ("vt", TrackingTask, "name the variables of a chain of assignments hidden in noise", {}),
    ("cwe", CommonWordsTask, "name the ten most common words of a list", {}),
    ("fwe", FrequentWordsTask, "name the three most frequent code words of a text", {}),
    ("qa_1", SquadTask, "answer a question about one of many paragraphs (SQuAD)", {}),
    ("qa_2", HotpotTask, "answer a question that needs two of many paragraphs (HotpotQA)", {}),
    (
        "qa_local_1",
        LocalTask,
        "name the module of Python that defines a name",
        {"hops": 1},
    ),
    (
        "qa_local_2",
        LocalTask,
        "name the module of Python that defines the base of a class",
        {"hops": 2},
    ),
)


def _task(name: str, base: type[RulerTask], summary: str, attributes: dict[str, Any]) -> type[RulerTask]:
    """Create the task class of one row."""
    common = {"name": name, "summary": summary, "__module__": __name__, "__doc__": base.__doc__}
    return type(name, (base,), {**common, **attributes})


RULER: Mapping[str, type[RulerTask]] = {row[0]: _task(*row) for row in _ROWS}
"""RULER's thirteen tasks, and two tasks like its last two that need no file."""
THIRTEEN = tuple(name for name in RULER if not name.startswith("qa_local"))
"""The names of RULER's own tasks."""
RULER_GROUPS: Mapping[str, tuple[str, ...]] = {
    "ruler": THIRTEEN[:-2],
    "ruler_full": THIRTEEN,
    "ruler_local": (*THIRTEEN[:-2], "qa_local_1", "qa_local_2"),
}
"""`ruler` has the eleven tasks that need no files, and `ruler_full` all thirteen, of which two need the files of SQuAD
and HotpotQA. `ruler_local` replaces these two by tasks that need no file."""
