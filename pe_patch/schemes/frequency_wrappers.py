"""Schemes that change the frequencies of another rotary scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_length, check_number
from ..core.scheme import AttentionShape
from ..errors import OptionValueError, quoted
from .registry import find_scheme, register_scheme
from .rotary import Rotary

HOOKS = ("embed", "angles", "encode", "bias", "attend", "prepare")


WINDOW = "original_max_position_embeddings"


def build_inner(
    scheme: str, over: str | Mapping[str, object] | None, shape: AttentionShape, theta: Any, window: Any
) -> tuple[Rotary, int | None]:
    """Build the rotary scheme that `over` names (a name, or a dict in any config format; plain RoPE when None).

    Args:
        theta: the base of its frequencies, where `over` does not set one.
        window: the trained window. If `over` sets one, that applies to the frequencies only, and this stays the model's
            window (Llama 3.1: frequencies from 8,192, a window of 131,072).

    Returns:
        The scheme, and the model's window if it differs from the scheme's; else None.
    """
    if not isinstance(over, str | Mapping | None):
        raise OptionValueError(f"{scheme!r} got over={quoted(over)}; give the name of a rotary scheme, or a dict.")
    given = {} if theta is None else {"theta": theta}
    inner, options = find_scheme("rope" if over is None else over, given, shape)
    if not issubclass(inner, Rotary) or any(getattr(inner, hook) is not getattr(Rotary, hook) for hook in HOOKS):
        raise OptionValueError(
            f"{scheme!r} changes rotary frequencies, and {inner.name!r} is not defined by those alone."
        )
    own = options.get(WINDOW)
    if own is None and window is not None:
        options[WINDOW] = window
    built = inner(shape, **options)
    assert isinstance(built, Rotary)
    return built, check_length(scheme, WINDOW, window) if own is not None and window != own else None


class FrequencyWrapper(Rotary):
    """A change to the frequencies of another rotary scheme, whose attention factor, window and regimes it keeps.

    A subclass overrides `change_frequencies(inv_freq)`.
    """

    over: str | Mapping[str, object] | None = None
    """The other scheme, a name or a dict with its options; None for plain RoPE."""

    def setup(self) -> None:
        super().setup()
        self.inner, self.model_window = build_inner(
            self.name, self.over, self.shape, self.theta, self.original_max_position_embeddings
        )
        self.base, self.trained_window = self.inner.base, self.inner.trained_window
        self.longest_expected = self.inner.longest_expected

    def change_frequencies(self, inv_freq: Tensor) -> Tensor:
        """Return new frequencies, `[rotary_dim / 2]`, given those of the other scheme."""
        raise NotImplementedError

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        inv_freq, factor = self.inner.frequencies(length)
        return self.change_frequencies(inv_freq), factor

    def regime(self, length: int) -> int:
        return self.inner.regime(length)

    @property
    def length_dependent(self) -> bool:
        return self.inner.length_dependent

    @property
    def softmax_factor(self) -> float:
        return self.inner.softmax_factor

    @property
    def effective_window(self) -> int | None:
        return self.model_window or self.inner.effective_window

    def differs_within(self, length: int) -> bool:
        """Return whether anything is encoded otherwise than by the other scheme in a sequence of `length` tokens."""
        theirs, their_factor = self.inner.frequencies(self.inner.regime(length))
        ours, factor = self.frequencies(self.inner.regime(length))
        return self.scorer is not None or factor != their_factor or not torch.equal(ours.float(), theirs.float())


@register_scheme
class ClippedRoPE(FrequencyWrapper):
    """Clipped RoPE (CoPE): the n slowest frequencies are multiplied by (1 + cos(pi t / (n - 1))) / 2, t = 0 .. n - 1,
    so that the slowest of all stands still (Li et al. 2026, arXiv 2602.05258).
    """

    name = "clipped_rope"
    summary = "tapers the slowest frequencies to zero, over any rotary scheme"
    paper = "Li et al. 2026, arXiv 2602.05258"
    training_free = True

    dims: int = 20
    """n, at least 2. A number given explicitly may exceed the number of frequencies; then all of them are tapered."""

    def setup(self) -> None:
        super().setup()
        pairs, dims = self.dim // 2, self.dims
        if check_number(self.name, "dims", dims, 2) != int(dims):
            raise OptionValueError(f"{self.name!r} got dims={dims!r}; give a whole number of frequencies.")
        if pairs < 2 or ("dims" not in self.options and dims >= pairs):
            raise OptionValueError(
                f"{self.name!r} tapers {dims} frequencies by default, and this attention has only {pairs}. Give "
                f"dims=<2 to {pairs}>."
            )
        self.dims = min(int(dims), pairs)

    def change_frequencies(self, inv_freq: Tensor) -> Tensor:
        steps = torch.arange(self.dims, dtype=torch.float64, device="cpu") / (self.dims - 1)
        taper = torch.ones(len(inv_freq), dtype=torch.float64, device="cpu")
        taper[-self.dims :] = 0.5 * (1 + (math.pi * steps).cos())
        return (inv_freq * taper).float()


@register_scheme
class Resonance(FrequencyWrapper):
    """Resonance RoPE: wavelengths rounded to whole tokens, w' = 2 pi / round(2 pi / w) (Wang et al. 2024, arXiv
    2403.00071, algorithm 1)."""

    name = "resonance"
    summary = "rounds every wavelength to a whole number of tokens, over any rotary scheme"
    paper = "Wang et al. 2024, arXiv 2403.00071"
    training_free = True

    def change_frequencies(self, inv_freq: Tensor) -> Tensor:
        return 2 * math.pi / (2 * math.pi / inv_freq).round()
