"""Tokenise text, in pieces if it is long."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

PIECE = 1 << 18
"""Characters of a piece. A tokeniser needs about 150 bytes for each character that it reads in one call."""
OVERLAP = 1 << 11
"""Characters that two pieces share, so that their tokens can be compared around the seam."""
WORD_END = re.compile(r"(?<=\w)[^\w]")


def text_ids(tokenizer: Any, text: str, **options: Any) -> np.ndarray:
    """Return the ids [n], int64, of a text without special tokens, as one call of the tokenizer returns them.

    A text of more than `PIECE` characters is tokenised in overlapping pieces. Two pieces are joined at the end of a
    word around which both have the same tokens. Without such a place the pieces become longer. A tokenizer without
    offsets (written in Python) reads the text in one call.

    Args:
        tokenizer: a Transformers tokenizer.
        text: the text.
        options: arguments of the tokenizer's call, such as `split_special_tokens`.
    """
    if len(text) <= PIECE or not getattr(tokenizer, "is_fast", False):
        return _call(tokenizer, text, **options)[0]
    return np.concatenate(list(_pieces(tokenizer, text, options)))


def leading_text(tokenizer: Any, text: str, tokens: int) -> str:
    """Return the beginning of a text, with `tokens` tokens or more, up to the end of a word.

    The number of characters is estimated from the first piece, with a margin of a quarter.
    """
    if len(text) <= PIECE:
        return text
    per_token = PIECE / max(1, len(_call(tokenizer, text[:PIECE])[0]))
    stop = WORD_END.search(text, max(PIECE, int(1.25 * tokens * per_token)))
    return text[: stop.start()] if stop else text


def _pieces(tokenizer: Any, text: str, options: dict[str, Any]) -> Iterator[np.ndarray]:
    start, size, seam = 0, PIECE, 0
    left = _Piece(tokenizer, text, 0, size, options)
    while left.stop < len(text):
        right = _Piece(tokenizer, text, left.stop - OVERLAP, PIECE, options)
        joined = _seam(text, left, right)
        if joined is None:  # no safe place in the overlap: read the left piece again, longer
            size *= 2
            left = _Piece(tokenizer, text, start, size, options)
            continue
        yield left.ids[left.index(seam) : left.index(joined)]
        start, size, seam, left = right.start, PIECE, joined, right
    yield left.ids[left.index(seam) :]


class _Piece:
    """The tokens of `text[start:stop]`, with their bounds in the whole text."""

    def __init__(self, tokenizer: Any, text: str, start: int, size: int, options: dict[str, Any]) -> None:
        self.start, self.stop = start, min(start + size, len(text))
        self.ids, bounds = _call(tokenizer, text[start : self.stop], return_offsets_mapping=True, **options)
        self.starts, self.ends = bounds[:, 0] + start, bounds[:, 1] + start

    def index(self, place: int) -> int:
        """Return the number of the first token that starts at or after a place of the text."""
        return int(np.searchsorted(self.starts, place)) if place else 0


def _seam(text: str, left: _Piece, right: _Piece) -> int | None:
    """Return a place at which two pieces can be joined, or None.

    Both pieces must have the same tokens in the middle half of their overlap, and none may cross the place.
    """
    low, high = right.start + OVERLAP // 4, left.stop - OVERLAP // 4
    tokens = []
    for piece in (left, right):
        if (np.diff(piece.starts) < 0).any():  # a normaliser that reorders text: bounds cannot be searched
            return None
        inside = slice(piece.index(low), piece.index(high))
        tokens.append(np.stack([piece.ids[inside], piece.starts[inside], piece.ends[inside]]))
    if not np.array_equal(*tokens):
        return None
    ids, starts, ends = tokens[0]
    middle = (low + high) // 2
    for place in sorted(
        (match.start() for match in WORD_END.finditer(text, low, high)), key=lambda at: abs(at - middle)
    ):
        index = int(np.searchsorted(starts, place))
        if 0 < index < len(ids) and ends[index - 1] <= place:
            return place
    return None


def _call(tokenizer: Any, text: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [n] and their bounds [n, 2] in the text (empty unless requested)."""
    # verbose=False: a text may exceed the tokenizer's length limit
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_attention_mask=False, **options)
    bounds = np.array(found.get("offset_mapping", []), dtype=np.int64).reshape(-1, 2)
    return np.array(found["input_ids"], dtype=np.int64), bounds


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start]), list(whole[start + len(plain) :])
    return [], []


def control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern that finds the tokenizer's control tokens in text, or None if it has none."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {str(token) for token in added if getattr(token, "special", False)}
    names |= set(getattr(tokenizer, "all_special_tokens", []))
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None
