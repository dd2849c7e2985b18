"""Define `pe-patch extend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from .application import app
from .options import AsJson, Device, Dtype, Model, Overwrite, parse_length_option
from .output import echo, is_quiet, note, print_json, set_continues


@app.command(
    epilog="\b\nExamples:\n  pe-patch extend ./my-llama --target-length 32k --output my-llama-32k --budget 15m\n"
    "  pe-patch extend ./my-llama --target-length 32k --output my-llama-32k --train --for vllm"
)
def extend(
    model: Model,
    target_length: Annotated[
        int,
        typer.Option(
            parser=parse_length_option, metavar="TOKENS", help="Tokens that the model must read, such as 32k."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint, the measurements and a page.")],
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Time for the measurement, such as 90s, 10m or 1h.")
    ] = "10m",
    train: Annotated[bool, typer.Option("--train", help="Train the scheme that gains most from training.")] = False,
    train_budget: Annotated[str, typer.Option(metavar="TIME", help="Time for the training.")] = "1h",
    export: Annotated[
        list[str] | None, typer.Option("--for", metavar="TARGET", help="Also export for vllm, sglang, llamacpp ...")
    ] = None,
    text: Annotated[str, typer.Option(help="Text: stdlib, a folder, a file or a hub data set.")] = "stdlib",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its time, and stop.")] = False,
    overwrite: Overwrite = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint that reads longer texts: measure the schemes that fit, train if asked, write and check.

    A stopped run continues with the same command.
    """
    from ..extension.request import Request
    from ..extension.run import carry_out, prepare

    request = Request(
        model=model, target_length=target_length, output=output, budget=budget, train=train, train_budget=train_budget,
        export=export or (), text=text, dtype=dtype, device=device, seed=seed, overwrite=overwrite,
    )  # fmt: skip
    say = (lambda sentence: None) if is_quiet() else note
    if dry_run:
        plan = prepare(request, say)[0]
        print_json(plan.to_dict()) if as_json else echo(str(plan))
        if plan.shortfalls:
            raise OptionError(" ".join(plan.shortfalls))
        return
    set_continues(output)
    done = carry_out(request, say)
    if as_json:
        paths = {"model": str(done.model), "exports": [str(path) for path in done.exports], "page": str(done.page)}
        print_json({"scheme": done.chosen.scheme, "options": done.chosen.options, "verdict": done.verdict, **paths})
    else:
        echo(str(done))
