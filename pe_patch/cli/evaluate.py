"""Define `pe-patch evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

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
    Overwrite,
    PrefillChunk,
    SchemeName,
    TargetLength,
    parse_length_option,
)
from .output import command_line, console, is_quiet, note, print_results, set_continues


@app.command(
    epilog="\b\nExample:\n  pe-patch evaluate ./my-llama --scheme yarn --factor 4 --task passkey --length 8192 32768"
)
def evaluate(
    model: Model,
    scheme: SchemeName = None,
    factor: Factor = None,
    target_length: TargetLength = None,
    option: Options = None,
    on_existing: OnExisting = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK...", help="One or more tasks; see `pe-patch list tasks`.")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(parser=parse_length_option, metavar="TOKENS...", help="One or more lengths in tokens, or 32k."),
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(metavar="DEPTH...", help="Position of the answer in the text, from 0 (start) to 1 (end)."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Questions at each length; below 32, perplexity reads less text, too.")
    ] = 50,
    task_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Set an option of the tasks that accept it. Repeatable."),
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK,...",
            help="Run tasks of lm-eval, by their names there: arc_easy,hellaswag, or retention.",
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(min=0, help="Maximum number of documents of each lm-eval task; below 1, their share."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            parser=parse_length_option, metavar="TOKENS", help="Maximum length for lm-eval (default: the window)."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Format prompts with the tokenizer's chat template.")] = False,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Start every window and prompt with BOS, or without (default: as the tokenizer)."
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="Text source: stdlib, a folder, a file or a hub data set.")] = "stdlib",
    seed: Annotated[int, typer.Option(help="Random seed for questions and text positions.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences in one forward pass.")] = None,
    prefill_chunk: PrefillChunk = None,
    control_length: Annotated[
        int | None,
        typer.Option(
            parser=parse_length_option, metavar="TOKENS", help="Length of the control (default: native window)."
        ),
    ] = None,
    beyond_window: Annotated[bool, typer.Option("--beyond-window", help="Allow lengths beyond the window.")] = False,
    no_retrieval: Annotated[
        bool, typer.Option("--no-retrieval", help="Do not add the needle task to an evaluation of loss alone.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and print what each task reads, without running the model."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write a report to this folder. A rerun skips rows in it.")
    ] = None,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model at several lengths, with the same questions within its window as a control."""
    from .. import evaluation
    from ..checkpoints import sources
    from ..evaluation.lm_eval import harness as run_harness
    from ..evaluation.results import Results, check_results_folder, summary_table

    task_only = {"--task-option": task_option, "--depth": depth, "--control-length": control_length}
    task_only["--prefill-chunk"] = prefill_chunk
    if stray := [name for name, value in (task_only | {"--no-retrieval": no_retrieval}).items() if value]:
        if harness and not task:
            raise OptionError(f"{', '.join(stray)} has no effect on lm-eval's tasks: add --task, or remove it.")
    if dry_run and harness:
        raise OptionError("--dry-run has no effect on lm-eval's tasks: remove --harness.")
    if not harness and (limit is not None or max_length is not None):
        raise OptionError("--limit and --max-length apply to lm-eval's tasks: give --harness with them.")
    if output is not None:
        from ..compat import require_extra

        require_extra("report")  # before anything is measured
        check_results_folder(output, inputs=[model, text], overwrite=overwrite)
        set_continues(output)
    loaded, tokenizer = sources.load(model, dtype, device)
    sources.apply(loaded, scheme, factor, option, on_existing, target_length)
    results = Results()
    if harness:
        results += run_harness(
            loaded, tokenizer, [name for entry in harness for name in entry.split(",")], length or None, limit=limit,
            max_length=max_length, batch_size=batch_size or 1, chat=chat, bos=bos, beyond_window=beyond_window,
            output=output, overwrite=overwrite,
        )  # fmt: skip
    if task or not harness:
        results += evaluation.evaluate(
            loaded,
            tokenizer,
            task or ["perplexity", "needle"],
            length or None,
            samples=samples,
            batch_size=batch_size,
            prefill_chunk=prefill_chunk,
            seed=seed,
            text=text,
            control_length=control_length,
            beyond_window=beyond_window,
            retrieval=not no_retrieval,
            chat=chat,
            bos=bos,
            task_options=sources.parse_options(task_option or ()),
            output=output,
            overwrite=overwrite,
            dry_run=dry_run,
            **({"progress": False} if is_quiet() else {}),
            **({"depths": depth} if depth else {}),
        )
    if dry_run:
        return _print_plan(results.config["plan"], as_json)
    if as_json:
        print_results(results)
    else:
        console().print(summary_table(results))
    if output is not None:
        page = evaluation.write_report(
            results, output, title=f"Evaluation of {model}", command=command_line(), overwrite=overwrite
        )
        note(f"Report: {page}")


def _print_plan(plan: dict[str, dict[str, int]], as_json: bool) -> None:
    """Print what each task reads, controls included."""
    if as_json:
        typer.echo(json.dumps(plan))
        return
    table = Table(title="To read, controls included", title_justify="left")
    for heading in ("task", "prompts", "windows", "tokens", "forward passes at most"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, work in plan.items():
        table.add_row(task, *(f"{work[name]:,}" for name in ("prompts", "windows", "tokens", "forward_passes")))
    console().print(table)
