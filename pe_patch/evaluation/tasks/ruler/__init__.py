"""RULER (Hsieh et al. 2024, arXiv 2404.06654): thirteen tasks of any length, made on this machine.

What is drawn at random, and in which order, is what NVIDIA's scripts draw (github.com/NVIDIA/RULER at c3f5e3b). The
words are ours unless `wording="official"` is asked for; a row is called RULER's only where the words, the haystack, the
splitter, the words to count and the questions all are.
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
    "niah_single_1": "one number hidden in noise is asked for",
    "niah_single_2": "one number hidden in running text is asked for",
    "niah_single_3": "one UUID hidden in running text is asked for",
    "niah_multikey_1": "one of four numbers hidden in running text is asked for",
    "niah_multikey_2": "one of many numbers is asked for, with nothing else in the text",
    "niah_multikey_3": "one of many UUIDs, kept under UUIDs, is asked for, with nothing else in the text",
    "niah_multivalue": "all four numbers of one key, hidden in running text, are asked for",
    "niah_multiquery": "four numbers of four keys, hidden in running text, are asked for",
}
_ROWS: tuple[tuple[str, type[RulerTask], str, dict[str, Any]], ...] = (
    *(
        (name, EssayNiahTask if SHAPES[name].haystack == "essay" else NiahTask, summary, {"shape": SHAPES[name]})
        for name, summary in _NIAH.items()
    ),
    ("vt", TrackingTask, "the variables of a chain of assignments hidden in noise are asked for", {}),
    ("cwe", CommonWordsTask, "the ten most common words of a list are asked for", {}),
    ("fwe", FrequentWordsTask, "the three most frequent code words of a text are asked for", {}),
    ("qa_1", SquadTask, "a question about one of many paragraphs (SQuAD)", {}),
    ("qa_2", HotpotTask, "a question that needs two of many paragraphs (HotpotQA)", {}),
    (
        "qa_local_1",
        LocalTask,
        "in which module of Python a name is defined",
        {"hops": 1},
    ),
    (
        "qa_local_2",
        LocalTask,
        "in which module of Python the base of a class is defined",
        {"hops": 2},
    ),
)


def _row(name: str, kind: type[RulerTask], summary: str, fixed: dict[str, Any]) -> type[RulerTask]:
    """A class for one row: the name, the summary and what is fixed for it."""
    return type(
        name, (kind,), {"name": name, "summary": summary, "__module__": __name__, "__doc__": kind.__doc__, **fixed}
    )


RULER: Mapping[str, type[RulerTask]] = {row[0]: _row(*row) for row in _ROWS}
"""RULER's thirteen, and two like its last two that need no file."""
THIRTEEN = tuple(name for name in RULER if not name.startswith("qa_local"))
"""The names of RULER's own tasks."""
RULER_GROUPS: Mapping[str, tuple[str, ...]] = {
    "ruler": THIRTEEN,
    "ruler_local": (*THIRTEEN[:-2], "qa_local_1", "qa_local_2"),
}
"""RULER, whose questions need the files of SQuAD and HotpotQA; and the same with questions that need no file."""
