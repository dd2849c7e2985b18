"""What the papers say, in float64 and plain Python: one number at a time, by another construction than the library's.

Every function returns the frequencies of pair 0 .. r/2 - 1 in radians per token, or those and the attention factor.
Notation: r rotary width, theta base, s factor, L trained window, N current length.
"""

from __future__ import annotations

import math

TURN = 2 * math.pi


def rope(r: int, theta: float) -> list[float]:
    """Su et al. 2021: theta^(-2k/r)."""
    return [math.exp(-2 * k / r * math.log(theta)) for k in range(r // 2)]


def linear(r: int, theta: float, s: float) -> list[float]:
    """Chen et al. 2023: a position p is read as p / s."""
    return [w / s for w in rope(r, theta)]


def ntk(r: int, theta: float, s: float) -> list[float]:
    """bloc97 2023: pair k is stretched by s^(2k/(r-2)), so the first by 1 and the last by s."""
    return [w * s ** (-2 * k / (r - 2)) for k, w in enumerate(rope(r, theta))]


def dynamic_ntk(r: int, theta: float, f: float, L: int, N: int) -> list[float]:
    """emozilla 2023: NTK by f N / L - (f - 1) beyond the window."""
    return ntk(r, theta, f * N / L - f + 1) if N > L else rope(r, theta)


def by_turns(r: int, theta: float, s: float, L: int, low: float, high: float) -> list[float]:
    """Peng et al. 2023, definition 2, and Llama 3.1: a pair that turns rho times in L is kept in full from `high` turns
    on, divided by s up to `low`, and mixed linearly in rho between; at low == high, kept from there on."""
    frequencies = []
    for w in rope(r, theta):
        turns = L * w / TURN
        if turns >= high:
            kept = 1.0
        elif turns <= low:
            kept = 0.0
        else:
            kept = (turns - low) / (high - low)
        frequencies.append(kept * w + (1 - kept) * w / s)
    return frequencies


def yarn_frequencies(
    r: int, theta: float, s: float, L: int, beta_fast: float = 32, beta_slow: float = 1, truncate: bool = True
) -> list[float]:
    """Peng et al. 2023 as its authors coded it: mixed linearly in the pair index between the (fractional) pairs that
    turn beta_fast and beta_slow times in L. Pair x turns n times where theta^(2x/r) = L / (2 pi n)."""
    if s == 1:
        return rope(r, theta)
    first, last = (r / 2 * math.log(L / (TURN * n), theta) for n in (beta_fast, beta_slow))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, r - 1)
    width = last - first or 0.001
    frequencies = []
    for k, w in enumerate(rope(r, theta)):
        slowed = min(max((k - first) / width, 0.0), 1.0)
        frequencies.append(w * (1 - slowed + slowed / s))
    return frequencies


def yarn_attention(s: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Equation 22: sqrt(1/t) = 0.1 ln s + 1; DeepSeek divides two of them."""
    if s <= 1:
        return 1.0
    if mscale and mscale_all_dim:
        return (1 + mscale * math.log(s) / 10) / (1 + mscale_all_dim * math.log(s) / 10)
    return 1 + math.log(s) / 10


def dynamic_yarn(r: int, theta: float, L: int, N: int, cap: float = math.inf) -> tuple[list[float], float]:
    """YaRN at s = N / L."""
    s = min(max(1.0, N / L), cap)
    return yarn_frequencies(r, theta, s, L), yarn_attention(s)


def longrope(r: int, theta: float, stretch: list[float], s: float, L: int) -> tuple[list[float], float]:
    """Ding et al. 2024: lambda_k stretches the wavelength of pair k; sqrt(1 + ln s / ln L)."""
    attention = 1.0 if s <= 1 else (1 + math.log(s, L)) ** 0.5
    return [w / one for w, one in zip(rope(r, theta), stretch, strict=True)], attention


def proportional(r: int, theta: float, p: float, s: float = 1) -> list[float]:
    """Barbero et al. 2024: the fastest part p of the pairs turns, rounded down to whole pairs."""
    turning = math.floor(p * r / 2 + 1e-9)
    return [w / s if k < turning else 0.0 for k, w in enumerate(rope(r, theta))]


def clipped(frequencies: list[float], n: int) -> list[float]:
    """Li et al. 2026: the last n are multiplied by a falling half cosine, cos^2 of half the phase."""
    kept = len(frequencies) - n
    phase = [max(0, k - kept) / (n - 1) for k in range(len(frequencies))]
    return [w * math.cos(math.pi / 2 * x) ** 2 for w, x in zip(frequencies, phase, strict=True)]


def resonance(frequencies: list[float]) -> list[float]:
    """Wang et al. 2024: the wavelength is the nearest whole number of tokens."""
    return [TURN / math.floor(TURN / w + 0.5) for w in frequencies]
