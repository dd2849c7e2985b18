"""How a generated text is made as long as it may be: whole units, none of them cut."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import PePatchError
from ..context import EvaluationContext

REACH = 64
"""Units tried to find out how many tokens one takes."""


def most(size: Callable[[int], int], room: int, least: int, what: str) -> int:
    """The greatest number of units, at least `least`, whose text `size(number)` has at most `room` tokens.

    Sizes must not fall as units are added. Where not even `least` fit, raises `PePatchError` naming `what`.
    """
    low, low_size = least, size(least)
    if low_size > room:
        raise PePatchError(
            f"{what} takes at least {low_size} tokens beside its answer, and there is room for {room}. "
            "Ask for a greater length."
        )
    high, high_size = None, 0
    step = REACH
    while high is None or high - low > 1:
        guess = low + step if high is None else min(max(low + step, low + 1), high - 1)
        found = size(guess)
        if found <= room:
            each = max((found - low_size) / (guess - low), 1e-3)
            low, low_size = guess, found
        else:
            high, high_size = guess, found
            each = (high_size - low_size) / (high - low)
        # Where sizes grow evenly this is the answer; one more makes the next guess the first that is too long.
        step = max(1, int((room - low_size) / max(each, 1e-3)) + (high is None))
    return low


def text_size(context: EvaluationContext, text: str, lead: str = "") -> int:
    """How many tokens a prompt takes. Not kept, unlike `context.count`: such texts are long and used once."""
    tokenizer, frame = context.model.tokenizer, context.template
    if frame.chat:
        whole = f"{frame.head}{text}{frame.tail}{lead}"
        return len(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])
    return len(frame.head_ids(tokenizer)) + len(
        tokenizer(text + lead, add_special_tokens=False, verbose=False)["input_ids"]
    )
