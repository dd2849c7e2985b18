"""Define `pe-patch advise`."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import app
from .options import AsJson, Dtype, Model, parse_length_option
from .output import console, print_json


@app.command(
    epilog="\b\nExamples:\n  pe-patch advise meta-llama/Llama-2-7b-hf --target-length 32768\n"
    "  pe-patch advise ./my-llama --target-length 32k --for vllm\n"
    "  pe-patch advise ./my-llama --target-length 131072 --train-tokens 2000000000 --json"
)
def advise(
    model: Model,
    target_length: Annotated[
        int,
        typer.Option(
            parser=parse_length_option,
            metavar="TOKENS",
            help="Target context length in tokens, such as 131072 or 128k.",
        ),
    ],
    trained_length: Annotated[
        int | None,
        typer.Option(
            parser=parse_length_option, metavar="TOKENS", help="Override the trained length of the config, in tokens."
        ),
    ] = None,
    train_tokens: Annotated[int | None, typer.Option(help="Number of tokens available for training.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch, for the memory estimate.")] = 1,
    export: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="TARGET",
            help="Recommend what vllm, sglang, llamacpp or transformers loads without pe_patch.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Recommend a scheme for a longer window, with reasons and costs. Reads only the model's config."""
    from ..advice import advise as advise_on

    advice = advise_on(
        model,
        target_length,
        trained_length=trained_length,
        train_tokens=train_tokens,
        dtype=dtype,
        batch_size=batch_size,
        export=export or (),
    )
    if as_json:
        print_json(advice.to_dict())
    else:
        console().print(advice, markup=False, highlight=False)
