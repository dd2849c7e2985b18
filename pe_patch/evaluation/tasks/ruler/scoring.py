"""Score answers as RULER does, by the references that occur in them (Hsieh et al. 2024, arXiv 2404.06654)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...question import scores_references

_CONTROL = re.compile(r"[\x00-\x1f]")


def postprocess(prediction: str) -> str:
    """Strip white space from the prediction and replace control characters by line feeds."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


@scores_references
def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Return the share of the references that occur in the prediction, ignoring case, from 0 to 1."""
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


@scores_references
def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if any of the references occurs in the prediction, ignoring case, else 0.

    This is NVIDIA's rule. lm-eval 0.4.13 scores the share of the references instead, so its numbers for the two
    question-answering tasks are lower and not comparable.
    """
    text = prediction.lower()
    return float(any(reference.lower() in text for reference in references))
