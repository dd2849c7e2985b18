"""RULER's needles in a haystack: facts hidden in noise, in running text or among similar facts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...retrieval import TOKEN_KEYS
from .generator import Generator, Prompt, Sample, Tokens
from .material import DEPTHS, KINDS, Essay
from .wording import Wording

SHORT = 4096
"""The length in tokens below which RULER's scripts use smaller steps."""


@dataclass(frozen=True)
class Shape:
    """The haystack of a needle task and the facts in it."""

    haystack: Literal["noise", "essay", "needle"]
    keys: int = 1
    values: int = 1
    """The number of values per key."""
    queries: int = 1
    """The number of keys in a question."""
    key_kind: str = "words"
    value_kind: str = "numbers"

    @property
    def needles(self) -> int:
        """The number of hidden facts."""
        return max(self.keys, self.queries) * self.values

    @property
    def in_tokens(self) -> bool:
        """True if single tokens can replace keys and values: one value per key, and the default kinds."""
        return (self.values, self.key_kind, self.value_kind) == (1, "words", "numbers")


SHAPES = {
    "niah_single_1": Shape("noise"),
    "niah_single_2": Shape("essay"),
    "niah_single_3": Shape("essay", value_kind="uuids"),
    "niah_multikey_1": Shape("essay", keys=4),
    "niah_multikey_2": Shape("needle"),
    "niah_multikey_3": Shape("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Shape("essay", values=4),
    "niah_multiquery": Shape("essay", queries=4),
}
"""RULER's eight needle tasks."""
WITH_TOKENS = tuple(name for name, shape in SHAPES.items() if shape.in_tokens)


class Niah(Generator):
    """A generator whose unit is a line of noise, a word of running text or a distractor needle.

    The facts are [keys, the values of each key, the indices of the keys in the question].
    """

    budget = 128

    def __init__(
        self, tokens: Tokens, length: int, seed: int, shape: Shape, wording: Wording, essay: Essay | None = None
    ) -> None:
        super().__init__(tokens, length, seed)
        self.shape, self.wording, self.essay = shape, wording, essay
        self.step = 500 if shape.haystack == "essay" else 5 if length < SHORT else 25

    def min_size(self, index: int) -> int:
        return 0 if self.shape.haystack == "essay" else self.shape.needles

    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        keys, values = facts[:2] if facts else self.draw_keys()
        needles = [
            self.needle(key, value) for key, values_of_key in zip(keys, values, strict=True) for value in values_of_key
        ]
        random.Random(self.seed).shuffle(needles)
        context = self.hide(needles, size, keys)
        asked = facts[2] if facts else self.draws.random.sample(range(len(keys)), self.shape.queries)
        return Sample(self.ask(context, keys, values, asked), size, [keys, values, asked])

    def draw_keys(self) -> tuple[list[str], list[list[str]]]:
        """Draw the keys, each before its values, and return both."""
        keys, values = [], []
        for _ in range(max(self.shape.keys, self.shape.queries)):
            keys.append(self._new(self.shape.key_kind))
            values.append([self._new(self.shape.value_kind) for _ in range(self.shape.values)])
        return keys, values

    def needle(self, key: str, value: str) -> str:
        """Return the sentence that states a fact."""
        return self.wording.needle.format(type_needle_v=self.shape.value_kind, key=key, value=value)

    def hide(self, needles: list[str], size: int, keys: Sequence[str]) -> str:
        """Return a haystack of `size` units with the needles in it."""
        if self.shape.haystack == "essay":
            return self._between_sentences(needles, size)
        lines = [self.wording.noise] * size if self.shape.haystack == "noise" else self.distractors(size, keys)
        places = sorted(self.draws.random.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def distractors(self, size: int, keys: Sequence[str]) -> list[str]:
        """Return `size` needles that no question asks for."""
        return [self.needle(self._new(self.shape.key_kind), self._new(self.shape.value_kind)) for _ in range(size)]

    def ask(
        self, context: str, keys: Sequence[str], values: Sequence[Sequence[str]], asked: Sequence[int]
    ) -> tuple[Prompt, ...]:
        """Return the questions about the keys with the indices `asked`."""
        single = self.shape.queries * self.shape.values == 1
        template = self.wording.one_value if single else self.wording.all_values
        fields = {
            "type_needle_v": self.shape.value_kind[:-1] if single else self.shape.value_kind,
            "query": _enumerated([keys[index] for index in asked]),
        }
        text, prefix = template.fill(context=context, **fields)
        bare, _ = template.fill(context="", **fields)
        return (Prompt(text, prefix, bare, tuple(value for index in asked for value in values[index])),)

    def _between_sentences(self, needles: list[str], size: int) -> str:
        assert self.essay is not None
        sentences = self.essay.sentences(size)
        cuts = sorted(int(len(sentences) * (depth / 100)) for depth in self.draws.random.sample(DEPTHS, len(needles)))
        segments, start = [], 0
        for cut, needle in zip(cuts, needles, strict=True):
            segments += [" ".join(sentences[start:cut]), needle]
            start = cut
        return " ".join([*segments, " ".join(sentences[start:])])

    def _new(self, kind: str) -> str:
        return KINDS[kind](self.draws.random)


class TokenNiah(Niah):
    """A generator with single tokens for keys and values: a needle is a key with its value, a question is a key.

    There are 64 keys. More distractors repeat keys with the same value. Each key gets a separate question, because an
    answer of one token cannot contain several values. The mean over the questions is still the share of references
    found.
    """

    budget = 1

    def draw_keys(self) -> tuple[list[str], list[list[str]]]:
        """Draw every key at most once, so that no two needles contradict each other."""
        order = self.draws.random.sample(range(TOKEN_KEYS), TOKEN_KEYS)
        hidden = order[: max(self.shape.keys, self.shape.queries)]
        return [f"<k{key}>" for key in hidden], [[self._value()] for _ in hidden]

    def needle(self, key: str, value: str) -> str:
        return f"{key}{value}"

    def distractors(self, size: int, keys: Sequence[str]) -> list[str]:
        others = [key for key in (f"<k{number}>" for number in range(TOKEN_KEYS)) if key not in keys]
        self.draws.random.shuffle(others)
        others = others[:size]
        needles = [self.needle(key, self._value()) for key in others]
        return needles + self.draws.random.choices(needles, k=size - len(needles))

    def ask(
        self, context: str, keys: Sequence[str], values: Sequence[Sequence[str]], asked: Sequence[int]
    ) -> tuple[Prompt, ...]:
        gap = " " if self.shape.haystack == "essay" else "\n"
        return tuple(Prompt(f"{context}{gap}{keys[index]}", "", keys[index], tuple(values[index])) for index in asked)

    def _value(self) -> str:
        return f"<v{self.draws.random.randrange(TOKEN_KEYS)}>"


def _enumerated(names: list[str]) -> str:
    return ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
