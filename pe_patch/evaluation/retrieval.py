"""How a fact is hidden in a text and asked for, at the level of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import PePatchError

Draw = Callable[[np.random.Generator, int], list[str]]

_COLOURS = (
    "amber azure beige black blue bronze brown copper coral cream crimson cyan golden green grey indigo ivory jade "
    "lemon lilac lime maroon mauve ochre olive orange pearl pink plum purple red ruby rust sable scarlet silver teal "
    "violet white yellow"
).split()
_ANIMALS = (
    "badger beaver bison camel crane donkey dove eagle falcon ferret finch fox gecko goat goose hare hawk heron horse "
    "lark lemur lion llama lynx magpie mole moose newt otter owl panda parrot pigeon rabbit raven robin seal stork "
    "swan tapir tiger toad trout turtle walrus weasel whale wolf wombat zebra"
).split()
TOKEN_KEYS = 64
"""How many `<k..>` and how many `<v..>` tokens the demo's vocabulary has."""

CACHE_LIMIT = 1 << 16


@dataclass(frozen=True)
class Wording:
    """The words around a hidden fact.

    `needle` holds `{key}` and `{value}`, `question` holds `{key}`, as may `lead`, the beginning of the answer that
    is given with the question (in a chat the model's turn starts before it); `answer`, which follows, holds
    `{value}`. `draw_keys(rng, n)` gives n different keys, `draw_values(rng, n)` n values. With `at_line` needles go
    to line boundaries of the haystack where there are any.
    """

    name: str
    needle: str
    question: str
    draw_keys: Draw = field(repr=False)
    draw_values: Draw = field(repr=False)
    lead: str = ""
    answer: str = "{value}"
    instruction: str = ""
    at_line: bool = False
    several_values: tuple[str, str] | None = None
    """Question and lead that ask for all values of a `{key}`, which are `{count}`; None where it cannot be asked."""
    several_keys: tuple[str, str] | None = None
    """Question and lead that ask for the values of all `{keys}`; None: they are asked for one by one."""


@dataclass(frozen=True)
class RetrievalSample:
    """One question about one haystack.

    `input_ids` [n] is the prompt, or with `answer_in_sequence` the whole sequence; the masks are boolean and as long.
    `is_answer` marks the answers' tokens (none in a prompt). `is_needle` marks every other token that was spliced in
    and cannot be predicted from the text: instruction, needles and questions. What neither marks is haystack.
    `depth` is where the needle asked for first stands in the haystack: 0 is its start, 1 its end. `bare_ids` is the
    first question with no haystack and no needle before it.
    """

    input_ids: np.ndarray
    answer_ids: np.ndarray
    answer: str
    depth: float
    needles: int
    is_answer: np.ndarray
    is_needle: np.ndarray
    bare_ids: np.ndarray


def _draw_word_keys(rng: np.random.Generator, count: int) -> list[str]:
    picks = rng.choice(len(_COLOURS) * len(_ANIMALS), count, replace=False)
    return [f"{_COLOURS[pick % len(_COLOURS)]} {_ANIMALS[pick // len(_COLOURS)]}" for pick in picks]


def _draw_numbers(rng: np.random.Generator, count: int) -> list[str]:
    return [str(number) for number in rng.integers(1_000_000, 10_000_000, count)]


def _draw_token_keys(rng: np.random.Generator, count: int) -> list[str]:
    if count > TOKEN_KEYS:
        raise PePatchError(f"The 'tokens' wording has {TOKEN_KEYS} keys, {count} needles were asked for.")
    return [f"<k{key}>" for key in rng.permutation(TOKEN_KEYS)[:count]]


def _draw_token_values(rng: np.random.Generator, count: int) -> list[str]:
    return [f"<v{value}>" for value in rng.integers(0, TOKEN_KEYS, count)]


WORDINGS: dict[str, Wording] = {
    "english": Wording(
        name="english",
        instruction="The text below has notes about lockers and their codes in it. Keep the codes in mind.\n\n",
        needle="\nA note on lockers: the {key} locker opens with the code {value}.\n",
        question="\n\nWhich code opens the {key} locker?",
        lead=" By the note in the text, the {key} locker opens with the code",
        answer=" {value}",
        draw_keys=_draw_word_keys,
        draw_values=_draw_numbers,
        at_line=True,
        several_values=(
            "\n\nThe {key} locker opens with {count} different codes. Which are they?",
            " By the notes in the text, the {key} locker opens with the codes",
        ),
        several_keys=(
            "\n\nWhich codes open the lockers {keys}? One code for each, in this order.",
            " By the notes in the text, the codes of these lockers are, in this order:",
        ),
    ),
    "tokens": Wording(
        name="tokens",
        needle="{key}{value}",
        question="{key}",
        draw_keys=_draw_token_keys,
        draw_values=_draw_token_values,
    ),
}


def wording_for(tokenizer: Any) -> Wording:
    """`tokens` where the vocabulary has the demo's key and value tokens, `english` elsewhere."""
    vocabulary = tokenizer.get_vocab()
    return WORDINGS["tokens" if "<k0>" in vocabulary and "<v0>" in vocabulary else "english"]


class _Encoder:
    """A tokenizer's ids of short texts, each made once, and which of its tokens end a line."""

    def __init__(self, tokenizer: Any) -> None:
        self.ids: dict[str, np.ndarray] = {}
        self.pairs: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        start = tokenizer("")["input_ids"]
        has_start = len(start) > 0 and start[0] == tokenizer.bos_token_id
        self.prefix = np.array(start[:1] if has_start else [], dtype=np.int64)
        self._line_end: np.ndarray | None = None

    def line_end(self, tokenizer: Any) -> np.ndarray:
        """Boolean [vocabulary]: the token ends with a line feed, in byte-level, SentencePiece or plain spelling."""
        if self._line_end is None:
            vocabulary = tokenizer.get_vocab()
            table = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
            table[[index for token, index in vocabulary.items() if token.endswith(("\u010a", "\n", "<0x0A>"))]] = True
            self._line_end = table
        return self._line_end


# Keyed weakly, and no value holds its tokenizer: a dropped tokenizer takes its cache along.
_ENCODERS: WeakKeyDictionary[Any, _Encoder] = WeakKeyDictionary()


def _encoder(tokenizer: Any) -> _Encoder:
    if tokenizer not in _ENCODERS:
        _ENCODERS[tokenizer] = _Encoder(tokenizer)
    return _ENCODERS[tokenizer]


def start_ids(tokenizer: Any) -> np.ndarray:
    """The token that the tokenizer starts every text with [1], or none [0]."""
    return _encoder(tokenizer).prefix


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """The ids of `text` [n], int64, without special tokens; cached, so treat them as read-only."""
    cache = _encoder(tokenizer).ids
    if text not in cache:
        if len(cache) >= CACHE_LIMIT:
            cache.clear()
        # verbose=False: a haystack is meant to be longer than the tokenizer's own limit
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        cache[text] = np.array(ids, dtype=np.int64)
    return cache[text]


def encode_pair(tokenizer: Any, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a question and of its answer as they stand when written together, where the tokenizer allows."""
    cache = _encoder(tokenizer).pairs
    if (question, answer) not in cache:
        if len(cache) >= CACHE_LIMIT:
            cache.clear()
        head, whole = encode(tokenizer, question), encode(tokenizer, question + answer)
        joined = len(whole) > len(head) and np.array_equal(whole[: len(head)], head)
        cache[question, answer] = head, whole[len(head) :] if joined else encode(tokenizer, answer)
    return cache[question, answer]


def make_sample(
    tokenizer: Any,
    haystack_ids: Sequence[int] | np.ndarray,
    wording: Wording,
    *,
    length: int,
    needles: int = 1,
    queries: int = 1,
    depth: float | None = None,
    rng: np.random.Generator,
    answer_in_sequence: bool = False,
    head: np.ndarray | None = None,
    tail: str = "",
) -> RetrievalSample:
    """Hide `needles` facts in a piece of the haystack and ask for the first; prompt and answer fill `length` exactly.

    The piece starts at a random place. `depth` places the needle that is asked for first (0 to 1), the others fall
    anywhere. The same `rng` state gives the same facts, question and depths at every length. `answer_in_sequence`
    gives the whole sequence with `queries` questions and answers at its end, for training. `head` [n] is what the
    prompt starts with (default: what the tokenizer starts a text with), `tail` what stands between a question and its
    lead. Nothing is ever cut: a length too small or a haystack too short raises `PePatchError`.
    """
    if not 1 <= queries <= needles:
        raise PePatchError(f"queries must be between 1 and needles ({needles}), got {queries}.")
    if queries > 1 and not answer_in_sequence:
        raise PePatchError("Several questions need answer_in_sequence=True: a prompt ends where one answer starts.")
    if depth is not None and not 0 <= depth <= 1:
        raise PePatchError(f"depth must be between 0 (start of the haystack) and 1 (its end), got {depth}.")
    keys, values = wording.draw_keys(rng, needles), wording.draw_values(rng, needles)
    # Every draw is independent of the length, so that a control at another length asks the same question.
    depths, start = rng.random(needles), rng.random()
    if depth is not None:
        depths[0] = depth
    facts = [
        encode(tokenizer, wording.needle.format(key=key, value=value)) for key, value in zip(keys, values, strict=True)
    ]
    asked = [_question(tokenizer, wording, tail, keys[i], values[i]) for i in range(queries)]
    head = np.concatenate([start_ids(tokenizer) if head is None else head, encode(tokenizer, wording.instruction)])
    used = len(head) + sum(map(len, facts)) + sum(len(question) + len(answer) for question, answer in asked)
    piece = take_piece(haystack_ids, length - used, start, f"{needles} needles and {queries} questions", used)
    cuts = place(tokenizer, wording, piece, depths)
    parts = [(head, 1), *splice(piece, facts, cuts)]
    for question, answer in asked:
        parts += [(question, 1), (answer, 2)] if answer_in_sequence else [(question, 1)]
    ids = np.concatenate([part for part, _ in parts])
    kind = np.repeat([mark for _, mark in parts], [len(part) for part, _ in parts])
    return RetrievalSample(
        input_ids=ids,
        answer_ids=asked[0][1],
        answer=wording.answer.format(value=values[0]).strip(),
        depth=float(cuts[0] / len(piece)) if len(piece) else 0.0,
        needles=needles,
        is_answer=kind == 2,
        is_needle=kind == 1,
        bare_ids=np.concatenate([head, asked[0][0]]),
    )


def _question(tokenizer: Any, wording: Wording, tail: str, key: str, value: str) -> tuple[np.ndarray, np.ndarray]:
    question = wording.question.format(key=key) + tail + wording.lead.format(key=key)
    return encode_pair(tokenizer, question, wording.answer.format(value=value))


def take_piece(haystack_ids: Sequence[int] | np.ndarray, size: int, start: float, what: str, used: int) -> np.ndarray:
    """`size` ids of the haystack from `start` (0 to 1) on; `what` takes `used` tokens beside it, as errors say."""
    if size < 0:
        raise PePatchError(f"{used + size} tokens are too few: {what} alone take {used}. Ask for a greater length.")
    if len(haystack_ids) < size:
        raise PePatchError(f"The haystack has {len(haystack_ids)} tokens, {size} are needed. Give a longer text.")
    first = int(start * (len(haystack_ids) - size + 1))
    return np.asarray(haystack_ids[first : first + size], dtype=np.int64)


def place(tokenizer: Any, wording: Wording, piece: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Where each needle goes: [needles] offsets into the piece, moved to the nearest line boundary if so worded."""
    cuts = np.rint(depths * len(piece)).astype(np.int64)
    if not wording.at_line or not len(piece):
        return cuts
    ends = _encoder(tokenizer).line_end(tokenizer)
    boundaries = np.concatenate([[0], np.flatnonzero(ends[piece]) + 1, [len(piece)]])
    after = np.searchsorted(boundaries, cuts).clip(1, len(boundaries) - 1)
    left, right = boundaries[after - 1], boundaries[after]
    return np.where(cuts - left < right - cuts, left, right)


def splice(piece: np.ndarray, facts: list[np.ndarray], cuts: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """The piece with each fact at its cut, as (ids, mark) parts; mark 1 is a needle, 0 the haystack."""
    parts: list[tuple[np.ndarray, int]] = []
    at = 0
    for index in np.argsort(cuts, kind="stable"):
        cut = int(cuts[index])
        parts += [(piece[at:cut], 0), (facts[index], 1)]
        at = cut
    return [*parts, (piece[at:], 0)]
