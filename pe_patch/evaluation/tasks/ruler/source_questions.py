"""Questions about the source of Python's standard library, with answers derived from the source."""

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
"""The largest number of characters of a document, which ends at the end of a line."""
LETTERS = 6
"""The smallest number of letters of a module or name in a question; shorter ones occur in other words by chance."""
_STATEMENT = re.compile(r"^(?=[^\s#)\]}])", re.MULTILINE)
_DEFINITION = re.compile(r"(class|def) (\w+)(?:\((\w+)\))?[(:]")


@dataclass(frozen=True)
class _Definition:
    """A class or function at the top level of a module."""

    module: str
    name: str
    base: str | None
    """The base of a class with a single base; otherwise None."""
    text: str
    """The document with the definition."""


@cache
def single_hop() -> Documents:
    """Return questions for the module that defines a name."""
    definitions, count = _definitions()
    items = [
        Item(
            f"In which module is {definition.name} defined?", (definition.module,), (index,), _near(definitions, index)
        )
        for index, definition in enumerate(definitions)
        if _is_suitable(definition) and count[definition.name] == 1
    ]
    return _documents(definitions, items, "qa_local_1: where a name of Python's standard library is defined")


@cache
def two_hop() -> Documents:
    """Return questions for the module that defines the base of a class."""
    definitions, count = _definitions()
    index_of = {definition.name: index for index, definition in enumerate(definitions) if count[definition.name] == 1}
    items = []
    for index, definition in enumerate(definitions):
        base_index = index_of.get(definition.base or "")
        if base_index is None or count[definition.name] > 1:
            continue
        base = definitions[base_index]
        if base.module == definition.module or not _is_suitable(base):
            continue
        query = f"The class {definition.name} derives from another class. In which module is that other class defined?"
        items.append(Item(query, (base.module,), (index, base_index)))
    return _documents(
        definitions, items, "qa_local_2: where the base of a class of Python's standard library is defined"
    )


def _definitions() -> tuple[list[_Definition], Counter[str]]:
    """Return all definitions with different texts, sorted by text, and the number of definitions of each name."""
    unique = {
        definition.text: definition
        for path, source in stdlib_files()
        for definition in _definitions_in_module(path, source)
    }
    definitions = [unique[text] for text in sorted(unique)]
    return definitions, Counter(definition.name for definition in definitions)


def _definitions_in_module(path: str, source: str) -> Iterator[_Definition]:
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


def _is_suitable(definition: _Definition) -> bool:
    """Return whether a question can ask for the module of a definition."""
    module, name = definition.module, definition.name
    return min(len(module), len(name)) >= LETTERS and module.lower() not in name.lower() and not name.startswith("_")


def _near(definitions: list[_Definition], index: int) -> tuple[int, ...]:
    """Return the indices of the other definitions in the same module, which are neighbors in the sorted list."""
    module = definitions[index].module
    start = end = index
    while start > 0 and definitions[start - 1].module == module:
        start -= 1
    while end + 1 < len(definitions) and definitions[end + 1].module == module:
        end += 1
    return tuple(number for number in range(start, end + 1) if number != index)


def _documents(definitions: list[_Definition], items: list[Item], name: str) -> Documents:
    texts = tuple(definition.text for definition in definitions)
    random.Random(0).shuffle(items)
    return Documents(texts, tuple(items), name, digest("\n\n".join(texts)))


BY_HOPS: dict[int, Callable[[], Documents]] = {1: single_hop, 2: two_hop}
"""The documents by the number of documents that an answer needs."""
