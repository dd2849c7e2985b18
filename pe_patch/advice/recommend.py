"""Which schemes fit a model and a target, by trying each on the model without weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..adapters.trained_window import OPTION
from ..checkpoints.exporters.native import transformers_config
from ..errors import PePatchError, UnsupportedError
from ..patching.api import find_patch, patch_model, unpatch_model
from ..patching.description import effective
from ..patching.targets import find_adapter, find_stack
from ..schemes.registry import SCHEMES
from .candidates import CANDIDATES, Answer, Candidate
from .case import FARTHEST_UNTRAINED, Case

LARGE_BUDGET = 10**9
"""Tokens from which the controlled comparisons find a raised base ahead of YaRN."""


@dataclass(frozen=True)
class Judgement:
    """One scheme, with the options that this model and target ask for."""

    scheme: str
    options: dict[str, Any]
    """As `patch_model` takes them, `on_existing` and `layers` with them where they are needed."""
    untrained: Answer
    trained: Answer
    why: str
    obstacle: str | None
    """What stands against it here; None where it fits."""
    effective: dict[str, Any]
    """What it really uses on this model, as `describe` says it; empty where it cannot be applied."""
    exports: bool
    """Plain Transformers loads the result without pe_patch."""


@dataclass(frozen=True)
class Choice:
    """What fits best; None where nothing does."""

    untrained: Judgement | None
    trained: Judgement | None


def judge_all(case: Case, model: Any) -> list[Judgement]:
    """Every scheme that starts from trained weights, those that fit first."""
    judged = [_judge(candidate, case, model) for candidate in CANDIDATES[case.facts.positions]]
    return sorted(judged, key=lambda one: one.obstacle is not None)


def from_the_start(case: Case) -> list[str]:
    """The schemes that would have to be trained anew with the model."""
    considered = {candidate.scheme for candidate in CANDIDATES[case.facts.positions]}
    own = {case.facts.positions, "mla"}  # MLA changes the cache and no window
    return [name for name in SCHEMES if name not in considered | own and not name.endswith("_2d")]


def choose(case: Case, judged: list[Judgement]) -> Choice:
    """What the figures speak for: the authors' own word first, then the order of the candidates."""
    word = case.facts.word
    first = word.recommended if word and case.target <= word.recommended_length else None
    fitting = [one for one in judged if one.obstacle is None]
    untrained = [one for one in fitting if one.untrained == "yes"] or [
        one for one in fitting if one.untrained == "weak"
    ]
    untrained.sort(key=lambda one: one.scheme != first)
    large = case.train_tokens is not None and case.train_tokens >= LARGE_BUDGET
    leading = "ntk" if large else "yarn"
    trained = sorted((one for one in fitting if one.trained == "yes"), key=lambda one: one.scheme != leading)
    far = case.facts.positions == "rope" and case.ratio > FARTHEST_UNTRAINED
    return Choice(untrained[0] if untrained and not far else None, trained[0] if trained else None)


def _judge(candidate: Candidate, case: Case, model: Any) -> Judgement:
    options = candidate.options(case) | _framework(candidate, case, model)
    obstacle, untrained, why = candidate.limit(case), candidate.untrained, candidate.why
    word = case.facts.word
    if word and word.recommended == candidate.scheme and case.target <= word.recommended_length:
        untrained, why = "yes", f"Its authors recommend it up to {word.recommended_length:,} tokens. {why}"
    elif untrained != "no" and (reason := candidate.needs_training(case)):
        untrained, why = "no", f"{why} Not untrained here: {reason}."
    numbers: dict[str, Any] = {}
    exports = False
    if obstacle is None:
        try:
            with patched_quietly(model, candidate.scheme, options):
                patch = find_patch(model)
                assert patch is not None
                numbers, exports = effective(patch.scheme), _exports(patch)
        except PePatchError as error:
            obstacle = " ".join(str(error).split())
    reach = numbers.get("effective_window", "unbounded")
    if isinstance(reach, int) and reach < case.target:
        obstacle = f"with these options it reaches {reach:,} tokens only"
    answers: tuple[Answer, Answer] = (untrained, candidate.trained) if obstacle is None else ("no", "no")
    return Judgement(candidate.scheme, options, *answers, why, obstacle, numbers, exports)


def _framework(candidate: Candidate, case: Case, model: Any) -> dict[str, Any]:
    """What `patch_model` must be told beside a scheme's own options."""
    facts, options = case.facts, {}
    if facts.scaling:
        options["on_existing"] = "compose" if candidate.composes else "replace"
    start, composed = facts.original, options.get("on_existing") == "compose"
    if composed:
        start = facts.window
    _, base = find_stack(model, None)
    own = find_adapter(base, None).window(base, base.config, facts.layers[0] if facts.layers else 0)
    found = own.scaled_length if composed else own.length
    by_authors = own.word is not None and own.word.trained_length == start != own.maximum
    if OPTION in SCHEMES[candidate.scheme].option_names() and (found != start or by_authors):
        options[OPTION] = start
    return options | ({"layers": list(facts.layers)} if facts.layers else {})


def _exports(patch: Any) -> bool:
    try:
        transformers_config(patch)
    except UnsupportedError:
        return False
    return True


@contextmanager
def patched_quietly(model: Any, scheme: str, options: dict[str, Any]) -> Iterator[None]:
    """The scheme on the model, without the log lines that tell a user what was done."""
    logger = logging.getLogger("pe_patch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        patch_model(model, scheme, **options)
        try:
            yield
        finally:
            unpatch_model(model)
    finally:
        logger.setLevel(level)
