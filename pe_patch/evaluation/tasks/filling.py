"""Find the largest number of whole text units that fits a length."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import PePatchError
from ..context import EvaluationContext

FIRST_STEP = 64
"""Units added in the first guess, to estimate the tokens per unit."""


def largest_fit(size: Callable[[int], int], room: int, minimum: int, name: str) -> int:
    """Return the largest number of units whose text fits.

    Args:
        size: returns the tokens of a text with this number of units; must not decrease.
        room: the largest number of tokens.
        minimum: the smallest number of units.
        name: the subject of the error message.

    Raises:
        PePatchError: if the text with `minimum` units exceeds `room`.
    """
    low, low_size = minimum, size(minimum)
    if low_size > room:
        raise PePatchError(
            f"{name} takes at least {low_size} tokens beside its answer, and there is room for {room}. "
            "Ask for a greater length."
        )
    high, high_size = None, 0
    step = FIRST_STEP
    while high is None or high - low > 1:
        guess = low + step if high is None else min(max(low + step, low + 1), high - 1)
        guess_size = size(guess)
        if guess_size <= room:
            tokens_per_unit = max((guess_size - low_size) / (guess - low), 1e-3)
            low, low_size = guess, guess_size
        else:
            high, high_size = guess, guess_size
            tokens_per_unit = (high_size - low_size) / (high - low)
        # If sizes grow evenly, this step reaches the result. One more makes the next guess the first that is too long.
        step = max(1, int((room - low_size) / max(tokens_per_unit, 1e-3)) + (high is None))
    return low


def text_size(context: EvaluationContext, text: str, lead: str = "") -> int:
    """Return the tokens of a prompt, without the cache of `context.count`: such texts are long and used once."""
    tokenizer, frame = context.model.tokenizer, context.template
    if frame.chat:
        prompt = f"{frame.head}{text}{frame.tail}{lead}"
        return len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    return len(frame.head_ids(tokenizer)) + len(
        tokenizer(text + lead, add_special_tokens=False, verbose=False)["input_ids"]
    )
