"""How well a model uses its context: tasks, rows, metrics and the report.

Names are imported on first use. So a training script that needs only `pe_patch.evaluation.retrieval` (numpy) does not
import datasets, evaluate or matplotlib.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "WORDINGS": "retrieval",
    "Wording": "retrieval",
    "RetrievalSample": "retrieval",
    "make_sample": "retrieval",
    "Corpus": "corpus",
    "GROUPS": "tasks",
    "Question": "question",
    "QuestionTask": "question_task",
    "TASKS": "tasks",
    "Needle": "tasks",
    "Passkey": "tasks",
    "Perplexity": "perplexity",
    "RetrievalAccuracy": "metrics",
    "TokenLoss": "metrics",
    "Results": "results",
    "evaluate": "run",
    "harness": "lm_eval",
    "retention": "lm_eval",
    "write_report": "report",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_MODULES)
