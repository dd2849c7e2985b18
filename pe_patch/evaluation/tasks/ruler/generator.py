"""Generate samples with the random draws of RULER's scripts, and find the amount of text for each."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....errors import PePatchError

VERSION = 1
"""The version of the generators; raise it with every change that gives other samples for the same seed."""
UPPER_BOUND_FACTOR = 3
"""The upper end of the search, as a multiple of the size estimated from the first trial."""
REDRAWS = 20
"""How often to redraw a sample that cannot shrink further; RULER's scripts redraw without a limit."""

Tokens = Callable[[str, str], int]
"""Returns the tokens of a text and the beginning of its answer together."""


@dataclass(frozen=True)
class Prompt:
    """A prompt with its references."""

    text: str
    answer_prefix: str
    """The beginning of the answer, which follows the text."""
    bare: str
    """The text without its context."""
    references: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A sample: one or more questions about the same context."""

    prompts: tuple[Prompt, ...]
    size: int
    """The size of the haystack in units."""
    facts: Any
    """The facts of the sample as JSON data, from which a control asks the same questions in another haystack."""


class Draws:
    """The two streams of random numbers of RULER's scripts."""

    def __init__(self, seed: int) -> None:
        self.random, self.numpy = random.Random(seed), np.random.RandomState(seed)

    def state(self) -> tuple[Any, Any]:
        """Return the state of both streams."""
        return self.random.getstate(), self.numpy.get_state()

    def restore(self, state: tuple[Any, Any]) -> None:
        """Set both streams back to an earlier state."""
        self.random.setstate(state[0])
        self.numpy.set_state(state[1])


class Generator(ABC):
    """A generator of the samples of one task.

    Each draw takes the same random numbers as RULER's script, in the same order, including those for the trials of the
    search for a size.

    Args:
        tokens: counts the tokens of a text and the beginning of its answer.
        length: the largest number of tokens of a prompt and its answer together.
        seed: the random seed.
    """

    budget: int
    """Tokens reserved for the answer."""
    step: int
    """The units by which the haystack of a sample that is too long shrinks."""
    extra = 0
    """Tokens that the search adds to every trial."""

    def __init__(self, tokens: Tokens, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.draws = Draws(seed)
        self.endless = 0
        """The number of samples for which RULER's script would not terminate; `fit` sized them instead."""
        self._previous: tuple[int, float] | None = None

    @abstractmethod
    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        """Return sample number `index` with `size` units of haystack; `facts` replace drawn facts."""

    def min_size(self, index: int) -> int:
        """Return the smallest number of units of a sample."""
        return 0

    def samples(self, count: int, exact_fit: bool = False) -> Iterator[Sample]:
        """Yield the first `count` samples with RULER's sizes, or with all the haystack that fits for `exact_fit`."""
        size = None if exact_fit else self.search()
        for index in range(count):
            yield self.fit(index) if size is None else self.sized(index, size)

    def with_facts(self, facts: Sequence[Any]) -> Iterator[Sample]:
        """Yield samples with the facts of other samples, in all the haystack that fits."""
        for index, sample_facts in enumerate(facts):
            yield self.fit(index, sample_facts)

    def check_plausible(self, size: int) -> None:
        """Stop an endless search with a tokenizer for which more text does not give more tokens.

        Raises:
            PePatchError: if this many units cannot fit the length.
        """
        if size > 16 * self.length + 1024:
            raise PePatchError(
                f"{size} units of text still fit {self.length} tokens: this tokenizer does not count them. "
                "Check that it is the model's tokenizer and that it loaded completely."
            )

    def measure(self, sample: Sample) -> int:
        """Return the tokens of a sample's first prompt; other questions of the sample have equally many."""
        return self.tokens(sample.prompts[0].text, sample.prompts[0].answer_prefix)

    def trial(self, size: int) -> int:
        """Return the tokens of one trial of the search."""
        return self.measure(self.draw(size, 0))

    def bounds(self) -> tuple[int, int]:
        """Return the smallest and the largest size of the search, from a first trial."""
        tokens_per_unit = self.trial(self.step) / self.step
        return self.step, max(int((self.length / tokens_per_unit) * UPPER_BOUND_FACTOR), 2 * self.step)

    def search(self) -> int:
        """Return the largest size whose trial fits, by bisection, or `step` if none fits."""
        low, high = self.bounds()
        largest = self.step
        while low <= high:
            middle = (low + high) // 2
            if self.trial(middle) + self.extra + self.budget <= self.length:
                largest, low = middle, middle + 1
            else:
                high = middle - 1
        return largest

    def sized(self, index: int, size: int) -> Sample:
        """Return a sample of this size; shrink it by `step` and redraw it while it is too long."""
        redraws = 0
        while size >= self.min_size(index) and redraws <= REDRAWS:
            sample = self.draw(size, index)
            if self.measure(sample) + self.budget <= self.length:
                return sample
            if size > self.step:
                size -= self.step
            else:
                redraws += 1
        self.endless += 1
        return self.fit(index)

    def fit(self, index: int, facts: Any = None) -> Sample:
        """Return a sample with as many units as fit; each trial draws from the same state of the streams.

        Raises:
            PePatchError: if not even the smallest sample fits.
        """
        start, room = self.draws.state(), self.length - self.budget
        low = self.min_size(index)
        best = self.draw(low, index, facts)
        after, shortest = self.draws.state(), self.measure(best)
        if shortest > room:
            raise PePatchError(
                f"{self.length} tokens are too few: the smallest sample with the {self.budget} tokens of its answer "
                f"takes {shortest + self.budget}. Ask for a greater length."
            )
        bracket = _Bracket(low, shortest, room, self._previous)
        while (size := bracket.next()) is not None:
            self.check_plausible(size)
            self.draws.restore(start)
            sample = self.draw(size, index, facts)
            if bracket.update(size, self.measure(sample)):
                best, after = sample, self.draws.state()
        self.draws.restore(after)
        self._previous = bracket.low, bracket.slope
        return best


class _Bracket:
    """A search for the largest size within `room` tokens, with few trials if tokens grow about evenly with the size.

    It interpolates linearly and bisects at every third trial, so that it always terminates.
    """

    def __init__(self, low: int, count: int, room: int, previous: tuple[int, float] | None) -> None:
        self.low, self.room = low, room
        self.slope = previous[1] if previous else 0.0
        self._count, self._first = count, previous[0] if previous else low + 64
        self._high: tuple[int, int] | None = None
        self._trials = 0

    def next(self) -> int | None:
        """Return the next size to try, or None at the end of the search."""
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

    def update(self, size: int, count: int) -> bool:
        """Record the tokens of a size, and return whether it fits."""
        self.slope = max((count - self._count) / (size - self.low), 1 / 64)
        if count > self.room:
            self._high = size, count
            return False
        self.low, self._count = size, count
        if self._high is not None:
            self.slope = max((self._high[1] - count) / (self._high[0] - size), 1 / 64)
        return True
