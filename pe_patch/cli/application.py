"""Define the `pe-patch` application, to which the commands are added."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="pe-patch",
    help="Replace the positional logic of a Transformers model, and measure the effect. "
    "Add --debug to any command for a traceback.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
