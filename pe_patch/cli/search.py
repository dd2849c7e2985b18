"""Define `pe-patch search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError
from .application import app
from .options import AsJson, Device, Dtype, Model, OnExisting, Overwrite, parse_length_option
from .output import console, echo, print_json, set_continues


@app.command(
    epilog="\b\nExamples:\n  pe-patch search ./my-llama --length 32768 --text ./books --output runs/search\n"
    "  pe-patch search ./my-llama --length 32768 --method longrope --population 16 --parents 8 --iterations 10"
)
def search(
    model: Model,
    length: Annotated[
        int, typer.Option(parser=parse_length_option, metavar="TOKENS", help="Target context length in tokens, or 32k.")
    ],
    method: Annotated[
        str,
        typer.Option(help="Score candidates by the loss on documents (longrope) or on answers in them (longrope2)."),
    ] = "longrope2",
    text: Annotated[str, typer.Option(help="Text source: stdlib, a folder, a file or a hub data set.")] = "stdlib",
    samples: Annotated[int, typer.Option(help="Number of documents to score each candidate on.")] = 8,
    needles: Annotated[int, typer.Option(help="Number of facts hidden in each document (longrope2).")] = 8,
    targets: Annotated[
        int | None,
        typer.Option(help="Number of last tokens of each document to score (longrope; default: 1/8, at most 2048)."),
    ] = None,
    population: Annotated[int, typer.Option(help="Number of candidates in the first generation.")] = 64,
    iterations: Annotated[int, typer.Option(help="Number of further generations.")] = 40,
    mutations: Annotated[int, typer.Option(help="Mutated candidates in each generation.")] = 16,
    crossovers: Annotated[int, typer.Option(help="Candidates with two parents in each generation.")] = 16,
    parents: Annotated[int, typer.Option(help="Number of best candidates that enter the next generation.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for candidates, questions and text positions.")] = 0,
    start: Annotated[
        Path | None, typer.Option(help="Additional start: a best.json, or a JSON list of factors.")
    ] = None,
    attention_factor: Annotated[
        float | None, typer.Option(help="Factor of cos and sin (default: LongRoPE's formula).")
    ] = None,
    on_existing: OnExisting = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences in one forward pass.")] = None,
    output: Annotated[Path, typer.Option(help="Output folder. A rerun continues a stopped search in it.")] = Path(
        "search"
    ),
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Search for the factors by which LongRoPE rescales a model's rotation. The result sets options of `longrope`."""
    from ..checkpoints import sources
    from ..checkpoints.folders import SEARCH, check_output
    from ..search import Schedule
    from ..search import search as run
    from ..search.result import result_table

    check_output(output, SEARCH, inputs=[model, text], overwrite=overwrite)
    set_continues(output)
    initial_factors = None if start is None else _factors(start)
    loaded, tokenizer = sources.load(model, dtype, device)
    result = run(
        loaded, tokenizer, length, method=method, text=text, samples=samples, needles=needles, targets=targets,
        schedule=Schedule(population, iterations, mutations, crossovers, parents), seed=seed, start=initial_factors,
        attention_factor=attention_factor, on_existing=on_existing or "error", batch_size=batch_size, output=output,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        print_json({**result.to_dict(), "files": str(output)})
        return
    console().print(result_table(result))
    if result.beaten:
        echo(f"{result.beaten} scores lower than the best candidate: use it, or search longer.")
    echo(f"Options of the scheme longrope: {output / 'best.json'}; picture: {output / 'search.png'}.")


def _factors(path: Path) -> Any:
    """Read a list of factors from a JSON file, or from the `long_factor` of the options in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"--start {path} cannot be read as JSON: {error}.") from error
    listed = content.get("long_factor") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not all(type(value) in (int, float) for value in listed):
        raise OptionError(f"--start {path} must hold a list of numbers, or options with such a list in long_factor.")
    return listed
