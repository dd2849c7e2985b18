"""LongPPL: perplexity on those tokens alone that long context makes easier (Fang et al. 2024, arXiv:2410.23771).

A judge, which is another model or the evaluated one itself, reads a text twice: with all that comes before each token,
and with a short context. Key tokens are those that the long context helps by more than `GAIN` and that are then
predicted with a loss below `MOST`. They are handed over as places in the text, so that the tokenizers may differ.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import OptionError, PePatchError
from ..bench import Bench
from ..results import Row
from ..subject import Subject, model_fingerprint, tokenizer_hash, windows
from .measure import Measure, control, longest, within
from .position import WINDOWS
from .sliding import Span, sliding_losses, span_losses

if TYPE_CHECKING:
    from .task import Perplexity

logger = logging.getLogger(__name__)

GAIN = 2.0
"""In nats: how much better the judge must predict a key token with the whole context than with the short one."""
MOST = 2.0
"""In nats: what the judge's loss of a key token must stay below with the whole context."""
SHORT_CONTEXT = 4096
SHARED_CONTEXT = 1024


@dataclass(frozen=True, eq=False)
class Judge:
    """The model that says which tokens are key; its name changes with its weights and its tokenizer."""

    model: Any
    tokenizer: Any

    @classmethod
    def of(cls, given: Any) -> Judge:
        """From a folder, a name on the hub, or (model, tokenizer)."""
        if isinstance(given, Judge):
            return given
        if isinstance(given, str):
            from ...checkpoints.sources import load

            return cls(*load(given))
        if isinstance(given, tuple) and len(given) == 2:
            return cls(*given)
        raise OptionError(f"judge is a folder, or (model, tokenizer); got {type(given).__name__}.")

    @cached_property
    def name(self) -> str:
        known = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
        return f"{known} {model_fingerprint(self.model)} {tokenizer_hash(self.tokenizer)}"

    def __repr__(self) -> str:
        return f"Judge({self.name!r})"


def is_key(short: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Which tokens are key, by their loss with the short context and with the whole one; both [n], in nats."""
    return (short - whole > GAIN) & (whole < MOST)


def short_losses(subject: Subject, ids: np.ndarray, context: int, shared: int) -> np.ndarray:
    """The loss of tokens `context` and on, [n - context], with `context` tokens before each, or up to `shared` more.

    `shared` neighbours are predicted in one window, from its start.
    """
    ends = [min(start + context + shared, len(ids)) for start in range(0, len(ids) - context, shared)]
    spans = [Span(shared * index, end, end - shared * index - context) for index, end in enumerate(ends)]
    return np.concatenate(span_losses(subject, ids, spans))


def key_places(judge: Subject, text: str, context: int, shared: int) -> tuple[list[tuple[int, int]], int]:
    """Where in a text the judge's key tokens are, as (start, end) in characters, and how many tokens they are."""
    ids, places = _encoded(judge.tokenizer, text, special=True)
    bound = windows(judge.model)[1]
    if bound is not None and len(ids) > bound:
        raise PePatchError(
            f"The judge of LongPPL reads {len(ids)} tokens here, beyond its window of {bound}. "
            "Give a judge with a longer window, or ask for smaller lengths."
        )
    if len(ids) <= context:
        return [], 0
    whole = judge.losses([ids], len(ids) - 1)[0][context - 1 :]
    chosen = np.flatnonzero(is_key(short_losses(judge, ids, context, shared), whole)) + context
    return merged([places[index] for index in chosen]), len(chosen)


def merged(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places in order, those that touch or overlap made one."""
    found: list[tuple[int, int]] = []
    for start, end in places:
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def inside(tokens: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens [n], given as places of characters, lie within one of some places in order that do not touch."""
    starts = np.array([start for start, _ in places], dtype=np.int64)
    ends = np.array([end for _, end in places], dtype=np.int64)
    if not len(places):
        return np.zeros(len(tokens), dtype=bool)
    given = np.array(tokens, dtype=np.int64).reshape(-1, 2)
    which = np.searchsorted(starts, given[:, 0], side="right") - 1
    return (which >= 0) & (given[:, 1] <= ends[which])


def longppl(task: Perplexity, bench: Bench, length: int) -> Row | None:
    """exp of the mean loss of the key tokens of some texts; the control is the same tokens within a shorter window."""
    context = within(bench, "short_context", task.short_context, SHORT_CONTEXT)
    shared = task.shared_context or min(SHARED_CONTEXT, max(1, context // 4))
    texts = _texts(task, bench, length)
    judge = _judge(task, bench)
    with bench.timed() as work:
        places, judged = zip(*[key_places(judge, text, context, shared) for text, _, _ in texts], strict=True)
        # the first token has nothing before it, and is never scored
        keys = [inside(tokens, where)[1:] for (_, _, tokens), where in zip(texts, places, strict=True)]
        losses = [bench.subject.losses([ids], len(ids) - 1)[0] for _, ids, _ in texts]
    groups = np.concatenate([np.full(key.sum(), index) for index, key in enumerate(keys)])
    if not len(groups):
        logger.warning(
            "LongPPL at %d: the judge finds no token that more than %d tokens of context make easier: no row.",
            length,
            context,
        )
        return None
    found = _key_loss(bench, losses, keys, groups)

    def shortened() -> float:
        stride = max(1, min(shared, bench.control_length // 2))
        slid = [sliding_losses(bench.subject, ids, bench.control_length, stride) for _, ids, _ in texts]
        return _key_loss(bench, slid, keys, groups)["loss"]

    within_window = control(task, bench, length, f"longppl at {length}", found["loss"], shortened)
    every = np.concatenate(losses)
    return bench.row(
        work,
        task="perplexity",
        measure="LongPPL",
        length=length,
        tokens=length,
        depth=None,
        score=found["perplexity"],
        low=None if found["low"] is None else math.exp(found["low"]),
        high=None if found["high"] is None else math.exp(found["high"]),
        samples=found["tokens"],
        control=math.exp(within_window),
        control_length=min(length, bench.control_length),
        measured_on=f"{found['tokens']} key tokens among the first {length} tokens of {len(texts)} texts of "
        f"{bench.corpus.name}, which the judge predicts better by more than {GAIN} nats, and below {MOST}, than with "
        f"{context} to {context + shared - 1} tokens before them; exp of their mean loss, each weighing the same",
        details={
            "judge": "the evaluated model" if task.judge is None else Judge.of(task.judge).name,
            "key_tokens": found["tokens"],
            "key_tokens_of_judge": sum(judged),
            "key_hash": hashlib.sha256(repr(places).encode()).hexdigest()[:12],
            "scored_tokens": int(every.size),
            "perplexity_of_all": math.exp(min(float(every.mean()), 700.0)),
            "short_context": context,
            "shared_context": shared,
        },
    )


def _key_loss(
    bench: Bench, losses: Sequence[np.ndarray], keys: Sequence[np.ndarray], groups: np.ndarray
) -> dict[str, Any]:
    scored = np.concatenate([loss[key] for loss, key in zip(losses, keys, strict=True)])
    return bench.token_loss(scored.tolist(), groups.tolist())


def _judge(task: Perplexity, bench: Bench) -> Subject:
    if task.judge is None:
        return bench.subject
    judge = Judge.of(task.judge)
    return Subject(judge.model, judge.tokenizer, autocast=bench.subject.autocast, advance=bench.subject.advance)


def _texts(task: Perplexity, bench: Bench, length: int) -> list[tuple[str, np.ndarray, list[tuple[int, int]]]]:
    """The beginnings of documents, `length` tokens each: the text, its ids and where each token is in it.

    The same documents at every length. Where none is long enough, they are joined.
    """
    long = [i for i, ids in enumerate(bench.corpus.documents) if len(ids) >= longest(bench)]
    order = np.random.default_rng([bench.seed, longest(bench)]).permutation(len(long))
    chosen = [bench.corpus.texts[long[index]] for index in order[: task.windows or WINDOWS]]
    found = []
    for text in chosen or ["".join(bench.corpus.texts)]:
        ids, places = _encoded(bench.subject.tokenizer, text, special=False)
        found.append((text[: places[length - 1][1]], ids[:length], places[:length]))
    return found


def _encoded(tokenizer: Any, text: str, *, special: bool) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The ids [n] of a text and the characters that each stands for."""
    if not tokenizer.is_fast:
        raise PePatchError(
            "LongPPL needs to know where in the text each token is, which only fast tokenizers say. "
            "Load the tokenizer with use_fast=True, or leave 'longppl' out."
        )
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return np.array(found["input_ids"], dtype=np.int64), [(start, end) for start, end in found["offset_mapping"]]


LONGPPL = Measure(
    options=frozenset({"windows", "judge", "short_context", "shared_context"}),
    # The score, the judge's whole reading, and its windows, which are about (short + shared) / shared as many tokens.
    tokens=lambda task, bench, length: (task.windows or WINDOWS) * length * 7,
    row=longppl,
)
