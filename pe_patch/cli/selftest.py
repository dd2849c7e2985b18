"""`pe-patch selftest`."""

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
        typer.Argument(metavar="[MODEL]", help="A folder or a hub name to check beside the models that come along."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of MODEL: float32, bfloat16 or float16.")] = "float32",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Check that patching works with the versions installed here. Run it after an upgrade of Transformers.

    Exit code 1 where something differs that must be equal.
    """
    from ..checkpoints.loading import quiet_host
    from ..doctor.self_test import selftest as run
    from ..doctor.self_test.result import render

    quiet_host()
    result = run(model, dtype=dtype, device=device)
    if as_json:
        print_json(result.to_dict())
    else:
        console().print(render(result))
    if not result.passed:
        raise typer.Exit(1)
