"""Compare conversions with the original model: one conversion, or methods times cache sizes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from ..adapters.projections import check_unquantised
from ..checkpoints.folders import SWEEP, check_output
from ..errors import OptionError
from ..evaluation.charts import CacheLine, cache_chart
from ..evaluation.progress import Progress, fewer_samples
from ..evaluation.results import write_atomically
from .measure import Advance, Material, share_name

RATIOS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
ORIGINAL = "original"

Row = dict[str, Any]


def convert_model(model: Any, material: Material, options: Mapping[str, Any], progress: Progress) -> dict[str, Row]:
    """Convert a model in place, and return its measurements `before` and `after`.

    Args:
        model: the model.
        material: the text of the conversion.
        options: options of `mla`.
        progress: shows each step and counts the tokens that are read.
    """
    from ..patching.api import patch_model

    check_unquantised(model)
    progress.describe("1 of 3, measuring the original model")
    before = original_row(model, material, progress.advance)
    started = time.perf_counter()
    progress.describe(f"2 of 3, converting, calibrated on {material.calibrated_on}")
    patch_model(model, "mla", calibration=material.rows, **options)
    progress.advance(material.calibration_tokens)
    progress.describe("3 of 3, measuring the converted model")
    return {"before": before, "after": converted_row(model, material, before, started, progress.advance)}


def work(model: Any, material: Material, *, conversions: int, shown: bool) -> Progress:
    """Return the progress over all tokens that a number of conversions and their measurements read.

    Args:
        model: the model before the conversion.
        material: the text of the conversion.
        conversions: number of conversions.
        shown: False shows nothing.
    """
    ruler = material.ruler

    def tokens(questions: int) -> int:
        return (1 + conversions) * ruler.tokens(model, questions) + conversions * material.calibration_tokens

    total = tokens(ruler.questions)
    plan = (
        f"to read: about {total:,} tokens, in {1 + conversions} measurements at {ruler.length:,} tokens and "
        f"{conversions} x {material.calibration_tokens:,} tokens of calibration"
    )
    return Progress("convert", total, plan, shown, partial(fewer_samples, ruler.questions, tokens=tokens))


def original_row(model: Any, material: Material, advance: Advance = lambda tokens: None) -> Row:
    """Measure the model before a conversion; `advance` counts the tokens that are read."""
    measured = material.ruler.measure(model, advance)
    return {"method": ORIGINAL, "cache_ratio": 1.0, **measured.to_dict()}


def converted_row(
    model: Any, material: Material, original: Row, started: float, advance: Advance = lambda tokens: None
) -> Row:
    """Measure a converted model.

    Args:
        model: the converted model.
        material: the text of the conversion.
        original: the row of the original model.
        started: `time.perf_counter()` at the start of the conversion.
        advance: counts the tokens that are read.
    """
    from ..patching.api import find_patch

    seconds = time.perf_counter() - started
    patch = find_patch(model)
    assert patch is not None
    scheme: Any = patch.scheme
    measured = material.ruler.measure(model, advance).to_dict()
    return {
        "method": scheme.method,
        "cache_ratio": measured["cached_bytes_per_token"] / original["cached_bytes_per_token"],
        "kv_rank": scheme.rank,
        "rope_dim": scheme.rotary_width,
        **measured,
        "loss_change": measured["loss"] / original["loss"] - 1,
        "seconds": round(seconds, 3),
    }


def sweep(
    model: Any,
    material: Material,
    methods: Sequence[str],
    ratios: Sequence[float],
    options: Mapping[str, Any],
    progress: Progress,
) -> list[Row]:
    """Measure the original, then each method at each share of its cache, and restore the model.

    A size that a method does not support gives a row with a `note`. If no size works, the last error is raised.
    """
    check_unquantised(model)
    progress.describe(ORIGINAL)
    rows, problem = [original_row(model, material, progress.advance)], None
    points = [(method, ratio) for method in methods for ratio in ratios]
    for number, (method, ratio) in enumerate(points, 1):
        progress.describe(f"{number} of {len(points)}, {method} at {share_name(ratio)}")
        try:
            row = _point(model, material, rows[0], {"method": method, "cache_ratio": ratio, **options}, progress)
        except OptionError as error:
            problem, row = error, {"method": method, "note": str(error)}
        rows.append({**row, "asked_ratio": ratio})
    if problem is not None and all("note" in row for row in rows[1:]):
        raise problem
    return rows


def _point(model: Any, material: Material, original: Row, options: Mapping[str, Any], progress: Progress) -> Row:
    from ..patching.api import patched

    started = time.perf_counter()
    with patched(model, "mla", calibration=material.rows, **options):
        progress.advance(material.calibration_tokens)
        return converted_row(model, material, original, started, progress.advance)


def write(rows: Sequence[Row], config: Mapping[str, Any], folder: Path, *, overwrite: bool = False) -> dict[str, Path]:
    """Write the rows to sweep.jsonl, the settings to config.json and the picture to sweep.png, and return their paths.

    Raises:
        OutputError: the folder has content other than a sweep and `overwrite` is False.
    """
    check_output(folder, SWEEP, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"rows": folder / "sweep.jsonl", "config": folder / "config.json", "picture": folder / "sweep.png"}
    write_atomically(paths["rows"], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_atomically(paths["config"], json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    title = f"{config['model']}, not trained after the conversion; calibrated on {config['calibration']}"
    write_atomically(paths["picture"], cache_chart(lines(rows), rows[0], title))
    return paths


def lines(rows: Sequence[Row]) -> list[CacheLine]:
    """Return one line of the picture for each method."""
    measured = [row for row in rows[1:] if "note" not in row]
    methods = list(dict.fromkeys(row["method"] for row in measured))
    return [
        CacheLine(method, [row for row in measured if row["method"] == method], index)
        for index, method in enumerate(methods)
    ]


def sweep_table(rows: Sequence[Row]) -> Table:
    """Return a table with one line for each size and method, sorted by size."""
    table = Table(title="Conversions at equal size of the cache", title_justify="left", caption_justify="left")
    table.caption = measured_on(rows[0])
    for name in ("cache", "method"):
        table.add_column(name)
    for name in ("kv_rank", "rope_dim", "numbers", "bytes", "loss", "change", "perplexity", "retrieval", "95 %"):
        table.add_column(name, justify="right")
    if any("note" in row for row in rows):
        table.add_column("note", max_width=60)
    for row in _by_size(rows):
        size = share_name(row.get("asked_ratio", row.get("cache_ratio", 1.0)))
        if "note" in row:
            table.add_row(size, row["method"], *["-"] * 9, row["note"])
            continue
        low, high = row["retrieval_interval"]
        table.add_row(
            size, row["method"], _plain(row.get("kv_rank")), _plain(row.get("rope_dim")),
            f"{row['cached_numbers_per_token_and_layer']:g}", f"{row['cached_bytes_per_token']:,}",
            f"{row['loss']:.3f}", "" if "loss_change" not in row else f"{row['loss_change']:+.1%}",
            f"{row['perplexity']:.2f}", _score(row["retrieval"]), "" if low is None else f"{low:.2f} to {high:.2f}",
        )  # fmt: skip
    return table


def _by_size(rows: Sequence[Row]) -> Iterator[Row]:
    yield rows[0]
    yield from sorted(rows[1:], key=lambda row: -row["asked_ratio"])


def change_table(rows: Mapping[str, Row]) -> Table:
    """Return a table of the model before and after one conversion."""
    before, after = rows["before"], rows["after"]
    table = Table(title=f"Converted with {after['method']}", title_justify="left", caption_justify="left")
    table.caption = measured_on(before)
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="right" if name else "left")
    shown = {
        "cache: numbers per token and layer": ("cached_numbers_per_token_and_layer", "{:g}"),
        "cache: bytes per token": ("cached_bytes_per_token", "{:,}"),
        "loss, nats per token": ("loss", "{:.4f}"),
        "perplexity": ("perplexity", "{:.2f}"),
        "questions answered": ("retrieval", "{:.2f}"),
    }
    for label, (key, form) in shown.items():
        old, new = before[key], after[key]
        if old is not None:
            table.add_row(label, form.format(old), form.format(new), f"{new / old - 1:+.1%}" if old else "")
    table.add_row("width of the latent (kv_rank)", "", str(after["kv_rank"]), "")
    table.add_row("rotary dimensions (rope_dim)", "", str(after["rope_dim"]), "")
    return table


def measured_on(row: Row) -> str:
    """Return a sentence on what the numbers were measured on."""
    sentence = f"Cache: growth over 8 tokens in the model's cache object. Loss: {row['loss_measured_on']}."
    return sentence if row["retrieval"] is None else f"{sentence} Retrieval: {row['retrieval_measured_on']}."


def _plain(value: int | None) -> str:
    return "" if value is None else str(value)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
