"""Write the verdict and the notes of an advice."""

from __future__ import annotations

from collections.abc import Sequence

from ..schemes.bias import alibi_slopes
from ..schemes.registry import SCHEMES
from .case import FARTHEST_TRAINED, FARTHEST_UNTRAINED, Case
from .frequencies import Pair
from .model_facts import ModelFacts
from .recommend import Choice, Judgement
from .training import recipes_for

STARTING_POINT_OPTIONS = ("on_existing", "layers", "original_max_position_embeddings")
"""Options that set the starting point of a scheme; `format_scheme` leaves them out."""


def format_scheme(judgement: Judgement) -> str:
    """Return a scheme with its main options, for example `yarn(factor=8)`."""
    shown = {key: value for key, value in judgement.options.items() if key not in STARTING_POINT_OPTIONS}
    options = ", ".join(f"{key}={format_value(value)}" for key, value in shown.items())
    return f"{judgement.scheme}({options})" if options else judgement.scheme


def format_value(value: object) -> str:
    """Return an option's value as short text; a list shows its first and last element."""
    if isinstance(value, list):
        ends = [f"{end:.4g}" if isinstance(end, float) else str(end) for end in (value[0], value[-1])]
        return f"[{ends[0]}, ..., {ends[1]}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def billions(tokens: int) -> str:
    """Return a number of tokens in billions, for example `0.84 billion`."""
    return f"{tokens / 1e9:,.2g} billion" if tokens < 10**10 else f"{tokens / 1e9:,.0f} billion"


def verdict(case: Case, pairs: Sequence[Pair], choice: Choice) -> str:
    """Return the recommendation in a few sentences."""
    facts, target = case.facts, case.target
    if target <= facts.window and not must_lift_sliding_window(case):
        scaled = f" with its {facts.scaling['rope_type']!r} scaling" if facts.scaling else ""
        return f"Nothing is needed: {facts.name} was trained for {facts.window:,} tokens{scaled}; {target:,} fit."
    if case.only_near_layers_rotate:
        return (
            f"No position has to change: the rotating layers of {facts.name} look back at most "
            f"{facts.rotation_slides:,} tokens, and its other {facts.unrotated} layers have no positions. It was "
            f"trained for {facts.window:,} tokens; measure how well it reads {target:,}."
        )
    describe = {"rope": _describe_rotary, "alibi": _describe_alibi, "learned": _describe_learned}[facts.positions]
    return f"{describe(case, pairs)} {_describe_choice(case, choice)}"


def must_lift_sliding_window(case: Case) -> bool:
    """Return True if every layer slides and the target exceeds the largest sliding window."""
    return case.facts.all_slide and case.target > max(case.facts.sliding)


def _describe_rotary(case: Case, pairs: Sequence[Pair]) -> str:
    facts, leaving = case.facts, sum(pair.leaves for pair in pairs)
    angles = f"{leaving} of its {len(pairs)} rotating pairs reach angles unseen in training"
    if not leaving:
        angles = "Its rotating pairs have seen all angles, but not at such distances"
    growth = f"{facts.window:,} tokens; {case.target:,} are {case.ratio:.4g} times that"
    if not must_lift_sliding_window(case):
        return f"{facts.name} was trained for {growth}. {angles}."
    sliding = (
        f"{facts.name} runs at any length, but each layer looks back at most {max(facts.sliding):,} tokens, so no "
        f'angle is new. To let it read {case.target:,} tokens, set "sliding_window" to null in its config.'
    )
    if case.target <= facts.window:
        return f"{sliding} It was trained for {facts.window:,} tokens, so it then needs no scheme."
    return f"{sliding} It was trained for {growth}. Without the sliding window: {angles[0].lower()}{angles[1:]}."


def _describe_alibi(case: Case, pairs: Sequence[Pair]) -> str:
    facts, slopes = case.facts, alibi_slopes(case.facts.shape.num_heads)
    bias = min(slopes) * case.target
    return (
        f"{facts.name} runs at any length without a scheme, because ALiBi is defined for every distance. It was "
        f"trained for {facts.window:,} tokens, however: at {case.target:,} even its flattest head subtracts {bias:.3g} "
        "from the score of the first token, so distant text fades instead of being read."
    )


def _describe_learned(case: Case, pairs: Sequence[Pair]) -> str:
    facts = case.facts
    return (
        f"{facts.name} has a learned vector for each of {facts.window:,} positions and none beyond: {case.target:,} "
        f"tokens ({case.ratio:.4g} times as many) raise an error without a scheme."
    )


def _describe_choice(case: Case, choice: Choice) -> str:
    """Return the recommended schemes without and with training."""
    if case.facts.positions == "rope" and case.target <= case.facts.window:
        return ""
    if case.too_far:
        return (
            f"No paper goes farther than {FARTHEST_TRAINED} times the window (LongRoPE, arXiv 2402.13753). Choose a "
            "smaller target or a model with a longer window."
        )
    served = f" and can be exported for {' and '.join(case.served_by)}" if case.served_by else ""
    sentences = []
    if choice.untrained:
        sentences.append(f"Without training: {format_scheme(choice.untrained)}.")
    elif case.ratio <= FARTHEST_UNTRAINED:
        sentences.append(f"Without training, no scheme fits this model{served}.")
    else:
        sentences.append(f"Without training, the papers reach at most {FARTHEST_UNTRAINED} times the window.")
    if choice.trained:
        recipe = next(iter(recipes_for({choice.trained.scheme})), None)
        tokens = recipe.tokens(case.target, case.facts.original) if recipe else 0
        amount = f" (about {billions(tokens)} tokens with the paper's settings)" if tokens else ""
        sentences.append(f"With training{amount}: {format_scheme(choice.trained)}.")
    elif served:
        sentences.append(f"With training, no scheme fits this model{served}.")
    return " ".join(sentences)


def notes(case: Case) -> list[str]:
    """Return traps of this model and target, one or two sentences each."""
    facts = case.facts
    lines = [facts.word.statement] if facts.word else []
    if facts.scaling:
        lines.append(_scaling_note(case))
    if facts.sliding:
        windows = " and ".join(f"{count} over {window:,} tokens" for window, count in facts.sliding.items())
        lines.append(f"Sliding layers, of {len(facts.cache)}: {windows}. Their cache does not grow beyond that.")
    if facts.unrotated:
        lines.append(f"{facts.unrotated} of {facts.shape.num_layers} layers have no positions and do not change.")
    if facts.layers:
        lines.append(
            f"Patch only its {len(facts.layers)} {facts.layer_type!r} layers: layers={list(facts.layers)}, in Python "
            "or in a recipe. The command line has no such option."
        )
    if facts.shape.rotary_dim < facts.shape.head_dim and not facts.shape.latent_rank and facts.positions == "rope":
        lines.append(f"It rotates {facts.shape.rotary_dim} of the {facts.shape.head_dim} dimensions of a head.")
    exact = case.target / facts.original
    if case.target > facts.window and case.factor != exact:
        lines.append(f"{case.target:,} tokens are {exact:.4g} windows; the factor is rounded up to {case.factor:g}.")
    if facts.positions == "rope" and facts.window / 2 < case.target <= facts.window:
        lines.append(
            "Models use the far part of their window less well: Llama-3.1-8B scores 95.5 on RULER at 4k and 77.0 at "
            "128k. The scheme 'string' raises the latter to 80.0 (An et al. 2024, arXiv 2410.18745)."
        )
    if facts.positions == "alibi":
        lines.append(
            "Its native attention stores all scores. patch_model(model, 'alibi') computes the same result with memory "
            "that is linear in the length, not quadratic."
        )
    return lines


def _differs_from_product(facts: ModelFacts) -> str:
    """Return a warning if the trained window is not the factor times the original window (Llama 3.1), else ""."""
    product = int((facts.trained.factor or 1) * facts.original)
    differs = product != facts.window and facts.scaling["rope_type"] == "llama3"
    return f", not from the {product:,} that the factor alone would give" if differs else ""


def _scaling_note(case: Case) -> str:
    facts, rope_type = case.facts, case.facts.scaling["rope_type"]
    composable = [name for name, scheme in SCHEMES.items() if "over" in scheme.option_names()]
    scaling = f"Its config has {rope_type!r} scaling over an original window of {facts.original:,} tokens."
    if case.target <= facts.window:
        return f"{scaling} Without a patch, on_existing is not needed."
    return (
        f"{scaling} on_existing='replace' starts from these {facts.original:,} tokens and the base "
        f"{facts.shape.rope_theta:g}: the factor is {case.factor:g}, and the weights need training with it. "
        f"on_existing='compose' puts a scheme on top of the scaling ({', '.join(composable)}); it counts from "
        f"{facts.trained.in_words(composed=True)}{_differs_from_product(facts)}."
    )
