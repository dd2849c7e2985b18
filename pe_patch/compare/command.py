"""What `pe-patch compare` does between its options and its output."""

from __future__ import annotations

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
"""The command's options and their defaults; a preset decides all of them."""


def run(
    asked: Mapping[str, Any],
    output: Path,
    *,
    preset: str | None,
    quick: bool,
    workers: int | None,
    line: str,
    overwrite: bool = False,
) -> tuple[Comparison, Path]:
    """Compare, write the page, and give both the result and the page's path; `line` is the command line."""
    from ..checkpoints.loading import parse_options, quiet_host

    quiet_host()
    seed, given = asked["seed"], {key: asked[key] for key in DEFAULTS}
    if preset is not None:
        presets.refuse(given, DEFAULTS)
        check_output(output, COMPARISON, overwrite=overwrite)  # a preset may build its model there
        chosen, settings = presets.find(preset, output, seed=seed, quick=quick)
        # their models are so small that two threads on one are slower than one thread on each of two
        found = carry_out(
            settings, output, workers=processes.cores() if workers is None else workers, overwrite=overwrite
        )
        return found, page.write(found, output, title=chosen.title, command=line, more=chosen.notes)
    if quick:
        raise OptionError(
            "--quick belongs to --preset; elsewhere --samples, --length and --steps say how much is done."
        )
    if given["model"] is None or not given["scheme"]:
        raise OptionError("Give a MODEL and at least one --scheme, or a --preset (survey, demo).")
    factor = None if given["factor"] is None else parse_options([f"factor={given['factor']}"])["factor"]
    found = compare(
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
    )
    return found, page.write(found, output, title=f"Schemes on {given['model']}", command=line)


def show(found: Comparison, console: Any) -> None:
    """The tables, and in one sentence what they say."""
    for table in page.terminal(found):
        console.print(table)
    console.print(page.verdict(found), highlight=False, soft_wrap=True)
