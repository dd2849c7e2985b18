"""Cousins of InfiniteBench's generated tasks, at any length and without any data: the ideas, in other words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ....errors import OptionError, unknown
from ...context import EvaluationContext
from ...question import Question
from ..generated import Drawn, Generated
from . import scoring

NOISE = "Rain falls on the hill. A dog sleeps at the gate. The mill turns. Nobody comes, and nobody leaves.\n"
PAPER = "Zhang et al. 2024, arXiv 2402.13718 (the idea; wording and generator are ours)"


@dataclass(frozen=True)
class _InNoise(Generated):
    """Digits said once in lines of noise that are all the same."""

    paper: ClassVar[str] = PAPER
    by_depth: ClassVar[bool] = True
    same_at_every_length: ClassVar[bool] = True
    needle: ClassVar[str] = ""
    question: ClassVar[str] = ""
    lead: ClassVar[str] = ""

    def digits(self, rng: np.random.Generator) -> str:
        raise NotImplementedError

    def drawn(self, context: EvaluationContext, rng: np.random.Generator, depth: float) -> Drawn:
        digits = self.digits(rng)
        needle = self.needle.format(digits=digits)

        def text(lines: int) -> str:
            before = round(depth * lines)
            return f"{NOISE * before}{needle}{NOISE * (lines - before)}\n{self.question}"

        return Drawn(text, self.question, self.lead, lambda lines: digits, digits)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """1 where the first number of the answer is the right one."""
        return scoring.first_integer(prediction, references)

    def measure(self) -> str:
        return "share of exact numbers"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return (
            f"{len(questions)} questions at each depth, in repeated lines of noise; first number of the greedy answer"
        )


@dataclass(frozen=True)
class NoisePasskey(_InNoise):
    """Five random digits."""

    name: ClassVar[str] = "noise_passkey"
    summary: ClassVar[str] = "five digits said once in repeated lines of noise are asked for"
    needle: ClassVar[str] = "Mark this: the gate opens with the number {digits}, and with {digits} alone.\n"
    question: ClassVar[str] = "Which number opens the gate?\n"
    lead: ClassVar[str] = "The gate opens with the number"

    def digits(self, rng: np.random.Generator) -> str:
        return "".join(map(str, rng.integers(0, 10, 5)))


@dataclass(frozen=True)
class NoiseDigits(_InNoise):
    """Ten digits in which neighbours repeat: five are random, and five repeat the digit before them."""

    name: ClassVar[str] = "noise_digits"
    summary: ClassVar[str] = "ten digits with repetitions, said once in repeated lines of noise, are asked for"
    needle: ClassVar[str] = "Mark this: the bell rings in the order {digits}, and in no order but {digits}.\n"
    question: ClassVar[str] = "In which order does the bell ring?\n"
    lead: ClassVar[str] = "The bell rings in the order"

    def digits(self, rng: np.random.Generator) -> str:
        digits = list(map(str, rng.integers(0, 10, 5)))
        for _ in range(5):
            place = int(rng.integers(len(digits)))
            digits.insert(place, digits[place])
        return "".join(digits)


PLACES: dict[str, Callable[[list[int]], float]] = {
    "largest": lambda distinct: distinct[-1],
    "second largest": lambda distinct: distinct[-2],
    "third largest": lambda distinct: distinct[-3],
    "smallest": lambda distinct: distinct[0],
    "second smallest": lambda distinct: distinct[1],
    "third smallest": lambda distinct: distinct[2],
}


@dataclass(frozen=True)
class ListFind(Generated):
    """The largest, the smallest or one next to it of a list of whole numbers; equal ones count as one.

    Args:
        place: which one: "largest", "second largest", "third largest", and so on with "smallest"; None takes turns.
    """

    place: str | None = None

    paper: ClassVar[str] = PAPER
    name: ClassVar[str] = "list_find"
    summary: ClassVar[str] = "the largest, second largest, ... smallest number of a long list is asked for"
    least: ClassVar[int] = 12
    span: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        if self.place is not None and self.place not in PLACES:
            raise unknown("place", self.place, PLACES)

    def drawn(self, context: EvaluationContext, rng: np.random.Generator, depth: float) -> Drawn:
        place = str(rng.choice(list(PLACES))) if self.place is None else self.place
        # Bounds of its own for each list: else the answer of a long one would always be 0 or 999.
        low, high = int(rng.integers(0, 200)), int(rng.integers(800, self.span))
        numbers: list[int] = rng.permutation(np.arange(low, high + 1))[: self.least].tolist()

        def of(count: int) -> list[int]:
            while count > len(numbers):  # always as many at once: what is drawn must not depend on who asks
                numbers.extend(rng.integers(low, high + 1, 1024).tolist())
            return numbers[:count]

        question = f"Which is the {place} number of the list? Equal numbers count as one.\n"
        return Drawn(
            text=lambda count: f"A list of numbers:\n\n{', '.join(map(str, of(count)))}\n\n{question}",
            bare=question,
            lead=f"The {place} number is",
            answer=lambda count: str(PLACES[place](sorted(set(of(count))))),
            widest=str(self.span - 1),
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """1 where the first number of the answer is the right one."""
        return scoring.first_number(prediction, references)

    def measure(self) -> str:
        return "share of exact numbers"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return f"{len(questions)} questions about lists of random numbers; first number of the greedy answer"


@dataclass(frozen=True)
class CallChain(Generated):
    """What a function returns that calls another, which calls another: one is in each layer, among others like it.

    Args:
        layers: functions that must be followed, the first and the last among them.
    """

    layers: int = 4

    paper: ClassVar[str] = PAPER
    name: ClassVar[str] = "call_chain"
    summary: ClassVar[str] = "the value of a function that calls through a long file of others is asked for"

    def __post_init__(self) -> None:
        if self.layers < 2:
            raise OptionError(f"layers is the number of functions in a chain, at least 2; got {self.layers}.")

    def drawn(self, context: EvaluationContext, rng: np.random.Generator, depth: float) -> Drawn:
        argument = int(rng.integers(-10, 11))
        shifts = [int(shift) for shift in rng.integers(-12, 18, self.layers)]
        seed = int(rng.integers(2**32))
        bare = "What does {asked} return? Write the number alone.\n"

        def file(groups: int) -> tuple[str, str]:
            """So many functions in each layer, in the order of their names, and the call that is asked for."""
            draw = np.random.default_rng(seed)
            total = groups * self.layers
            names = [int(name) for name in draw.permutation(np.arange(1, 2 * total + 1))[:total]]
            lines = {}
            for place, name in enumerate(names):
                layer = place // groups
                asked = place % groups == 0
                shift = shifts[layer] if asked else int(draw.integers(-12, 18))
                last = layer == self.layers - 1
                follows = (layer + 1) * groups + (0 if asked or groups == 1 else int(draw.integers(groups)))
                inner = "x" if last else f"step_{names[follows]}(x)"
                lines[name] = f"def step_{name}(x):\n    return {inner} {'-' if shift < 0 else '+'} {abs(shift)}\n"
            return "\n".join(lines[name] for name in sorted(lines)), f"step_{names[0]}({argument})"

        def text(groups: int) -> str:
            code, call = file(groups)
            return f"{code}\n{bare.format(asked=call)}"

        return Drawn(
            text=text,
            bare=bare.format(asked=f"step_1({argument})"),
            lead="The value is",
            answer=lambda groups: str(argument + sum(shifts)),
            widest=str(-12 * self.layers - 10),
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """1 where the first whole number of the answer, sign included, is the right one."""
        return scoring.first_signed(prediction, references)

    def measure(self) -> str:
        return f"share of exact values, {self.layers} calls"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return f"{len(questions)} questions about files of small functions; first number of the greedy answer"


GENERATED = {task.name: task for task in (NoisePasskey, NoiseDigits, ListFind, CallChain)}
