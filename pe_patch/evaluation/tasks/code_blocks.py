"""Split Python source into top-level statements, and find the functions that a question can ask for."""

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
"""Characters of a parameter list: a shorter list could be guessed, a longer one needs a long answer."""

PARAGRAPH = (40, 400)
"""The shortest and the longest paragraph of documentation, in characters."""


@dataclass(frozen=True)
class Block:
    """One top-level statement with the comments before it."""

    text: str
    document: int
    """The number of the document."""
    name: str = ""
    """The name of a function that is defined once in all documents; otherwise empty."""
    parameters: str | None = None
    """The text between the parentheses of the function's definition. None if it spans several lines or has an
    unsuitable length, or without `name`."""


@dataclass(frozen=True)
class Code:
    """The blocks of several documents in order, and the documents joined into one text."""

    blocks: tuple[Block, ...]
    text: str

    def has_unique_parameters(self, block: Block) -> bool:
        """Return whether a function's parameters, in parentheses, occur only in its definition."""
        return block.parameters is not None and self.text.count(f"({block.parameters})") == 1


@lru_cache(maxsize=2)
def read_code(texts: tuple[str, ...]) -> Code:
    """Return the code in the documents; skip those that are not Python."""
    parsed = [(number, text.replace("\r\n", "\n"), _parse(text)) for number, text in enumerate(texts)]
    kept = [(number, text, tree) for number, text, tree in parsed if tree is not None]
    defined = Counter(node.name for _, _, tree in kept for node in ast.walk(tree) if isinstance(node, _DEFINITIONS))
    blocks = [block for number, text, tree in kept for block in _blocks(number, text, tree, defined)]
    return Code(tuple(blocks), "\n".join(text for _, text, _ in kept))


@lru_cache(maxsize=2)
def read_paragraphs(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the first paragraphs of docstrings, each on one line and once, if their length is within `PARAGRAPH`."""
    trees = [tree for tree in map(_parse, texts) if tree is not None]
    paragraphs = [
        " ".join(text.split("\n\n")[0].split())
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, *_DEFINITIONS)) and (text := ast.get_docstring(node))
    ]
    return tuple(dict.fromkeys(text for text in paragraphs if PARAGRAPH[0] <= len(text) <= PARAGRAPH[1]))


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the documents' strings
            return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _blocks(number: int, text: str, tree: ast.Module, defined: Counter[str]) -> Iterator[Block]:
    lines = text.split("\n")  # the parser's lines; splitlines() also splits at form feeds
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
    """Return the text between the parentheses of `def name(...)` if it is one line of suitable length, else None."""
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type in (tokenize.NAME, tokenize.OP)
    ]
    strings = [token.string for token in tokens]
    start = next((i for i in range(len(tokens)) if strings[i : i + 3] == ["def", name, "("]), None)
    if start is None:
        return None  # for example `def name[T](...)`
    depth = 0
    for token in tokens[start + 2 :]:
        depth += (token.string in "([{") - (token.string in ")]}")
        if depth == 0:
            first, last = tokens[start + 2].end, token.start
            text = source.split("\n")[first[0] - 1][first[1] : last[1]] if first[0] == last[0] else ""
            return text if SHORTEST_PARAMETERS <= len(text) <= LONGEST_PARAMETERS else None
    return None
