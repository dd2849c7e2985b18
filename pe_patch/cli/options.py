"""Define arguments that several commands share, and the types of their values."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

UNITS = {"": 1, "k": 2**10, "m": 2**20}
"""Multipliers of lengths: 32k is 32,768 tokens, as in the names of models."""


def parse_length(word: str) -> int | None:
    """Return a length in tokens from 32768, 32_768 or 32k, or None if `word` is not a whole number of tokens."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([km]?)", word.strip().lower())
    if match is None:
        return None
    tokens = float(match[1].replace("_", "")) * UNITS[match[2]]
    return int(tokens) if tokens.is_integer() else None


def parse_length_option(word: Any) -> int:
    """Return the number of tokens of an option's value.

    Raises:
        typer.BadParameter: it is not a whole number of at least 1 token.
    """
    tokens = word if isinstance(word, int) else parse_length(str(word))
    if tokens is None or tokens < 1:
        raise typer.BadParameter(f"{word!r} is not a number of tokens. Give a whole number, such as 32768 or 32k.")
    return tokens


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder of a model or adapter, a GGUF file, a hub name or demo.")
]
SchemeName = Annotated[
    str | None, typer.Option("--scheme", help="Scheme to patch the model with, by name or as a JSON dict.")
]
Factor = Annotated[str | None, typer.Option("--factor", help="The scheme's factor: target length / trained length.")]
TargetLength = Annotated[
    int | None,
    typer.Option(
        parser=parse_length_option, metavar="TOKENS", help="Target length in tokens, such as 32k, instead of --factor."
    ),
]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Set an option of the scheme. Repeatable.")
]
OnExisting = Annotated[
    str | None, typer.Option(help="How to handle the model's existing scaling: error, replace or compose.")
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        parser=parse_length_option,
        metavar="TOKENS",
        help="Read a prompt in parts of so many tokens, such as 2k, which bounds the memory.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[str, typer.Option(help="Data type: auto, float32, bfloat16 (bf16) or float16 (fp16).")]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda or cpu (default: a GPU if available).")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write into a folder with other content. Inputs are never overwritten.")
]
