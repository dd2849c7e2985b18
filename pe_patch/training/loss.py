"""Compute the training loss as sums over the targets of a batch, to be divided by a global count."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .data import IGNORED

CHUNK = 512
"""Targets whose two distributions are in float32 memory together."""


class Score(NamedTuple):
    """Sums over the targets of a batch, in nats; `correct` counts the targets that were the most likely token."""

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
    """Score the predictions of the next tokens.

    Args:
        logits: `[batch, length, vocabulary]`.
        labels: `[batch, length]`, token ids or `IGNORED`.
        vocabulary: first and one past the last token id in the softmax; None uses all.
        accuracy: count the correct predictions; otherwise `correct` is 0.
        teacher: a teacher's logits `[batch, length, vocabulary]`; None makes the divergence 0.
        temperature: softmax temperature of the divergence.
        shifted: True if the labels are already aligned with the logits that predict them.
    """
    chosen, wanted = find_targets(labels, shifted)
    candidates = restrict(logits[chosen], vocabulary)
    loss, correct = cross_entropy_and_hits(candidates, wanted - (vocabulary or (0,))[0], accuracy=accuracy)
    if teacher is None:
        return Score(loss, correct, torch.zeros_like(loss))
    return Score(loss, correct, divergence(restrict(teacher[chosen], vocabulary), candidates, temperature))


def find_targets(labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Return a mask of the positions with targets, bool `[batch, length]`, and the targets `[targets]`."""
    if not shifted:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    chosen = labels != IGNORED
    return chosen, labels[chosen]


def restrict(logits: Tensor, vocabulary: tuple[int, int] | None) -> Tensor:
    """Return the columns of `logits` within the vocabulary range."""
    return logits if vocabulary is None else logits[..., slice(*vocabulary)]


def cross_entropy_and_hits(candidates: Tensor, wanted: Tensor, *, accuracy: bool) -> tuple[Tensor, Tensor]:
    """Return summed cross-entropy and hits of logits `[targets, vocabulary]` at `wanted` `[targets]`, in >= float32."""
    loss = F.cross_entropy(_wide(candidates), wanted, reduction="sum")
    return loss, (candidates.argmax(-1) == wanted).sum() if accuracy else torch.zeros_like(wanted[:1]).sum()


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(p || q), summed over the rows of two sets of logits `[targets, vocabulary]`.

    p is the teacher's softmax at temperature T, and q the student's. The factor keeps the size of the gradients
    independent of T. The backward pass recomputes a chunk's distributions instead of keeping them.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """
    chunks = zip(teacher.split(CHUNK), student.split(CHUNK), strict=True)
    sums = [checkpoint(_divergence, *chunk, temperature, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum() * temperature**2


def _divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    wanted, ours = ((_wide(logits) / temperature).log_softmax(-1) for logits in (teacher, student))
    return F.kl_div(ours, wanted, reduction="sum", log_target=True)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def count_targets(labels: Tensor) -> Tensor:
    """Count the labels `[batch, length]` that are predicted; the first of a row never is."""
    return (labels[:, 1:] != IGNORED).sum()
