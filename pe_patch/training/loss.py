"""Compute the training loss as sums over the targets of a batch, to be divided by a global count."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .data import IGNORED
from .data.sequences import LEARN_FROM

CHUNK = 512
"""Targets whose two distributions are in float32 memory together."""


class Score(NamedTuple):
    """Sums over the targets of a batch, in nats; `correct` counts the targets that were the most likely token."""

    loss: Tensor
    correct: Tensor
    divergence: Tensor
    taught: Tensor
    """The number of targets that the divergence sums over."""


def next_token_score(
    logits: Tensor,
    labels: Tensor,
    *,
    vocabulary: tuple[int, int] | None,
    accuracy: bool,
    teacher: Tensor | None = None,
    temperature: float = 1.0,
    shifted: bool = False,
    learn_from: Tensor | None = None,
) -> Score:
    """Score the predictions of the next tokens.

    The loss sums over all targets, but only those that learn from the text have a gradient through it. The divergence
    sums over the targets that learn from the teacher.

    Args:
        logits: `[batch, length, vocabulary]`.
        labels: `[batch, length]`, token ids or `IGNORED`.
        vocabulary: first and one past the last token id in the softmax; None uses all.
        accuracy: count the correct predictions; otherwise `correct` is 0.
        teacher: a teacher's logits `[taught, vocabulary]` of the targets that learn from it, in the order of their
            positions; None makes the divergence 0.
        temperature: softmax temperature of the divergence.
        shifted: True if the labels are already aligned with the logits that predict them.
        learn_from: for each row, the index in `LEARN_FROM` of what it learns from; None learns from both.
    """
    chosen, wanted = find_targets(labels, shifted)
    lessons = find_lessons(chosen, learn_from)
    candidates = restrict(logits[chosen], vocabulary)
    wanted = wanted - (vocabulary or (0,))[0]
    return score_targets(
        candidates, wanted, lessons, accuracy=accuracy, temperature=temperature,
        teacher=None if teacher is None else restrict(teacher, vocabulary),
    )  # fmt: skip


class Lessons(NamedTuple):
    """Masks `[targets]` of the targets that learn from the text, and of those that learn from the teacher."""

    text: Tensor
    teacher: Tensor

    def of(self, place: slice) -> Lessons:
        """Return the lessons of some targets."""
        return Lessons(self.text[place], self.teacher[place])

    def taught(self, place: slice) -> slice:
        """Return the place of some targets among those that learn from the teacher."""
        first, count = self.teacher[: place.start].sum(), self.teacher[place].sum()
        return slice(int(first), int(first + count))


def find_lessons(chosen: Tensor, learn_from: Tensor | None) -> Lessons | None:
    """Return the lessons of the targets `chosen`, bool `[batch, length]`; None if all learn from both."""
    if learn_from is None:
        return None
    numbers = learn_from[chosen.nonzero()[:, 0]]
    return Lessons(numbers != LEARN_FROM.index("teacher"), numbers != LEARN_FROM.index("text"))


def score_targets(
    candidates: Tensor,
    wanted: Tensor,
    lessons: Lessons | None,
    *,
    accuracy: bool,
    teacher: Tensor | None = None,
    temperature: float = 1.0,
) -> Score:
    """Score logits `[targets, vocabulary]` at `wanted` `[targets]`; see `next_token_score`."""
    loss, nothing = _cross_entropy(candidates, wanted, lessons), torch.zeros_like(wanted[:1]).sum()
    correct = (candidates.argmax(-1) == wanted).sum() if accuracy else nothing
    if teacher is None:
        return Score(loss, correct, torch.zeros_like(loss), nothing)
    taught = candidates if lessons is None else candidates[lessons.teacher]
    return Score(loss, correct, divergence(teacher, taught, temperature), nothing + len(taught))


def find_targets(labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Return a mask of the positions with targets, bool `[batch, length]`, and the targets `[targets]`."""
    if not shifted:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    chosen = labels != IGNORED
    return chosen, labels[chosen]


def restrict(logits: Tensor, vocabulary: tuple[int, int] | None) -> Tensor:
    """Return the columns of `logits` within the vocabulary range."""
    return logits if vocabulary is None else logits[..., slice(*vocabulary)]


def _cross_entropy(candidates: Tensor, wanted: Tensor, lessons: Lessons | None) -> Tensor:
    """Return the summed cross-entropy, in >= float32, with a gradient for the targets that learn from the text."""
    if lessons is None:
        return F.cross_entropy(_wide(candidates), wanted, reduction="sum")
    learnt = F.cross_entropy(_wide(candidates[lessons.text]), wanted[lessons.text], reduction="sum")
    others = candidates.detach()[~lessons.text]
    return learnt + F.cross_entropy(_wide(others), wanted[~lessons.text], reduction="sum")


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
