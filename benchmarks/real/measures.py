"""Measure retrieval and loss of a model at one length, for the tables of this folder."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pe_patch import evaluate
from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.metrics import binomial_interval
from pe_patch.evaluation.model import EvaluatedModel
from pe_patch.evaluation.perplexity_measures import position_buckets
from pe_patch.evaluation.retrieval import start_ids
from pe_patch.evaluation.tasks import Needle, Passkey

DEPTHS = (0.05, 0.2, 0.35, 0.45, 0.55, 0.65, 0.8, 0.95)
"""Where the eight facts of a `needle` text are. Each is asked for, so that a text gives eight answers."""
TARGETS = 4_096
"""Tokens at the end of a text whose loss is compared between lengths."""
CONTROL = 2_048
"""Length of the control: the same questions about a shorter text."""


@cache
def corpus(tokenizer: Any, text: str, needed: int) -> Corpus:
    """Return the tokenized text of a source."""
    return Corpus.load(tokenizer, text, needed)


def retrieval(model: Any, tokenizer: Any, text: Corpus, task: str, length: int, questions: int) -> dict[str, Any]:
    """Return the share of exact answers with its interval.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: Where the facts are hidden.
        task: `needle`, eight facts in a text of which each is asked for, or `passkey`, one fact.
        length: Tokens of prompt and answer.
        questions: Number of questions.
    """
    chosen = Needle(shared_text=True) if task == "needle" else Passkey()
    depths = (
        DEPTHS
        if task == "needle"
        else [(2 * index + 1) / (2 * min(5, questions)) for index in range(min(5, questions))]
    )
    results = evaluate(
        model, tokenizer, [chosen], [length], samples=questions, depths=depths, text=text, seed=0, beyond_window=True,
        control_length=min(CONTROL, length), label="model",
    )  # fmt: skip
    cell = results.cell(task=task)
    assert cell is not None
    # One or two texts give no interval by text; this one takes the answers as independent, and the tables say so.
    low, high = binomial_interval(round(cell.score * cell.samples), cell.samples)
    return {
        "score": cell.score, "low": low, "high": high, "questions": cell.samples, "control": cell.control,
        "control_length": min(CONTROL, length),
        "depths": {str(row.depth): row.score for row in results.rows},
        "seconds": round(sum(row.seconds for row in results.rows), 1),
        "peak_memory": max(row.peak_memory or 0 for row in results.rows),
    }  # fmt: skip


def loss(model: Any, tokenizer: Any, text: Corpus, length: int, longest: int, windows: int = 1) -> dict[str, Any]:
    """Return the loss of the last `TARGETS` tokens of texts, and the loss by position, from one reading of each text.

    The task `perplexity` reads a text once for each of the two.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: Where the texts come from.
        length: Tokens that the model reads.
        longest: Tokens of the longest reading. All lengths end at the same token, so that their targets are the same.
        windows: Number of texts.
    """
    start = start_ids(tokenizer)
    pieces, where = text.spots(longest - len(start), TARGETS, windows, 0)
    rows = [np.concatenate([start, piece[len(piece) - (length - len(start)) :]]) for piece in pieces]
    subject = EvaluatedModel(model, tokenizer)
    started = time.perf_counter()
    losses = subject.losses(rows, length - max(1, len(start)))
    return {
        "loss": float(losses[:, -TARGETS:].mean()), "targets": min(TARGETS, losses.shape[1]),
        "of_each_text": losses[:, -TARGETS:].mean(1).tolist(),
        "buckets": position_buckets(losses, max(1, len(start))),
        "windows": windows, "texts": f"{text.name}, {where}",
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def text_of(folder: Path, kind: str) -> str:
    """Return the source of the held-out `english` or `code`."""
    return f"{folder / kind}@split=test"
