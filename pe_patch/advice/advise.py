"""Advice on one model and one target length."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoints.sources import DTYPES
from ..errors import OptionError
from . import memory
from .case import Case
from .commands import Step, steps
from .frequencies import Pair, pairs
from .model_facts import build, read_facts
from .recommend import Choice, Judgement, choose, from_the_start, judge_all
from .training import TrainingRecipe, recipes_for
from .verdict import notes, verdict


@dataclass(frozen=True)
class Plan:
    """A paper's training at this target."""

    recipe: TrainingRecipe
    length: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class Advice:
    """Which scheme a model wants for a target, and what that costs; `str()` is a page, `to_dict()` is for machines."""

    case: Case
    verdict: str
    notes: list[str]
    pairs: tuple[Pair, ...]
    """The rotating pairs as the model has them now; empty for a family without rotation."""
    schemes: list[Judgement]
    """Those that fit first; empty where nothing is needed."""
    from_the_start: list[str]
    """Schemes that a model must be trained with from the start."""
    choice: Choice
    plans: list[Plan]
    inference: memory.Inference
    training: memory.Training
    steps: list[Step]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists, dicts, numbers and strings."""
        facts = self.case.facts
        model = asdict(facts)
        model |= {"existing": facts.existing.name if facts.existing else None, "sliding": facts.sliding}
        turning = [pair for pair in self.pairs if pair.wavelength != float("inf")]
        return {
            "model": model,
            "target_length": self.case.target,
            "ratio": self.case.ratio,
            "factor": self.case.factor,
            "needed": self.case.needed,
            "verdict": self.verdict,
            "notes": self.notes,
            "pairs": [asdict(pair) | {"leaves": pair.leaves} for pair in turning],
            "leaving": sum(pair.leaves for pair in self.pairs),
            "schemes": [asdict(one) for one in self.schemes],
            "from_the_start": self.from_the_start,
            "choice": asdict(self.choice),
            "training_plans": [asdict(plan) for plan in self.plans],
            "inference_memory": asdict(self.inference),
            "training_memory": asdict(self.training),
            "steps": [asdict(step) for step in self.steps],
        }

    def __str__(self) -> str:
        from .show import page

        return page(self)


def advise(
    model: Any,
    target_length: int,
    *,
    trained_length: int | None = None,
    train_tokens: int | None = None,
    dtype: str | None = None,
    batch_size: int = 1,
) -> Advice:
    """Say which scheme a model wants for `target_length` tokens, why, and what that costs. No weights are needed.

    Args:
        model: a folder, a name on the hub, or a Transformers config.
        target_length: in tokens.
        trained_length: what the model was trained for as it stands, where you know better than its config.
        train_tokens: how many tokens you can train on, which decides between schemes.
        dtype: of weights and cache: float32, bfloat16 or float16; the config's own when None.
        batch_size: sequences at a time, for the memory of inference.

    Raises:
        OptionError: a length that is no whole number of tokens, or a dtype that does not exist.
        UnsupportedError: a family that pe_patch has no adapter for, or no causal language model.
    """
    for option, value in (("target_length", target_length), ("batch_size", batch_size)):
        _check_count(option, value)
    for option, value in (("trained_length", trained_length), ("train_tokens", train_tokens)):
        if value is not None:
            _check_count(option, value)
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}.")
    empty = build(model)
    name = empty.config.name_or_path or empty.config.model_type
    facts = read_facts(empty, name, trained_length, None if dtype == "auto" else dtype)
    case = Case(facts, target_length, train_tokens)
    turning = () if facts.existing is None else pairs(facts.existing, facts.window, target_length)
    judged = judge_all(case, empty) if case.needed and not case.too_far else []
    choice = choose(case, judged)
    fitting = {one.scheme for one in judged if one.trained == "yes"}
    return Advice(
        case=case,
        verdict=verdict(case, turning, choice),
        notes=notes(case),
        pairs=turning,
        schemes=judged,
        from_the_start=from_the_start(case) if judged else [],
        choice=choice,
        plans=[_plan(recipe, case) for recipe in recipes_for(fitting)],
        inference=memory.inference(facts, empty, target_length, batch_size),
        training=memory.training(facts, target_length),
        steps=steps(case, name, choice),
    )


def _check_count(option: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{option} is a whole number of at least 1, got {value!r}.")


def _plan(recipe: TrainingRecipe, case: Case) -> Plan:
    length = recipe.length(case.target, case.facts.original)
    tokens = recipe.tokens(case.target, case.facts.original)
    return Plan(recipe, length, tokens, memory.training_flops(case.facts, tokens, length))
