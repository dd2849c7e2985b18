"""Hide facts in a text and ask for them, at the level of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import OptionError, PePatchError

Draw = Callable[[np.random.Generator, int], list[str]]
"""Draws a number of keys or values."""

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
"""Number of `<k..>` tokens, and of `<v..>` tokens, in the vocabulary of the demo."""

CACHE_LIMIT = 1 << 16
"""Texts that each cache of ids holds before it is cleared."""


@dataclass(frozen=True)
class Wording:
    """The words of a fact and of the question about it."""

    name: str
    needle: str
    """The fact, with `{key}` and `{value}`."""
    question: str
    """The question, with `{key}`."""
    draw_keys: Draw = field(repr=False)
    """Draws distinct keys."""
    draw_values: Draw = field(repr=False)
    """Draws values, which may repeat."""
    lead: str = ""
    """Start of the answer, which the prompt includes; may have `{key}`. In a chat it begins the model's turn."""
    answer: str = "{value}"
    """The rest of the answer, with `{value}`."""
    instruction: str = ""
    """Text at the start of the prompt."""
    at_line: bool = False
    """Put needles at line boundaries of the haystack if it has any."""
    several_values: tuple[str, str] | None = None
    """Question and lead that ask for all `{count}` values of a `{key}`. None if this wording cannot ask for them."""
    several_keys: tuple[str, str] | None = None
    """Question and lead that ask for the values of all `{keys}`. None asks for one value at a time."""


@dataclass(frozen=True)
class RetrievalSample:
    """One question about one haystack."""

    input_ids: np.ndarray
    """The prompt [n], or with `answer_in_sequence` the whole sequence [n]."""
    answer_ids: np.ndarray
    """Ids of the first answer [m]."""
    answer: str
    depth: float
    """Position of the first requested needle in the haystack: 0 is its start, 1 its end."""
    needles: int
    is_answer: np.ndarray
    """Boolean [n]: tokens of the answers. A prompt has none."""
    is_needle: np.ndarray
    """Boolean [n]: instruction, needles and questions. All tokens in neither mask are haystack."""
    bare_ids: np.ndarray
    """The first question without haystack and needles [k]."""


def _draw_word_keys(rng: np.random.Generator, count: int) -> list[str]:
    picks = rng.choice(len(_COLOURS) * len(_ANIMALS), count, replace=False)
    return [f"{_COLOURS[pick % len(_COLOURS)]} {_ANIMALS[pick // len(_COLOURS)]}" for pick in picks]


def _draw_numbers(rng: np.random.Generator, count: int) -> list[str]:
    return [str(number) for number in rng.integers(1_000_000, 10_000_000, count)]


def _draw_token_keys(rng: np.random.Generator, count: int) -> list[str]:
    if count > TOKEN_KEYS:
        raise PePatchError(
            f"The 'tokens' wording has {TOKEN_KEYS} keys, so needles must be at most {TOKEN_KEYS}, got {count}."
        )
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
    """Return the `tokens` wording if the vocabulary has the demo's key and value tokens, else `english`."""
    vocabulary = tokenizer.get_vocab()
    return WORDINGS["tokens" if "<k0>" in vocabulary and "<v0>" in vocabulary else "english"]


class _Encoder:
    """A cache of the ids of short texts, and of the tokens that end a line, for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.ids: dict[str, np.ndarray] = {}
        self.pairs: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        self._line_end: np.ndarray | None = None

    def line_end(self, tokenizer: Any) -> np.ndarray:
        """Return a mask [vocabulary] of the tokens that end with a line feed (byte-level, SentencePiece or plain)."""
        if self._line_end is None:
            vocabulary = tokenizer.get_vocab()
            table = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
            table[[index for token, index in vocabulary.items() if token.endswith(("\u010a", "\n", "<0x0A>"))]] = True
            self._line_end = table
        return self._line_end


# Weak keys, and no value refers to its tokenizer: the cache of a deleted tokenizer is freed with it.
_ENCODERS: WeakKeyDictionary[Any, _Encoder] = WeakKeyDictionary()


def _encoder(tokenizer: Any) -> _Encoder:
    if tokenizer not in _ENCODERS:
        _ENCODERS[tokenizer] = _Encoder(tokenizer)
    return _ENCODERS[tokenizer]


def _ids_before_text(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])


def starts_with_bos(tokenizer: Any) -> bool:
    """Return True if the tokenizer puts special tokens before a text: BOS for nearly all that do."""
    return len(start_ids(tokenizer)) > 0


def start_ids(tokenizer: Any, bos: bool | None = None) -> np.ndarray:
    """Return the special tokens that a text starts with [n]: BOS for nearly all tokenizers that add any, else none.

    This is the only definition of BOS in an evaluation: every window of a loss and every prompt starts with these ids.

    Args:
        tokenizer: Tokenizer of the model.
        bos: None follows the tokenizer, True adds its BOS token even if it does not, False adds nothing.

    Raises:
        OptionError: `bos` is True and the tokenizer has no BOS token.
    """
    # Not cached: setting `add_bos_token` changes a tokenizer.
    ids = np.array(_ids_before_text(tokenizer), dtype=np.int64)
    if bos is None or (bos and len(ids)):
        return ids
    if not bos:
        return ids[:0]
    if tokenizer.bos_token_id is None:
        raise OptionError(
            "bos=True puts the BOS token before every window and prompt, and this tokenizer has none. Leave bos out."
        )
    return np.array([tokenizer.bos_token_id], dtype=np.int64)


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Return the ids [n] of a text without special tokens, int64. The array is cached: do not write to it."""
    cache = _encoder(tokenizer).ids
    if text not in cache:
        if len(cache) >= CACHE_LIMIT:
            cache.clear()
        # verbose=False: a haystack may be longer than the model_max_length of the tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        cache[text] = np.array(ids, dtype=np.int64)
    return cache[text]


def encode_pair(tokenizer: Any, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a question and of its answer, encoded together if that leaves the question's ids unchanged."""
    cache = _encoder(tokenizer).pairs
    if (question, answer) not in cache:
        if len(cache) >= CACHE_LIMIT:
            cache.clear()
        head, both = encode(tokenizer, question), encode(tokenizer, question + answer)
        unchanged = len(both) > len(head) and np.array_equal(both[: len(head)], head)
        cache[question, answer] = head, both[len(head) :] if unchanged else encode(tokenizer, answer)
    return cache[question, answer]


def make_sample(
    tokenizer: Any,
    haystack_ids: Sequence[int] | np.ndarray,
    wording: Wording,
    *,
    length: int,
    needles: int = 1,
    queries: int = 1,
    depth: float | Sequence[float] | None = None,
    asked: int = 0,
    rng: np.random.Generator,
    answer_in_sequence: bool = False,
    head: np.ndarray | None = None,
    tail: str = "",
) -> RetrievalSample:
    """Hide facts in a random piece of the haystack and ask for the first one, or for another.

    Prompt and answer together have exactly `length` tokens; with several depths, those of the longest question have, so
    that the text is the same for each question. The same state of `rng` gives the same facts, question and
    depths at every length.

    Args:
        tokenizer: Tokenizer of the model.
        haystack_ids: Token ids of the text [tokens].
        wording: Words of facts and questions.
        length: Tokens of the prompt and its answer.
        needles: Number of facts.
        queries: Number of questions at the end of a training sequence; 1 for a prompt.
        depth: Position of the first needle, from 0 (start) to 1 (end), or positions of the first needles. All other
            positions are drawn.
        asked: Index of the depth whose needle a prompt asks for.
        rng: Random generator.
        answer_in_sequence: Return the whole sequence with questions and answers, for training.
        head: Ids that the prompt starts with [n]. None is what the tokenizer puts before a text.
        tail: Text between a question and its lead.

    Raises:
        PePatchError: The length is too small, the haystack too short, or a number is out of range. Nothing is ever cut.
    """
    if not 1 <= queries <= needles:
        raise PePatchError(f"queries must be between 1 and the number of needles ({needles}), got {queries}.")
    if queries > 1 and not answer_in_sequence:
        raise PePatchError(f"queries={queries} needs answer_in_sequence=True: a prompt has only one question.")
    placed = [] if depth is None else np.atleast_1d(depth).tolist()
    if not 0 <= asked < max(1, len(placed)):
        raise PePatchError(f"asked must be from 0 to {max(0, len(placed) - 1)}, the index of a depth, got {asked}.")
    if len(placed) > 1 and answer_in_sequence:
        raise PePatchError(f"{len(placed)} depths are for prompts; a training sequence has one depth or None.")
    if outside := [each for each in placed if not 0 <= each <= 1]:
        raise PePatchError(f"depth must be between 0 (start of the haystack) and 1 (its end), got {outside[0]}.")
    if len(placed) > needles:
        raise PePatchError(f"{len(placed)} depths need as many needles, got needles={needles}.")
    keys, values = wording.draw_keys(rng, needles), wording.draw_values(rng, needles)
    # No draw depends on the length, so that the control at another length asks the same question.
    depths, start = rng.random(needles), rng.random()
    depths[: len(placed)] = placed
    facts = [
        encode(tokenizer, wording.needle.format(key=key, value=value)) for key, value in zip(keys, values, strict=True)
    ]

    def end(index: int) -> tuple[np.ndarray, np.ndarray]:
        return _question(tokenizer, wording, tail, keys[index], values[index])

    ends = [end(index) for index in range(asked, asked + queries)]
    sizes = [sum(map(len, end(index))) for index in range(needles)]
    room = max(sizes[: len(placed)]) if len(placed) > 1 else sum(sizes[asked : asked + queries])
    head = np.concatenate([start_ids(tokenizer) if head is None else head, encode(tokenizer, wording.instruction)])
    used = len(head) + sum(map(len, facts)) + room
    piece = take_piece(haystack_ids, length - used, start, f"{needles} needles and {queries} questions", used)
    cuts = place(tokenizer, wording, piece, depths)
    segments = [(head, 1), *splice(piece, facts, cuts)]
    for question, answer in ends:
        segments += [(question, 1), (answer, 2)] if answer_in_sequence else [(question, 1)]
    ids = np.concatenate([segment for segment, _ in segments])
    kind = np.repeat([mark for _, mark in segments], [len(segment) for segment, _ in segments])
    return RetrievalSample(
        input_ids=ids,
        answer_ids=ends[0][1],
        answer=wording.answer.format(value=values[asked]).strip(),
        depth=float(cuts[asked] / len(piece)) if len(piece) else 0.0,
        needles=needles,
        is_answer=kind == 2,
        is_needle=kind == 1,
        bare_ids=np.concatenate([head, ends[0][0]]),
    )


def _question(tokenizer: Any, wording: Wording, tail: str, key: str, value: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a question with its lead, and of its answer."""
    question = wording.question.format(key=key) + tail + wording.lead.format(key=key)
    return encode_pair(tokenizer, question, wording.answer.format(value=value))


def take_piece(haystack_ids: Sequence[int] | np.ndarray, size: int, start: float, what: str, used: int) -> np.ndarray:
    """Return a piece of the haystack.

    Args:
        haystack_ids: Token ids [tokens].
        size: Tokens of the piece.
        start: Position of the piece, from 0 (first possible) to 1 (last possible).
        what: Names the rest of the prompt, for the error.
        used: Tokens of the rest of the prompt, for the error.

    Raises:
        PePatchError: The size is negative, or the haystack is shorter.
    """
    if size < 0:
        raise PePatchError(f"{used + size} tokens are too few: {what} alone take {used}. Use a greater length.")
    if len(haystack_ids) < size:
        raise PePatchError(f"The haystack has {len(haystack_ids)} tokens, but {size} are needed. Give a longer text.")
    first = int(start * (len(haystack_ids) - size + 1))
    return np.asarray(haystack_ids[first : first + size], dtype=np.int64)


def place(tokenizer: Any, wording: Wording, piece: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Return the offset of each needle in the piece [needles], at the nearest line boundary if `wording.at_line`."""
    cuts = np.rint(depths * len(piece)).astype(np.int64)
    if not wording.at_line or not len(piece):
        return cuts
    ends = _encoder(tokenizer).line_end(tokenizer)
    boundaries = np.concatenate([[0], np.flatnonzero(ends[piece]) + 1, [len(piece)]])
    after = np.searchsorted(boundaries, cuts).clip(1, len(boundaries) - 1)
    left, right = boundaries[after - 1], boundaries[after]
    return np.where(cuts - left < right - cuts, left, right)


def splice(piece: np.ndarray, facts: list[np.ndarray], cuts: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Insert each fact at its offset.

    Args:
        piece: Token ids of the haystack [n].
        facts: Token ids of each fact.
        cuts: Offset of each fact in the piece [facts].

    Returns:
        Segments as (ids, mark). The mark is 1 for a needle and 0 for the haystack.
    """
    segments: list[tuple[np.ndarray, int]] = []
    end = 0
    for index in np.argsort(cuts, kind="stable"):
        cut = int(cuts[index])
        segments += [(piece[end:cut], 0), (facts[index], 1)]
        end = cut
    return [*segments, (piece[end:], 0)]
