"""A prompt whose correct answers are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np

from ..errors import OptionError

Score = Callable[..., float]


def check_references(references: Sequence[str]) -> None:
    """Raise `OptionError` unless these are right answers in a list: a string would count as a list of letters."""
    if isinstance(references, str):
        raise OptionError(
            f"The right answers must be a list of strings, got the string {references[:40]!r}, whose letters would "
            f"each count as one. Pass [{references[:40]!r}]."
        )
    if not len(references) or not all(isinstance(reference, str) for reference in references):
        raise OptionError(f"The right answers must be a list of at least one string, got {list(references)[:3]}.")


def scores_references(score: Score) -> Score:
    """Decorate a scoring function, whose last argument is the list of right answers, to check that list."""

    @wraps(score)
    def checked(*arguments: Any, **named: Any) -> float:
        check_references([*arguments, *named.values()][-1])
        return score(*arguments, **named)

    return checked


@dataclass(frozen=True)
class Question:
    """A prompt, its correct answers, and the token budget of the answer."""

    prompt: np.ndarray
    """Token ids [n], int64: everything that the model reads."""
    references: tuple[str, ...]
    """Correct answers. The task decides how they count."""
    budget: int
    """Maximum number of answer tokens. They count towards the length."""
    without_context: np.ndarray | None = None
    """Token ids [m] of the same question without its text. The answer shows what the model knows without reading."""
    depth: float | None = None
    """Position of the answer in the text: 0 is the start, 1 the end."""
    group: int | None = None
    """Index shared by questions about the same text, whose answers are not independent; None if all texts differ."""
    stamps: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts for the row, the same for all questions of a task."""

    def __post_init__(self) -> None:
        check_references(self.references)
