"""Python source as whole top-level statements, and the functions in it that can be asked for."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

SHORTEST_PARAMETERS = 12
LONGEST_PARAMETERS = 160
"""Characters of a parameter list: fewer could be guessed, more would take a long answer."""

PARAGRAPH = (40, 400)
"""Characters of a paragraph of documentation."""


@dataclass(frozen=True)
class Block:
    """One top-level statement with the comments before it, as it stands in document number `document`.

    `parameters` is what stands between the brackets of a function's definition, None for anything that cannot be asked
    for: a name that is defined elsewhere too, parameters on several lines or too few or many to be a good answer.
    """

    text: str
    document: int
    name: str = ""
    parameters: str | None = None


@dataclass(frozen=True)
class Code:
    """The blocks of several documents in order, and all of it as one text."""

    blocks: tuple[Block, ...]
    text: str

    def says_once(self, block: Block) -> bool:
        """Whether a function's parameters, in their brackets, are written nowhere but in its definition."""
        return block.parameters is not None and self.text.count(f"({block.parameters})") == 1


@lru_cache(maxsize=2)
def read_code(texts: tuple[str, ...]) -> Code:
    """The code in documents; those that are not Python are left out."""
    parsed = [(number, text.replace("\r\n", "\n"), _parse(text)) for number, text in enumerate(texts)]
    kept = [(number, text, tree) for number, text, tree in parsed if tree is not None]
    defined = Counter(node.name for _, _, tree in kept for node in ast.walk(tree) if isinstance(node, _DEFINITIONS))
    blocks = [block for number, text, tree in kept for block in _blocks(number, text, tree, defined)]
    return Code(tuple(blocks), "\n".join(text for _, text, _ in kept))


@lru_cache(maxsize=2)
def read_paragraphs(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The first paragraphs of docstrings, each on one line and none twice, of a length that is worth comparing."""
    trees = [tree for tree in map(_parse, texts) if tree is not None]
    found = [
        " ".join(text.split("\n\n")[0].split())
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, *_DEFINITIONS)) and (text := ast.get_docstring(node))
    ]
    return tuple(dict.fromkeys(text for text in found if PARAGRAPH[0] <= len(text) <= PARAGRAPH[1]))


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _blocks(number: int, text: str, tree: ast.Module, defined: Counter[str]) -> Iterator[Block]:
    lines = text.split("\n")  # as the parser counts them; splitlines() also splits at form feeds
    start = 0
    for node in tree.body:
        end = node.end_lineno or start
        body = "\n".join(lines[start:end]).strip("\n")
        if end > start and body.strip():
            single = isinstance(node, ast.FunctionDef) and defined[node.name] == 1
            name = node.name if isinstance(node, ast.FunctionDef) and single else ""
            yield Block(body, number, name, _parameters(body, name) if name else None)
        start = max(start, end)


def _parameters(source: str, name: str) -> str | None:
    """What is written between the brackets of `def name(...)`, if it is one line of a fitting length."""
    words = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type in (tokenize.NAME, tokenize.OP)
    ]
    strings = [word.string for word in words]
    at = next((i for i in range(len(words)) if strings[i : i + 3] == ["def", name, "("]), None)
    if at is None:
        return None  # as in `def name[T](...)`
    depth = 0
    for word in words[at + 2 :]:
        depth += (word.string in "([{") - (word.string in ")]}")
        if depth == 0:
            first, last = words[at + 2].end, word.start
            text = source.split("\n")[first[0] - 1][first[1] : last[1]] if first[0] == last[0] else ""
            return text if SHORTEST_PARAMETERS <= len(text) <= LONGEST_PARAMETERS else None
    return None
