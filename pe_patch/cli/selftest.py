"""Define `pe-patch selftest`."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import app
from .options import AsJson, Device
from .output import console, print_json


@app.command(epilog="\b\nExamples:\n  pe-patch selftest\n  pe-patch selftest ./my-llama --json")
def selftest(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder, GGUF file or hub name to check in addition to the built-in models.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Data type of MODEL: float32, bfloat16 or float16.")] = "float32",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Check that patching works with the installed versions. Run this after an upgrade of Transformers.

    Exits with code 1 if values differ that must be equal.
    """
    from ..checkpoints.sources import quiet_transformers
    from ..doctor.self_test import selftest as run
    from ..doctor.self_test.result import render

    quiet_transformers()
    result = run(model, dtype=dtype, device=device)
    if as_json:
        print_json(result.to_dict())
    else:
        console().print(render(result))
    if not result.passed:
        raise typer.Exit(1)
