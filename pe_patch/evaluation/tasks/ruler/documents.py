"""RULER's questions about a few documents with the answer among many without it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ....errors import PePatchError
from .generator import Generator, Prompt, Sample, Tokens
from .material import digest, parse, read
from .wording import Wording

Source = Literal["squad", "hotpotqa"]


@dataclass(frozen=True)
class Item:
    """A question with its right answers and its documents."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    """Indices of the documents that answer the question."""
    near: tuple[int, ...] = ()
    """Indices of related documents, which are used first as distractors."""


@dataclass(frozen=True)
class Documents:
    """Documents and questions about them."""

    texts: tuple[str, ...]
    items: tuple[Item, ...]
    name: str
    sha256: str
    official: bool = False
    """True if these are RULER's questions."""


class DocumentQuestions(Generator):
    """A generator whose unit is a document. The facts of a sample are the number of its question."""

    budget = 32
    step = 10

    def __init__(self, tokens: Tokens, length: int, seed: int, wording: Wording, documents: Documents) -> None:
        super().__init__(tokens, length, seed)
        self.wording, self.documents = wording, documents

    def min_size(self, index: int) -> int:
        return len(self._item(index).gold)

    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        item = self._item(index)
        shown = self._choose(item, size)
        random.Random(self.seed).shuffle(shown)
        numbered = [self.wording.document.format(i=number, document=text) for number, text in enumerate(shown, 1)]
        template = self.wording.answer_from_documents
        text, prefix = template.fill(context="\n\n".join(numbered), query=item.query)
        bare, _ = template.fill(context="", query=item.query)
        return Sample((Prompt(text, prefix, bare, item.answers),), size, [index])

    def _choose(self, item: Item, size: int) -> list[str]:
        """Return the documents of a question, then related ones, then others; repeat all if there are too few."""
        texts = self.documents.texts
        if size >= len(texts):
            return list((texts * -(-size // len(texts)))[:size])
        distractors = size - len(item.gold)
        if distractors > len(item.near):
            used = {*item.gold, *item.near}
            others = [number for number in range(len(texts)) if number not in used]
            picked = [*item.near, *self.draws.random.sample(others, distractors - len(item.near))]
        else:
            picked = self.draws.random.sample(item.near, distractors)
        return [texts[number] for number in (*item.gold, *picked)]

    def _item(self, index: int) -> Item:
        items = self.documents.items
        if index >= len(items):
            raise PePatchError(f"{self.documents.name} has only {len(items)} questions. Ask for fewer samples.")
        return items[index]


@lru_cache(maxsize=2)
def load(path: str, source: Source) -> Documents:
    """Load the questions of a file in the format of SQuAD 2.0 or of HotpotQA.

    Raises:
        PePatchError: if the file cannot be read, or has another format.
    """
    file = Path(path).expanduser()
    text = read(file, "question file")
    content: Any = parse(text, file)
    reader, format_name, official_count = _FORMATS[source]
    try:
        texts, items = reader(content)
    except (KeyError, TypeError, ValueError) as error:
        raise PePatchError(
            f"{file} is not in the format of {format_name} ({type(error).__name__}: {error})."
        ) from error
    if not items:
        raise PePatchError(f"{file} has no question with an answer.")
    return Documents(texts, items, file.name, digest(text), official=len(items) == official_count)


def _squad(content: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Item, ...]]:
    articles = [article["paragraphs"] for article in content["data"]]
    texts, index_of = _index_texts(paragraph["context"] for article in articles for paragraph in article)
    items = []
    for article in articles:
        article_indices = [index_of[paragraph["context"]] for paragraph in article]
        for paragraph, gold in zip(article, article_indices, strict=True):
            near = tuple(index for index in article_indices if index != gold)
            items += [
                Item(entry["question"], tuple(answer["text"] for answer in entry["answers"]), (gold,), near)
                for entry in paragraph["qas"]
                if not entry["is_impossible"]
            ]
    return texts, tuple(items)


def _hotpotqa(content: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], tuple[Item, ...]]:
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in content]
    texts, index_of = _index_texts(text for context in contexts for text in context)
    items = tuple(
        Item(entry["question"], (entry["answer"],), tuple(index_of[text] for text in context))
        for entry, context in zip(content, contexts, strict=True)
    )
    return texts, items


def _index_texts(texts: Any) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the different texts, sorted, and the index of each."""
    ordered = tuple(sorted(set(texts)))
    return ordered, {text: index for index, text in enumerate(ordered)}


_FORMATS: dict[Source, tuple[Any, str, int]] = {
    "squad": (_squad, "SQuAD 2.0", 5928),
    "hotpotqa": (_hotpotqa, "HotpotQA's distractor setting", 7405),
}
"""The reader of each format, its name, and the number of answerable questions in the development set."""
