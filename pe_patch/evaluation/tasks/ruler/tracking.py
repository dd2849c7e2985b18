"""RULER's variable tracking: ask for the variables in a chain of assignments hidden in noise."""

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
    """A generator whose unit is a line of noise. The facts are [the variables of the chain in order, the value]."""

    letters = NAME_LETTERS

    def __init__(self, tokens: Tokens, length: int, seed: int, wording: Wording, draws: Draws | None = None) -> None:
        super().__init__(tokens, length, seed)
        self.wording, self.draws = wording, draws or self.draws

    def min_size(self, index: int) -> int:
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
        """Return the value of a chain."""
        return str(self.draws.numpy.randint(10000, 99999))

    def _new_chain(self) -> tuple[list[str], str]:
        names: list[str] = []
        while len(set(names)) <= HOPS:  # RULER's script fails if it draws a name twice, which is very rare
            names = [self._name(self.letters) for _ in range(HOPS + 1)]
        return names, self.value()

    def _name(self, letters: int) -> str:
        return "".join(self.draws.random.choices(string.ascii_uppercase, k=letters))


class _Example(_Chains):
    """The generator of the solved example before every question, of up to 500 tokens."""

    budget = 0
    step = 5
    letters = _EXAMPLE_LETTERS

    def value(self) -> str:
        return _EXAMPLE_VALUE


class Tracking(_Chains):
    """A generator that puts the solved example before each sample, with new names and a new value."""

    budget = 30

    def __init__(self, tokens: Tokens, length: int, seed: int, wording: Wording) -> None:
        super().__init__(tokens, length, seed, wording)
        self.step = 5 if length < SHORT else 10
        try:
            (example,) = _Example(tokens, _EXAMPLE_LENGTH, seed, wording, self.draws).samples(1)
        except PePatchError as error:
            raise PePatchError(f"The solved example of variable tracking is too long. {error}") from error
        (prompt,) = example.prompts
        self._example = f"{prompt.text}{prompt.answer_prefix} {' '.join(prompt.references)}\n"
        self.extra = tokens(self._example, "") - tokens("", "")

    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        sample = super().draw(size, index, facts)
        (prompt,) = sample.prompts
        head = self._new_example() + "\n"
        with_example = Prompt(head + prompt.text, prompt.answer_prefix, head + prompt.bare, prompt.references)
        return Sample((with_example,), sample.size, sample.facts)

    def trial(self, size: int) -> int:
        """Return the tokens of a trial without the example, so that it draws no new names; `extra` adds its tokens."""
        return self.measure(super().draw(size, 0))

    def _new_example(self) -> str:
        text = self._example
        for name in text.split()[-HOPS - 1 :]:
            text = text.replace(name, self._name(len(name)))
        return text.replace(_EXAMPLE_VALUE, self.value())
