"""What is minimised: the cross-entropy of the next token, summed, so that it can be divided by a global count."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import IGNORED


class Score(NamedTuple):
    """Sums over the targets of a batch; `correct` is how many were the most likely token."""

    loss: Tensor
    correct: Tensor


def next_token_score(logits: Tensor, labels: Tensor, *, vocabulary: tuple[int, int] | None, accuracy: bool) -> Score:
    """Score `logits` [batch, length, vocabulary] at predicting `labels` [batch, length], each one place ahead.

    `vocabulary` (first, one past the last) lets only those tokens compete. `accuracy` counts the hits; otherwise
    `correct` is zero.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    candidates, wanted = logits[:, :-1][chosen], targets[chosen]
    if vocabulary is not None:
        first, stop = vocabulary
        candidates, wanted = candidates[:, first:stop], wanted - first
    candidates = candidates.float()
    loss = F.cross_entropy(candidates, wanted, reduction="sum")
    correct = (candidates.argmax(-1) == wanted).sum() if accuracy else torch.zeros_like(wanted[:1]).sum()
    return Score(loss, correct)


def count_targets(labels: Tensor) -> Tensor:
    """How many labels [batch, length] are predicted: the first of a row never is."""
    return (labels[:, 1:] != IGNORED).sum()
