"""`pe-patch evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from .application import app
from .options import AsJson, Device, Dtype, Factor, Model, OnExisting, Options, Overwrite, SchemeName
from .output import command_line, console, echo, print_results


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
    task_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the tasks that take it; may be repeated."),
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK,...", help="Tasks of lm-eval, by their names there: ruler,arc_challenge, or retention."
        ),
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Documents of each of lm-eval's tasks; below 1 their share.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens that lm-eval gives the model (default: its window).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")] = False,
    text: Annotated[str, typer.Option(help="stdlib, a folder, a file or a data set of the hub.")] = "stdlib",
    seed: Annotated[int, typer.Option(help="Of the questions and of the places in the text.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences in one forward.")] = None,
    control_length: Annotated[int | None, typer.Option(min=1, help="Of the control (default: native window).")] = None,
    beyond_window: Annotated[bool, typer.Option("--beyond-window", help="Allow lengths above the window.")] = False,
    no_retrieval: Annotated[bool, typer.Option("--no-retrieval", help="Let loss stand without retrieval.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write a report to this folder; rows that it holds are not measured again.")
    ] = None,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model at several lengths; every score stands beside the same questions within its window."""
    from .. import evaluation
    from ..checkpoints import loading
    from ..evaluation.lm_eval import harness as run_harness
    from ..evaluation.results import Results, check_results_folder, summary_table

    own = {"--task-option": task_option, "--depth": depth, "--control-length": control_length}
    if stray := [name for name, value in (own | {"--no-retrieval": no_retrieval}).items() if value]:
        if harness and not task:
            raise OptionError(
                f"{', '.join(stray)} would change nothing of lm-eval's tasks: give --task, or leave it out."
            )
    if not harness and (limit is not None or max_length is not None):
        raise OptionError("--limit and --max-length belong to lm-eval's tasks: give --harness with them.")
    if output is not None:
        check_results_folder(output, inputs=[model, text], overwrite=overwrite)
    loaded, tokenizer = loading.load(model, dtype, device)
    loading.apply(loaded, scheme, factor, option, on_existing)
    results = Results()
    if harness:
        results += run_harness(
            loaded, tokenizer, [name for entry in harness for name in entry.split(",")], length or None, limit=limit,
            max_length=max_length, batch_size=batch_size or 1, chat=chat, beyond_window=beyond_window, output=output,
            overwrite=overwrite,
        )  # fmt: skip
    if task or not harness:
        results += evaluation.evaluate(
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
            chat=chat,
            task_options=loading.parse_options(task_option or ()),
            output=output,
            overwrite=overwrite,
            **({"depths": depth} if depth else {}),
        )
    if as_json:
        print_results(results)
    else:
        console().print(summary_table(results))
    if output is not None:
        page = evaluation.write_report(
            results, output, title=f"Evaluation of {model}", command=command_line(), overwrite=overwrite
        )
        echo(f"Report: {page}", err=True)
