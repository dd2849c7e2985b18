"""What there is to say first, and what a reader would trip over."""

from __future__ import annotations

from collections.abc import Sequence

from ..schemes.bias import alibi_slopes
from ..schemes.registry import SCHEMES
from .case import FARTHEST_TRAINED, FARTHEST_UNTRAINED, Case
from .frequencies import Pair
from .model_facts import ModelFacts
from .recommend import Choice, Judgement
from .training import recipes_for

ASIDE = ("on_existing", "layers", "original_max_position_embeddings")
"""Options that say where a scheme starts from and not what it does."""


def written(judgement: Judgement) -> str:
    """A scheme with the options that matter, such as `yarn(factor=8)`."""
    shown = {key: value for key, value in judgement.options.items() if key not in ASIDE}
    told = ", ".join(f"{key}={short(value)}" for key, value in shown.items())
    return f"{judgement.scheme}({told})" if told else judgement.scheme


def short(value: object) -> str:
    """A value of an option for people: a long list by its ends."""
    if isinstance(value, list):
        ends = [f"{one:.4g}" if isinstance(one, float) else str(one) for one in (value[0], value[-1])]
        return f"[{ends[0]}, ..., {ends[1]}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def billions(tokens: int) -> str:
    """A large count of tokens in words."""
    return f"{tokens / 1e9:,.2g} billion" if tokens < 10**10 else f"{tokens / 1e9:,.0f} billion"


def verdict(case: Case, pairs: Sequence[Pair], choice: Choice) -> str:
    """The answer in a few sentences."""
    facts, target = case.facts, case.target
    if target <= facts.window and not lifts(case):
        scaled = f", with the {facts.scaling['rope_type']!r} scaling that it carries" if facts.scaling else ""
        return f"Nothing is needed: {facts.name} was trained for {facts.window:,} tokens{scaled}; {target:,} fit."
    if case.rests:
        return (
            f"No position has to change: the layers of {facts.name} that rotate look back {facts.rotation_slides:,} "
            f"tokens at most, and the {facts.unrotated} that look farther have no positions. It was trained for "
            f"{facts.window:,} tokens; whether it reads {target:,} is for a measurement to tell."
        )
    tell = {"rope": _rotary, "alibi": _alibi, "learned": _learned}[facts.positions]
    return f"{tell(case, pairs)} {_choices(case, choice)}"


def lifts(case: Case) -> bool:
    """Whether every layer slides over fewer tokens than the target, so that no text from before is read directly."""
    return case.facts.all_slide and case.target > max(case.facts.sliding)


def _rotary(case: Case, pairs: Sequence[Pair]) -> str:
    facts, leaving = case.facts, sum(pair.leaves for pair in pairs)
    count = f"{leaving} of its {len(pairs)} rotating pairs would meet angles that training never showed them"
    if not leaving:
        count = "all of its rotating pairs have met all angles, but never so far apart"
    grown = f"{facts.window:,} tokens, and {case.target:,} are {case.ratio:.4g} times that"
    if not lifts(case):
        return f"{facts.name} was trained for {grown}: {count}."
    start = (
        f"As it is, {facts.name} breaks at no length and reads none beyond {max(facts.sliding):,} tokens: each of its "
        f"layers looks back so far and no further, and no angle is new. To have it read {case.target:,} tokens, set "
        '"sliding_window" to null in its config.'
    )
    if case.target <= facts.window:
        return f"{start} It was trained for {facts.window:,} tokens, so that needs no scheme."
    return f"{start} It was trained for {grown}: then {count}."


def _alibi(case: Case, pairs: Sequence[Pair]) -> str:
    facts, slopes = case.facts, alibi_slopes(case.facts.shape.num_heads)
    fade = min(slopes) * case.target
    return (
        f"{facts.name} needs no scheme to go on: ALiBi is defined for any distance. But it was trained for "
        f"{facts.window:,} tokens, and at {case.target:,} even its flattest head takes {fade:.3g} off the score of the "
        f"first token, so what lies far back fades rather than being read."
    )


def _learned(case: Case, pairs: Sequence[Pair]) -> str:
    facts = case.facts
    return (
        f"{facts.name} has a learned vector for each of {facts.window:,} positions and none beyond: {case.target:,} "
        f"tokens, {case.ratio:.4g} times as many, are an error without a scheme."
    )


def _choices(case: Case, choice: Choice) -> str:
    """What to do without training, and with it."""
    if case.facts.positions == "rope" and case.target <= case.facts.window:
        return ""
    if case.too_far:
        return (
            f"No paper goes farther than {FARTHEST_TRAINED} times the window (LongRoPE, arXiv 2402.13753), so there is "
            "no advice to give: take a smaller target, or a model with a longer window."
        )
    parts = []
    if choice.untrained:
        parts.append(f"Without training: {written(choice.untrained)}.")
    elif case.ratio <= FARTHEST_UNTRAINED:
        parts.append("Without training no scheme fits this model.")
    else:
        parts.append(f"Without training the papers go to {FARTHEST_UNTRAINED} times the window, so train.")
    if choice.trained:
        recipe = next(iter(recipes_for({choice.trained.scheme})), None)
        tokens = recipe.tokens(case.target, case.facts.original) if recipe else 0
        amount = f" (about {billions(tokens)} tokens in the paper's way)" if tokens else ""
        parts.append(f"With training{amount}: {written(choice.trained)}.")
    return " ".join(parts)


def notes(case: Case) -> list[str]:
    """What a reader would trip over, each in a sentence or two."""
    facts = case.facts
    found = [facts.word.said] if facts.word else []
    if facts.scaling:
        found.append(_scaling(case))
    if facts.sliding:
        told = " and ".join(f"{count} over {window:,} tokens" for window, count in facts.sliding.items())
        found.append(f"Of {len(facts.cache)} layers these slide: {told}. Their cache grows no further.")
    if facts.unrotated:
        found.append(f"{facts.unrotated} of {facts.shape.num_layers} layers have no positions; nothing changes there.")
    if facts.layers:
        found.append(
            f"Only its {len(facts.layers)} {facts.layer_type!r} layers are to be changed: layers={list(facts.layers)}, "
            "from Python or in a recipe; the command line has no such option."
        )
    if facts.shape.rotary_dim < facts.shape.head_dim and not facts.shape.latent_rank and facts.positions == "rope":
        found.append(f"It rotates {facts.shape.rotary_dim} of the {facts.shape.head_dim} dimensions of a head.")
    exact = case.target / facts.original
    if case.target > facts.window and case.factor != exact:
        found.append(f"{case.target:,} tokens are {exact:.4g} windows; the factor is rounded up to {case.factor:g}.")
    if facts.positions == "rope" and facts.window / 2 < case.target <= facts.window:
        found.append(
            "Models read the far part of their window worse: RULER of Llama-3.1-8B is 95.5 at 4k and 77.0 at 128k. The "
            "scheme 'string' is made for that and takes it to 80.0 (An et al. 2024, arXiv 2410.18745)."
        )
    if facts.positions == "alibi":
        found.append(
            "Its own attention makes all scores at once; patch_model(model, 'alibi') gives the same result in memory "
            "that grows with the length and not with its square."
        )
    return found


def _product(facts: ModelFacts) -> str:
    """A reminder where the factor times the original window is another number (Llama 3.1)."""
    product = int((facts.trained.factor or 1) * facts.original)
    differs = product != facts.window and facts.scaling["rope_type"] == "llama3"
    return f", not from the {product:,} that the factor alone would give" if differs else ""


def _scaling(case: Case) -> str:
    facts = case.facts
    kind, over = facts.scaling["rope_type"], [name for name, one in SCHEMES.items() if "over" in one.option_names()]
    base = f"It carries {kind!r} over an original window of {facts.original:,} tokens."
    if case.target <= facts.window:
        return f"{base} It needs no on_existing as long as nothing is patched."
    return (
        f"{base} on_existing='replace' starts again from these {facts.original:,} tokens and the base "
        f"{facts.shape.rope_theta:g}, so its factor is {case.factor:g}, and the weights must be trained to it. "
        f"on_existing='compose' puts a scheme on top of what is there ({', '.join(over)}); they count from "
        f"{facts.trained.in_words(composed=True)}{_product(facts)}."
    )
