"""Perplexity as papers and libraries compute it, to be set beside their figures; each averages in its own way.

YaRN: arXiv:2309.00071, eval/perplexity.py. PoSE: arXiv:2309.10400, src/eval_ppl.py. LongLoRA: arXiv:2309.12307,
eval.py. `evaluate`: the metric "perplexity" of Hugging Face evaluate. lm-eval: `loglikelihood_rolling` of
lm-evaluation-harness.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import PePatchError
from ..bench import Bench, Work
from ..results import Row
from ..subject import Subject
from .averages import LONGLORA_E, longlora_spans, mean_of_perplexities, mean_of_tokens, mean_of_window_means, yarn_spans
from .measure import Measure, longest
from .position import WINDOWS
from .sliding import STRETCH_TOKENS, Span, bos_of, sliding_spans, sliding_tokens, span_losses, stretches, stride_of

if TYPE_CHECKING:
    from .task import Perplexity

DOCUMENTS = 8


def yarn(task: Perplexity, bench: Bench, length: int) -> Row:
    """YaRN's sliding window: BOS before every window, and the mean of the windows' means."""
    windows, work, words = _slid(task, bench, length, "yarn")
    mean = mean_of_window_means(windows)
    words += "; the mean of the windows' means, the first window weighing as much as another's newest tokens"
    return _row(bench, work, length, "yarn", math.exp(mean), windows, words, {"stride": stride_of(task, bench)})


def pose(task: Perplexity, bench: Bench, length: int) -> Row:
    """PoSE's sliding window: YaRN's windows, each token weighing the same."""
    windows, work, words = _slid(task, bench, length, "pose")
    words += "; each token weighing the same"
    perplexity = math.exp(mean_of_tokens(windows))
    return _row(bench, work, length, "pose", perplexity, windows, words, {"stride": stride_of(task, bench)})


def yarn_truncate(task: Perplexity, bench: Bench, length: int) -> Row:
    """YaRN's --truncate: the first length - 1 tokens of each text behind BOS, and the mean of the texts' means."""
    bos, size = bos_of(bench, "compat='yarn_truncate'"), longest(bench)
    texts, where = bench.corpus.spots(size, size, task.windows or WINDOWS, bench.seed)
    with bench.timed() as work:
        windows = [span_losses(bench.subject, ids, [Span(0, length - 1, length - 1)], bos)[0] for ids in texts]
    words = (
        f"the first {length - 1} tokens of {len(texts)} pieces ({where}) in {bench.corpus.name}, the BOS token before "
        "each; the mean of the pieces' means"
    )
    return _row(bench, work, length, "yarn_truncate", math.exp(mean_of_window_means(windows)), windows, words)


def longlora(task: Perplexity, bench: Bench, length: int) -> Row:
    """LongLoRA's: all tokens of windows that overlap, over joined documents, and the mean of the windows' means."""
    stride = stride_of(task, bench)
    data = bench.corpus.stream[: longest(bench) + (task.stretch_tokens or STRETCH_TOKENS)]
    spans = longlora_spans(len(data), length, stride)
    if not spans:
        raise PePatchError(
            f"compat='longlora' leaves its last window out, and {len(data)} tokens of text hold no two windows of "
            f"{length} tokens {stride} apart. Give a longer text, a larger stretch_tokens or a smaller stride."
        )
    with bench.timed() as work:
        windows = span_losses(bench.subject, data, spans)
    words = (
        f"all tokens but the first of {len(spans)} windows of {length} tokens that begin every {stride} tokens of the "
        f"first {len(data)} of {bench.corpus.name}, documents joined, the last window left out, so most tokens are "
        f"scored many times; the mean of the windows' means, as a power of {LONGLORA_E}"
    )
    perplexity = LONGLORA_E ** mean_of_window_means(windows)
    return _row(bench, work, length, "longlora", perplexity, windows, words, {"stride": stride})


def evaluate(task: Perplexity, bench: Bench, length: int) -> Row:
    """The metric of Hugging Face evaluate: each text cut to length - 1 tokens behind BOS, the mean of perplexities."""
    bos = bos_of(bench, "compat='evaluate'")
    texts = [ids[: length - 1] for ids in bench.corpus.documents[: task.documents or DOCUMENTS]]
    with bench.timed() as work:
        windows = [span_losses(bench.subject, ids, [Span(0, len(ids), len(ids))], bos)[0] for ids in texts]
    words = (
        f"the first {length - 1} tokens, or all, of the first {len(texts)} documents of {bench.corpus.name}, the BOS "
        "token before each; the mean of the documents' perplexities"
    )
    return _row(bench, work, length, "evaluate", mean_of_perplexities(windows), windows, words)


def lm_eval(task: Perplexity, bench: Bench, length: int) -> Row:
    """lm-eval's rolling likelihood: windows that do not overlap, one token before each, and the words' perplexity."""
    texts = bench.corpus.texts[: task.documents or DOCUMENTS]
    with bench.timed() as work:
        windows = [rolling_losses(bench.subject, text, length) for text in texts]
    total = math.fsum(loss for losses in windows for loss in losses)
    # Both as lm-eval's tasks count them.
    count = sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    words = (
        f"every token of the first {len(texts)} documents of {bench.corpus.name}, in windows of {length} tokens that "
        "do not overlap, one token before each (the last reaches back as far as it can); the whole loss by the number "
        "of words"
    )
    details = {
        "log_likelihood": -total,
        "token_perplexity": math.exp(total / sum(map(len, windows))),
        "byte_perplexity": math.exp(total / size),
        "bits_per_byte": total / size / math.log(2),
    }
    return _row(bench, work, length, "lm_eval", math.exp(min(total / count, 700.0)), windows, words, details)


def rolling_losses(subject: Subject, text: str, window: int) -> np.ndarray:
    """The loss of every token of a text as lm-eval rolls over it, in nats: the model reads `window` tokens at a time.

    The first token is predicted from BOS, or from the end of a text where there is no BOS. The ids are what the
    tokenizer gives by itself, its special tokens among them.
    """
    tokenizer = subject.tokenizer
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise PePatchError("compat='lm_eval' predicts the first token from BOS or EOS, and this tokenizer has neither.")
    plain = {"add_special_tokens": False} if text.startswith(tokenizer.decode([prefix])) else {}
    ids = np.array([prefix, *tokenizer.encode(text, verbose=False, **plain)], dtype=np.int64)
    # The last token of a span is only predicted: `window` tokens are read of a span of window + 1.
    spans = sliding_spans(len(ids), window + 1, window, bos=False)
    return np.concatenate([_read_but_last(subject, ids[span.start : span.end])[-span.scored :] for span in spans])


def _read_but_last(subject: Subject, ids: np.ndarray) -> np.ndarray:
    """The losses of all tokens but the first, the last one predicted without being read."""
    tokens = torch.from_numpy(ids).to(subject.device)
    with subject.ready():
        logits = subject.model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
    subject.advance(len(ids) - 1)
    return F.cross_entropy(logits.float(), tokens[1:], reduction="none").double().cpu().numpy()


def _slid(task: Perplexity, bench: Bench, length: int, name: str) -> tuple[list[np.ndarray], Work, str]:
    """The losses of YaRN's windows over the stretches of the sliding measure, and the words for which they are."""
    stride, bos = stride_of(task, bench), bos_of(bench, f"compat={name!r}")
    texts, where = stretches(task, bench)
    with bench.timed() as work:
        windows = [
            losses
            for ids in texts
            for losses in span_losses(bench.subject, ids, yarn_spans(len(ids), length - 1, stride), bos)
        ]
    words = (
        f"every token of {len(texts)} stretches of {len(texts[0])} tokens ({where}) in {bench.corpus.name}, in "
        f"{len(windows)} windows of up to {length - 1} tokens behind the BOS token that begin every {stride} tokens"
    )
    return windows, work, words


def _row(
    bench: Bench,
    work: Work,
    length: int,
    name: str,
    perplexity: float,
    windows: list[np.ndarray],
    words: str,
    details: dict[str, Any] | None = None,
) -> Row:
    """The row of a mode: its score is the perplexity that it prints, without interval and without control."""
    return bench.row(
        work,
        task="perplexity",
        measure=_PRINTED[name],
        length=length,
        tokens=length,
        depth=None,
        score=perplexity,
        low=None,
        high=None,
        samples=sum(map(len, windows)),
        control=None,
        control_length=None,
        measured_on=words,
        details={"compat": name, "windows": len(windows), **(details or {})},
    )


_PRINTED = {
    "yarn": "perplexity, as YaRN's sliding window",
    "yarn_truncate": "perplexity, as YaRN's --truncate",
    "pose": "perplexity, as PoSE's sliding window",
    "longlora": "perplexity, as LongLoRA's",
    "evaluate": "perplexity, as Hugging Face evaluate's",
    "lm_eval": "word perplexity, as lm-eval's rolling",
}


def _document_tokens(task: Perplexity, bench: Bench, most: int | None) -> int:
    chosen = bench.corpus.documents[: task.documents or DOCUMENTS]
    return sum(len(ids) if most is None else min(most, len(ids)) for ids in chosen)


COMPAT = {
    "yarn": Measure(frozenset({"stride", "stretch_tokens"}), sliding_tokens, yarn),
    "pose": Measure(frozenset({"stride", "stretch_tokens"}), sliding_tokens, pose),
    "yarn_truncate": Measure(frozenset({"windows"}), lambda t, b, n: (t.windows or WINDOWS) * n, yarn_truncate),
    "longlora": Measure(frozenset({"stride", "stretch_tokens"}), sliding_tokens, longlora),
    "evaluate": Measure(frozenset({"documents"}), lambda t, b, n: _document_tokens(t, b, n), evaluate),
    "lm_eval": Measure(frozenset({"documents"}), lambda t, b, n: _document_tokens(t, b, None), lm_eval),
}
