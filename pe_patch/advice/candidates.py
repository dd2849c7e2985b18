"""What is known of each scheme when a trained model is to read further: figures of the papers, and limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..schemes.bias import alibi_slopes
from .case import Case

Answer = Literal["yes", "weak", "no"]
Options = dict[str, Any]
LCEG = "Lu et al. 2024, arXiv 2409.12181"
LONGROPE = "Ding et al. 2024, arXiv 2402.13753"
LONGROPE2 = "Shang et al. 2025, arXiv 2502.20082"


def _none(case: Case) -> Options:
    return {}


def _factor(case: Case) -> Options:
    return {"factor": case.factor}


def _never(case: Case) -> str | None:
    return None


def _undoes(case: Case) -> str | None:
    """Without training a scaling is not taken away from the weights that were trained with it."""
    if not case.facts.scaling:
        return None
    kind = case.facts.scaling["rope_type"]
    return f"it takes away the {kind!r} scaling that the weights were trained with"


@dataclass(frozen=True)
class Candidate:
    """One scheme for a longer window; `untrained` and `trained` are what the papers say of it."""

    scheme: str
    untrained: Answer
    trained: Answer
    why: str
    options: Callable[[Case], Options] = _none
    needs_training: Callable[[Case], str | None] = _undoes
    """Why, on this model, it does not work untrained though it does on others."""
    limit: Callable[[Case], str | None] = field(default=_never)
    """Why it does not fit this model or this target."""
    composes: bool = False
    """It stands over a scaling that the model already has, rather than replace it."""


def _beyond_twice(case: Case) -> str | None:
    if case.ratio > 2:
        return f"the target is {case.ratio:.3g} times the window, and beyond about twice it falls off"
    return _undoes(case)


def _beyond_string(case: Case) -> str | None:
    window = case.facts.window
    reach = window + window // 3 - 128
    if case.target > reach:
        return (
            f"it shifts far distances down by L / 3 - 128, which brings {reach:,} tokens within the window and no more"
        )
    return None


def _needs_factors(case: Case) -> str | None:
    return "it needs factors that were searched for this very model (long_factor), and none are at hand"


ROTARY: tuple[Candidate, ...] = (
    Candidate(
        "dca", "yes", "yes",
        "No distance exceeds the chunk, so none is new. Llama-3-8B, trained for 8k: perplexity on PG19 9.04 at 4k and "
        "10.66 at 160k (An et al. 2024, arXiv 2402.17463).",
        needs_training=_never, composes=True,
    ),
    Candidate(
        "self_extend", "yes", "yes",
        "Far positions are counted in groups. Best untrained scheme of a controlled comparison: RULER of Llama-2-7B "
        f"50.7 at 8k, 44.0 at 16k, 29.5 at 32k ({LCEG}).",
        options=lambda case: {"factor": case.composed_factor}, needs_training=_never, composes=True,
    ),
    Candidate(
        "yarn", "weak", "yes",
        "The fewest tokens: Llama-2-7B to 64k in 400 steps, perplexity 2.42, passkey 96.3 % (arXiv 2309.00071). "
        f"Untrained, PG19 at twice the window 32.6, dynamic_ntk 10.2 ({LONGROPE}). Transformers and the common servers "
        "have it.",
        options=_factor,
    ),
    Candidate(
        "dynamic_ntk", "yes", "no",
        "The model itself within its window, bit for bit. RULER of static NTK, untrained: 44.5 at twice the window, "
        f"14.8 at four times ({LCEG}). Frequencies that move with the length are not for training.",
        needs_training=_beyond_twice,
    ),
    Candidate(
        "ntk", "weak", "yes",
        "Raises the base. After the same 10 billion tokens RULER at 128k 73.2, yarn 49.4, searched factors 82.0 "
        f"(Llama-3-8B, {LONGROPE2}); after 1 billion 59.4 at 32k, linear 57.7, yarn 37.0 ({LCEG}).",
        options=_factor, needs_training=_beyond_twice,
    ),
    Candidate(
        "linear", "no", "yes",
        "1000 steps: LLaMA-7B to 32k, perplexity 6.77. Before the first step 16.1 at factor 4 and 112 at factor 8, "
        "where the model had 7.20 (Chen et al. 2023, arXiv 2306.15595).",
        options=_factor,
    ),
    Candidate(
        "rerope", "weak", "weak",
        "All distances beyond a window look the same. Loss of Llama-2-13B, trained for 4k: 1.427 at 8k, 1.400 at 16k; "
        "without 8.86 at 8k (Su 2023). The order of what lies far back is lost.",
        needs_training=_never, composes=True,
    ),
    Candidate(
        "leaky_rerope", "weak", "weak",
        "rerope that keeps the order of far tokens (Su 2023); reaches (L - w) k + w tokens.",
        options=lambda case: {"k": max(16, 2 * case.composed_factor)}, needs_training=_never, composes=True,
    ),
    Candidate(
        "ntk_by_parts", "weak", "yes",
        "yarn without its temperature and with a ramp over turns (arXiv 2309.00071); the authors went on to yarn.",
        options=_factor,
    ),
    Candidate(
        "dynamic_yarn", "weak", "no",
        "yarn whose factor follows the length: the model itself within its window (arXiv 2309.00071).",
    ),
    Candidate(
        "llama3", "no", "yes",
        "What Llama 3.1 was released with, after about 800 billion tokens of long text (arXiv 2407.21783); not made "
        "for untrained use.",
        options=_factor,
    ),
    Candidate(
        "string", "yes", "no",
        "For lengths that a model has and reads badly: RULER at 128k 77.0 to 80.0 on Llama-3.1-8B, 66.6 to 81.7 on 70B "
        "(An et al. 2024, arXiv 2410.18745).",
        needs_training=_never, limit=_beyond_string, composes=True,
    ),
    Candidate(
        "longrope", "yes", "yes",
        f"One searched factor for each pair: RULER at 128k 82.0, the best of its comparison ({LONGROPE2}).",
        options=lambda case: {"factor": case.factor}, limit=_needs_factors,
    ),
    Candidate(
        "lm_infinite", "no", "no",
        "Attends to the newest window and the first tokens and drops what lies between: for text without end, not for "
        f"recall. RULER 30.0 at 8k, 12.3 at 32k ({LCEG}).",
        limit=lambda case: "what lies beyond its window is not attended, so nothing there can be found",
    ),
    Candidate(
        "drope", "no", "weak",
        "Takes the rotation away; wants 10 billion tokens of recalibration at the original length (arXiv 2512.12167).",
    ),
    Candidate(
        "clipped_rope", "weak", "weak",
        "Stills the slowest frequencies; goes over another scheme, such as over=yarn (arXiv 2602.05258).",
        limit=lambda case: "alone it does not extend the window: give it over another scheme",
    ),
    Candidate(
        "resonance", "weak", "weak",
        "Rounds wavelengths to whole tokens; goes over another scheme, such as over=yarn (arXiv 2403.00071).",
        limit=lambda case: "alone it does not extend the window: give it over another scheme",
    ),
    Candidate(
        "proportional", "no", "no",
        "Stills the slowest pairs: an architecture to train from the start (Gemma 4).",
        limit=lambda case: "it does not extend the window of weights that were trained without it",
    ),
)  # fmt: skip

ALIBI: tuple[Candidate, ...] = (
    Candidate(
        "alibi", "yes", "weak",
        "The bias that the model was trained with goes on growing: text far beyond the window stays fluent, and what "
        "lies far back fades rather than being read (Press et al. 2021, arXiv 2108.12409).",
    ),
    Candidate(
        "alibi", "weak", "yes",
        "Slopes over the factor, so that the bias at the target is what it was at the window (Al-Khateeb et al. 2023, "
        "arXiv 2310.13017).",
        options=lambda case: {"slopes": [slope / case.factor for slope in alibi_slopes(case.facts.shape.num_heads)]},
    ),
)  # fmt: skip

LEARNED: tuple[Candidate, ...] = (
    Candidate(
        "learned", "weak", "yes",
        "Rows beyond the table are sums of two of its rows; its own rows stay as they are (Su 2020).",
        options=lambda case: {"max_positions": case.target, "extend": "hierarchical"},
    ),
    Candidate(
        "learned", "no", "yes",
        "The table is stretched, which moves every row: wants training.",
        options=lambda case: {"max_positions": case.target, "extend": "interpolate"},
    ),
)  # fmt: skip

CANDIDATES: dict[str, tuple[Candidate, ...]] = {"rope": ROTARY, "alibi": ALIBI, "learned": LEARNED}
"""By what a family has of its own."""
