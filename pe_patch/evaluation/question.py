"""A prompt whose correct answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


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
