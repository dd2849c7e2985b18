"""Advise on one model and one target length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType

from ..checkpoints.sources import full_dtype
from ..errors import OptionError, unknown
from . import memory, report
from .case import Case
from .commands import Step, steps
from .frequencies import Pair, pairs
from .model_facts import build, read_facts
from .recommend import SERVING, Choice, Judgement, choose, from_the_start, judge_all
from .training import TrainingPlan, TrainingRecipe, recipes_for
from .verdict import notes, verdict


@dataclass(frozen=True)
class Advice:
    """A recommended scheme for a model and a target length, with its cost.

    `str()` and a Rich console show it as a page; `to_dict()` returns plain data.
    """

    case: Case
    verdict: str
    notes: list[str]
    pairs: tuple[Pair, ...]
    """The rotating pairs of the unpatched model; empty for a family without rotation."""
    schemes: list[Judgement]
    """All schemes considered, those that fit first; empty if none is needed."""
    from_the_start: list[str]
    """Schemes that require training the model from scratch."""
    choice: Choice
    plans: list[TrainingPlan]
    inference: memory.Inference
    training: memory.Training
    steps: list[Step]

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as plain lists, dicts, numbers and strings."""
        facts = self.case.facts
        model = asdict(facts)
        model |= {"existing": facts.existing.name if facts.existing else None, "sliding": facts.sliding}
        rotating = [pair for pair in self.pairs if pair.wavelength != float("inf")]
        return {
            "model": model,
            "target_length": self.case.target,
            "ratio": self.case.ratio,
            "factor": self.case.factor,
            "needed": self.case.needed,
            "verdict": self.verdict,
            "notes": self.notes,
            "pairs": [asdict(pair) | {"leaves": pair.leaves} for pair in rotating],
            "leaving": sum(pair.leaves for pair in self.pairs),
            "schemes": [asdict(judgement) for judgement in self.schemes],
            "from_the_start": self.from_the_start,
            "choice": asdict(self.choice),
            "training_plans": [asdict(plan) for plan in self.plans],
            "inference_memory": asdict(self.inference),
            "training_memory": asdict(self.training),
            "steps": [asdict(step) for step in self.steps],
        }

    def __str__(self) -> str:
        return report.plain_text(self)

    def __rich__(self) -> Group:
        return Group(*self._sections())

    def _sections(self) -> Iterator[RenderableType]:
        case, facts = self.case, self.case.facts
        yield report.opening(self.verdict, self.notes)
        yield report.section("Model", report.model_table(facts))
        if self.pairs and case.needed:
            chosen = self.choice.trained or self.choice.untrained
            yield report.section("Frequencies", report.frequency_table(case, self.pairs, chosen))
        if facts.positions == "alibi":
            yield report.section("Slopes", report.slope_table(case))
        if self.schemes:
            yield report.section("Schemes", report.scheme_table(self.schemes, self.choice, self.from_the_start))
        if self.plans:
            yield report.section("Training in the papers", report.plan_table(self.plans))
        title = f"Memory at {case.target:,} tokens"
        yield report.section(title, report.memory_tables(self.inference, self.training, facts.dtype))
        if self.steps:
            yield report.section("Next steps", report.step_list(self.steps))


def advise(
    model: Any,
    target_length: int,
    *,
    trained_length: int | None = None,
    train_tokens: int | None = None,
    dtype: str | None = None,
    batch_size: int = 1,
    export: Sequence[str] = (),
) -> Advice:
    """Recommend a scheme for `target_length` tokens, with reasons and costs, without loading any weights.

    Args:
        model: a checkpoint folder, a hub name, or a Transformers config.
        target_length: the length to reach, in tokens.
        trained_length: the length that the unpatched model was trained for, in tokens; overrides the config.
        train_tokens: the training budget in tokens, which affects the choice of scheme.
        dtype: the dtype of weights and cache: float32, bfloat16 or float16, or a short name. None takes the config's.
        batch_size: sequences per batch, for the memory of inference.
        export: targets of `pe_patch.export` that must be able to express the recommended scheme, such as "vllm".

    Returns:
        The advice. It prints as a page and converts to plain data with `to_dict()`.

    Raises:
        OptionError: if a length is not a whole number of tokens, or the dtype does not exist.
        UnknownNameError: if there is no such export target.
        UnsupportedError: if the model is not a causal language model of a supported family.
    """
    for option, value in (("target_length", target_length), ("batch_size", batch_size)):
        _check_count(option, value)
    for option, value in (("trained_length", trained_length), ("train_tokens", train_tokens)):
        if value is not None:
            _check_count(option, value)
    for target in export:
        if target not in SERVING:
            raise unknown("export target", target, SERVING)
    dtype = None if dtype is None else full_dtype(dtype)
    empty = build(model)
    name = empty.config.name_or_path or empty.config.model_type
    facts = read_facts(empty, name, trained_length, None if dtype == "auto" else dtype)
    case = Case(facts, target_length, train_tokens, tuple(export))
    rotating = () if facts.existing is None else pairs(facts.existing, facts.window, target_length)
    judgements = judge_all(case, empty) if case.needed and not case.too_far else []
    choice = choose(case, judgements)
    trainable = {judgement.scheme for judgement in judgements if judgement.trained == "yes"}
    return Advice(
        case=case,
        verdict=verdict(case, rotating, choice),
        notes=notes(case),
        pairs=rotating,
        schemes=judgements,
        from_the_start=from_the_start(case) if judgements else [],
        choice=choice,
        plans=[_plan(recipe, case) for recipe in recipes_for(trainable)],
        inference=memory.inference(facts, empty, target_length, batch_size),
        training=memory.training(facts, target_length),
        steps=steps(case, name, choice),
    )


def _check_count(option: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{option} must be a whole number of at least 1, got {value!r}.")


def _plan(recipe: TrainingRecipe, case: Case) -> TrainingPlan:
    length = recipe.length(case.target, case.facts.original)
    tokens = recipe.tokens(case.target, case.facts.original)
    return TrainingPlan(recipe, length, tokens, memory.training_flops(case.facts, tokens, length))
