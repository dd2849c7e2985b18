"""Define the `pe-patch` application, to which the commands are added."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..data.packaged import __version__


def load_library() -> None:
    """Import what `import pe_patch` imports elsewhere. Help and completion do without it, since it takes seconds."""
    import_module("pe_patch.checkpoints.library")


class Command(TyperCommand):
    """A command that loads the library when it runs."""

    def invoke(self, ctx: Any) -> Any:
        load_library()
        return super().invoke(ctx)


class Application(typer.Typer):
    """An application whose commands load the library when they run."""

    def command(self, *arguments: Any, **keywords: Any) -> Any:
        return super().command(*arguments, **{"cls": Command, **keywords})


app = Application(
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
