"""Find private names of other libraries: in source files, and in the libraries that are installed."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

DOCUMENTED = {
    "_replace": "typing.NamedTuple",
    "_asdict": "typing.NamedTuple",
    "_exit": "os",
    "_info": "a method of evaluate.Metric that every metric writes",
    "_compute": "a method of evaluate.Metric that every metric writes",
    "_distutils_hack": "a folder of the standard library",
}
"""Names with an underscore that their owner documents."""

PARTS = ("endswith", "startswith", "removesuffix", "removeprefix")
"""Methods of strings whose argument is a part of a name."""


def is_private(name: str) -> bool:
    """Return whether a component of a dotted name is private: one underscore in front, as in `_x` and `_C`."""
    return any(re.fullmatch(r"_(?!_)\w+", part) for part in name.split("."))


def private_parts(name: str) -> list[str]:
    return [part for part in name.split(".") if is_private(part)]


class Names:
    """The private names that some files define, and those that they read."""

    def __init__(self, trees: Iterable[ast.AST]) -> None:
        self.defined: set[str] = set()
        self.read: set[str] = set()
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.defined.add(node.name)
            elif isinstance(node, ast.arg):
                self.defined.add(node.arg)
            elif isinstance(node, ast.Name):
                (self.read if isinstance(node.ctx, ast.Load) else self.defined).add(node.id)
            elif isinstance(node, ast.Attribute):
                on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if isinstance(node.ctx, ast.Load):
                    self.read.add(node.attr)
                elif on_self:
                    self.defined.add(node.attr)


def name_parts(tree: ast.AST) -> set[int]:
    """Return the ids of the strings that are parts of names: pieces of f-strings and sums, ends that are compared."""
    parts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
        elif isinstance(node, ast.BinOp):
            parts |= {id(node.left), id(node.right)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PARTS:
            parts |= {id(argument) for argument in node.args}
    return parts


def overridden(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    """Yield the methods and attributes in the body of a class."""
    for member in node.body:
        if isinstance(member, ast.FunctionDef):
            yield member.lineno, member.name
        elif isinstance(member, ast.Assign | ast.AnnAssign):
            targets = member.targets if isinstance(member, ast.Assign) else [member.target]
            yield from ((member.lineno, target.id) for target in targets if isinstance(target, ast.Name))


def private_uses(trees: Mapping[str, ast.AST], foreign: set[str]) -> list[tuple[str, int, str]]:
    """Return where files use private names of other libraries, as `(file, line, name)`.

    A name belongs to another library unless the files define it; names in `foreign` do even then. A private member of
    a class that the files never read is written for another library, which reads it.
    """
    names = Names(trees.values())
    own = {name for name in names.defined if name not in foreign} | set(DOCUMENTED)
    return sorted(
        {
            (file, line, name)
            for file, tree in trees.items()
            for line, name in _uses(tree, own, names.read | set(DOCUMENTED), foreign)
        }
    )


def _uses(tree: ast.AST, own: set[str], read: set[str], foreign: set[str]) -> Iterator[tuple[int, str]]:
    parts = name_parts(tree)
    for node in ast.walk(tree):
        line, found = getattr(node, "lineno", 0), []
        if isinstance(node, ast.Import):
            found = [part for alias in node.names for part in private_parts(alias.name)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = private_parts(".".join([node.module or "", *(alias.name for alias in node.names)]))
        elif isinstance(node, ast.Attribute):
            found = [part for part in private_parts(node.attr) if part not in own]
        elif isinstance(node, ast.keyword) and node.arg is not None:
            line, found = node.value.lineno, [part for part in private_parts(node.arg) if part not in own]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            if re.fullmatch(r"[\w.]+", node.value):
                found = [part for part in private_parts(node.value) if part not in own]
        elif isinstance(node, ast.ClassDef):
            members = ((at, name) for at, name in overridden(node) if is_private(name))
            yield from ((at, name) for at, name in members if name in foreign or name not in read)
        yield from ((line, name) for name in found)


def resolve(path: str) -> Any:
    """Return the object at a dotted path; raise `LookupError` if there is none."""
    first, *rest = path.split(".")
    found: Any = import_module(first)
    for count, name in enumerate(rest, 1):
        try:
            found = getattr(found, name)
        except AttributeError:
            try:
                found = import_module(".".join([first, *rest[:count]]))
            except ImportError:
                raise LookupError(path) from None
    return found


def has(owner: str, name: str) -> bool:
    """Return whether a module or class has an attribute, its code stores one, or a function takes such a keyword."""
    try:
        resolve(f"{owner}.{name}")
        return True
    except LookupError:
        pass
    try:
        found = resolve(owner)
    except LookupError:
        return False
    if not inspect.isclass(found) and not inspect.isfunction(found):
        return False
    if inspect.isfunction(found) and name in inspect.signature(found).parameters:
        return True
    return name in stored(ast.parse(textwrap.dedent(inspect.getsource(found))))


def stored(tree: ast.AST) -> set[str]:
    """Return the attributes that some code declares or writes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "__setattr__":
            names |= {
                each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
    return names
