"""Run `pe-patch compare` from its options to its output."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.folders import COMPARISON, check_output
from ..errors import OptionError
from . import page, presets, processes
from .comparison import Comparison
from .run import carry_out, compare

DEFAULTS: Mapping[str, Any] = {
    "model": None, "scheme": None, "factor": None, "length": None, "task": None, "fine_tune": None, "steps": None,
    "samples": 50, "text": "stdlib", "batch_size": None, "dtype": "auto", "device": None,
}  # fmt: skip
"""The command's options and their defaults. A preset sets all of them."""


def run(
    arguments: Mapping[str, Any],
    output: Path,
    *,
    preset: str | None,
    quick: bool,
    workers: int | None,
    line: str,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[Comparison, Path]:
    """Compare, write the report page, and return the comparison and the page's path.

    Args:
        arguments: the command's options.
        output: the output folder.
        preset: name of a preset; None compares `arguments["scheme"]` on `arguments["model"]`.
        quick: run the preset with few steps and questions.
        workers: number of parallel processes; None uses the default.
        line: the command line, for the page.
        overwrite: write into a folder with other content.
        progress: show a progress bar and the estimate.

    Raises:
        OptionError: options are missing or contradict each other.
    """
    from ..checkpoints.sources import parse_options, quiet_transformers

    quiet_transformers()
    seed, given = arguments["seed"], {key: arguments[key] for key in DEFAULTS}
    if preset is not None:
        presets.refuse(given, DEFAULTS)
        check_output(output, COMPARISON, overwrite=overwrite)  # a preset may build its model there
        chosen, settings = presets.find(preset, output, seed=seed, quick=quick)
        if progress and not quick and not (output / "settings.json").exists():
            print(
                f"The preset {preset} took {chosen.takes}. --quick tries it with few steps and questions.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        # The presets' models are so small that one thread each on two models is faster than two threads on one.
        comparison = carry_out(
            settings,
            output,
            workers=processes.cores() if workers is None else workers,
            overwrite=overwrite,
            progress=progress,
        )
        return comparison, page.write(comparison, output, title=chosen.title, command=line, more=chosen.notes)
    if quick:
        raise OptionError(
            "--quick needs --preset; otherwise set the amount of work with --samples, --length and --steps."
        )
    if given["model"] is None or not given["scheme"]:
        raise OptionError("Give a MODEL and at least one --scheme, or a --preset (survey, demo).")
    factor = None if given["factor"] is None else parse_options([f"factor={given['factor']}"])["factor"]
    comparison = compare(
        given["model"],
        given["scheme"],
        given["length"],
        output=output,
        factor=factor,
        tasks=given["task"] or ("perplexity", "needle"),
        fine_tune=given["fine_tune"],
        steps=given["steps"],
        samples=given["samples"],
        text=given["text"],
        seed=seed,
        dtype=given["dtype"],
        device=given["device"],
        batch_size=given["batch_size"],
        workers=workers,
        overwrite=overwrite,
        progress=progress,
    )
    return comparison, page.write(comparison, output, title=f"Schemes on {given['model']}", command=line)


def show(comparison: Comparison, console: Any) -> None:
    """Print the tables and a one-sentence conclusion."""
    for table in page.terminal(comparison):
        console.print(table)
    console.print(page.verdict(comparison), highlight=False, soft_wrap=True)
