"""Write the reference of the commands from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from pe_patch.cli.main import app


def page() -> str:
    """Return the reference of all commands as Markdown."""
    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", f"{(group.help or '').strip()}", ""]
    for name, command in sorted(group.commands.items()):
        if not command.hidden:
            lines += command_lines(name, command)
    return "\n".join(lines) + "\n"


def command_lines(name: str, command: Any) -> Iterator[str]:
    """Yield the section of one command."""
    context = command.context_class(command, info_name=f"pe-patch {name}")
    yield from (f"## pe-patch {name}", "", plain(command.help or ""), "")
    yield from ("```text", " ".join(command.get_usage(context).split()).removeprefix("Usage: "), "```", "")
    records = [parameter.get_help_record(context) for parameter in command.params]
    if any(records):
        yield from ("| argument or option | meaning |", "| --- | --- |")
    for names, meaning in filter(None, records):
        yield f"| `{names.replace('|', chr(92) + '|')}` | {plain(meaning)} |"
    if examples := (command.epilog or "").replace("\b", "").strip():
        body = "\n".join(line.strip() for line in examples.splitlines() if not line.startswith("Example"))
        yield from ("", "```sh", body.strip(), "```")
    yield ""


def plain(text: str) -> str:
    """Return help as one Markdown paragraph, in which brackets and bars are text."""
    return " ".join(text.replace("\b", "").split()).replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;")
