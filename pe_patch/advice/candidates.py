"""The candidate schemes for a longer window: figures from the papers, options and limits."""

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


def _removes_scaling(case: Case) -> str | None:
    """Return the reason why weights trained with a scaling need training without it; None without a scaling."""
    if not case.facts.scaling:
        return None
    rope_type = case.facts.scaling["rope_type"]
    return f"it removes the {rope_type!r} scaling that the weights were trained with"


@dataclass(frozen=True)
class Candidate:
    """One scheme for a longer window; `untrained` and `trained` summarize the results of the papers."""

    scheme: str
    untrained: Answer
    trained: Answer
    why: str
    options: Callable[[Case], Options] = _none
    needs_training: Callable[[Case], str | None] = _removes_scaling
    """Returns the reason why the scheme needs training on this model or target; None if it does not."""
    limit: Callable[[Case], str | None] = field(default=_never)
    """Returns the reason why the scheme does not fit this model or target; None if it fits."""
    composes: bool = False
    """True if the scheme builds on the model's existing scaling instead of replacing it."""


def _beyond_twice(case: Case) -> str | None:
    if case.ratio > 2:
        return f"the target is {case.ratio:.3g} times the window, and quality drops beyond about twice"
    return _removes_scaling(case)


def _beyond_string(case: Case) -> str | None:
    window = case.facts.window
    reach = window + window // 3 - 128
    if case.target > reach:
        return f"it shifts far distances down by L / 3 - 128, so it brings at most {reach:,} tokens within the window"
    return None


def _needs_factors(case: Case) -> str | None:
    return "it needs factors searched for this model (long_factor), and none are available"


ROTARY: tuple[Candidate, ...] = (
    Candidate(
        "dca", "yes", "yes",
        "No distance exceeds the chunk, so every distance was seen in training. Perplexity of Llama-3-8B, trained for "
        "8k, on PG19: 9.04 at 4k and 10.66 at 160k (An et al. 2024, arXiv 2402.17463).",
        needs_training=_never, composes=True,
    ),
    Candidate(
        "self_extend", "yes", "yes",
        "Groups far positions. The best untrained scheme of a controlled comparison: Llama-2-7B scores 50.7 on RULER "
        f"at 8k, 44.0 at 16k and 29.5 at 32k ({LCEG}).",
        options=lambda case: {"factor": case.composed_factor}, needs_training=_never, composes=True,
    ),
    Candidate(
        "yarn", "weak", "yes",
        "Needs the fewest training tokens: Llama-2-7B to 64k in 400 steps, perplexity 2.42, passkey 96.3 % (arXiv "
        f"2309.00071). Untrained, perplexity on PG19 at twice the window is 32.6; dynamic_ntk has 10.2 ({LONGROPE}). "
        "At factor 4, untrained, the loss of SmolLM2 135M on short texts rises by 2.4 % (English) and 5.7 % (code) "
        "(benchmarks/results/untrained.md). Transformers and common servers support it.",
        options=_factor,
    ),
    Candidate(
        "dynamic_ntk", "yes", "no",
        "Leaves the model bit for bit unchanged within its window. Static NTK, untrained, scores 44.5 on RULER at "
        f"twice the window and 14.8 at four times ({LCEG}). Length-dependent frequencies do not suit training.",
        needs_training=_beyond_twice,
    ),
    Candidate(
        "ntk", "weak", "yes",
        "Raises the base. RULER at 128k after the same 10 billion tokens: 73.2, against 49.4 for yarn and 82.0 for "
        f"searched factors (Llama-3-8B, {LONGROPE2}); at 32k after 1 billion tokens: 59.4, against 57.7 for linear and "
        f"37.0 for yarn ({LCEG}).",
        options=_factor, needs_training=_beyond_twice,
    ),
    Candidate(
        "linear", "no", "yes",
        "LLaMA-7B to 32k in 1000 steps, perplexity 6.77. Before training, 16.1 at factor 4 and 112 at factor 8; the "
        "original model has 7.20 (Chen et al. 2023, arXiv 2306.15595).",
        options=_factor,
    ),
    Candidate(
        "rerope", "weak", "weak",
        "All distances beyond a window look the same, so the order of distant text is lost. Loss of Llama-2-13B, "
        "trained for 4k: 1.427 at 8k and 1.400 at 16k; without rerope 8.86 at 8k (Su 2023).",
        needs_training=_never, composes=True,
    ),
    Candidate(
        "leaky_rerope", "weak", "weak",
        "Like rerope, but keeps the order of distant tokens (Su 2023); reaches (L - w) k + w tokens.",
        options=lambda case: {"k": max(16, 2 * case.composed_factor)}, needs_training=_never, composes=True,
    ),
    Candidate(
        "ntk_by_parts", "weak", "yes",
        "yarn without its temperature and with a ramp over turns (arXiv 2309.00071); its authors replaced it by yarn.",
        options=_factor,
    ),
    Candidate(
        "dynamic_yarn", "weak", "no",
        "yarn whose factor follows the length; leaves the model unchanged within its window (arXiv 2309.00071).",
    ),
    Candidate(
        "llama3", "no", "yes",
        "The scheme of Llama 3.1, trained on about 800 billion tokens of long text (arXiv 2407.21783); not designed "
        "for untrained use.",
        options=_factor,
    ),
    Candidate(
        "string", "yes", "no",
        "Improves lengths within the window that the model uses poorly: RULER at 128k rises from 77.0 to 80.0 on "
        "Llama-3.1-8B and from 66.6 to 81.7 on 70B (An et al. 2024, arXiv 2410.18745).",
        needs_training=_never, limit=_beyond_string, composes=True,
    ),
    Candidate(
        "longrope", "yes", "yes",
        f"One searched factor per pair; scores 82.0 on RULER at 128k, the best of its comparison ({LONGROPE2}).",
        options=lambda case: {"factor": case.factor}, limit=_needs_factors,
    ),
    Candidate(
        "lm_infinite", "no", "no",
        "Attends to the newest window and the first tokens and drops the rest: suits endless text, not recall. Scores "
        f"30.0 on RULER at 8k and 12.3 at 32k ({LCEG}).",
        limit=lambda case: "it does not attend beyond its window, so it retrieves nothing from there",
    ),
    Candidate(
        "drope", "no", "weak",
        "Removes the rotation; needs 10 billion tokens of recalibration at the original length (arXiv 2512.12167).",
    ),
    Candidate(
        "clipped_rope", "weak", "weak",
        "Zeroes the slowest frequencies; wraps another scheme, for example over=yarn (arXiv 2602.05258).",
        limit=lambda case: "it does not extend the window by itself; wrap it around another scheme with over=",
    ),
    Candidate(
        "resonance", "weak", "weak",
        "Rounds wavelengths to whole tokens; wraps another scheme, for example over=yarn (arXiv 2403.00071).",
        limit=lambda case: "it does not extend the window by itself; wrap it around another scheme with over=",
    ),
    Candidate(
        "proportional", "no", "no",
        "Zeroes the slowest frequencies: an architecture to train from scratch (Gemma 4).",
        limit=lambda case: "it does not extend the window of weights that were trained without it",
    ),
)  # fmt: skip

ALIBI: tuple[Candidate, ...] = (
    Candidate(
        "alibi", "yes", "weak",
        "The trained bias keeps growing with distance: text far beyond the window stays fluent, but distant text fades "
        "instead of being read (Press et al. 2021, arXiv 2108.12409).",
    ),
    Candidate(
        "alibi", "weak", "yes",
        "Divides the slopes by the factor, so that the bias at the target equals the trained bias at the window "
        "(Al-Khateeb et al. 2023, arXiv 2310.13017).",
        options=lambda case: {"slopes": [slope / case.factor for slope in alibi_slopes(case.facts.shape.num_heads)]},
    ),
)  # fmt: skip

LEARNED: tuple[Candidate, ...] = (
    Candidate(
        "learned", "weak", "yes",
        "Rows beyond the table are sums of two trained rows; the trained rows do not change (Su 2020).",
        options=lambda case: {"max_positions": case.target, "extend": "hierarchical"},
    ),
    Candidate(
        "learned", "no", "yes",
        "Stretches the table, which changes every row, so it needs training.",
        options=lambda case: {"max_positions": case.target, "extend": "interpolate"},
    ),
)  # fmt: skip

CANDIDATES: dict[str, tuple[Candidate, ...]] = {"rope": ROTARY, "alibi": ALIBI, "learned": LEARNED}
"""The candidates by the native scheme of the family, the recommended ones first."""
