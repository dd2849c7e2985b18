"""RULER's variable tracking: a chain of assignments hidden in noise; which variables have its value?"""

from __future__ import annotations

import string
from itertools import pairwise
from typing import Any

from ....errors import PePatchError
from .generator import Draws, Generator, Prompt, Sample, Tokens
from .niah import SHORT
from .wording import Wording

HOPS = 4
NAME_LETTERS = 5
_EXAMPLE_LETTERS, _EXAMPLE_VALUE, _EXAMPLE_LENGTH = 3, "12345", 500


class _Chains(Generator):
    """The haystack's unit is a line of noise. Facts are [the variables' names in their order, the value]."""

    letters = NAME_LETTERS

    def __init__(self, tokens: Tokens, length: int, seed: int, wording: Wording, draws: Draws | None = None) -> None:
        super().__init__(tokens, length, seed)
        self.wording, self.draws = wording, draws or self.draws

    def least(self, index: int) -> int:
        return HOPS + 1

    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        names, value = facts or self._new_chain()
        lines = [self.wording.noise] * size
        chain = [self.wording.assignment.format(names[0], value)]
        chain += [self.wording.link.format(name, source) for source, name in pairwise(names)]
        places = sorted(self.draws.random.sample(range(size), len(chain)))
        for shift, (place, line) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + shift, line)
        context = "\n".join(lines).replace(". \n", ".\n")
        fields = {"query": value, "num_v": HOPS + 1}
        text, prefix = self.wording.variables.fill(context=context, **fields)
        bare, _ = self.wording.variables.fill(context="", **fields)
        return Sample((Prompt(text, prefix, bare, tuple(names)),), size, [names, value])

    def value(self) -> str:
        return str(self.draws.numpy.randint(10000, 99999))

    def _new_chain(self) -> tuple[list[str], str]:
        names: list[str] = []
        while len(set(names)) <= HOPS:  # RULER's script stops where a name is drawn twice, which is very rare
            names = [self._name(self.letters) for _ in range(HOPS + 1)]
        return names, self.value()

    def _name(self, letters: int) -> str:
        return "".join(self.draws.random.choices(string.ascii_uppercase, k=letters))


class _Example(_Chains):
    """The solved example that stands before every question; it takes up to 500 tokens."""

    budget = 0
    step = 5
    letters = _EXAMPLE_LETTERS

    def value(self) -> str:
        return _EXAMPLE_VALUE


class Tracking(_Chains):
    """Each sample has the solved example before it, its names and its value replaced by new ones."""

    budget = 30

    def __init__(self, tokens: Tokens, length: int, seed: int, wording: Wording) -> None:
        super().__init__(tokens, length, seed, wording)
        self.step = 5 if length < SHORT else 10
        try:
            (made,) = _Example(tokens, _EXAMPLE_LENGTH, seed, wording, self.draws).samples(1)
        except PePatchError as error:
            raise PePatchError(f"Variable tracking shows a solved example, which is too long. {error}") from error
        (prompt,) = made.prompts
        self._example = f"{prompt.text}{prompt.answer_prefix} {' '.join(prompt.references)}\n"
        self.extra = tokens(self._example, "") - tokens("", "")

    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        sample = super().draw(size, index, facts)
        (prompt,) = sample.prompts
        head = self._new_example() + "\n"
        shown = Prompt(head + prompt.text, prompt.answer_prefix, head + prompt.bare, prompt.references)
        return Sample((shown,), sample.size, sample.facts)

    def trial(self, size: int) -> int:
        """Without the example, whose tokens the search adds as `extra`: no new names are drawn for it here."""
        return self.measure(super().draw(size, 0))

    def _new_example(self) -> str:
        text = self._example
        for name in text.split()[-HOPS - 1 :]:
            text = text.replace(name, self._name(len(name)))
        return text.replace(_EXAMPLE_VALUE, self.value())
