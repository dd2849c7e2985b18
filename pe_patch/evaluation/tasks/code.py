"""Questions about real source code: how a function that is defined somewhere in it is written."""

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
"""The longest function that is asked for: it must fit the least length too."""
CLOSE = 12
"""Tokens left over that no further statement is looked for."""
SPARE = 4
"""Tokens that an answer may take beside the right one."""
GAP = "\n\n"


@dataclass(frozen=True)
class CodeParameters(QuestionTask):
    """The parameters of a function, to be written as they stand in its definition.

    The text is whole top-level statements of real Python files, in their order, from a random place on. The function,
    from another file, stands at the depth. Its name is defined once in all of the text, and its parameters, in their
    brackets, are written nowhere else. Where the text has fewer of them than are asked for, they come again in other
    surroundings, and rows tell how many different ones there were. A model may know a library by heart: the score
    without the text tells.
    """

    name: ClassVar[str] = "code_parameters"
    summary: ClassVar[str] = "the parameters of a function in real Python files are asked for"
    paper: ClassVar[str] = "Kamradt 2023, https://github.com/gkamradt/LLMTest_NeedleInAHaystack (the idea, on code)"
    by_depth: ClassVar[bool] = True
    same_at_every_length: ClassVar[bool] = True

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        """The functions, and where the text around them starts, do not depend on the length."""
        code = read_code(tuple(context.corpus.texts))
        seeds = [context.seed, zlib.crc32(self.name.encode()), round((depth or 0.0) * 1e6)]
        rng = np.random.default_rng(seeds)
        functions = self._functions(context, code, rng)
        count = context.samples_per_depth
        stamps = {"different_functions": min(len(functions), count)}
        return [
            replace(_question(context, code, function, within or length, depth or 0.0, start), stamps=stamps)
            for function, start in zip(islice(cycle(functions), count), rng.random(count).tolist(), strict=True)
        ]

    def _functions(self, context: EvaluationContext, code: Code, rng: np.random.Generator) -> list[Block]:
        """Different functions, as many as there are samples if the text has them."""
        candidates = [block for block in code.blocks if block.parameters]
        found: list[Block] = []
        for index in rng.permutation(len(candidates)):
            block = candidates[index]
            if len(found) < context.samples_per_depth and context.count(block.text) <= ASKED_TOKENS:
                found += [block] if code.says_once(block) else []
        if not found:
            raise PePatchError(
                f"The text ({context.corpus.name}) has no function in Python that can be asked for. Give source code: "
                "text='stdlib', or a folder of .py files."
            )
        return found

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """1 where the answer begins with the parameters and the bracket that closes them, white space apart."""
        return float(_tight(prediction).startswith(_tight(references[0]) + ")"))

    def measure(self) -> str:
        return "share of exact parameters"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return (
            f"{len(questions)} functions at each depth, among whole statements of Python files of "
            f"{context.corpus.name}; greedy answer begins with the right parameters"
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
    least = text_size(context, _prompt([asked], asked.name), lead)
    if least > room:
        raise PePatchError(
            f"A question about {asked.name!r} takes {least} tokens without any text around it, and there is room for "
            f"{room} beside its answer. Ask for a greater length."
        )
    before, after = _around(context, code, asked, room - least, depth, start)
    while (excess := text_size(context, _prompt([*before, asked, *after], asked.name), lead) - room) > 0:
        lost = least_loss(context, [*before, *after], excess)
        (before if lost in before else after).remove(lost)
    sizes = [sum(block_size(context, block) for block in side) for side in (before, after)]
    return Question(
        prompt=context.prompt(_prompt([*before, asked, *after], asked.name), lead),
        references=(asked.parameters,),
        budget=budget,
        without_context=context.prompt(_prompt([], asked.name), lead),
        depth=sizes[0] / sum(sizes) if sum(sizes) else 0.0,
    )


def _around(
    context: EvaluationContext, code: Code, asked: Block, room: int, depth: float, start: float
) -> tuple[list[Block], list[Block]]:
    """Statements of other files that fill the room before and after the function, from a place on in their order."""
    first = int(start * len(code.blocks))
    others = iter([block for block in [*code.blocks[first:], *code.blocks[:first]] if block.document != asked.document])
    before, left = fill(context, others, round(depth * room))
    after, left = fill(context, others, room - sum(block_size(context, block) for block in before))
    if left > max(2 * CLOSE, room // 20):
        raise PePatchError(
            f"The text ({context.corpus.name}) has too little Python code: {left} of {room} tokens stay empty. "
            "Give more source code."
        )
    return before, after


def fill(context: EvaluationContext, blocks: Iterator[Block], room: int) -> tuple[list[Block], int]:
    """The next statements that fit, those that do not being passed over, and the tokens that are left."""
    chosen: list[Block] = []
    while room >= CLOSE and (block := next(blocks, None)) is not None:
        size = block_size(context, block)
        if size <= room:
            chosen.append(block)
            room -= size
    return chosen, room


def least_loss(context: EvaluationContext, blocks: Sequence[Block], excess: int) -> Block:
    """The statement to leave out where they are too long together: joined, some take a token more than by themselves.

    It is the smallest that makes up for the excess, or else the greatest.
    """
    by_size = sorted(blocks, key=partial(block_size, context))
    return next((block for block in by_size if block_size(context, block) >= excess), by_size[-1])


def block_size(context: EvaluationContext, block: Block) -> int:
    """Tokens of a statement and the empty line after it."""
    return context.count(block.text + GAP)


def _prompt(blocks: Sequence[Block], name: str) -> str:
    code = GAP.join(block.text for block in blocks)
    return (
        f"Source code in Python:\n\n{code}\n\nHow does the definition of the function {name} begin in this code? Write "
        "it with its parameters exactly as they stand there.\n\n"
    )


def _tight(text: str) -> str:
    return "".join(text.split())


CODE: Mapping[str, type[QuestionTask]] = {CodeParameters.name: CodeParameters}
