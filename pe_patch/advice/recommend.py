"""Find the schemes that fit a model and a target by trying each on the model without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..adapters.trained_window import OPTION
from ..checkpoints.exporters.export import check_export
from ..errors import PePatchError, UnsupportedError, silence_log_warnings
from ..patching.api import find_patch, patch_model, unpatch_model
from ..patching.description import effective
from ..patching.inference import adapter_for
from ..schemes.registry import SCHEMES
from .candidates import CANDIDATES, Answer, Candidate
from .case import FARTHEST_UNTRAINED, Case

SERVING = ("transformers", "vllm", "sglang", "llamacpp")
"""The export targets that an advice reports on."""
LARGE_BUDGET = 10**9
"""Training tokens from which controlled comparisons rank a raised base above YaRN."""


@dataclass(frozen=True)
class Judgement:
    """The assessment of one scheme for a model and a target."""

    scheme: str
    options: dict[str, Any]
    """The arguments of `patch_model`, including `on_existing` and `layers` if needed."""
    untrained: Answer
    trained: Answer
    why: str
    obstacle: str | None
    """The reason why the scheme does not fit; None if it fits."""
    effective: dict[str, Any]
    """The numbers that the scheme uses on this model, as in `describe`; empty if it cannot be applied."""
    exports: tuple[str, ...]
    """The targets of `pe_patch.export` in `SERVING` that load the result without pe_patch."""


@dataclass(frozen=True)
class Choice:
    """The recommended schemes; None if none fits."""

    untrained: Judgement | None
    trained: Judgement | None


def judge_all(case: Case, model: Any) -> list[Judgement]:
    """Assess every scheme that starts from trained weights and return those that fit first."""
    judgements = [_judge(candidate, case, model) for candidate in CANDIDATES[case.facts.positions]]
    return sorted(judgements, key=lambda judgement: judgement.obstacle is not None)


def from_the_start(case: Case) -> list[str]:
    """Return the schemes that require training the model from scratch."""
    considered = {candidate.scheme for candidate in CANDIDATES[case.facts.positions]}
    excluded = {case.facts.positions, "mla"}  # MLA changes the cache, not the window
    return [name for name in SCHEMES if name not in considered | excluded and not name.endswith("_2d")]


def choose(case: Case, judgements: list[Judgement]) -> Choice:
    """Choose the best scheme without and with training.

    A recommendation by the model's authors comes first, then the order of the candidates. Every export target that the
    case asks for must be able to express the scheme.
    """
    word = case.facts.word
    recommended = word.recommended if word and case.target <= word.recommended_length else None
    fitting = [each for each in judgements if each.obstacle is None and set(case.served_by) <= set(each.exports)]
    untrained = [judgement for judgement in fitting if judgement.untrained == "yes"] or [
        judgement for judgement in fitting if judgement.untrained == "weak"
    ]
    untrained.sort(key=lambda judgement: judgement.scheme != recommended)
    large = case.train_tokens is not None and case.train_tokens >= LARGE_BUDGET
    leading = "ntk" if large else "yarn"
    trained = [judgement for judgement in fitting if judgement.trained == "yes"]
    trained.sort(key=lambda judgement: judgement.scheme != leading)
    far = case.facts.positions == "rope" and case.ratio > FARTHEST_UNTRAINED
    return Choice(untrained[0] if untrained and not far else None, trained[0] if trained else None)


def _judge(candidate: Candidate, case: Case, model: Any) -> Judgement:
    options = candidate.options(case) | _patch_arguments(candidate, case, model)
    obstacle, untrained, why = candidate.limit(case), candidate.untrained, candidate.why
    word = case.facts.word
    if word and word.recommended == candidate.scheme and case.target <= word.recommended_length:
        untrained, why = "yes", f"Its authors recommend it up to {word.recommended_length:,} tokens. {why}"
    elif untrained != "no" and (reason := candidate.needs_training(case)):
        lead = "Needs training here" if candidate.trained == "yes" else "Too far without training"
        untrained, why = "no", f"{why} {lead}: {reason}."
    numbers: dict[str, Any] = {}
    exports: tuple[str, ...] = ()
    if obstacle is None:
        try:
            with patched_quietly(model, candidate.scheme, options):
                patch = find_patch(model)
                assert patch is not None
                numbers, exports = effective(patch.scheme), _exports(model)
        except PePatchError as error:
            obstacle = " ".join(str(error).split())
    reach = numbers.get("effective_window", "unbounded")
    if isinstance(reach, int) and reach < case.target:
        obstacle = f"it reaches only {reach:,} tokens with these options"
    answers: tuple[Answer, Answer] = (untrained, candidate.trained) if obstacle is None else ("no", "no")
    return Judgement(candidate.scheme, options, *answers, why, obstacle, numbers, exports)


def _patch_arguments(candidate: Candidate, case: Case, model: Any) -> dict[str, Any]:
    """Return the arguments of `patch_model` besides the scheme's own options.

    The trained window is among them if `patch_model` would read another one, or if only the authors state it.
    """
    facts, options = case.facts, {}
    if facts.scaling:
        options["on_existing"] = "compose" if candidate.composes else "replace"
    start, composed = facts.original, options.get("on_existing") == "compose"
    if composed:
        start = facts.window
    base, adapter = adapter_for(model)
    first = facts.layers[0] if facts.layers else next(iter(adapter.attentions(base)))
    window = adapter.window(base, base.config, first)
    default_start = window.scaled_length if composed else window.length
    by_authors = window.word is not None and window.word.trained_length == start != window.maximum
    if OPTION in SCHEMES[candidate.scheme].option_names() and (default_start != start or by_authors):
        options[OPTION] = start
    return options | ({"layers": list(facts.layers)} if facts.layers else {})


def _exports(model: Any) -> tuple[str, ...]:
    """Return the targets in `SERVING` that can express the patched model."""
    able = []
    for target in SERVING:
        try:
            check_export(model, target)
        except UnsupportedError:
            continue
        able.append(target)
    return tuple(able)


@contextmanager
def patched_quietly(model: Any, scheme: str, options: dict[str, Any]) -> Iterator[None]:
    """Patch the model inside the context, without log lines, and restore it afterwards."""
    with silence_log_warnings():
        patch_model(model, scheme, **options)
        try:
            yield
        finally:
            unpatch_model(model)
