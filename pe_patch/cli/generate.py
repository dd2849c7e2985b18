"""Define `pe-patch generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import AsJson, Device, Dtype, Factor, Model, OnExisting, Options, SchemeName
from .output import echo, print_json


@app.command(epilog='\b\nExample:\n  pe-patch generate ./my-llama --scheme yarn --factor 4 --prompt "Once upon a time"')
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue (default: standard input).")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 100,
    scheme: SchemeName = None,
    factor: Factor = None,
    option: Options = None,
    on_existing: OnExisting = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text greedily with a patched model."""
    from ..checkpoints import sources

    text = prompt_file.read_text(encoding="utf-8") if prompt_file else sys.stdin.read() if prompt is None else prompt
    loaded, tokenizer = sources.load(model, dtype, device)
    sources.apply(loaded, scheme, factor, option, on_existing)
    continuation, tokens = sources.continue_text(loaded, tokenizer, text, max_new_tokens)
    if as_json:
        print_json({"prompt": text, "prompt_tokens": tokens, "text": continuation})
    else:
        echo(continuation)
