"""How well a model uses its context: tasks, rows, metrics and the report.

Names are imported on first use, so that `pe_patch.evaluation.retrieval` (numpy only) can be used by a training
script without pulling in datasets, evaluate or matplotlib.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "WORDINGS": "retrieval",
    "Wording": "retrieval",
    "RetrievalSample": "retrieval",
    "make_sample": "retrieval",
    "Corpus": "corpus",
    "GROUPS": "tasks",
    "Question": "questions",
    "QuestionTask": "questions",
    "TASKS": "tasks",
    "Needle": "tasks",
    "Passkey": "tasks",
    "Perplexity": "perplexity",
    "RetrievalAccuracy": "metrics",
    "TokenLoss": "metrics",
    "Results": "results",
    "evaluate": "run",
    "retention": "harness",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
