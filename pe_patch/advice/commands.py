"""What to type next."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from .case import Case
from .recommend import Choice, Judgement
from .training import TrainingRecipe, recipes_for
from .verdict import lifts

RECIPE = "recipes/configs/yarn_llama_32k.yaml"
"""The recipe that the others are written as overrides of; it trains every weight with a scheme of one factor."""


@dataclass(frozen=True)
class Step:
    """One thing to do."""

    purpose: str
    command: str | None = None
    """What to type into a shell."""
    block: str | None = None
    """What to write elsewhere: Python, or a part of a recipe."""


def steps(case: Case, model: str, choice: Choice) -> list[Step]:
    """From looking at a patch to a model that loads anywhere."""
    found: list[Step] = []
    if lifts(case):
        copied = f"{case.facts.name}-unlimited"
        found.append(Step(f'Copy the model\'s folder to ./{copied} and set "sliding_window": null in its config.json'))
        model = f"./{copied}"
    lengths = [str(length) for length in dict.fromkeys((min(case.facts.window, case.target), case.target))]
    measure = ["--task", "perplexity", "needle", "--length", *lengths]
    if case.facts.window < case.facts.config_window:  # its control would take the config's word for the window
        measure += ["--control-length", str(min(case.facts.window, case.target))]
    if not case.needed and case.facts.config_window and case.target > case.facts.config_window:
        measure.append("--beyond-window")
    if not case.needed:
        return [*found, Step("Measure it as it is", _line("pe-patch", "evaluate", model, *measure))]
    if choice.untrained:
        found += _patched(case, model, choice.untrained, measure, "without training")
    if choice.trained:
        found += _trained(case, model, choice.trained, measure)
    return found


def _patched(case: Case, model: str, chosen: Judgement, measure: list[str], how: str) -> list[Step]:
    if case.facts.layers:
        return [Step(f"Patch it, {how}", block=_python(chosen))]
    flags = _flags(chosen)
    return [
        Step("See what would be swapped", _line("pe-patch", "inspect", model, *flags)),
        Step(f"Measure it {how}", _line("pe-patch", "evaluate", model, *flags, *measure)),
        *_export(case, model, chosen, *flags),
    ]


def _export(case: Case, model: str, chosen: Judgement, *flags: str) -> list[Step]:
    """How to write it for others, where they can load it and it is not what they have already."""
    if not chosen.exports or (chosen.scheme == case.facts.positions and not chosen.options):
        return []
    folder = f"./{_label(case, chosen)}"
    return [Step("Write it so that it loads without pe_patch", _line("pe-patch", "export", model, folder, *flags))]


def _label(case: Case, chosen: Judgement) -> str:
    return f"{case.facts.name}-{case.target}-{chosen.scheme}"


def _trained(case: Case, model: str, chosen: Judgement, measure: list[str]) -> list[Step]:
    """A dry run of the recipe, which tells what the run would train; then the run itself and its result."""
    paper = next((one for one in recipes_for({chosen.scheme}) if one.steps and one.window == "target"), None)
    run = f"runs/{_label(case, chosen)}"
    result = f"{run}/model"
    found = [Step("After training, measure it", _line("pe-patch", "evaluate", result, *measure))]
    found += _export(case, result, chosen)
    if "factor" not in chosen.options:
        block = json.dumps({"name": chosen.scheme, "options": chosen.options})
        return [Step(f"Train with a copy of {RECIPE} whose scheme is", block=f"scheme: {block}"), *found]
    overrides = _overrides(case, model, chosen, paper, run)
    command = _line("accelerate", "launch", "recipes/finetune.py", RECIPE, *overrides, "dry_run=true")
    return [Step("See what the training takes; leave dry_run out to run it", command), *found]


def _overrides(case: Case, model: str, chosen: Judgement, paper: TrainingRecipe | None, run: str) -> list[str]:
    values: dict[str, Any] = {"model.source": model, "output": run, "scheme.name": chosen.scheme}
    values |= {f"scheme.options.{key}": value for key, value in chosen.options.items()}
    values |= {"phases.0.length": case.target}
    if paper is not None:
        steps = paper.steps or 0
        if case.train_tokens is not None:
            steps = max(1, min(steps, case.train_tokens // (paper.sequences * case.target)))
        told = {"batch": paper.sequences, "steps": steps, "learning_rate": paper.learning_rate}
        told |= {"schedule": paper.schedule, "warmup": paper.warmup}
        values |= {f"phases.0.{key}": value for key, value in told.items() if value is not None}
    values["evaluation.lengths"] = [case.facts.window, case.target]
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def _flags(chosen: Judgement) -> list[str]:
    options = dict(chosen.options)
    flags = ["--scheme", chosen.scheme]
    if (factor := options.pop("factor", None)) is not None:
        flags += ["--factor", f"{factor:g}"]
    if existing := options.pop("on_existing", None):
        flags += ["--on-existing", existing]
    for key, value in options.items():
        flags += ["--option", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return flags


def _python(chosen: Judgement) -> str:
    given = "".join(f", {key}={value!r}" for key, value in chosen.options.items())
    return f"pe_patch.patch_model(model, {chosen.scheme!r}{given})"


def _line(*words: str) -> str:
    return shlex.join(words)
