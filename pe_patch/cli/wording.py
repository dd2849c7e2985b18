"""Rewrite messages of the library for the command line: the argument `chat=True` becomes the flag `--chat`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ASSIGNMENT = re.compile(
    r"(?P<got>\bgot )?(?<![\w.\-'\"{=])(?P<name>[a-z][a-z_0-9]*)=(?P<value>'[^']*'|<[^>]*>|[\w./+-]*[\w/])"
)
"""An argument with its value."""
PHRASES = (
    (re.compile(r" ?\(\w+=\w+ in Python\)"), ""),
    (re.compile(r"unpatch_model\(model\) first, or "), "load the original model, or give "),
    (re.compile(r"(?:call )?patch_model\(model, \.\.\., on_existing='replace'\)"), "give --on-existing replace"),
    (re.compile(r"patch_model\(\.\.\.\)"), "--scheme"),
    (re.compile(r"'patch_model' got "), "got "),
)
"""Further phrases, each with what it becomes."""


def flags_of(command: str) -> dict[str, str]:
    """Return the flags of a command by the names of their arguments in Python, or an empty dict."""
    from typer.main import get_command

    from .application import app

    group: Any = get_command(app)
    if command not in group.commands:
        return {}
    return {each.name: each.opts[0] for each in group.commands[command].params if each.opts[0].startswith("--")}


def for_command_line(message: str, command: str) -> str:
    """Return a message whose Python arguments are replaced by the flags of a command.

    Args:
        message: the message.
        command: the name of the command, such as `evaluate`. Recipes (`train`) keep `key=value`, which they take.
    """
    if "=" not in message and "(" not in message:
        return message
    flags = flags_of(command)
    if not flags or command == "train":
        return message
    for pattern, replacement in PHRASES:
        message = pattern.sub(replacement, message)
    return ASSIGNMENT.sub(lambda match: _flag(match, flags), message)


def _flag(match: re.Match[str], flags: Mapping[str, str]) -> str:
    name, value, got = match["name"], match["value"].strip("'"), match["got"] or ""
    before = match.string[: match.start("name")]
    in_parentheses = before.count("(") > before.count(")")  # a description or a call, such as yarn(factor=4)
    if in_parentheses and value not in ("True", "False"):
        return match[0]
    if value == "False" and f"no_{name}" in flags:
        return f"{got}{flags[f'no_{name}']}"
    if name in flags and value in ("True", "False"):
        return f"{got}{flags[name]}" if value == "True" else f"{got}no {flags[name]}"
    if name in flags:
        return f"{got}{flags[name]} {value}"
    if got or in_parentheses or "option" not in flags:
        return match[0]
    from ..schemes.registry import SCHEMES

    if any(name in scheme.option_names() for scheme in SCHEMES.values()):
        return f"{flags['option']} {name}={value}"
    return f"{flags['task_option']} {name}={value}" if "task_option" in flags else match[0]
