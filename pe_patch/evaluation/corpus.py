"""The text a measurement is made on, as token ids, with the hash that names it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PePatchError

TOKEN_LIMIT = 1_000_000
"""Tokens kept of a long source: enough for haystacks and targets, and quick to make."""


@dataclass(frozen=True)
class Corpus:
    """Documents as ids, in order; `texts` are the same as strings; `stream` [tokens] is all of them in a row; `hash` is
    of the text that was kept."""

    documents: tuple[np.ndarray, ...]
    texts: tuple[str, ...]
    stream: np.ndarray
    name: str
    hash: str
    bytes_per_token: float

    @classmethod
    def load(cls, tokenizer: Any, text: str | Sequence[str], needed: int) -> Corpus:
        """Tokenize documents until the limit, or four times the `needed` tokens where that is more, is reached."""
        name, documents = _read(text)
        kept, texts, hashed, size, tokens = [], [], hashlib.sha256(), 0, 0
        for document in documents:
            ids = whole_ids(tokenizer, document)
            if not len(ids):
                continue
            kept.append(ids)
            texts.append(document)
            hashed.update(document.encode("utf-8", "surrogatepass") + b"\0")
            size += len(document.encode("utf-8", "surrogatepass"))
            tokens += len(ids)
            if tokens >= max(TOKEN_LIMIT, 4 * needed):
                break
        if tokens < needed:
            raise PePatchError(f"The text ({name}) has {tokens} tokens, {needed} are needed. Give a longer text.")
        return cls(tuple(kept), tuple(texts), np.concatenate(kept), name, hashed.hexdigest()[:12], size / tokens)

    def spots(self, longest: int, step: int, count: int, seed: int) -> tuple[list[np.ndarray], str]:
        """Up to `count` pieces of `longest` tokens whose ends are multiples of `step` apart, and where they are from.

        Pieces lie within one document where any document is long enough, else anywhere in the joined documents.
        """
        sources, where = [ids for ids in self.documents if len(ids) >= longest], "within documents"
        if not sources:
            sources, where = [self.stream], "across joined documents"
        ends = [(index, end) for index, ids in enumerate(sources) for end in range(longest, len(ids) + 1, step)]
        order = np.random.default_rng([seed, longest]).permutation(len(ends))[:count]
        return [sources[ends[i][0]][ends[i][1] - longest : ends[i][1]] for i in order], where


def _read(text: str | Sequence[str]) -> tuple[str, Sequence[str]]:
    if not isinstance(text, str):
        return "given documents", text
    from ..data.text import load_documents

    # The library's own base model is trained on the "train" half of this source; it is judged on the other.
    split = "test" if text == "stdlib" else None
    return (f"{text}, held-out files" if split else text), load_documents(text, split=split)


def whole_ids(tokenizer: Any, document: str) -> np.ndarray:
    """The ids of a document, refused if the tokenizer dropped a part of it.

    Two halves may make a token or two more than the whole, never many more, unless the whole was cut.
    """
    ids = _plain_ids(tokenizer, document)
    middle = len(document) // 2
    halves = len(_plain_ids(tokenizer, document[:middle])) + len(_plain_ids(tokenizer, document[middle:]))
    if halves > len(ids) + 16:
        raise PePatchError(
            f"The tokenizer cut a document: its halves have {halves} tokens, the whole {len(ids)}. "
            "Load it without truncation and with a model_max_length above the lengths asked for."
        )
    return ids


def _plain_ids(tokenizer: Any, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
