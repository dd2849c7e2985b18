"""What is minimised: sums over the targets of a batch, so that they can be divided by a global count."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .data import IGNORED

CHUNK = 512
"""Targets whose two distributions are held in float32 at once."""


class Score(NamedTuple):
    """Sums over the targets of a batch, in nats; `correct` is how many were the most likely token."""

    loss: Tensor
    correct: Tensor
    divergence: Tensor


def next_token_score(
    logits: Tensor,
    labels: Tensor,
    *,
    vocabulary: tuple[int, int] | None,
    accuracy: bool,
    teacher: Tensor | None = None,
    temperature: float = 1.0,
    shifted: bool = False,
) -> Score:
    """Score `logits` [batch, length, vocabulary] at predicting `labels` [batch, length], each one place ahead.

    `vocabulary` (first, one past the last) lets only those tokens compete. `accuracy` counts the hits; otherwise
    `correct` is zero. `divergence` is from the logits of a `teacher` [batch, length, vocabulary]; zero without one.
    `shifted` labels already stand where they are predicted.
    """
    chosen, wanted = find_targets(labels, shifted)
    candidates = among(logits[chosen], vocabulary)
    loss, correct = hits(candidates, wanted - (vocabulary or (0,))[0], accuracy=accuracy)
    if teacher is None:
        return Score(loss, correct, torch.zeros_like(loss))
    return Score(loss, correct, divergence(among(teacher[chosen], vocabulary), candidates, temperature))


def find_targets(labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Where `labels` [batch, length] are predicted, [batch, length], bool, and the targets there, [targets]."""
    if not shifted:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    chosen = labels != IGNORED
    return chosen, labels[chosen]


def among(logits: Tensor, vocabulary: tuple[int, int] | None) -> Tensor:
    """The columns of `logits` that compete."""
    return logits if vocabulary is None else logits[..., slice(*vocabulary)]


def hits(candidates: Tensor, wanted: Tensor, *, accuracy: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy and hits, summed, of logits [targets, vocabulary] at `wanted` [targets]; in float32 or wider."""
    loss = F.cross_entropy(_wide(candidates), wanted, reduction="sum")
    return loss, (candidates.argmax(-1) == wanted).sum() if accuracy else torch.zeros_like(wanted[:1]).sum()


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || q), summed over the rows of two sets of logits [targets, vocabulary], p the teacher's softmax at
    temperature T and q the student's: the gradients keep their size whatever T is (Hinton et al. 2015, arXiv
    1503.02531, section 2). A chunk's distributions are made anew in the backward pass and never kept."""
    chunks = zip(teacher.split(CHUNK), student.split(CHUNK), strict=True)
    parts = [checkpoint(_divergence, *chunk, temperature, use_reentrant=False) for chunk in chunks]
    return torch.stack(parts).sum() * temperature**2


def _divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    wanted, ours = ((_wide(logits) / temperature).log_softmax(-1) for logits in (teacher, student))
    return F.kl_div(ours, wanted, reduction="sum", log_target=True)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def count_targets(labels: Tensor) -> Tensor:
    """How many labels [batch, length] are predicted: the first of a row never is."""
    return (labels[:, 1:] != IGNORED).sum()
