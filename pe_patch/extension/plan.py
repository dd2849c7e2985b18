"""Plan an extension: which schemes to measure at which lengths within a budget, and how to train."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..advice import Advice
from ..advice.recommend import Judgement, patched_quietly
from ..advice.verdict import format_scheme
from ..checkpoints.exporters.export import check_export
from ..errors import UnsupportedError
from ..evaluation.progress import duration
from ..patching.api import find_patch
from ..training.recipe import Checkpoints, Data, Distill, Evaluation, Model, Phase, Pose, Recipe, Scheme, Source
from .budget import ReadingTime
from .request import Request

SHORT = 2_048
"""Tokens of the control: texts so short that a change of positions must not cost anything there."""
QUESTIONS = 8
"""Facts hidden in a text; each is asked for, so that one reading gives as many answers."""
DEPTHS = (0.05, 0.2, 0.35, 0.45, 0.55, 0.65, 0.8, 0.95)
SCORED = 128
"""Tokens of a text whose loss is compared between lengths."""
SPARE = 1.2
"""Factor on the estimated time, for answers, controls and loading."""
POSE_LENGTH, BATCH, BACKWARD = 2_048, 4, 3.6
"""Tokens of a training sequence under PoSE, sequences of a step, and how much longer than a reading a step takes for
each sequence, the teacher included."""
STEPS = (20, 400)
"""Fewest and most steps of a training."""
NEEDLES = 0.6
"""Share of the training sequences that ask for hidden facts."""
AVERAGE = 0.8
"""Share of the trained weights in the saved ones. The rest are the original weights, so that chat and short texts stay
as they are."""


@dataclass(frozen=True)
class Candidate:
    """A scheme to measure."""

    scheme: str
    """`rope` and no options: the model as it is."""
    options: dict[str, Any]
    label: str
    why: str
    follows_length: bool = False
    """Its frequencies depend on the length of a pass, so that every question reads the whole text again."""

    @property
    def untouched(self) -> bool:
        """True for the model as it is."""
        return self.label == UNTOUCHED


UNTOUCHED = "as it is"


@dataclass(frozen=True)
class ExtensionPlan:
    """The measurements and the training that `extend` is about to run. `str()` shows them as text."""

    model: str
    target_length: int
    window: int
    dtype: str
    """Type of the weights that are measured and written: float32 or bfloat16."""
    advice: str
    """The verdict of `advise`."""
    candidates: tuple[Candidate, ...]
    lengths: tuple[int, ...]
    texts: int
    """Texts at each length; each has `QUESTIONS` questions."""
    seconds: float
    """Estimated time of the measurement."""
    budget: float
    trained: Candidate | None = None
    """The scheme to train; None without training."""
    steps: int = 0
    train_length: int = 0
    """Tokens of a training sequence."""
    train_seconds: float = 0.0
    train_budget: float = 0.0
    left_out: tuple[str, ...] = ()
    """Labels of schemes that fit the model and are not measured, for want of time."""
    all_seconds: float = 0.0
    """Estimated time to measure these as well."""
    not_exported: tuple[str, ...] = ()
    """Labels of schemes that fit the model and that an export target cannot express."""
    exports: tuple[str, ...] = ()
    """The export targets."""

    @property
    def shortfalls(self) -> list[str]:
        """One sentence for each budget that is too small, with the value to give instead; empty if both suffice."""
        found = []
        if self.seconds > self.budget:
            found.append(
                f"A budget of {duration(self.budget)} is too small: this measurement takes about "
                f"{duration(self.seconds)}. Give --budget {in_minutes(self.seconds)} (budget=... in Python)."
            )
        if self.trained is not None and self.train_seconds > self.train_budget:
            found.append(
                f"A training budget of {duration(self.train_budget)} is too small: {self.steps} steps take about "
                f"{duration(self.train_seconds)}. Give --train-budget {in_minutes(self.train_seconds)} "
                "(train_budget=... in Python)."
            )
        if found:
            found.append("A smaller --target-length takes less time as well.")
        return found

    @property
    def pose(self) -> bool:
        """True if the training sequences are shorter than the target, with positions that skip."""
        return self.trained is not None and self.train_length < self.target_length

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self) | {"pose": self.pose}

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """Yield the plan line by line."""
        yield self.advice
        lengths = in_words([f"{length:,}" for length in self.lengths])
        subjects = in_words(["the model as it is", *(each.label for each in self.candidates if not each.untouched)])
        yield (
            f"Measure {subjects} at {lengths} tokens: loss, {self.texts * QUESTIONS} questions about one of "
            f"{QUESTIONS} hidden facts at each length, and short answers. About {duration(self.seconds)} of a "
            f"budget of {duration(self.budget)}."
        )
        if self.left_out:
            yield (
                f"Not measured for want of time: {in_words(self.left_out)}. A --budget of "
                f"{in_minutes(self.all_seconds)} includes them."
            )
        if self.not_exported:
            yield f"Not measured, since {in_words(self.exports)} cannot load it: {in_words(self.not_exported)}."
        if self.trained is not None:
            how = (
                f"PoSE: sequences of {self.train_length:,} tokens whose positions skip up to {self.target_length:,}"
                if self.pose
                else f"sequences of {self.train_length:,} tokens"
            )
            yield (
                f"Train {self.trained.label} for {self.steps} steps of {BATCH} sequences. {how}. About "
                f"{duration(self.train_seconds)}."
            )
        else:
            yield "No training (--train trains the scheme that gains most from training)."
        yield "Write the best to the output folder, load it again, and check that it gives what was measured."


def candidates_of(
    advice: Advice, model: Any, exports: Sequence[str], most: int
) -> tuple[list[Candidate], tuple[str, ...]]:
    """Return the model as it is and the schemes that work without training, the most promising first.

    The second value has the labels of those among them that cannot be exported.

    Args:
        advice: The advice on the model.
        model: The loaded model, without a patch.
        exports: The export targets that must be able to express a scheme.
        most: Maximum number of schemes.

    Raises:
        UnsupportedError: no scheme fits, or none of those that fit can be exported.
    """
    fitting = [each for each in advice.schemes if each.obstacle is None and each.untrained != "no"]
    first = advice.choice.untrained
    rank = {"yes": 0, "weak": 1}
    fitting.sort(key=lambda each: (first is None or each.scheme != first.scheme, rank[each.untrained]))
    chosen = [Candidate("rope", {}, UNTOUCHED, "the model without a scheme")]
    obstacles: dict[str, str] = {}
    for judgement in fitting:
        try:
            chosen.append(candidate_of(judgement, model, exports))
        except UnsupportedError as error:
            obstacles[format_scheme(judgement)] = str(error)
        if len(chosen) > most:
            break
    if obstacles and len(chosen) == 1:
        first_obstacle = next(iter(obstacles.values()))
        raise UnsupportedError(f"No scheme that works without training can be exported. The first: {first_obstacle}")
    return chosen, tuple(obstacles)


def candidate_of(judgement: Judgement, model: Any, exports: Sequence[str]) -> Candidate:
    """Return a scheme as a candidate; it is put into the model for a moment.

    Raises:
        UnsupportedError: a target cannot express it.
    """
    with patched_quietly(model, judgement.scheme, judgement.options):
        for target in exports:
            check_export(model, target)
        patch = find_patch(model)
        assert patch is not None
        follows_length = patch.scheme.length_dependent
    return Candidate(judgement.scheme, judgement.options, format_scheme(judgement), judgement.why, follows_length)


def in_words(names: Sequence[str]) -> str:
    """Return names as a list in a sentence: a, b and c."""
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last


def in_minutes(seconds: float) -> str:
    """Return a time as an option takes it, in whole minutes."""
    return f"{max(1, math.ceil(seconds / 60))}m"


def choose_measurement(
    candidates: Sequence[Candidate], lengths: Sequence[int], time: ReadingTime, budget: float
) -> tuple[list[Candidate], list[int], int, float]:
    """Return the candidates, lengths, texts and seconds of the fullest measurement that the budget allows.

    If it allows none, return the smallest: one scheme at the control and the target length. It then takes longer than
    the budget.

    Args:
        candidates: The model as it is and the schemes, the most promising first.
        lengths: The control, the window and the target in tokens, ascending and distinct.
        time: The time of a reading.
        budget: Seconds.
    """
    fewest = fewest_lengths(lengths)
    choices = [
        (list(candidates[:count]), list(chosen), texts)
        for count in range(len(candidates), min(2, len(candidates)) - 1, -1)
        for chosen, texts in itertools.product((lengths, fewest), (4, 2, 1))
    ]
    # With two schemes or more to compare, more of them are worth more than more texts of each.
    fitting = (choice for choice in choices if measurement_seconds(*choice, time) <= budget)
    chosen, at, texts = next(fitting, choices[-1])
    return chosen, at, texts, measurement_seconds(chosen, at, texts, time)


def fewest_lengths(lengths: Sequence[int]) -> list[int]:
    """Return the control and the target, without the window between them."""
    return [lengths[0], lengths[-1]] if len(lengths) > 1 else list(lengths)


def spots_of(texts: int) -> int:
    """Return the number of texts whose loss is measured: at least 2, so that the loss has an interval."""
    return max(2, texts)


def measurement_seconds(
    candidates: Sequence[Candidate], lengths: Sequence[int], texts: int, time: ReadingTime
) -> float:
    """Return the estimated seconds of a measurement."""
    total = 0.0
    for candidate in candidates:
        for length in lengths:
            if candidate.untouched and length == lengths[-1] and len(lengths) > 1:
                continue  # it is not asked beyond its window
            readings = texts * (QUESTIONS if candidate.follows_length else 1) + spots_of(texts)
            total += readings * time.of(length)
    return SPARE * total


def training_of(
    target: int, window: int, time: ReadingTime, budget: float, free_memory: float, needed_memory: float
) -> tuple[int, int, float]:
    """Return the length of the training sequences, the number of steps and the seconds.

    The sequences have the target's length if a useful number of them fits the budget and the memory; otherwise they are
    short and their positions skip (PoSE). If the budget is too small for the fewest useful steps, these are returned,
    and take longer than the budget.
    """
    for length in (target, min(POSE_LENGTH, window)):
        step = BATCH * BACKWARD * time.of(length)
        steps = int(budget // step)
        if length == target and (steps < 2 * STEPS[0] or needed_memory > free_memory):
            continue
        break
    steps = max(STEPS[0], min(steps, STEPS[1]))
    return length, steps, steps * step


def trained_candidate(advice: Advice, model: Any, exports: Sequence[str]) -> Candidate:
    """Return the scheme that gains most from training.

    Raises:
        UnsupportedError: no scheme fits, or a target cannot express it.
    """
    if advice.choice.trained is None:
        raise UnsupportedError(f"No scheme can be trained on {advice.case.facts.name}; leave train out.")
    return candidate_of(advice.choice.trained, model, exports)


def recipe_of(plan: ExtensionPlan, chosen: Candidate, request: Request) -> Recipe:
    """Return the recipe that trains or only saves a model with a scheme."""
    half = plan.dtype == "bfloat16"
    recipe = Recipe(
        output=str(request.folder),
        model=Model(source=plan.model, dtype="bfloat16" if half and plan.trained is None else "float32"),
        scheme=None if chosen.untouched else Scheme(name=chosen.scheme, options=dict(chosen.options)),
        data=Data(source=request.text), export=list(request.export), seed=request.seed, resume="auto",
        evaluation=Evaluation(every=None, lengths=[plan.lengths[0], plan.target_length]),
    )  # fmt: skip
    if plan.trained is None:
        return recipe
    # Answers alone are learnt from the text. On all else the untouched model is the teacher, so that short texts stay.
    mixture = {
        "text": Source(share=1 - NEEDLES, learn_from="teacher"),
        "needles": Source(share=NEEDLES, kind="needles", needles=(2, 12), targets="answers", learn_from="text"),
    }
    phase = Phase(
        length=plan.train_length, batch=BATCH, micro_batch=1, steps=plan.steps, learning_rate=1e-4,
        schedule="warmup_stable_decay", warmup=max(1, min(10, plan.steps // 10)), floor=0.1, mixture=mixture,
        pose=Pose(target=plan.target_length) if plan.pose else None,
    )  # fmt: skip
    recipe.phases, recipe.distill, recipe.average = [phase], Distill(), AVERAGE
    recipe.mixed_precision = "bf16" if half else "no"
    recipe.checkpoints = Checkpoints(every=max(1, plan.steps // 10), keep=1)
    return recipe


def check_fits(advice: Advice) -> None:
    """Raise `UnsupportedError` if no scheme fits the model and the target."""
    if advice.case.needed and not any(each.obstacle is None for each in advice.schemes):
        reasons = "; ".join(f"{each.scheme}: {each.obstacle}" for each in advice.schemes[:3])
        raise UnsupportedError(f"No scheme fits {advice.case.facts.name} at {advice.case.target:,} tokens. {reasons}")
