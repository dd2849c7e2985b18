"""RULER's questions about documents: a few that hold the answer among many that do not."""

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
    """A question, its right answers, and by their numbers the documents that answer it and those close to them."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Documents:
    """Documents and questions about them."""

    texts: tuple[str, ...]
    items: tuple[Item, ...]
    name: str
    sha256: str
    official: bool = False


class Answering(Generator):
    """The haystack's unit is a document. A sample is the question of its number; there are no other facts."""

    budget = 32
    step = 10

    def __init__(self, tokens: Tokens, length: int, seed: int, wording: Wording, documents: Documents) -> None:
        super().__init__(tokens, length, seed)
        self.wording, self.documents = wording, documents

    def least(self, index: int) -> int:
        return len(self._item(index).gold)

    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        item = self._item(index)
        shown = self._choose(item, size)
        random.Random(self.seed).shuffle(shown)
        parts = [self.wording.document.format(i=number, document=text) for number, text in enumerate(shown, 1)]
        asking = self.wording.answer_from_documents
        text, prefix = asking.fill(context="\n\n".join(parts), query=item.query)
        bare, _ = asking.fill(context="", query=item.query)
        return Sample((Prompt(text, prefix, bare, item.answers),), size, [index])

    def _choose(self, item: Item, size: int) -> list[str]:
        """The documents of a question, then its neighbours, then any; all of them, repeated, where that is too few."""
        texts = self.documents.texts
        if size >= len(texts):
            return list((texts * -(-size // len(texts)))[:size])
        more = size - len(item.gold)
        if more > len(item.near):
            taken = {*item.gold, *item.near}
            others = [number for number in range(len(texts)) if number not in taken]
            picked = [*item.near, *self.draws.random.sample(others, more - len(item.near))]
        else:
            picked = self.draws.random.sample(item.near, more)
        return [texts[number] for number in (*item.gold, *picked)]

    def _item(self, index: int) -> Item:
        items = self.documents.items
        if index >= len(items):
            raise PePatchError(f"{self.documents.name} has {len(items)} questions, more were asked for.")
        return items[index]


@lru_cache(maxsize=2)
def load(path: str, source: Source) -> Documents:
    """The questions of a file in the form of SQuAD 2.0 or of HotpotQA.

    Raises:
        PePatchError: there is no such file, or it has another form.
    """
    file = Path(path).expanduser()
    text = read(file, "question file")
    content: Any = parse(text, file)
    reader, form, official = _FORMS[source]
    try:
        texts, items = reader(content)
    except (KeyError, TypeError, ValueError) as error:
        raise PePatchError(f"{file} is not in the form of {form} ({type(error).__name__}: {error}).") from error
    if not items:
        raise PePatchError(f"{file} holds no question that can be answered.")
    return Documents(texts, items, file.name, digest(text), official=len(items) == official)


def _squad(content: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Item, ...]]:
    articles = [article["paragraphs"] for article in content["data"]]
    texts, number = _numbered(paragraph["context"] for article in articles for paragraph in article)
    items = []
    for article in articles:
        article_numbers = [number[paragraph["context"]] for paragraph in article]
        for paragraph, own in zip(article, article_numbers, strict=True):
            near = tuple(each for each in article_numbers if each != own)
            items += [
                Item(asked["question"], tuple(answer["text"] for answer in asked["answers"]), (own,), near)
                for asked in paragraph["qas"]
                if not asked["is_impossible"]
            ]
    return texts, tuple(items)


def _hotpotqa(content: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], tuple[Item, ...]]:
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in content]
    texts, number = _numbered(text for context in contexts for text in context)
    items = tuple(
        Item(entry["question"], (entry["answer"],), tuple(number[text] for text in context))
        for entry, context in zip(content, contexts, strict=True)
    )
    return texts, items


def _numbered(texts: Any) -> tuple[tuple[str, ...], dict[str, int]]:
    """Each different text once, sorted, and its number."""
    ordered = tuple(sorted(set(texts)))
    return ordered, {text: number for number, text in enumerate(ordered)}


_FORMS: dict[Source, tuple[Any, str, int]] = {
    "squad": (_squad, "SQuAD 2.0", 5928),
    "hotpotqa": (_hotpotqa, "HotpotQA's distractor setting", 7405),
}
"""How each file is read, what its form is called, and how many questions with an answer the development set has."""
