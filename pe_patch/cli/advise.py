"""`pe-patch advise`."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import app
from .options import AsJson, Dtype, Model
from .output import console, print_json


@app.command(
    epilog="\b\nExamples:\n  pe-patch advise meta-llama/Llama-2-7b-hf --target-length 32768\n"
    "  pe-patch advise ./my-llama --target-length 131072 --train-tokens 2000000000 --json"
)
def advise(
    model: Model,
    target_length: Annotated[int, typer.Option(help="The length in tokens that it is to read.")],
    trained_length: Annotated[
        int | None, typer.Option(help="What it was trained for, where you know better than its config.")
    ] = None,
    train_tokens: Annotated[int | None, typer.Option(help="How many tokens you can train on.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time, for the memory.")] = 1,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which scheme a model wants for a longer window, why, and what it costs. Reads its configuration only."""
    from ..advice import advise as advise_on

    advice = advise_on(
        model,
        target_length,
        trained_length=trained_length,
        train_tokens=train_tokens,
        dtype=dtype,
        batch_size=batch_size,
    )
    if as_json:
        print_json(advice.to_dict())
    else:
        console().print(advice, markup=False, highlight=False)
