"""Run the demonstration: extend a small model to eight times its window, with and without training, and measure it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import compat
from ..checkpoints.folders import DEMO, check_output
from ..data.packaged import DEMO_MODEL
from ..errors import CheckpointError
from ..evaluation.corpus import Corpus
from ..evaluation.perplexity import Perplexity
from ..evaluation.report import write_report
from ..evaluation.results import Cell, Results, pivots
from ..evaluation.run import evaluate
from ..evaluation.tasks import Needle

BASE = DEMO_MODEL
"""Folder of the base model."""
FACTOR = 8
UNTOUCHED, TUNED = "base", "yarn, fine-tuned"

NOTES = (
    "One small model and one seed: the order of the schemes agrees with the papers, the exact numbers hold only for "
    "this model.",
    "Loss does not fall with length here: a model of this size, trained at 256 tokens, gains nothing from more text. A "
    "flat line shows no harm, not a benefit.",
    "Keys and values are single special tokens, which makes questions clearer than in words.",
    "Every scheme uses its factor for the greatest length at all lengths, as in deployment.",
)


@dataclass(frozen=True)
class DemoSettings:
    """DemoSettings of the demonstration."""

    output: Path = Path("report")
    schemes: tuple[str, ...] = ("linear", "ntk", "dynamic_ntk", "yarn", "llama3")
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    samples: int = 35
    """Number of questions at each length."""
    spots: int = 16
    """Number of places in the text whose last 128 tokens are scored, equal for all lengths and schemes."""
    steps: int | None = None
    """Optimiser steps of the fine-tuning; None uses the recipe's number, and 0 skips it."""
    from_scratch: bool = False
    """Train the base model first instead of using the packaged one."""
    seed: int = 0
    overwrite: bool = False
    """Write into an output folder with other content."""


def quick(output: Path) -> DemoSettings:
    """Return settings for a run in under a minute: fewer questions, fewer lengths, ten steps."""
    return DemoSettings(output=output, lengths=(256, 1024), samples=20, spots=8, steps=10)


def run(settings: DemoSettings, console: Console | None = None) -> Results:
    """Measure, fine-tune, measure again, print the table, and write the report to `settings.output`.

    Raises:
        OutputError: the output folder has other content and `overwrite` is False.
        CheckpointError: the base model is missing or damaged.
    """
    check_output(settings.output, DEMO, inputs=[BASE], overwrite=settings.overwrite)
    console = console or Console()
    started = time.perf_counter()
    source = _train_base(settings, console) if settings.from_scratch else BASE
    model, tokenizer = load_base(source)
    corpus = Corpus.load(tokenizer, "stdlib", needed=max(settings.lengths))
    console.print(f"[bold]Without training[/]: factor {FACTOR}, {', '.join(map(str, settings.lengths))} tokens")
    results = Results()
    for scheme in (UNTOUCHED, *settings.schemes):
        with _scheme(model, scheme):
            results += _measure(model, tokenizer, corpus, scheme, settings, console)
    if settings.steps != 0:
        console.print("[bold]Fine-tuning with YaRN[/]: recipe tiny_yarn")
        tuned = fine_tune(source, settings)
        results += _measure(tuned, tokenizer, corpus, TUNED, settings, console)
    results.config.update(scheme=", ".join(results.values("scheme")), model=_model_name(source, settings))
    results.config.update(factor=FACTOR, seconds=round(time.perf_counter() - started, 1))
    console.print(table(results))
    page = write_report(
        results,
        settings.output,
        title="Eight times the window of a small model",
        verdict=verdict(results),
        command=command(settings),
        notes=NOTES,
        frequencies=frequencies(model, settings),
        overwrite=True,  # already checked above
    )
    console.print(verdict(results))
    console.print(f"Report: {page} ({results.config['seconds']:.0f} s)")
    return results


def load_base(folder: Path) -> tuple[Any, Any]:
    """Load the model in float32 and its tokenizer.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no checkpoint. Reinstall pe_patch, or train one with --from-scratch.")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read the checkpoint in {folder}: {error}") from error


def fine_tune(source: Path, settings: DemoSettings) -> Any:
    """Fine-tune the base model with the recipe `tiny_yarn`; checkpoints and log go to `<output>/yarn`."""
    overrides = [f"output={settings.output / 'yarn'}", f"model.source={source}", f"seed={settings.seed}"]
    if settings.steps is not None:
        overrides.append(f"phases.0.steps={settings.steps}")
        overrides.append(f"phases.0.warmup={min(10, settings.steps // 2)}")
    return _train("tiny_yarn", overrides)


def _train_base(settings: DemoSettings, console: Console) -> Path:
    console.print("[bold]Training the base model[/]: recipe tiny_base")
    folder = settings.output / "base"
    _train("tiny_base", [f"output={folder}", f"seed={settings.seed}"])
    return folder / "model"


def _train(recipe: str, overrides: list[str]) -> Any:
    from ..training.run import load_recipe, train

    if _autocast() is not None:
        overrides = [*overrides, "mixed_precision=bf16"]
    return train(load_recipe(recipe, overrides))


@contextmanager
def _scheme(model: Any, scheme: str) -> Iterator[None]:
    from ..patching.api import patched

    with nullcontext() if scheme == UNTOUCHED else patched(model, scheme, factor=FACTOR):
        yield


def _measure(
    model: Any, tokenizer: Any, corpus: Corpus, label: str, settings: DemoSettings, console: Console
) -> Results:
    started = time.perf_counter()
    results = evaluate(
        model,
        tokenizer,
        [Needle(wording="tokens"), Perplexity(measures=("fixed",), spots=settings.spots)],
        settings.lengths,
        samples=settings.samples,
        seed=settings.seed,
        text=corpus,
        control_length=settings.lengths[0],
        beyond_window=True,  # this measures the unpatched model beyond its window on purpose
        autocast=_autocast(),
        label=label,
        progress=console.is_terminal,
    )
    console.print(f"  {label}: {time.perf_counter() - started:.0f} s", highlight=False)
    return results


def _autocast() -> torch.dtype | None:
    """Return bfloat16 if the processor supports it natively; otherwise it is several times slower than float32."""
    return torch.bfloat16 if compat.cpu_multiplies_bfloat16() else None


def frequencies(model: Any, settings: DemoSettings) -> dict[str, Any]:
    """Return each scheme's inverse frequencies `[pairs]` at the greatest length, as numpy arrays."""
    from ..adapters import ADAPTERS
    from ..schemes.registry import SCHEMES

    shape = ADAPTERS[model.config.model_type].shape(model.base_model, model.config)
    options = {UNTOUCHED: {}} | {name: {"factor": FACTOR} for name in settings.schemes}
    by_scheme = {}
    for name, scheme_options in options.items():
        scheme: Any = SCHEMES["rope" if name == UNTOUCHED else name](shape, **scheme_options)
        by_scheme[name] = scheme.frequencies(max(settings.lengths))[0].detach().double().numpy()
    return by_scheme


def table(results: Results) -> Table:
    """Return a table of schemes by lengths; each cell shows retrieval and loss."""
    retrieval, loss = pivots(results)
    counted = next(cell.samples for cells in retrieval.cells.values() for cell in cells if cell is not None)
    result = Table(
        title="Retrieval / loss by length in tokens",
        caption=f"Retrieval: share of {counted} questions answered exactly, 8 needles in held-out Python source. "
        f"Loss: nats per token, {loss.measured_on[0]}. Computed in {'float32' if _autocast() is None else 'bfloat16'}.",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("scheme")
    for length in retrieval.lengths:
        result.add_column(f"{length:,}", justify="right")
    for scheme, cells in retrieval.cells.items():
        pairs = zip(cells, loss.cells[scheme], strict=True)
        result.add_row(scheme, *[f"{a.score:.2f} / {b.score:.3f}" if a and b else "-" for a, b in pairs])
    return result


def verdict(results: Results) -> str:
    """Return a sentence with the scores at the greatest length, with YaRN and without."""
    retrieval, loss = pivots(results)
    longest, shortest = retrieval.lengths[-1], retrieval.lengths[0]
    base, yarn, tuned = (retrieval.cells.get(name) for name in (UNTOUCHED, "yarn", TUNED))
    clauses = []
    if base and yarn:
        clauses.append(
            f"At {longest:,} tokens, {longest // shortest} times its window, the model with YaRN and no training "
            f"answers {_share(yarn[-1])} of the questions, and {_share(base[-1])} unpatched"
        )
    if base and tuned:
        after, before = loss.cells[TUNED][-1], loss.cells[UNTOUCHED][0]
        assert after is not None and before is not None
        change = after.score / before.score - 1
        clauses.append(
            f"after a short fine-tuning it answers {_share(tuned[-1])}, and its loss there is {after.score:.2f}, "
            f"{abs(change):.1%} {'above' if change > 0 else 'below'} the unpatched model's at {shortest}"
        )
    return "; ".join(clauses) + "."


def _share(cell: Cell | None) -> str:
    return "-" if cell is None else f"{cell.score:.0%}"


def _model_name(source: Path, settings: DemoSettings) -> str:
    return "trained from scratch by the recipe tiny_base" if settings.from_scratch else "the demo model of pe_patch"


def command(settings: DemoSettings) -> str:
    """Return the command line that repeats this run."""
    words = ["pe-patch", "demo", "--output", str(settings.output)]
    if settings.steps is not None:
        words += ["--steps", str(settings.steps)]
    if settings.seed:
        words += ["--seed", str(settings.seed)]
    if settings.from_scratch:
        words.append("--from-scratch")
    return shlex.join(words)
