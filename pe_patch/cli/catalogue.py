"""List schemes, model families and tasks, each with a summary and its paper."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ..errors import UnknownNameError, unknown

Entries = list[dict[str, Any]]


ANNOTATIONS = {"Factor": 'float | "auto"'}
"""Types of options in words, where their annotation is an alias."""


def untrained(name: str) -> str:
    """Return how well a scheme works without training: yes, weak or no, as `advise` judges it."""
    from ..advice.candidates import CANDIDATES
    from ..schemes.registry import SCHEMES

    answers = [each.untrained for each in CANDIDATES["rope"] if each.scheme == name]
    if answers:
        return answers[0]
    native = name in ("rope", "mla")  # what models of their families have
    return "as it is" if native else "yes" if SCHEMES[name].training_free else "no"


def options_of(scheme: Any) -> list[dict[str, Any]]:
    """Return the options of a scheme with their types and defaults, required ones first."""
    options = [
        {
            "name": option.name,
            "type": ANNOTATIONS.get(option.annotation, option.annotation),
            "required": option.required,
            "default": None if option.required else _plain(option.default),
        }
        for option in scheme.declared_options()
    ]
    return sorted(options, key=lambda option: not option["required"])


def field_docstrings(kind: type) -> dict[str, str]:
    """Return what the annotated fields of a class and its bases mean, by name.

    A meaning stands below its field, or in the section "Args" of the class. Classes without source, such as those that
    a function makes, are left out.
    """
    found: dict[str, str] = {}
    for owner in kind.__mro__:
        for name, meaning in _arguments_of(owner):
            found.setdefault(name, meaning)
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, TypeError, SyntaxError):
            continue
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, after in itertools.pairwise(statements):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found.setdefault(getattr(field.target, "id", ""), " ".join(str(after.value.value).split()))
    return found


def _arguments_of(owner: type) -> Iterator[tuple[str, str]]:
    """Yield the names and meanings in the section "Args" of a class's docstring."""
    _, _, section = inspect.cleandoc(owner.__doc__ or "").partition("Args:\n")
    lines = itertools.takewhile(lambda line: not line or line.startswith(" "), section.splitlines())
    for entry in re.split(r"^    (?=\w+: )", "\n".join(lines), flags=re.MULTILINE):
        name, colon, meaning = entry.partition(": ")
        if colon:
            meaning = " ".join(meaning.split())
            yield name.strip(), meaning[:1].upper() + meaning[1:]


def entry_of(entries: Mapping[str, Entries], kind: str, name: str) -> dict[str, Any]:
    """Return one scheme, family or task, with the meaning of its options.

    Raises:
        UnknownNameError: the kind or the name does not exist; the message names the nearest one.
    """
    from ..evaluation.tasks import TASKS
    from ..schemes.registry import ALIASES, SCHEMES

    name = ALIASES.get(name, name) if kind == "schemes" else name
    found = next((entry for entry in entries_of(entries, kind) if entry["name"] == name), None)
    if found is None:
        raise unknown(SINGULAR[kind], name, [entry["name"] for entry in entries[kind]])
    if kind == "families":
        return found
    if kind == "schemes":
        meanings, options = field_docstrings(SCHEMES[name]), found["options"]
    else:
        task: Any = TASKS[name]
        meanings = field_docstrings(task)
        options = [_task_option(field) for field in dataclasses.fields(task) if field.init]
    return found | {"options": [option | {"meaning": meanings.get(option["name"], "")} for option in options]}


SINGULAR = {"schemes": "scheme", "families": "family", "tasks": "task"}


def _task_option(field: dataclasses.Field[Any]) -> dict[str, Any]:
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = None if field.default is dataclasses.MISSING else _plain(field.default)
    return {"name": field.name, "type": str(field.type), "required": required, "default": default}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def catalogue() -> dict[str, Entries]:
    """Return all entries by kind, as dicts for JSON."""
    from ..adapters import ADAPTERS
    from ..adapters.inferred import VERIFIED
    from ..evaluation.tasks import TASKS
    from ..schemes.registry import ALIASES, SCHEMES

    aliases: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        aliases.setdefault(name, []).append(alias)
    return {
        "schemes": [
            {
                "name": name,
                "aliases": aliases.get(name, []),
                "mechanism": scheme.mechanism,
                "summary": scheme.summary,
                "options": options_of(scheme),
                "works untrained": untrained(name),
                "paper": scheme.paper,
            }
            for name, scheme in SCHEMES.items()
        ],
        "families": [
            {
                "name": name,
                "native": adapter.native,
                "mla": "has it" if adapter.scaling_includes_mscale else "converts" if adapter.projections else "",
                "adapter": "row",
                "summary": adapter.summary,
            }
            for name, adapter in ADAPTERS.items()
        ]
        + [
            {"name": name, "native": "", "mla": "", "adapter": "inferred", "summary": summary}
            for name, summary in VERIFIED.items()
            if name not in ADAPTERS
        ],
        "tasks": [{"name": name, "summary": task.summary, "paper": task.paper} for name, task in TASKS.items()],
    }


def entries_of(entries: Mapping[str, Entries], kind: str) -> Entries:
    """Return the entries of one kind.

    Raises:
        UnknownNameError: the kind does not exist; the message names the nearest one.
    """
    if kind in entries:
        return entries[kind]
    holding = [each for each, found in entries.items() if kind in [entry["name"] for entry in found]]
    if holding:
        raise UnknownNameError(f"{kind!r} is one of the {holding[0]}: type `pe-patch list {holding[0]} {kind}`.")
    raise unknown("list", kind, entries)


def page(kind: str, entry: Mapping[str, Any]) -> Iterator[str | Table]:
    """Yield what a terminal shows about one entry: lines, and a table of the options."""
    yield entry["name"]
    for key, value in entry.items():
        if key not in ("name", "options") and value not in ("", []):
            yield f"  {key}: {_cell(value)}"
    options = entry.get("options", [])
    if not options:
        return
    flag = "--option" if kind == "schemes" else "--task-option"
    named = any(option["name"] == "factor" for option in options)
    title = f"Options, given as {flag} NAME=VALUE{'; factor also as --factor' if named else ''}"
    table = Table(title=title, title_justify="left")
    for column in ("name", "type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for option in options:
        default = "required" if option["required"] else repr(option["default"])
        table.add_row(*(Text(each) for each in (option["name"], option["type"], default, option["meaning"])))
    yield table


def tables(entries_by_kind: Mapping[str, Entries]) -> Iterator[Table]:
    """Yield one terminal table for each kind."""
    for kind, entries in entries_by_kind.items():
        table = Table(title=kind.capitalize(), title_justify="left")
        for column in entries[0] if entries else ():
            table.add_column(column, overflow="fold")
        for entry in entries:
            table.add_row(*(Text(_cell(value)) for value in entry.values()))  # as text: `[str]` is no markup
        yield table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, list):
        return ", ".join(_option(each) if isinstance(each, dict) else str(each) for each in value)
    return str(value)


def _option(option: Mapping[str, Any]) -> str:
    """Return an option as in a signature: `factor: float` or `beta_fast: float = 32`."""
    default = "" if option["required"] else f" = {option['default']!r}"
    return f"{option['name']}: {option['type']}{default}"
