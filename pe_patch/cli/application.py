"""The application that the commands of `pe-patch` belong to."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="pe-patch",
    help="Replace the positional logic of a Transformers model, and measure what that does. "
    "--debug anywhere shows the traceback of a failure.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
