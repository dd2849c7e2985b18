"""Variants of InfiniteBench's generated tasks for any length, without data and with our wording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ....errors import OptionError, unknown
from ...context import EvaluationContext
from ...question import Question
from ..generated import GeneratedQuestion, GeneratedTask
from . import scoring

NOISE = "Rain falls on the hill. A dog sleeps at the gate. The mill turns. Nobody comes, and nobody leaves.\n"
PAPER = "Zhang et al. 2024, arXiv 2402.13718 (the idea; wording and generator are ours)"


@dataclass(frozen=True)
class _InNoise(GeneratedTask):
    """A task that asks for digits hidden in repeated lines of noise."""

    paper: ClassVar[str] = PAPER
    by_depth: ClassVar[bool] = True
    same_at_every_length: ClassVar[bool] = True
    needle: ClassVar[str] = ""
    question: ClassVar[str] = ""
    lead: ClassVar[str] = ""

    def digits(self, rng: np.random.Generator) -> str:
        """Draw the digits to hide."""
        raise NotImplementedError

    def draw_question(self, context: EvaluationContext, rng: np.random.Generator, depth: float) -> GeneratedQuestion:
        digits = self.digits(rng)
        needle = self.needle.format(digits=digits)

        def text(lines: int) -> str:
            before = round(depth * lines)
            return f"{NOISE * before}{needle}{NOISE * (lines - before)}\n{self.question}"

        return GeneratedQuestion(text, self.question, self.lead, lambda lines: digits, digits)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the first number of the answer is the right one, else 0."""
        return scoring.first_integer(prediction, references)

    def measure(self) -> str:
        return "share of exact numbers"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return (
            f"{len(questions)} questions at each depth, in repeated lines of noise; first number of the greedy answer"
        )


@dataclass(frozen=True)
class NoisePasskey(_InNoise):
    """A task that asks for five random digits in noise."""

    name: ClassVar[str] = "noise_passkey"
    summary: ClassVar[str] = "retrieve five digits hidden in repeated lines of noise"
    needle: ClassVar[str] = "Mark this: the gate opens with the number {digits}, and with {digits} alone.\n"
    question: ClassVar[str] = "Which number opens the gate?\n"
    lead: ClassVar[str] = "The gate opens with the number"

    def digits(self, rng: np.random.Generator) -> str:
        return "".join(map(str, rng.integers(0, 10, 5)))


@dataclass(frozen=True)
class NoiseDigits(_InNoise):
    """A task that asks for ten digits in noise: five random ones, and five that repeat a neighbor."""

    name: ClassVar[str] = "noise_digits"
    summary: ClassVar[str] = "retrieve ten digits with repetitions hidden in repeated lines of noise"
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
class ListFind(GeneratedTask):
    """A task that asks for one of the largest or smallest numbers of a list; equal numbers count as one.

    Args:
        place: the rank to ask for: "largest", "second largest", "third largest", or the same with "smallest". None
            draws one for each question.
    """

    place: str | None = None

    paper: ClassVar[str] = PAPER
    name: ClassVar[str] = "list_find"
    summary: ClassVar[str] = "find the largest, second largest, ... smallest number of a long list"
    min_units: ClassVar[int] = 12
    span: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        if self.place is not None and self.place not in PLACES:
            raise unknown("place", self.place, PLACES)

    def draw_question(self, context: EvaluationContext, rng: np.random.Generator, depth: float) -> GeneratedQuestion:
        place = str(rng.choice(list(PLACES))) if self.place is None else self.place
        # Each list has different bounds. Otherwise the answer for a long list would always be 0 or 999.
        low, high = int(rng.integers(0, 200)), int(rng.integers(800, self.span))
        numbers: list[int] = rng.permutation(np.arange(low, high + 1))[: self.min_units].tolist()

        def first(count: int) -> list[int]:
            while count > len(numbers):  # a fixed number per draw, so that the numbers do not depend on the calls
                numbers.extend(rng.integers(low, high + 1, 1024).tolist())
            return numbers[:count]

        question = f"Which is the {place} number of the list? Equal numbers count as one.\n"
        return GeneratedQuestion(
            text=lambda count: f"A list of numbers:\n\n{', '.join(map(str, first(count)))}\n\n{question}",
            bare=question,
            lead=f"The {place} number is",
            answer=lambda count: str(PLACES[place](sorted(set(first(count))))),
            widest=str(self.span - 1),
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the first number of the answer is the right one, else 0."""
        return scoring.first_number(prediction, references)

    def measure(self) -> str:
        return "share of exact numbers"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return f"{len(questions)} questions about lists of random numbers; first number of the greedy answer"


@dataclass(frozen=True)
class CallChain(GeneratedTask):
    """A task that asks for the value of a function at the start of a chain of calls.

    The file has several functions in each layer, and each calls a function of the next layer.

    Args:
        layers: the number of functions in the chain.
    """

    layers: int = 4

    paper: ClassVar[str] = PAPER
    name: ClassVar[str] = "call_chain"
    summary: ClassVar[str] = "compute a function that calls through a long file of functions"

    def __post_init__(self) -> None:
        if self.layers < 2:
            raise OptionError(f"layers, the number of functions in the chain, must be at least 2; got {self.layers}.")

    def draw_question(self, context: EvaluationContext, rng: np.random.Generator, depth: float) -> GeneratedQuestion:
        argument = int(rng.integers(-10, 11))
        shifts = [int(shift) for shift in rng.integers(-12, 18, self.layers)]
        seed = int(rng.integers(2**32))
        bare = "What does {asked} return? Write the number alone.\n"

        def file(groups: int) -> tuple[str, str]:
            """Return a file with `groups` functions per layer, sorted by name, and the call of the question."""
            draw = np.random.default_rng(seed)
            total = groups * self.layers
            names = [int(name) for name in draw.permutation(np.arange(1, 2 * total + 1))[:total]]
            lines = {}
            for place, name in enumerate(names):
                layer = place // groups
                asked = place % groups == 0
                shift = shifts[layer] if asked else int(draw.integers(-12, 18))
                last = layer == self.layers - 1
                callee = (layer + 1) * groups + (0 if asked or groups == 1 else int(draw.integers(groups)))
                inner = "x" if last else f"step_{names[callee]}(x)"
                lines[name] = f"def step_{name}(x):\n    return {inner} {'-' if shift < 0 else '+'} {abs(shift)}\n"
            return "\n".join(lines[name] for name in sorted(lines)), f"step_{names[0]}({argument})"

        def text(groups: int) -> str:
            code, call = file(groups)
            return f"{code}\n{bare.format(asked=call)}"

        return GeneratedQuestion(
            text=text,
            bare=bare.format(asked=f"step_1({argument})"),
            lead="The value is",
            answer=lambda groups: str(argument + sum(shifts)),
            widest=str(-12 * self.layers - 10),
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the first integer of the answer, with its sign, is the right one, else 0."""
        return scoring.first_signed(prediction, references)

    def measure(self) -> str:
        return f"share of exact values, {self.layers} calls"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return f"{len(questions)} questions about files of small functions; first number of the greedy answer"


GENERATED = {task.name: task for task in (NoisePasskey, NoiseDigits, ListFind, CallChain)}
