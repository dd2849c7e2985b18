"""Questions about the source of Python's standard library, whose answers follow from the text itself."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from ....data.text import stdlib_files
from .documents import Documents, Item
from .material import digest

CHARACTERS = 600
"""The most a document has, to the end of a line."""
LETTERS = 6
"""Modules and names with fewer are not asked for: they would stand in other words by chance."""
_STATEMENT = re.compile(r"^(?=[^\s#)\]}])", re.MULTILINE)
_DEFINITION = re.compile(r"(class|def) (\w+)(?:\((\w+)\))?[(:]")


@dataclass(frozen=True)
class _Definition:
    """A class or function at the top of a module: where it is, what it is called, its only base, and its document."""

    module: str
    name: str
    base: str | None
    text: str


@cache
def single_hop() -> Documents:
    """In which module is X defined?"""
    found, number = _definitions()
    items = [
        Item(f"In which module is {each.name} defined?", (each.module,), (own,), _near(found, own))
        for own, each in enumerate(found)
        if _can_be_asked(each) and number[each.name] == 1
    ]
    return _documents(found, items, "qa_local_1: where a name of Python's standard library is defined")


@cache
def two_hop() -> Documents:
    """In which module is the class defined that X derives from?"""
    found, number = _definitions()
    place = {each.name: own for own, each in enumerate(found) if number[each.name] == 1}
    items = []
    for own, each in enumerate(found):
        base = place.get(each.base or "")
        if base is None or number[each.name] > 1 or found[base].module == each.module or not _can_be_asked(found[base]):
            continue
        query = f"The class {each.name} derives from another class. In which module is that other class defined?"
        items.append(Item(query, (found[base].module,), (own, base)))
    return _documents(found, items, "qa_local_2: where the base of a class of Python's standard library is defined")


def _definitions() -> tuple[list[_Definition], Counter[str]]:
    """All definitions with different texts, sorted, and how often each name is defined."""
    unique = {each.text: each for path, source in stdlib_files() for each in _of_module(path, source)}
    found = [unique[text] for text in sorted(unique)]
    return found, Counter(each.name for each in found)


def _of_module(path: str, source: str) -> Iterator[_Definition]:
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for statement in _STATEMENT.split(source):
        head = _DEFINITION.match(statement)
        if head:
            kind, name, base = head.groups()
            text = statement[:CHARACTERS]
            if len(statement) > CHARACTERS:
                text = text[: text.rfind("\n")]
            text = f"Module {module}\n{text.rstrip()}"
            yield _Definition(module, name, base, text) if kind == "class" else _Definition(module, name, None, text)


def _can_be_asked(each: _Definition) -> bool:
    short = min(len(each.module), len(each.name)) < LETTERS
    return not short and each.module.lower() not in each.name.lower() and not each.name.startswith("_")


def _near(found: list[_Definition], own: int) -> tuple[int, ...]:
    """The other definitions of the same module; they are sorted by it."""
    start = end = own
    while start > 0 and found[start - 1].module == found[own].module:
        start -= 1
    while end + 1 < len(found) and found[end + 1].module == found[own].module:
        end += 1
    return tuple(number for number in range(start, end + 1) if number != own)


def _documents(found: list[_Definition], items: list[Item], name: str) -> Documents:
    texts = tuple(each.text for each in found)
    random.Random(0).shuffle(items)
    return Documents(texts, tuple(items), name, digest("\n\n".join(texts)))


BY_HOPS: dict[int, Callable[[], Documents]] = {1: single_hop, 2: two_hop}
"""By how many documents an answer takes."""
