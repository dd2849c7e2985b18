"""The command line: `pe-patch demo`, `list`, `inspect`, `evaluate`, `generate`, `export`, `convert`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pe_patch.errors import OptionError, PePatchError, UnknownNameError

app = typer.Typer(
    name="pe-patch",
    help="Replace the positional logic of a Transformers model, and measure what that does. "
    "--debug anywhere shows the traceback of a failure.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or the name of a model on the hub.")]
SchemeName = Annotated[str | None, typer.Option("--scheme", help="A scheme to patch in, by name or as a JSON dict.")]
Factor = Annotated[str | None, typer.Option("--factor", help="The scheme's factor: target over trained length.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the scheme; may be repeated.")
]
OnExisting = Annotated[
    str | None, typer.Option(help="What to do with a scaling the model already has: error, replace or compose.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cuda or cpu (default: a GPU if there is one).")]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _is_task(word: str) -> bool:
    from pe_patch.evaluation.tasks import TASKS

    return all(name in TASKS for name in word.split(",") if name)


def _is_method(word: str) -> bool:
    from pe_patch.evaluation.conversion import METHODS

    return all(name in METHODS for name in word.split(",") if name)


SEVERAL: dict[str, Callable[[str], bool]] = {
    "--length": lambda word: word.replace(",", "").isdigit(),
    "--depth": lambda word: all(map(_is_number, word.split(","))),
    "--task": _is_task,
    "--method": _is_method,
    "--cache-ratio": lambda word: all(map(_is_number, word.replace("/", ",").split(","))),
}
"""Options that take several values after one flag, and what a further value looks like."""


def spread(words: Sequence[str]) -> list[str]:
    """Write a flag before each of its values, as Typer wants it: `--length 1 2` becomes `--length 1 --length 2`.

    Commas separate too. The word after a flag is always its value; those after it only if they look like one.
    """
    spread_out: list[str] = []
    flag, first = "", False
    for word in words:
        name, equals, value = word.partition("=")
        if name in SEVERAL:
            flag, first = name, not equals
            if not equals:
                continue
            word = value
        elif not flag or not (first or SEVERAL[flag](word)) or word.startswith("--"):
            spread_out += [flag, word] if first else [word]
            flag, first = "", False
            continue
        spread_out += [part for item in word.split(",") if item for part in (flag, item)]
        first = False
    return [*spread_out, flag] if first else spread_out


@app.command(epilog="\b\nExample:\n  pe-patch demo --output report")
def demo(
    output: Annotated[Path, typer.Option(help="The folder of the report.")] = Path("report"),
    steps: Annotated[int | None, typer.Option(min=0, help="Steps of the fine-tune (default: the recipe's).")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Train the base model first.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer questions and steps: a first look.")] = False,
    seed: Annotated[int, typer.Option(help="Of the questions and of the training.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Take a small model to eight times its window, measure six schemes, fine-tune with one, write a report."""
    from dataclasses import replace

    from rich.console import Console

    from pe_patch import demo as demonstration
    from pe_patch.loading import quiet_host

    quiet_host()
    settings = demonstration.quick(output) if quick else demonstration.Settings(output=output)
    chosen = replace(settings, from_scratch=from_scratch, seed=seed, steps=settings.steps if steps is None else steps)
    results = demonstration.run(chosen, Console(stderr=as_json))
    if as_json:
        _print_results(results)


@app.command("list", epilog="\b\nExample:\n  pe-patch list schemes --json")
def list_(
    what: Annotated[str | None, typer.Argument(metavar="[schemes|families|tasks]", help="Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the schemes, the model families and the tasks, each with a clause and its paper."""
    from pe_patch import catalogue

    found = catalogue.catalogue()
    if what is not None:
        found = {what: catalogue.part(found, what)}
    if as_json:
        _print_json(found)
        return
    for table in catalogue.tables(found):
        _console().print(table)


@app.command(
    epilog="\b\nExample:\n  pe-patch inspect meta-llama/Llama-3.1-8B --scheme yarn --factor 4 --on-existing replace"
)
def inspect(
    model: Model,
    scheme: SchemeName = None,
    factor: Factor = None,
    option: Options = None,
    on_existing: OnExisting = None,
    as_json: AsJson = False,
) -> None:
    """Show what a scheme would swap in a model. Reads its configuration only: no weights are needed."""
    from pe_patch import describe, loading

    empty = loading.empty_model(model)
    loading.apply(empty, scheme, factor, option, on_existing)
    description = describe(empty)
    if as_json:
        _print_json(description.to_dict())
    else:
        typer.echo(str(description))


@app.command(
    epilog="\b\nExample:\n  pe-patch evaluate ./my-llama --scheme yarn --factor 4 --task passkey --length 8192 32768"
)
def evaluate(
    model: Model,
    scheme: SchemeName = None,
    factor: Factor = None,
    option: Options = None,
    on_existing: OnExisting = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK...", help="One or more tasks; see `pe-patch list tasks`.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, metavar="TOKENS...", help="One or more lengths in tokens.")
    ] = None,
    depth: Annotated[
        list[float] | None, typer.Option(metavar="DEPTH...", help="Where the answer stands: 0 start, 1 end.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions at each length.")] = 50,
    text: Annotated[str, typer.Option(help="stdlib, a folder, a file or a data set of the hub.")] = "stdlib",
    seed: Annotated[int, typer.Option(help="Of the questions and of the places in the text.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences in one forward.")] = None,
    control_length: Annotated[int | None, typer.Option(min=1, help="Of the control (default: native window).")] = None,
    beyond_window: Annotated[bool, typer.Option("--beyond-window", help="Allow lengths above the window.")] = False,
    no_retrieval: Annotated[bool, typer.Option("--no-retrieval", help="Let loss stand without retrieval.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write a report to this folder.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model at several lengths; every score stands beside the same questions within its window."""
    from pe_patch import evaluation, loading
    from pe_patch.evaluation.tables import summary

    loaded, tokenizer = loading.load(model, dtype, device)
    loading.apply(loaded, scheme, factor, option, on_existing)
    results = evaluation.evaluate(
        loaded,
        tokenizer,
        task or ["perplexity", "needle"],
        length or None,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        text=text,
        control_length=control_length,
        beyond_window=beyond_window,
        retrieval=not no_retrieval,
        **({"depths": depth} if depth else {}),
    )
    if as_json:
        _print_results(results)
    else:
        _console().print(summary(results))
    if output is not None:
        page = evaluation.write_report(results, output, title=f"Evaluation of {model}", command=_command_line())
        typer.echo(f"Report: {page}", err=True)


@app.command(epilog='\b\nExample:\n  pe-patch generate ./my-llama --scheme yarn --factor 4 --prompt "Once upon a time"')
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from (default: standard input).")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text to go on from.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    scheme: SchemeName = None,
    factor: Factor = None,
    option: Options = None,
    on_existing: OnExisting = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text greedily with a patched model."""
    from pe_patch import loading

    text = prompt_file.read_text(encoding="utf-8") if prompt_file else sys.stdin.read() if prompt is None else prompt
    loaded, tokenizer = loading.load(model, dtype, device)
    loading.apply(loaded, scheme, factor, option, on_existing)
    written, tokens = loading.continue_text(loaded, tokenizer, text, max_new_tokens)
    if as_json:
        _print_json({"prompt": text, "prompt_tokens": tokens, "text": written})
    else:
        typer.echo(written)


@app.command(
    epilog="\b\nExample:\n  pe-patch export ./my-llama ./my-llama-32k --scheme yarn --factor 8 --target transformers"
)
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    scheme: SchemeName = None,
    factor: Factor = None,
    option: Options = None,
    on_existing: OnExisting = None,
    target: Annotated[str, typer.Option(help="For whom: transformers, ...")] = "transformers",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a model with its scheme so that it loads without pe_patch."""
    from pe_patch import export as export_model
    from pe_patch import loading

    loaded, tokenizer = loading.load(model, dtype, "cpu")
    loading.apply(loaded, scheme, factor, option, on_existing)
    written = export_model(loaded, output, target=target)
    tokenizer.save_pretrained(written)
    if as_json:
        _print_json({"path": str(written), "target": target})
    else:
        typer.echo(f"Written to {written}")


@app.command(
    epilog="\b\nExamples:\n  pe-patch convert ./my-llama --to mla --cache-ratio 1/4 --out ./my-llama-mla\n"
    "  pe-patch convert ./my-llama --to mla --sweep --output sweep"
)
def convert(
    model: Model,
    to: Annotated[str, typer.Option(help="What to convert to: mla, multi-head latent attention.")],
    method: Annotated[
        list[str] | None, typer.Option(metavar="METHOD...", help="transmla (default), mha2mla or svd; sweep: all.")
    ] = None,
    kv_rank: Annotated[int | None, typer.Option(min=1, help="Width of the latent that is cached.")] = None,
    cache_ratio: Annotated[
        list[str] | None, typer.Option(metavar="SHARE...", help="Share of the cache to keep, such as 1/8.")
    ] = None,
    max_loss: Annotated[float | None, typer.Option(min=0, help="Greatest growth of the loss, such as 0.02.")] = None,
    rope_dim: Annotated[int | None, typer.Option(min=2, help="Dimensions that go on rotating.")] = None,
    option: Options = None,
    calibration: Annotated[str, typer.Option(help="Text to calibrate on: stdlib, a folder, a file, ...")] = "stdlib",
    calibration_tokens: Annotated[int, typer.Option(min=2, help="How much of it.")] = 65536,
    text: Annotated[str | None, typer.Option(help="Text to measure on (default: held-out files of that).")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens to measure at (default: window, <= 2048).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions about facts hidden in the text.")] = 100,
    no_retrieval: Annotated[bool, typer.Option("--no-retrieval", help="Let loss stand without retrieval.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Compare methods at several sizes; save no model.")] = False,
    keep_original: Annotated[bool, typer.Option("--keep-original", help="Save the replaced weights as well.")] = False,
    out: Annotated[Path | None, typer.Option(help="Save the converted model to this folder.")] = None,
    output: Annotated[Path, typer.Option(help="The folder of the sweep's table and picture.")] = Path("sweep"),
    seed: Annotated[int, typer.Option(help="Of the calibration, the questions and the places.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Convert a trained model to a smaller cache, and measure what that changes; it wants healing afterwards."""
    from pe_patch.evaluation import conversion_command

    sizes = {"kv_rank": kv_rank, "cache_ratio": cache_ratio, "max_loss": max_loss, "rope_dim": rope_dim}
    request = conversion_command.Request(
        target=to, methods=method or (), sizes=sizes, options=option or (), sweep=sweep, out=out, output=output,
        keep_original=keep_original,
    )  # fmt: skip
    questions = 0 if no_retrieval and not sweep else samples
    text_of = {"calibration": calibration, "tokens": calibration_tokens, "text": text, "length": length, "seed": seed}
    found = conversion_command.run(model, request, {**text_of, "questions": questions}, (dtype, device))
    if as_json:
        _print_json(found.to_dict())
    else:
        found.show(_console())


def _console() -> Any:
    from rich.console import Console

    # A pipe has no width of its own: tables are not folded to 80 columns there.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_results(results: Any) -> None:
    from dataclasses import asdict

    _print_json({"config": results.config, "rows": [asdict(row) for row in results.rows]})


def _command_line() -> str:
    import shlex

    return shlex.join(["pe-patch", *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 for a failure, 2 for wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    logging.basicConfig(format="%(message)s")
    try:
        app(spread([word for word in words if word != "--debug"]), prog_name="pe-patch")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, PePatchError) else f"{type(error).__name__}: "
        typer.echo(f"pe-patch: {kind}{' '.join(str(error).split())}", err=True)
        return 2 if isinstance(error, UnknownNameError | OptionError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
