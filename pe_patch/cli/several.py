"""Accept several values after one flag."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .application import load_library
from .options import parse_length


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _are_lengths(word: str) -> bool:
    return all(parse_length(each) is not None for each in word.split(",") if each)


def _is_task(word: str) -> bool:
    from ..evaluation.tasks import GROUPS, TASKS

    return all(name in TASKS or name in GROUPS for name in word.split(",") if name)


def _is_method(word: str) -> bool:
    from ..convert.measure import METHODS

    return all(name in METHODS for name in word.split(",") if name)


def _is_scheme(word: str) -> bool:
    load_library()
    from ..errors import nearest
    from ..schemes.registry import ALIASES, SCHEMES

    name = word.partition(":")[0]
    # Pass on a misspelt name, so that the error can suggest the right one.
    return word.startswith("{") or name in ALIASES or bool(nearest(name, SCHEMES))


SEVERAL: dict[str, Callable[[str], bool]] = {
    "--length": _are_lengths,
    "--depth": lambda word: all(map(_is_number, word.split(","))),
    "--scheme": _is_scheme,
    "--task": _is_task,
    "--method": _is_method,
    "--cache-ratio": lambda word: all(map(_is_number, word.replace("/", ",").split(","))),
}
"""Options that accept several values after one flag, and a test for a further value."""
ONLY = {"--scheme": "compare"}
"""Options that do so in one command only; in other commands, a folder may have the name of a scheme."""
WHOLE = frozenset({"--scheme"})
"""Options whose values may contain commas."""


def spread(words: Sequence[str]) -> list[str]:
    """Repeat a flag before each of its values, as Typer needs: `--length 1 2` becomes `--length 1 --length 2`.

    Commas separate values too, except for options in WHOLE. The word after a flag is always its value; later words
    only if they look like one.
    """
    spread_out: list[str] = []
    flag, first = "", False
    several = {name for name in SEVERAL if ONLY.get(name, words[0]) == words[0]} if words else set()
    for word in words:
        name, equals, value = word.partition("=")
        if name in several:
            flag, first = name, not equals
            if not equals:
                continue
            word = value
        elif not flag or not (first or SEVERAL[flag](word)) or word.startswith("--"):
            spread_out += [flag, word] if first else [word]
            flag, first = "", False
            continue
        items = [word] if flag in WHOLE else word.split(",")
        spread_out += [token for item in items if item for token in (flag, item)]
        first = False
    return [*spread_out, flag] if first else spread_out
