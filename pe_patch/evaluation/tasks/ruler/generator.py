"""Samples one after another, in the order in which RULER's scripts draw at random, and how much text each one gets."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....errors import PePatchError

VERSION = 1
"""Raised with every change that gives other samples for the same seed."""
ROUNDS = 3
"""The search's upper end, as a multiple of what the first sample lets expect."""
REDRAWS = 20
"""How often a sample that cannot be made smaller is drawn again; RULER's scripts do so until one happens to fit."""

Tokens = Callable[[str, str], int]
"""How many tokens a text and the beginning of its answer have together."""


@dataclass(frozen=True)
class Prompt:
    """What the model is given: a text, and the beginning of its answer. `bare` is the text without its context."""

    text: str
    answer_prefix: str
    bare: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One sample: its questions (they share a context), its haystack's size in units, and what makes it what it is.

    `facts` (JSON-able) is what a control asks again in a haystack of another size.
    """

    prompts: tuple[Prompt, ...]
    size: int
    facts: Any


class Draws:
    """The two streams of random numbers that RULER's scripts use, and no one else's."""

    def __init__(self, seed: int) -> None:
        self.random, self.numpy = random.Random(seed), np.random.RandomState(seed)

    def state(self) -> tuple[Any, Any]:
        return self.random.getstate(), self.numpy.get_state()

    def restore(self, state: tuple[Any, Any]) -> None:
        self.random.setstate(state[0])
        self.numpy.set_state(state[1])


class Generator(ABC):
    """Makes the samples of one task.

    `length` is the most tokens of a prompt and its answer together, `tokens` counts. Each draw takes from the streams
    what RULER's script takes, in its order; the trials of the search for a size are part of the order.
    """

    budget: int
    """Tokens kept free for the answer."""
    step: int
    """How much smaller, in units, the haystack of a sample that is too long becomes."""
    extra = 0
    """Tokens that the search adds to every trial."""

    def __init__(self, tokens: Tokens, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.draws = Draws(seed)
        self.endless = 0
        """Samples so far that RULER's script would have tried for ever; they were fitted instead."""
        self._previous: tuple[int, float] | None = None

    @abstractmethod
    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        """The sample of this number with `size` units of haystack; given facts are kept and not drawn."""

    def least(self, index: int) -> int:
        """The fewest units that a sample can have."""
        return 0

    def samples(self, count: int, exact_fit: bool = False) -> Iterator[Sample]:
        """The first `count` samples: sized as RULER sizes them, or with all the haystack that fits."""
        size = None if exact_fit else self.search()
        for index in range(count):
            yield self.fit(index) if size is None else self.sized(index, size)

    def again(self, facts: Sequence[Any]) -> Iterator[Sample]:
        """Samples with facts of other samples, in all the haystack that fits."""
        for index, each in enumerate(facts):
            yield self.fit(index, each)

    def plausible(self, size: int) -> None:
        """Refuse to go on for ever with a tokenizer for which more text is not more tokens.

        Raises:
            PePatchError: so many units must be longer than the length.
        """
        if size > 16 * self.length + 1024:
            raise PePatchError(
                f"{size} units of text still fit {self.length} tokens: this tokenizer does not count them. "
                "Check that it is the model's own and loaded as a whole."
            )

    def measure(self, sample: Sample) -> int:
        """The tokens of a sample's prompt; where it has several questions they have equally many."""
        return self.tokens(sample.prompts[0].text, sample.prompts[0].answer_prefix)

    def trial(self, size: int) -> int:
        """The tokens of one trial of the search."""
        return self.measure(self.draw(size, 0))

    def bounds(self) -> tuple[int, int]:
        """Between which sizes the search looks, after a first trial."""
        each = self.trial(self.step) / self.step
        return self.step, max(int((self.length / each) * ROUNDS), 2 * self.step)

    def search(self) -> int:
        """The greatest size whose trial fits, by bisection; the smallest where none does."""
        low, high = self.bounds()
        found = self.step
        while low <= high:
            middle = (low + high) // 2
            if self.trial(middle) + self.extra + self.budget <= self.length:
                found, low = middle, middle + 1
            else:
                high = middle - 1
        return found

    def sized(self, index: int, size: int) -> Sample:
        """A sample of this size, made smaller by the step and drawn anew while it is too long."""
        drawn_again = 0
        while size >= self.least(index) and drawn_again <= REDRAWS:
            sample = self.draw(size, index)
            if self.measure(sample) + self.budget <= self.length:
                return sample
            if size > self.step:
                size -= self.step
            else:
                drawn_again += 1
        self.endless += 1
        return self.fit(index)

    def fit(self, index: int, facts: Any = None) -> Sample:
        """A sample with as many units as fit, each trial drawn from the same state of the streams.

        Raises:
            PePatchError: not even the smallest one fits.
        """
        start, room = self.draws.state(), self.length - self.budget
        low = self.least(index)
        best = self.draw(low, index, facts)
        after, shortest = self.draws.state(), self.measure(best)
        if shortest > room:
            raise PePatchError(
                f"{self.length} tokens are too few: without more than its facts, the question and the {self.budget} "
                f"tokens of its answer take {shortest + self.budget}. Ask for a greater length."
            )
        bracket = _Bracket(low, shortest, room, self._previous)
        while (size := bracket.next()) is not None:
            self.plausible(size)
            self.draws.restore(start)
            sample = self.draw(size, index, facts)
            if bracket.tell(size, self.measure(sample)):
                best, after = sample, self.draws.state()
        self.draws.restore(after)
        self._previous = bracket.low, bracket.slope
        return best


class _Bracket:
    """Finds the greatest size within `room` of a count that grows about evenly, in few trials.

    It guesses along the straight line through what it knows, and halves every third time, so that it always ends.
    """

    def __init__(self, low: int, count: int, room: int, previous: tuple[int, float] | None) -> None:
        self.low, self.room = low, room
        self.slope = previous[1] if previous else 0.0
        self._count, self._first = count, previous[0] if previous else low + 64
        self._high: tuple[int, int] | None = None
        self._trials = 0

    def next(self) -> int | None:
        """The size to try, or None when it is found."""
        ceiling = None if self._high is None else self._high[0]
        if ceiling is not None and ceiling - self.low <= 1:
            return None
        self._trials += 1
        if self._trials == 1:
            guess = self._first
        elif ceiling is not None and self._trials % 3 == 0:
            guess = (self.low + ceiling) // 2
        else:
            guess = self.low + int((self.room - self._count) / self.slope)
        guess = max(guess, self.low + 1)
        return guess if ceiling is None else min(guess, ceiling - 1)

    def tell(self, size: int, count: int) -> bool:
        """Take in what a size counted; whether it fits."""
        self.slope = max((count - self._count) / (size - self.low), 1 / 64)
        if count > self.room:
            self._high = size, count
            return False
        self.low, self._count = size, count
        if self._high is not None:
            self.slope = max((self._high[1] - count) / (self._high[0] - size), 1 / 64)
        return True
