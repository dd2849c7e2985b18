"""The text of an evaluation as token ids, and the hash that identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.tokens import PIECE, leading_text, text_ids
from ..errors import PePatchError

TOKEN_LIMIT = 1_000_000
"""Tokens to keep of a long source: enough for haystacks and targets, and fast to tokenize."""


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents in order."""

    documents: tuple[np.ndarray, ...]
    """Token ids of each document."""
    texts: tuple[str, ...]
    """The same documents as strings."""
    stream: np.ndarray
    """Token ids of all documents, concatenated [tokens]."""
    name: str
    hash: str
    """Twelve hexadecimal digits that identify the texts."""
    bytes_per_token: float

    @classmethod
    def load(cls, tokenizer: Any, text: str | Iterable[str], needed: int) -> Corpus:
        """Tokenize documents up to `TOKEN_LIMIT` tokens, or four times `needed` if that is more.

        Args:
            tokenizer: Tokenizer of the evaluated model.
            text: A list of documents, or a source that `pe_patch.data.text.load_documents` knows.
            needed: Minimum number of tokens.

        Raises:
            PePatchError: The text has fewer tokens than `needed`, or the tokenizer cuts a document.
        """
        name, documents = _read_documents(text)
        kept, texts, hashed, size, tokens = [], [], hashlib.sha256(), 0, 0
        for document in documents:
            document = leading_text(tokenizer, document, max(TOKEN_LIMIT, 4 * needed) - tokens)
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
            raise PePatchError(f"The text ({name}) has {tokens} tokens, but {needed} are needed. Give a longer text.")
        return cls(tuple(kept), tuple(texts), np.concatenate(kept), name, hashed.hexdigest()[:12], size / tokens)

    def spots(self, longest: int, step: int, count: int, seed: int) -> tuple[list[np.ndarray], str]:
        """Draw pieces of text without replacement.

        The pieces lie within single documents if any document is long enough, else anywhere in the joined documents.

        Args:
            longest: Tokens of each piece.
            step: Tokens between the ends of two candidates.
            count: Maximum number of pieces.
            seed: Random seed.

        Returns:
            The pieces [longest], and words that say where they are from.
        """
        sources, where = [ids for ids in self.documents if len(ids) >= longest], "within documents"
        if not sources:
            sources, where = [self.stream], "across joined documents"
        ends = [(index, end) for index, ids in enumerate(sources) for end in range(longest, len(ids) + 1, step)]
        order = np.random.default_rng([seed, longest]).permutation(len(ends))[:count]
        return [sources[ends[i][0]][ends[i][1] - longest : ends[i][1]] for i in order], where


def _read_documents(text: str | Iterable[str]) -> tuple[str, Iterable[str]]:
    if not isinstance(text, str):
        return "given documents", text
    from ..data.text import held_out_split, iter_documents

    # Evaluate on the documents that a recipe with this source does not train on, where the source names them.
    split = held_out_split(text)
    return (f"{text}, held-out files" if split else text), iter_documents(text, split=split)


def whole_ids(tokenizer: Any, document: str) -> np.ndarray:
    """Return the ids [n] of a document.

    Its two halves together have a token or two more than the document. Many more tokens mean that the tokenizer cut it.

    Raises:
        PePatchError: The tokenizer cut the document.
    """
    ids = _plain_ids(tokenizer, document)
    head = document[:PIECE]  # longer documents are tokenised in pieces
    count = len(ids) if len(document) == len(head) else len(_plain_ids(tokenizer, head))
    middle = len(head) // 2
    halves = len(_plain_ids(tokenizer, head[:middle])) + len(_plain_ids(tokenizer, head[middle:]))
    if halves > count + 16:
        raise PePatchError(
            f"The tokenizer cut a document: its halves have {halves} tokens, the document has {count}. "
            "Load the tokenizer without truncation and with a model_max_length above all lengths."
        )
    return ids


def _plain_ids(tokenizer: Any, text: str) -> np.ndarray:
    return text_ids(tokenizer, text)
