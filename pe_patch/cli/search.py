"""`pe-patch search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError
from .application import app
from .options import AsJson, Device, Dtype, Model, OnExisting, Overwrite
from .output import console, echo, print_json


@app.command(
    epilog="\b\nExamples:\n  pe-patch search ./my-llama --length 32768 --text ./books --output runs/search\n"
    "  pe-patch search ./my-llama --length 32768 --method longrope --population 16 --parents 8 --iterations 10"
)
def search(
    model: Model,
    length: Annotated[int, typer.Option(help="The length in tokens that the model is to reach.")],
    method: Annotated[
        str, typer.Option(help="longrope judges by the loss of documents, longrope2 by that of answers in them.")
    ] = "longrope2",
    text: Annotated[str, typer.Option(help="stdlib, a folder, a file or a data set of the hub.")] = "stdlib",
    samples: Annotated[int, typer.Option(help="Documents that each candidate is scored on.")] = 8,
    needles: Annotated[int, typer.Option(help="Facts hidden in each of longrope2's documents.")] = 8,
    targets: Annotated[
        int | None, typer.Option(help="Last tokens of longrope's documents that count (default: 1/8, at most 2048).")
    ] = None,
    population: Annotated[int, typer.Option(help="Candidates of the first generation.")] = 64,
    iterations: Annotated[int, typer.Option(help="Further generations.")] = 40,
    mutations: Annotated[int, typer.Option(help="Mutated candidates of each.")] = 16,
    crossovers: Annotated[int, typer.Option(help="Candidates with two parents of each.")] = 16,
    parents: Annotated[int, typer.Option(help="The best, which go on to the next generation.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the candidates, the questions and the places.")] = 0,
    start: Annotated[
        Path | None, typer.Option(help="Factors to start from as well: a best.json, or a JSON list.")
    ] = None,
    attention_factor: Annotated[
        float | None, typer.Option(help="What cos and sin are multiplied by (default: by LongRoPE's formula).")
    ] = None,
    on_existing: OnExisting = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences in one forward.")] = None,
    output: Annotated[Path, typer.Option(help="The folder of what is found; a stopped search goes on there.")] = Path(
        "search"
    ),
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Search the factors by which LongRoPE rescales a model's rotation; the best become options of `longrope`."""
    from ..checkpoints import loading
    from ..checkpoints.folders import SEARCH, check_output
    from ..search import Schedule
    from ..search import search as run
    from ..search.result import result_table

    check_output(output, SEARCH, inputs=[model, text], overwrite=overwrite)
    given = None if start is None else _factors(start)
    loaded, tokenizer = loading.load(model, dtype, device)
    found = run(
        loaded, tokenizer, length, method=method, text=text, samples=samples, needles=needles, targets=targets,
        schedule=Schedule(population, iterations, mutations, crossovers, parents), seed=seed, start=given,
        attention_factor=attention_factor, on_existing=on_existing or "error", batch_size=batch_size, output=output,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        print_json({**found.to_dict(), "files": str(output)})
        return
    console().print(result_table(found))
    if found.beaten:
        echo(f"{found.beaten} scores lower than anything found: use it, or search longer.")
    echo(f"Options of the scheme longrope: {output / 'best.json'}; picture: {output / 'search.png'}.")


def _factors(path: Path) -> Any:
    """The list in a file, or the `long_factor` of the options in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"--start {path} cannot be read as JSON: {error}.") from error
    listed = content.get("long_factor") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not all(type(value) in (int, float) for value in listed):
        raise OptionError(f"--start {path} holds no list of numbers, nor options with one in long_factor.")
    return listed
