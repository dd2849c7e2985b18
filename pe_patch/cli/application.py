"""Define the `pe-patch` application, to which the commands are added."""

from __future__ import annotations

from typing import Annotated

import typer

from ..data.packaged import __version__

app = typer.Typer(
    name="pe-patch",
    help="Replace the positional logic of a Transformers model, and measure the effect. "
    "Every command also takes -v (log what is patched), -q (print results and errors only) and --debug (tracebacks).",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pe-patch {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle the options before the command."""
