"""How RULER judges an answer (Hsieh et al. 2024, arXiv 2404.06654): which references stand in it as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def postprocess(prediction: str) -> str:
    """The prediction without white space at its ends, every control character in it a line feed."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that stand in the prediction, whatever their case: 0 to 1."""
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any of the references stands in the prediction, whatever its case, else 0.

    This is NVIDIA's rule. lm-eval 0.4.13 gives a question the share of its references instead, so the figures of its
    two question-answering tasks are lower and not to be compared.
    """
    text = prediction.lower()
    return float(any(reference.lower() in text for reference in references))
