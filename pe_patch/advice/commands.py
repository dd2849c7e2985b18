"""Write the commands to run next."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from ..data.packaged import shipped_recipes
from .case import Case
from .recommend import Choice, Judgement
from .training import TrainingRecipe, recipes_for
from .verdict import must_lift_sliding_window

RECIPE = "yarn_llama_32k"
"""The shipped recipe that the commands override; it trains every weight under a scheme with one factor."""


@dataclass(frozen=True)
class Step:
    """One step for the user."""

    purpose: str
    command: str | None = None
    """A shell command; None if there is none."""
    block: str | None = None
    """Python code or a part of a recipe; None if there is none."""


def steps(case: Case, model: str, choice: Choice) -> list[Step]:
    """Return the steps from inspecting a patch to exporting the result."""
    plan: list[Step] = []
    if must_lift_sliding_window(case):
        copied = f"{case.facts.name}-unlimited"
        plan.append(Step(f'Copy the model\'s folder to ./{copied} and set "sliding_window": null in its config.json'))
        model = f"./{copied}"
    lengths = [str(length) for length in dict.fromkeys((min(case.facts.window, case.target), case.target))]
    measure = ["--task", "perplexity", "needle", "--length", *lengths]
    if case.facts.window < case.facts.config_window:  # the default control length is the config's window
        measure += ["--control-length", str(min(case.facts.window, case.target))]
    if not case.needed and case.facts.config_window and case.target > case.facts.config_window:
        measure.append("--beyond-window")
    if not case.needed:
        return [*plan, Step("Measure the unpatched model", _line("pe-patch", "evaluate", model, *measure))]
    if (choice.untrained or choice.trained) and not case.facts.layers and not must_lift_sliding_window(case):
        plan.append(_whole_step(case, model, choice))
    if choice.untrained:
        plan += _untrained_steps(case, model, choice.untrained, measure)
    if choice.trained:
        plan += _training_steps(case, model, choice.trained, measure)
    return plan


def _whole_step(case: Case, model: str, choice: Choice) -> Step:
    """Return the one command that does what the other steps do one by one."""
    words = ["--target-length", str(case.target), "--output", f"./{case.facts.name}-{case.target}"]
    words += [word for target in case.served_by for word in ("--for", target)]
    words += [] if choice.untrained else ["--train"]
    purpose = "Measure the schemes that fit within a time budget, and write the best one"
    return Step(f"{purpose}; --train trains it", _line("pe-patch", "extend", model, *words, "--budget", "1h"))


def _untrained_steps(case: Case, model: str, chosen: Judgement, measure: list[str]) -> list[Step]:
    if case.facts.layers:
        return [Step("Patch the model without training", block=_python(chosen))]
    flags = _flags(chosen)
    return [
        Step("List what the patch replaces", _line("pe-patch", "inspect", model, *flags)),
        Step("Measure the patched model without training", _line("pe-patch", "evaluate", model, *flags, *measure)),
        *_export_step(case, model, chosen, *flags),
    ]


def _export_step(case: Case, model: str, chosen: Judgement, *flags: str) -> list[Step]:
    """Return the exports, if plain Transformers can load the result and it differs from the original model."""
    if "transformers" not in chosen.exports or (chosen.scheme == case.facts.positions and not chosen.options):
        return []
    folder, targets = f"./{_label(case, chosen)}", case.served_by or ("transformers",)
    return [
        Step(
            f"Export it for {target}, which loads it without pe_patch",
            _line("pe-patch", "export", model, folder, *flags, *(["--target", target] if case.served_by else [])),
        )
        for target in targets
    ]


def _label(case: Case, chosen: Judgement) -> str:
    return f"{case.facts.name}-{case.target}-{chosen.scheme}"


def _training_steps(case: Case, model: str, chosen: Judgement, measure: list[str]) -> list[Step]:
    """Return the training, as a dry run, and the steps for its result."""
    paper = next(
        (recipe for recipe in recipes_for({chosen.scheme}) if recipe.steps and recipe.window == "target"), None
    )
    run = f"runs/{_label(case, chosen)}"
    result = f"{run}/model"
    afterwards = [Step("After training, measure the result", _line("pe-patch", "evaluate", result, *measure))]
    afterwards += _export_step(case, result, chosen)
    if "factor" not in chosen.options:
        block = json.dumps({"name": chosen.scheme, "options": chosen.options})
        purpose = f"Train with a copy of the recipe {RECIPE} ({shipped_recipes()[RECIPE]}) whose scheme is"
        return [Step(purpose, block=f"scheme: {block}"), *afterwards]
    overrides = _overrides(case, model, chosen, paper, run)
    command = _line("accelerate", "launch", "-m", "pe_patch.training", RECIPE, *overrides, "dry_run=true")
    return [Step("Check the training in a dry run; remove dry_run=true to train", command), *afterwards]


def _overrides(case: Case, model: str, chosen: Judgement, paper: TrainingRecipe | None, run: str) -> list[str]:
    values: dict[str, Any] = {"model.source": model, "output": run, "scheme.name": chosen.scheme}
    values |= {f"scheme.options.{key}": value for key, value in chosen.options.items()}
    values |= {"phases.0.length": case.target}
    if paper is not None:
        steps = paper.steps or 0
        if case.train_tokens is not None:
            steps = max(1, min(steps, case.train_tokens // (paper.sequences * case.target)))
        phase = {"batch": paper.sequences, "steps": steps, "learning_rate": paper.learning_rate}
        phase |= {"schedule": paper.schedule, "warmup": paper.warmup}
        values |= {f"phases.0.{key}": value for key, value in phase.items() if value is not None}
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
    options = "".join(f", {key}={value!r}" for key, value in chosen.options.items())
    return f"pe_patch.patch_model(model, {chosen.scheme!r}{options})"


def _line(*words: str) -> str:
    return shlex.join(words)
