"""The demonstration: a small model is taken to eight times its window, without and with training, and measured."""

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
FACTOR = 8
UNTOUCHED, TUNED = "base", "yarn, fine-tuned"

NOTES = (
    "One small model and one seed: the order of the schemes is what the papers report, the exact numbers are this "
    "model's own.",
    "Loss does not fall with length here: a model of this size, trained at 256 tokens, gains nothing from more text. A "
    "flat line shows harm avoided, not benefit gained.",
    "Keys and values are single tokens of their own, so a question is harder to misread than one in words.",
    "Every scheme has its factor for the greatest length also at the short ones, as it would be deployed.",
)


@dataclass(frozen=True)
class Settings:
    """What the demonstration measures, and on how much."""

    output: Path = Path("report")
    schemes: tuple[str, ...] = ("linear", "ntk", "dynamic_ntk", "yarn", "llama3")
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    samples: int = 35
    """Questions at each length."""
    spots: int = 16
    """Places in the text whose last 128 tokens are scored, the same for every length and scheme."""
    steps: int | None = None
    """Optimiser steps of the fine-tune; None is the recipe's own number, 0 leaves it out."""
    from_scratch: bool = False
    """Train the base model first instead of taking the one that comes with the package."""
    seed: int = 0
    overwrite: bool = False
    """Write to an output folder that holds something else."""


def quick(output: Path) -> Settings:
    """A first look in well under a minute: fewer questions, half the length, ten steps."""
    return Settings(output=output, lengths=(256, 1024), samples=20, spots=8, steps=10)


def run(settings: Settings, console: Console | None = None) -> Results:
    """Measure, fine-tune, measure again, print the table and write the report to `settings.output`."""
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
        overwrite=True,  # checked at the start
    )
    console.print(verdict(results))
    console.print(f"Report: {page} ({results.config['seconds']:.0f} s)")
    return results


def load_base(folder: Path) -> tuple[Any, Any]:
    """The model, in float32, and its tokenizer; a folder that is missing or damaged raises `CheckpointError`."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"There is no checkpoint in {folder}. Reinstall pe_patch, or train one with --from-scratch."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint in {folder} cannot be read: {error}") from error


def fine_tune(source: Path, settings: Settings) -> Any:
    """The base model after the recipe `tiny_yarn`; checkpoints and log go to `<output>/yarn`."""
    overrides = [f"output={settings.output / 'yarn'}", f"model.source={source}", f"seed={settings.seed}"]
    if settings.steps is not None:
        overrides.append(f"phases.0.steps={settings.steps}")
        overrides.append(f"phases.0.warmup={min(10, settings.steps // 2)}")
    return _train("tiny_yarn", overrides)


def _train_base(settings: Settings, console: Console) -> Path:
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


def _measure(model: Any, tokenizer: Any, corpus: Corpus, label: str, settings: Settings, console: Console) -> Results:
    started = time.perf_counter()
    found = evaluate(
        model,
        tokenizer,
        [Needle(wording="tokens"), Perplexity(measures=("fixed",), spots=settings.spots)],
        settings.lengths,
        samples=settings.samples,
        seed=settings.seed,
        text=corpus,
        control_length=settings.lengths[0],
        beyond_window=True,  # the untouched model is taken past its window on purpose
        autocast=_autocast(),
        label=label,
        progress=console.is_terminal,
    )
    console.print(f"  {label}: {time.perf_counter() - started:.0f} s", highlight=False)
    return found


def _autocast() -> torch.dtype | None:
    """bfloat16 where the processor multiplies it natively; elsewhere it is several times slower than float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if supported() else None


def frequencies(model: Any, settings: Settings) -> dict[str, Any]:
    """Inverse frequencies [pairs] of each scheme at the greatest length, as numpy arrays."""
    from ..adapters import ADAPTERS
    from ..schemes.registry import SCHEMES

    shape = ADAPTERS[model.config.model_type].shape(model.base_model, model.config)
    options = {UNTOUCHED: {}} | {name: {"factor": FACTOR} for name in settings.schemes}
    found = {}
    for name, given in options.items():
        scheme: Any = SCHEMES["rope" if name == UNTOUCHED else name](shape, **given)
        found[name] = scheme.frequencies(max(settings.lengths))[0].detach().double().numpy()
    return found


def table(results: Results) -> Table:
    """Schemes against lengths; each cell is retrieval and loss."""
    retrieval, loss = pivots(results)
    counted = next(cell.samples for cells in retrieval.cells.values() for cell in cells if cell is not None)
    drawn = Table(
        title="Retrieval / loss by tokens given to the model",
        caption=f"Retrieval: share of {counted} questions answered exactly, 8 needles in held-out Python source. "
        f"Loss: nats per token, {loss.measured_on[0]}.",
        title_justify="left",
        caption_justify="left",
    )
    drawn.add_column("scheme")
    for length in retrieval.lengths:
        drawn.add_column(f"{length:,}", justify="right")
    for scheme, cells in retrieval.cells.items():
        pairs = zip(cells, loss.cells[scheme], strict=True)
        drawn.add_row(scheme, *[f"{a.score:.2f} / {b.score:.3f}" if a and b else "-" for a, b in pairs])
    return drawn


def verdict(results: Results) -> str:
    """One sentence from the numbers: what YaRN holds at the greatest length, against the untouched model."""
    retrieval, loss = pivots(results)
    longest, shortest = retrieval.lengths[-1], retrieval.lengths[0]
    base, yarn, tuned = (retrieval.cells.get(name) for name in (UNTOUCHED, "yarn", TUNED))
    parts = []
    if base and yarn:
        parts.append(
            f"At {longest:,} tokens, {longest // shortest} times its window, the model with YaRN and no training "
            f"answers {_share(yarn[-1])} of the questions, untouched {_share(base[-1])}"
        )
    if base and tuned:
        after, before = loss.cells[TUNED][-1], loss.cells[UNTOUCHED][0]
        assert after is not None and before is not None
        change = after.score / before.score - 1
        parts.append(
            f"after a short fine-tune it answers {_share(tuned[-1])}, and its loss there is {after.score:.2f}, "
            f"{abs(change):.1%} {'above' if change > 0 else 'below'} the untouched model's at {shortest}"
        )
    return "; ".join(parts) + "."


def _share(cell: Cell | None) -> str:
    return "-" if cell is None else f"{cell.score:.0%}"


def _model_name(source: Path, settings: Settings) -> str:
    return "trained from scratch by the recipe tiny_base" if settings.from_scratch else "the demo model of pe_patch"


def command(settings: Settings) -> str:
    """The command line that repeats this run."""
    words = ["pe-patch", "demo", "--output", str(settings.output)]
    if settings.steps is not None:
        words += ["--steps", str(settings.steps)]
    if settings.seed:
        words += ["--seed", str(settings.seed)]
    if settings.from_scratch:
        words.append("--from-scratch")
    return shlex.join(words)
