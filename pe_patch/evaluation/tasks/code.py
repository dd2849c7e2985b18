"""Ask for the parameters of a function in real source code."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, ClassVar

import numpy as np

from ...errors import PePatchError
from ..context import EvaluationContext
from ..question import Question
from ..question_task import QuestionTask
from .code_blocks import Block, Code, read_code
from .filling import text_size

ASKED_TOKENS = 320
"""The largest size of a function in tokens, so that it fits the smallest length."""
CLOSE = 12
"""Tokens left over below which no further statement is tried."""
SPARE = 4
"""Tokens that an answer may have beyond the right one."""
GAP = "\n\n"


@dataclass(frozen=True)
class CodeParameters(QuestionTask):
    """A task that asks for the exact parameters in a function's definition.

    The text consists of whole top-level statements of real Python files, in order, from a random place on. The
    function, from another file, is at the depth. Its name is defined only once, and its parameters, in parentheses,
    occur nowhere else. If the text has fewer such functions than samples, they repeat in other surroundings, and the
    row states the number of different functions. A model may have memorized a library; the score without the text
    measures that.
    """

    name: ClassVar[str] = "code_parameters"
    summary: ClassVar[str] = "retrieve the parameters of a function in real Python files"
    paper: ClassVar[str] = "Kamradt 2023, https://github.com/gkamradt/LLMTest_NeedleInAHaystack (the idea, on code)"
    by_depth: ClassVar[bool] = True
    same_at_every_length: ClassVar[bool] = True

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        """Return questions whose functions and starting places do not depend on the length."""
        code = read_code(tuple(context.corpus.texts))
        seeds = [context.seed, zlib.crc32(self.name.encode()), round((depth or 0.0) * 1e6)]
        rng = np.random.default_rng(seeds)
        count = context.samples_at(depth)
        functions = self._functions(context, code, rng, count)
        stamps = {"different_functions": min(len(functions), count)}
        return [
            replace(_question(context, code, function, within or length, depth or 0.0, start), stamps=stamps)
            for function, start in zip(islice(cycle(functions), count), rng.random(count).tolist(), strict=True)
        ]

    def _functions(self, context: EvaluationContext, code: Code, rng: np.random.Generator, count: int) -> list[Block]:
        """Return up to `count` different functions."""
        candidates = [block for block in code.blocks if block.parameters]
        functions: list[Block] = []
        for index in rng.permutation(len(candidates)):
            block = candidates[index]
            if len(functions) < count and context.count(block.text) <= ASKED_TOKENS:
                functions += [block] if code.has_unique_parameters(block) else []
        if not functions:
            raise PePatchError(
                f"The text ({context.corpus.name}) has no function in Python that a question can ask for. Give source "
                "code: text='stdlib', or a folder of .py files."
            )
        return functions

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the answer begins with the parameters and a closing parenthesis, ignoring white space, else 0."""
        return float(_without_space(prediction).startswith(_without_space(references[0]) + ")"))

    def measure(self) -> str:
        return "share of exact parameters"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return (
            f"{len(questions)} functions at each depth, among whole statements of Python files of "
            f"{context.corpus.name}; "
            "greedy answer begins with the right parameters"
        )

    def stamps(self, context: EvaluationContext) -> dict[str, Any]:
        return {"generator": 1, "wording": "own"}


def _question(
    context: EvaluationContext, code: Code, asked: Block, length: int, depth: float, start: float
) -> Question:
    assert asked.parameters is not None
    lead = f"def {asked.name}("
    budget = context.count(asked.parameters + "):") + SPARE
    room = length - budget + 1
    minimum = text_size(context, _prompt([asked], asked.name), lead)
    if minimum > room:
        raise PePatchError(
            f"A question about {asked.name!r} takes {minimum} tokens without any text around it, and there is room for "
            f"{room} beside its answer. Ask for a greater length."
        )
    before, after = _surrounding_code(context, code, asked, room - minimum, depth, start)
    while (excess := text_size(context, _prompt([*before, asked, *after], asked.name), lead) - room) > 0:
        dropped = block_to_drop(context, [*before, *after], excess)
        (before if dropped in before else after).remove(dropped)
    sizes = [sum(block_size(context, block) for block in side) for side in (before, after)]
    return Question(
        prompt=context.prompt(_prompt([*before, asked, *after], asked.name), lead),
        references=(asked.parameters,),
        budget=budget,
        without_context=context.prompt(_prompt([], asked.name), lead),
        depth=sizes[0] / sum(sizes) if sum(sizes) else 0.0,
    )


def _surrounding_code(
    context: EvaluationContext, code: Code, asked: Block, room: int, depth: float, start: float
) -> tuple[list[Block], list[Block]]:
    """Return statements of other files that fill the room before and after the function.

    Args:
        context: the evaluation.
        code: all statements.
        asked: the function of the question.
        room: the tokens to fill.
        depth: the share of the room before the function.
        start: the place of the first statement, from 0 to 1; the order wraps around.
    """
    first = int(start * len(code.blocks))
    others = iter([block for block in [*code.blocks[first:], *code.blocks[:first]] if block.document != asked.document])
    before, left = fill(context, others, round(depth * room))
    after, left = fill(context, others, room - sum(block_size(context, block) for block in before))
    if left > max(2 * CLOSE, room // 20):
        raise PePatchError(
            f"The text ({context.corpus.name}) has too little Python code: {left} of {room} tokens remain empty. "
            "Give more source code."
        )
    return before, after


def fill(context: EvaluationContext, blocks: Iterator[Block], room: int) -> tuple[list[Block], int]:
    """Return the next statements that fit, skipping those that do not, and the number of tokens left."""
    chosen: list[Block] = []
    while room >= CLOSE and (block := next(blocks, None)) is not None:
        size = block_size(context, block)
        if size <= room:
            chosen.append(block)
            room -= size
    return chosen, room


def block_to_drop(context: EvaluationContext, blocks: Sequence[Block], excess: int) -> Block:
    """Return the smallest statement with at least `excess` tokens, or else the largest one.

    Joined statements may take more tokens than the sum of their sizes, so one may have to be dropped.
    """
    by_size = sorted(blocks, key=partial(block_size, context))
    return next((block for block in by_size if block_size(context, block) >= excess), by_size[-1])


def block_size(context: EvaluationContext, block: Block) -> int:
    """Return the tokens of a statement and the empty line after it."""
    return context.count(block.text + GAP)


def _prompt(blocks: Sequence[Block], name: str) -> str:
    code = GAP.join(block.text for block in blocks)
    return (
        f"Source code in Python:\n\n{code}\n\nHow does the definition of the function {name} begin in this code? Write "
        "it with its parameters exactly as they stand there.\n\n"
    )


def _without_space(text: str) -> str:
    return "".join(text.split())


CODE: Mapping[str, type[QuestionTask]] = {CodeParameters.name: CodeParameters}
