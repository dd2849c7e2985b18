"""Carry an extension out: measure, choose, train if asked, write, check, and leave a page."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..advice import Advice, advise
from ..advice.recommend import SERVING
from ..checkpoints import sources
from ..checkpoints.folders import sole_writer
from ..errors import OptionError, OutputError, UnsupportedError
from ..evaluation.model import free_bytes, model_fingerprint, weights_fingerprint
from ..evaluation.perplexity import Perplexity
from ..evaluation.report import Entry, Section, write_report
from ..evaluation.results import Results, write_atomically
from ..evaluation.run import evaluate
from ..evaluation.tasks import Needle
from ..patching.api import patch_model, unpatch_model
from ..training.checkpoints import check_resumable, find_checkpoint
from ..training.plan import refuse_what_cannot_fit
from ..training.run import Run
from ..training.run import train as train_recipe
from .budget import time_reading
from .plan import (
    DEPTHS,
    QUESTIONS,
    SCORED,
    SHORT,
    Candidate,
    ExtensionPlan,
    candidates_of,
    check_fits,
    choose_measurement,
    fewest_lengths,
    measurement_seconds,
    recipe_of,
    spots_of,
    trained_candidate,
    training_of,
)
from .request import Request
from .short_answers import QUESTIONS as SHORT_QUESTIONS
from .short_answers import share_kept, short_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "extension.json"
"""File that holds the request and the plan of an extension, so that a stopped one continues with the same."""
MOST = 3
"""Schemes that are measured at most."""
ENOUGH_KEPT = 0.95
"""Share of its short answers that a model must keep to count as unchanged in chat. SmolLM2 135M keeps 80 % under an
untrained YaRN of factor 4, and then answers in broken French; under Llama 3's scaling of that factor it keeps 99 %."""
FIXED = "nats per token, fixed targets"
DTYPES = (torch.float32, torch.bfloat16)
"""Types of the weights that a checkpoint may have."""


@dataclass(frozen=True)
class Extension:
    """A finished extension. `str()` shows it as text."""

    plan: ExtensionPlan
    chosen: Candidate
    verdict: str
    """The chosen scheme and its scores, in sentences."""
    results: Results
    """The measurements of all candidates, and of the trained model."""
    model: Path
    """Folder of the checkpoint."""
    exports: list[Path]
    page: Path
    """The page with the verdict, the table and the charts."""

    def __str__(self) -> str:
        lines = [self.verdict, f"Model: {self.model}", *(f"Export: {path}" for path in self.exports)]
        return "\n".join([*lines, f"Page: {self.page}"])


def extend(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    target_length: int,
    output: str | os.PathLike[str],
    budget: str | float = "10m",
    train: bool = False,
    train_budget: str | float = "1h",
    export: Sequence[str] = (),
    text: str = "stdlib",
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    say: Callable[[str], object] = print,
) -> Extension:
    """Make a checkpoint that reads texts of `target_length` tokens.

    It asks `advise` for the schemes that fit, measures the best of them within the budget, trains if asked, writes the
    best one with its tokenizer and card, loads it again and checks it. A stopped extension continues: call it again
    with the same arguments.

    Args:
        model: a folder, a hub name, or a loaded causal language model without a patch.
        tokenizer: the tokenizer of a loaded model.
        target_length: tokens that the model must read.
        output: folder for the checkpoint (`model/`), the exports, the measurements and the page.
        budget: time for the measurement: seconds, or 90s, 10m, 1h.
        train: train the scheme that gains most from training.
        train_budget: time for the training.
        export: targets of `pe_patch.export`, such as "vllm".
        text: source of the text to measure on and to train on; measurements use its held-out part.
        dtype: dtype of the weights: auto, float32, bfloat16 or float16.
        device: a device; None uses CUDA if available.
        seed: random seed.
        overwrite: write into a folder with other content.
        say: receives sentences on the progress.

    Returns:
        The chosen scheme, its measurements and the folders.

    Raises:
        OptionError: the budget is too small, or an option is wrong.
        UnsupportedError: no scheme fits the model.
        OutputError: the folder holds something else, or another extension.
    """
    request = Request(
        model=model, tokenizer=tokenizer, target_length=target_length, output=output, budget=budget, train=train,
        train_budget=train_budget, export=export, text=text, dtype=dtype, device=device, seed=seed, overwrite=overwrite,
    )  # fmt: skip
    return carry_out(request, say)


def carry_out(request: Request, say: Callable[[str], object]) -> Extension:
    """Extend a model as `extend` does."""
    plan, loaded, tokenizer = prepare(request, say)
    say(str(plan))
    if plan.shortfalls:
        raise OptionError(" ".join(plan.shortfalls))
    with sole_writer(request.folder):
        _record(request, plan, model_fingerprint(loaded))
        results, kept = _measure_all(plan, loaded, tokenizer, request)
    del loaded  # the recipe loads the model again
    gc.collect()
    chosen = plan.trained or choose(plan, results, kept.shares)
    recipe = recipe_of(plan, chosen, request)
    recipe.overwrite = True  # the folder is checked, and holds the measurements
    say(f"{'Train' if plan.trained else 'Write'} {chosen.label}.")
    train_recipe(recipe)
    if plan.trained is not None:
        chosen = replace(chosen, label=f"{chosen.label}, trained")
        saved, _ = sources.load(str(request.folder / "model"), "auto", request.device)
        results += _measure(plan, saved, tokenizer, chosen, request)
        kept.measure(chosen.label, saved)
    verdict = write_verdict(plan, chosen, results, kept.shares)
    exports = [request.folder / "export" / target for target in request.export]
    page = _page(plan, chosen, verdict, results, kept.shares, request)
    return Extension(plan, chosen, verdict, results, request.folder / "model", exports, page)


# The plan


def prepare(request: Request, say: Callable[[str], object]) -> tuple[ExtensionPlan, Any, Any]:
    """Load the model and plan its extension; a stopped one keeps its plan.

    The plan may take longer than the budgets: see its `shortfalls`.

    Returns:
        The plan, the model and its tokenizer.
    """
    advice = _advise(request)
    check_fits(advice)
    say(f"Load {advice.case.facts.name} and time two short readings, to plan.")
    if request.is_loaded:
        loaded, tokenizer = request.model, request.tokenizer
    else:
        loaded, tokenizer = sources.load(request.source, request.dtype, request.device)
    if loaded.dtype not in DTYPES:
        raise OptionError(f"extend writes float32 or bfloat16, and this model is {loaded.dtype}: give dtype bfloat16.")
    if request.is_loaded:
        _check_source(request)
    plan = _stored_plan(request, loaded) or _plan(request, advice, loaded)
    if plan.trained is not None and not plan.shortfalls:
        check_training(plan, loaded, request)
    return plan, loaded, tokenizer


def _check_source(request: Request) -> None:
    """Raise `OptionError` if a loaded model has other weights than its folder, which the checkpoint is made from."""
    stored, _ = sources.load(request.source, str(request.model.dtype).removeprefix("torch."), "cpu")
    if weights_fingerprint(stored) != weights_fingerprint(request.model):
        raise OptionError(
            f"The weights of the model differ from those in {request.source}, from which the checkpoint is made. Save "
            "the model with its tokenizer, and give that folder."
        )


def check_training(plan: ExtensionPlan, loaded: Any, request: Request) -> None:
    """Raise what the training would raise before its first step, so that no measurement is made in vain."""
    assert plan.trained is not None
    recipe, trial = (recipe_of(plan, plan.trained, request) for _ in range(2))
    trial.overwrite, trial.dry_run, trial.progress = True, True, False
    device = loaded.device
    if not request.is_loaded:  # a GPU may not have room for it beside the model and the teacher of the run
        loaded.to("cpu")
    try:
        run = Run(trial)
        refuse_what_cannot_fit(run, size_of(loaded) if device.type == "cpu" and not request.is_loaded else 0)
        if (checkpoint := find_checkpoint(recipe, run.folder)) is not None:
            check_resumable(checkpoint, recipe, run.facts())
    finally:
        run = None
        gc.collect()  # a run refers to itself, and holds a model and a teacher
        if not request.is_loaded:
            loaded.to(device)


def size_of(model: Any) -> int:
    """Return the bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _advise(request: Request) -> Advice:
    """Return the advice on a model that needs a scheme for the target.

    Raises:
        OptionError: the model reads the target without one.
    """
    by_config = request.is_loaded and not Path(request.source).is_dir()
    served = [target for target in request.export if target in SERVING]
    advice = advise(request.model.config if by_config else request.source, request.target_length, export=served)
    if not advice.case.needed:
        raise OptionError(f"{advice.verdict} Give a greater target_length.")
    return advice


def _plan(request: Request, advice: Advice, loaded: Any) -> ExtensionPlan:
    window, target = advice.case.facts.window, request.target_length
    time = time_reading(loaded, window)
    lengths = sorted({min(SHORT, window, target), min(window, target), target})
    fitting, not_exported = candidates_of(advice, loaded, request.export, MOST)
    candidates, chosen_lengths, texts, seconds = choose_measurement(fitting, lengths, time, request.seconds)
    if len(candidates) == 1 and not request.train:
        raise UnsupportedError(f"{advice.verdict} No scheme reads {target:,} tokens without training: add train.")
    plan = ExtensionPlan(
        request.source, target, window, str(loaded.dtype).removeprefix("torch."), advice.verdict, tuple(candidates),
        tuple(chosen_lengths), texts, seconds, request.seconds,
        left_out=tuple(each.label for each in fitting[len(candidates) :]),
        all_seconds=measurement_seconds(fitting, fewest_lengths(lengths), 1, time), not_exported=not_exported,
        exports=tuple(request.export),
    )  # fmt: skip
    if not request.train:
        return plan
    needed = advice.training.states["mixed"] + advice.training.activations + advice.training.chunked_logits
    length, steps, taken = training_of(
        target, window, time, request.train_seconds, free_bytes(next(loaded.parameters()).device), needed
    )
    return replace(
        plan,
        trained=trained_candidate(advice, loaded, request.export),
        train_length=length,
        steps=steps,
        train_seconds=taken,
        train_budget=request.train_seconds,
    )


def _stored_plan(request: Request, loaded: Any) -> ExtensionPlan | None:
    """Return the plan of a stopped extension.

    Raises:
        OutputError: the folder holds an extension with other arguments or of other weights.
    """
    file = request.folder / RECORD
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        before, plan, weights = stored["request"], stored["plan"], stored.get("weights")
        plan["candidates"] = tuple(Candidate(**each) for each in plan["candidates"])
        plan |= {name: tuple(plan[name]) for name in ("lengths", "left_out", "not_exported", "exports") if name in plan}
        plan["trained"] = None if plan["trained"] is None else Candidate(**plan["trained"])
        made = ExtensionPlan(**plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OutputError(f"{file} cannot be read ({error!r}). Delete {request.folder} to start again.") from error
    differs = [name for name, value in request.lasting().items() if before.get(name) != value]
    if differs:
        name = differs[0]
        raise OutputError(
            f"{request.folder} holds an extension with another {name}: {before.get(name)!r}, and now "
            f"{request.lasting()[name]!r}. Give another folder, or the same {name} to continue."
        )
    if weights is not None and weights != model_fingerprint(loaded):
        raise OutputError(
            f"The config or the weights of {request.source} have changed since {request.folder} was begun. Give "
            f"another folder, or delete {request.folder} to start again."
        )
    return made


def _record(request: Request, plan: ExtensionPlan, weights: str) -> None:
    request.folder.mkdir(parents=True, exist_ok=True)
    content = {"request": request.lasting(), "weights": weights, "plan": asdict(plan)}
    write_atomically(request.folder / RECORD, json.dumps(content, indent=2) + "\n")


# The measurement


class ShortAnswers:
    """How much of its short answers the model keeps under each scheme, stored in a file."""

    def __init__(self, file: Path, model: Any, tokenizer: Any) -> None:
        self.file, self.given = file, short_answers(model, tokenizer)
        self.shares: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        """Share of the answers' tokens by label, from 0 to 1."""

    def measure(self, label: str, model: Any) -> None:
        """Measure a model unless its share is stored."""
        if label not in self.shares:
            self.shares[label] = share_kept(model, self.given)
            write_atomically(self.file, json.dumps(self.shares, indent=2) + "\n")


def _measure_all(plan: ExtensionPlan, loaded: Any, tokenizer: Any, request: Request) -> tuple[Results, ShortAnswers]:
    """Measure every candidate on the same text with the same questions."""
    results = Results()
    kept = ShortAnswers(request.folder / "short_answers.json", loaded, tokenizer)
    for candidate in plan.candidates:
        if not candidate.untouched:
            patch_model(loaded, candidate.scheme, **candidate.options)
        try:
            results += _measure(plan, loaded, tokenizer, candidate, request)
            kept.measure(candidate.label, loaded)
        finally:
            if not candidate.untouched:
                unpatch_model(loaded)
    return results, kept


def _measure(plan: ExtensionPlan, model: Any, tokenizer: Any, candidate: Candidate, request: Request) -> Results:
    lengths = [n for n in plan.lengths if not candidate.untouched or n <= plan.window or len(plan.lengths) == 1]
    number = (
        [each.label for each in plan.candidates].index(candidate.label) if candidate in plan.candidates else "trained"
    )
    # The control length decides from which texts the scored tokens come, and they must be the same for all.
    control = plan.target_length if candidate.untouched else plan.lengths[0]
    tasks = [Needle(shared_text=True), Perplexity(measures="fixed", targets=SCORED, spots=spots_of(plan.texts))]
    return evaluate(
        model, tokenizer, tasks, lengths, samples=plan.texts * QUESTIONS, depths=DEPTHS, text=request.text,
        seed=request.seed, control_length=control, beyond_window=True, label=candidate.label,
        output=request.folder / "measurements" / str(number),
    )  # fmt: skip


def choose(plan: ExtensionPlan, results: Results, kept: Mapping[str, float]) -> Candidate:
    """Return the best untrained scheme.

    1. Its share of answers at the target length may be the best one's: so few questions tell no more.
    2. It keeps the model's short answers, if one of those does.
    3. It has the least loss, at the control and the target length.

    Args:
        plan: The plan.
        results: The measurements of all candidates.
        kept: Share of the short answers that each candidate keeps, by label.
    """
    schemes = [candidate for candidate in plan.candidates if not candidate.untouched]
    if not schemes:
        return plan.candidates[0]
    cells = {each.label: results.cell(scheme=each.label, task="needle", length=plan.target_length) for each in schemes}
    best = max(cell.score for cell in cells.values() if cell is not None)
    equal = [each for each in schemes if (cell := cells[each.label]) is not None and (cell.high or 0.0) >= best]
    chatting = [each for each in equal if kept[each.label] >= ENOUGH_KEPT]

    def total_loss(candidate: Candidate) -> float:
        return sum(_loss(results, candidate, length) for length in (plan.lengths[0], plan.target_length))

    return min(chatting or equal, key=total_loss)


def _loss(results: Results, candidate: Candidate, length: int) -> float:
    cell = results.cell(scheme=candidate.label, measure=FIXED, length=length)
    assert cell is not None
    return cell.score


def write_verdict(plan: ExtensionPlan, chosen: Candidate, results: Results, kept: Mapping[str, float]) -> str:
    """Return what was chosen and what it scores, in sentences."""
    short, target = plan.lengths[0], plan.target_length
    untouched = plan.candidates[0]
    cell = results.cell(scheme=chosen.label, task="needle", length=target)
    before = results.cell(scheme=untouched.label, task="needle", length=short)
    assert cell is not None and before is not None
    cost = _loss(results, chosen, short) / _loss(results, untouched, short) - 1
    sentences = [
        f"{chosen.label} answers {cell.score:.0%} of {cell.samples} questions at {target:,} tokens "
        f"({cell.low:.0%} to {cell.high:.0%}); the model as it is answers {before.score:.0%} at {short:,}.",
        f"The loss on texts of {short:,} tokens changes by {cost:+.1%}. It keeps {kept[chosen.label]:.0%} of the words "
        f"of {len(SHORT_QUESTIONS)} short answers.",
    ]
    if plan.trained is None and len(plan.candidates) > 2:
        sentences.append(
            "Among the schemes that answer as well as the best, within the interval, and keep short answers, it has "
            "the least loss."
        )
    untrained = choose(plan, results, kept)
    if plan.trained is not None and not untrained.untouched:
        other = results.cell(scheme=untrained.label, task="needle", length=target)
        assert other is not None
        sentences.append(f"The best scheme without training, {untrained.label}, answers {other.score:.0%} there.")
    if plan.texts == 1:
        sentences.append(
            "All questions are about one text, so this is a rough guide; a larger --budget asks about more."
        )
    if cell.score <= before.score / 2:
        remedy = "More training may help: raise --train-budget." if plan.trained else "Train it: add --train."
        sentences.append(f"It does not read {target:,} tokens as the model reads {short:,}. {remedy}")
    if kept[chosen.label] < ENOUGH_KEPT:
        remedy = "Train longer: raise --train-budget." if plan.trained else "Train it: add --train."
        sentences.append(
            f"Its short answers are no longer those of the model; talk with it before you use it. {remedy}"
        )
    return " ".join(sentences)


# The page


def _page(
    plan: ExtensionPlan, chosen: Candidate, verdict: str, results: Results, kept: Mapping[str, float], request: Request
) -> Path:
    rows = []
    for label in results.values("scheme"):
        cells: list[Entry | str] = [f"{label} (chosen)" if label == chosen.label else label]
        for length in plan.lengths:
            needle = results.cell(scheme=label, task="needle", length=length)
            loss = results.cell(scheme=label, measure=FIXED, length=length)
            cells += [
                "-" if needle is None else Entry(f"{needle.score:.2f}", needle.score),
                "-" if loss is None else Entry(f"{loss.score:.3f}", loss.score),
            ]
        rows.append([*cells, Entry(f"{kept[label]:.2f}", kept[label])])
    table = Section(
        "Schemes that were measured",
        text=plan.advice,
        columns=[
            "scheme",
            *(f"{name} at {length:,}" for length in plan.lengths for name in ("retrieval", "loss")),
            "short answers",
        ],
        rows=rows,
        caption=f"Retrieval: share of {plan.texts * QUESTIONS} questions about one of {QUESTIONS} hidden facts; more "
        "is better. Loss: nats per token on the same last tokens; less is better. Short answers: share of the words of "
        f"{len(SHORT_QUESTIONS)} answers of the model as it is that are still its first choice; more is better.",
    )
    name = Path(plan.model).resolve().name if Path(plan.model).exists() else plan.model
    how = Section("What was done", text=" ".join(list(plan.lines())[1:]))
    return write_report(
        results, request.folder / "report", title=f"{name} at {plan.target_length:,} tokens", verdict=verdict,
        sections=[table, how], overwrite=True,
    )  # fmt: skip
