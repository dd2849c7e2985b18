"""Every token of a text once, in a window that slides over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import PePatchError
from ..bench import Bench
from ..results import Row
from ..subject import Subject
from .measure import STRIDE, Measure, control, longest, row, summary, within

if TYPE_CHECKING:
    from .task import Perplexity

STRETCH_TOKENS = 8192


@dataclass(frozen=True)
class Span:
    """The model reads tokens `start` to `end` of a text (the end left out), and the last `scored` of them count."""

    start: int
    end: int
    scored: int


def sliding_losses(subject: Subject, ids: np.ndarray, window: int, stride: int, bos: int | None = None) -> np.ndarray:
    """The loss of every token of a text but the first, each once, with up to `window` - 1 tokens before it.

    `ids` [n] gives [n - 1] losses in nats. The first window scores all of its tokens; each further one is moved by
    `stride` (the last by what is left) and scores only its newest. `stride` is less than `window`. With `bos`, an id,
    every window starts with it, one token less of the text fits in, and the first token is scored too: [n].
    """
    return np.concatenate(span_losses(subject, ids, sliding_spans(len(ids), window, stride, bos is not None), bos))


def sliding_spans(count: int, window: int, stride: int, bos: bool) -> list[Span]:
    """The windows of `sliding_losses` over `count` tokens; the last is a full one."""
    window = min(window - bos, count)
    starts = [*range(0, count - window + 1, stride)]
    spans = [Span(start, start + window, stride if start else window - (not bos)) for start in starts]
    rest = count - spans[-1].end
    return [*spans, Span(count - window, count, rest)] if rest else spans


def span_losses(subject: Subject, ids: np.ndarray, spans: Sequence[Span], bos: int | None = None) -> list[np.ndarray]:
    """The losses of what each span scores, in nats; spans of the same shape share batches."""
    first = [] if bos is None else [bos]
    found: dict[Span, np.ndarray] = {}
    for shape in dict.fromkeys((span.end - span.start, span.scored) for span in spans):
        alike = [span for span in spans if (span.end - span.start, span.scored) == shape]
        read = [np.concatenate([np.array(first, dtype=ids.dtype), ids[span.start : span.end]]) for span in alike]
        found.update(zip(alike, subject.losses(read, shape[1]), strict=True))
    return [found[span] for span in spans]


def stretches(task: Perplexity, bench: Bench) -> tuple[list[np.ndarray], str]:
    """Pieces of text to slide over, and where they are from: `stretch_tokens` in all, each as long as the longest."""
    asked = task.stretch_tokens or STRETCH_TOKENS
    size = max(longest(bench), min(asked, 4 * longest(bench)))
    return bench.corpus.spots(size, size, max(1, asked // size), bench.seed)


def stride_of(task: Perplexity, bench: Bench) -> int:
    """How far windows move: 256 tokens, or half of the shortest length, where nothing is said."""
    return within(bench, "stride", task.stride, STRIDE)


def bos_of(bench: Bench, asker: str) -> int:
    """The id of the tokenizer's first token, which some measures put before every window."""
    bos = bench.subject.tokenizer.bos_token_id
    if bos is None:
        raise PePatchError(
            f"{asker} puts the tokenizer's BOS token before every window, and this tokenizer has none. "
            "Leave it out, or measure measures=('sliding',), which needs none."
        )
    return bos


def sliding_tokens(task: Perplexity, bench: Bench, length: int) -> int:
    """About how many tokens are read: a window for each stride."""
    return -(-(task.stretch_tokens or STRETCH_TOKENS) // stride_of(task, bench)) * length


def sliding(task: Perplexity, bench: Bench, length: int) -> Row:
    """The token-weighted loss of whole stretches; the control slides a window of the control length over them."""
    stride, bos = stride_of(task, bench), bos_of(bench, "bos=True") if task.bos else None
    texts, where = stretches(task, bench)

    def losses(window: int) -> np.ndarray:
        return np.stack([sliding_losses(bench.subject, ids, window, stride, bos) for ids in texts])

    with bench.timed() as work:
        scored = losses(length)
    # One group per stride: the few stretches there are would give no interval.
    groups = np.arange(scored.shape[1]) // stride + np.arange(len(texts))[:, None] * scored.shape[1]
    found = summary(bench, scored, groups)
    size = len(texts[0])
    each = len(sliding_spans(size, length, stride, bos is not None))
    return row(
        bench,
        work,
        length,
        "nats per token, sliding window",
        found,
        f"every token{'' if task.bos else ' but the first'} of {len(texts)} stretches of {size} tokens ({where}) in "
        f"{bench.corpus.name}, window {length}{' with the BOS token first' if task.bos else ''}, stride {stride}, "
        "each token weighing the same",
        {
            "window": length,
            "stride": stride,
            "bos": bool(task.bos),
            "stretches": len(texts),
            "stretch": size,
            "windows": each * len(texts),
        },
        control=control(
            task,
            bench,
            length,
            "sliding",
            found["loss"],
            lambda: summary(bench, losses(bench.control_length))["loss"],
        ),
    )


SLIDING = Measure(options=frozenset({"stride", "bos", "stretch_tokens"}), tokens=sliding_tokens, row=sliding)
