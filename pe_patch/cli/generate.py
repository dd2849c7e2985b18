"""Define `pe-patch generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from .application import app
from .options import (
    AsJson,
    Device,
    Dtype,
    Factor,
    Model,
    OnExisting,
    Options,
    PrefillChunk,
    SchemeName,
    TargetLength,
    parse_length_option,
)
from .output import echo, note, print_json, write


@app.command(
    epilog='\b\nExamples:\n  pe-patch generate ./my-llama "Once upon a time" --scheme yarn --factor 4\n'
    '  pe-patch generate ./my-instruct-model "What is the capital of France?" --chat --temperature 0.7'
)
def generate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="Text to continue (default: standard input).", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The same as TEXT.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the text as a user's message, in the tokenizer's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message before the user's. Needs --chat.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(parser=parse_length_option, metavar="TOKENS", help="Maximum number of new tokens.")
    ] = 100,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sample at this temperature (default: 0, the likeliest token).")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(max=1, help="Sample from the likeliest tokens of this total probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this number of likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed of the sampling.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print the text as it is generated, or when it is complete.")
    ] = True,
    prefill_chunk: PrefillChunk = None,
    scheme: SchemeName = None,
    factor: Factor = None,
    target_length: TargetLength = None,
    option: Options = None,
    on_existing: OnExisting = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text, or answer a message with --chat.

    Exits with code 1 if the model ends at once.
    """
    from ..checkpoints import generation, sources

    sampling = generation.Sampling(temperature, top_p, top_k, seed)
    if system is not None and not chat:
        raise OptionError("--system is a message of a chat template: add --chat, or remove it.")
    text = _read_prompt(text, prompt, prompt_file)
    loaded, tokenizer = sources.load(model, dtype, device)
    sources.apply(loaded, scheme, factor, option, on_existing, target_length)
    ids = generation.encode(tokenizer, text, chat=chat, system=system)
    result = generation.continue_ids(
        loaded, tokenizer, ids, max_new_tokens, sampling, stream=write if stream and not as_json else None,
        prefill_chunk=prefill_chunk,
    )  # fmt: skip
    if as_json:
        print_json({"prompt": text, "prompt_tokens": ids.shape[1], "new_tokens": result.tokens, "text": result.text})
    else:
        echo("" if stream else result.text)
    if not result.text.strip():
        template = bool(getattr(tokenizer, "chat_template", None)) and not chat
        remedy = (
            "This model has a chat template: add --chat." if template else "Try another prompt, or --temperature 0.7."
        )
        note(f"pe-patch: the model ended after {result.tokens} tokens without any text. {remedy}", always=True)
        raise typer.Exit(1)


def _read_prompt(text: str | None, prompt: str | None, prompt_file: Path | None) -> str:
    given = {"TEXT": text, "--prompt": prompt, "--prompt-file": prompt_file}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise OptionError(f"{' and '.join(named)} exclude each other: give one of them.")
    if prompt_file is not None:
        try:
            read = prompt_file.expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise OptionError(f"--prompt-file {prompt_file} cannot be read: {reason}.") from error
    elif named:
        read = text or prompt or ""
    else:
        if sys.stdin.isatty():
            note("Reading the prompt from the terminal; end it with Ctrl-D.")
        read = sys.stdin.read()
    if not read.strip():
        raise OptionError("The prompt is empty. Give a text as an argument, with --prompt-file or on standard input.")
    return read
