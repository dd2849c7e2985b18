"""Rotations in which a query and a key that lie far apart turn by other positions than their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checks import LARGEST_FACTOR, check_flag, check_length, check_number
from ..core.positions import Positions
from ..core.scheme import AttentionShape
from ..errors import OptionValueError
from .registry import register_scheme
from .remapped_base import Remapped, Zone


class Windowed(Remapped):
    """Own positions within a window of near pairs, other ones beyond.

    Options:
        window: w in tokens, at most the trained window.
        log_scaling: multiply queries by max(1, ln(i + 1) / ln L) at position i, which keeps the entropy of attention
            over more tokens than it was trained for; distances alone no longer decide then.
    """

    def __init__(
        self, shape: AttentionShape, *, window: int | None = None, log_scaling: bool = False, **shared: Any
    ) -> None:
        super().__init__(shape, **shared)
        self.near = self.tokens("window", window, self.usual_window)
        self.log_scaling = check_flag(self.name, "log_scaling", log_scaling)
        if self.log_scaling:
            if self.window < 2:
                raise OptionValueError(
                    f"{self.name!r} cannot scale by ln L with a trained window of {self.window} token."
                )
            self.shift_invariant = False

    @property
    def usual_window(self) -> int:
        """The window in tokens where none is given."""
        return min(512, self.window // 2)

    @property
    def settled(self) -> dict[str, Any]:
        return {"near_window": self.near}

    def far(self, positions: Positions) -> tuple[Tensor | None, Tensor | None]:
        """Positions by which queries and keys of a far pair turn."""
        raise NotImplementedError

    def zones(self, positions: Positions) -> Sequence[Zone]:
        return Zone(positions.query, positions.key, high=self.near), Zone(*self.far(positions), low=self.near)

    def sharpness(self, positions: Tensor) -> Tensor | None:
        if not self.log_scaling:
            return None
        return ((positions + 1).float().clamp(min=1).log() / math.log(self.window)).clamp(min=1)


@register_scheme
class ReRoPE(Windowed):
    """ReRoPE: distances beyond w count as w (Su 2023, https://kexue.fm/archives/9708).

    A far query turns by w and a far key not at all. As no distance exceeds w, nothing bounds the length.

    Options:
        window: w; 512, or half the trained window where that is less, when None.
    """

    name = "rerope"
    summary = "counts every distance beyond a window as the window"
    paper = "Su 2023, https://kexue.fm/archives/9708"

    def far(self, positions: Positions) -> tuple[Tensor | None, Tensor | None]:
        return torch.full_like(positions.query[:1], self.near), None


@register_scheme
class LeakyReRoPE(Windowed):
    """Leaky ReRoPE: beyond w distances grow by 1 / k a token, w + (i - j - w) / k (Su 2023,
    https://kexue.fm/archives/9708).

    A far query turns by (i + w (k - 1)) / k, a far key by j / k. Distances reach the trained window L at
    (L - w) k + w tokens.

    Options:
        window: w; 512, or half the trained window where that is less, when None.
        k: at least 1; 1 is plain RoPE.
    """

    name = "leaky_rerope"
    summary = "slows distances down beyond a window"
    paper = "Su 2023, https://kexue.fm/archives/9708"

    def __init__(self, shape: AttentionShape, *, k: float = 16, **shared: Any) -> None:
        super().__init__(shape, **shared)
        self.k = check_number(self.name, "k", k, 1.0)

    def far(self, positions: Positions) -> tuple[Tensor | None, Tensor | None]:
        shift = self.near * (self.k - 1)
        return (positions.query.float() + shift) / self.k, positions.key.float() / self.k

    @property
    def changes_nothing(self) -> bool:
        return self.k == 1 and not self.log_scaling and self.over.changes_nothing

    @property
    def effective_window(self) -> int | None:
        return int((self.window - self.near) * self.k + self.near)


@register_scheme
class SelfExtend(Windowed):
    """Self-Extend: beyond W positions are counted in groups of G, floor(i / G) + W - floor(W / G) - floor(j / G)
    (Jin et al. 2024, arXiv 2401.01325, section 3.2).

    Distances reach the trained window L at (L - W) G + W tokens. What is not given follows from `factor`, the target
    N over L, by the authors' rule of thumb that W + (N - W) / G stay below two thirds of L, since large distances are
    not as well trained as small ones: the smallest such G, and W of 1024 or a quarter of L, whichever is less, or less
    than that where a given G asks for it. Without `factor` G is 8.

    Options:
        group: G >= 1; 1 is plain RoPE.
        window: W.
        factor: N / L >= 1. Where both of the others are given they must reach N.
    """

    name = "self_extend"
    summary = "counts positions in groups beyond a window"
    paper = "Jin et al. 2024, arXiv 2401.01325"
    shift_invariant = False

    def __init__(
        self,
        shape: AttentionShape,
        *,
        group: int | None = None,
        window: int | None = None,
        factor: float | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(shape, window=window, **shared)
        remedy = "Give the target window over the trained one, or leave it out."
        given, target = check_length(self.name, "group", group), 0
        if factor is not None:
            target = math.ceil(check_number(self.name, "factor", factor, 1.0, do=remedy) * self.window)
        if given is None:
            self.group = self._group_for(target) if target else 8
        else:
            self.group = given
            self.near = self._window_for(target) if target and window is None else self.near
        if self._reach() < target:
            raise OptionValueError(
                f"{self.name!r} with group={self.group} and window={self.near} reaches {self._reach()} tokens of the "
                f"{target} that factor={factor} asks for; give a larger group."
            )

    @property
    def usual_window(self) -> int:
        return min(1024, self.window // 4)

    def _group_for(self, target: int) -> int:
        """The smallest G for which W + (N - W) / G <= 2 L / 3, and 1 where there is nothing to extend."""
        if target <= self.window:
            return 1
        room = 2 * self.window - 3 * self.near
        if room <= 0:
            raise OptionValueError(
                f"{self.name!r} got window={self.near}, which leaves nothing for groups of two thirds of the trained "
                f"window of {self.window}; give a smaller window, or group= too."
            )
        return -(-3 * (target - self.near) // room)

    def _window_for(self, target: int) -> int:
        """The usual W, or less where W + (N - W) / G <= 2 L / 3 asks for it."""
        if self.group == 1:
            return self.near
        most = (2 * self.window * self.group - 3 * target) // (3 * (self.group - 1))
        if most < 1:
            needed = -(-3 * (target - 1) // (2 * self.window - 3))
            raise OptionValueError(
                f"{self.name!r} with group={self.group} leaves no room for a window on the way to {target} tokens; "
                f"give a group of {needed} or more, or window= too."
            )
        return min(self.near, most)

    def _reach(self) -> int:
        return (self.window - self.near) * self.group + self.near

    @property
    def changes_nothing(self) -> bool:
        return self.group == 1 and not self.log_scaling and self.over.changes_nothing

    @property
    def effective_window(self) -> int | None:
        return self._reach()

    @property
    def settled(self) -> dict[str, Any]:
        return {"group": self.group, **super().settled}

    def far(self, positions: Positions) -> tuple[Tensor | None, Tensor | None]:
        shift = self.near - self.near // self.group
        return positions.query // self.group + shift, positions.key // self.group


@register_scheme
class DCA(Remapped):
    """Dual Chunk Attention (An et al. 2024, arXiv 2402.17463, section 3).

    Keys turn by j mod u, u = c - w. A query at t = i mod u turns by t for keys of its own chunk of u tokens, by
    min(t + u, c) for those of the chunk before, so that distances up to w stay exact, and by min(2 u - 1, c) for all
    keys before that. No distance exceeds c, so nothing bounds the length.

    Options:
        chunk_size: c in tokens, at most the trained window L; 3 L / 4 when None.
        local_window: w, at most c / 2; L / 8 when None, or c / 2 where that is less.
    """

    name = "dca"
    summary = "counts positions anew in every chunk, with exact distances within a local window"
    paper = "An et al. 2024, arXiv 2402.17463"
    shift_invariant = False

    def __init__(
        self, shape: AttentionShape, *, chunk_size: int | None = None, local_window: int | None = None, **shared: Any
    ) -> None:
        super().__init__(shape, **shared)
        self.chunk = self.tokens("chunk_size", chunk_size, 3 * self.window // 4)
        self.local = self.tokens("local_window", local_window, min(self.window // 8, self.chunk // 2))
        if 2 * self.local > self.chunk:  # near keys would lie two chunks back, where distances are not exact
            raise OptionValueError(
                f"{self.name!r} got chunk_size={self.chunk} and local_window={self.local}; a local window is at most "
                "half a chunk."
            )
        self.unit = self.chunk - self.local

    @property
    def settled(self) -> dict[str, Any]:
        return {"chunk_size": self.chunk, "local_window": self.local}

    def zones(self, positions: Positions) -> Sequence[Zone]:
        query, at_key = positions.query, positions.key % self.unit
        steps = query // self.unit, positions.key // self.unit
        own = query % self.unit
        before = (own + self.unit).clamp(max=self.chunk)
        earlier = torch.full_like(query[:1], min(2 * self.unit - 1, self.chunk))
        return (
            Zone(own, at_key, high=1, steps=steps),
            Zone(before, at_key, low=1, high=2, steps=steps),
            Zone(earlier, at_key, low=2, steps=steps),
        )


@register_scheme
class STRING(Remapped):
    """STRING: distances from S on are shifted down by S - W, i - j - S + W, onto those that training met often; cos
    and sin are multiplied by a constant (An et al. 2024, arXiv 2410.18745, section 4).

    Options:
        shift: S in tokens, at most the trained window L; L / 3 when None.
        window: W < S, the local window that far tokens stay out of; 128, or S / 2 where that is less, when None.
        attention_factor: what cos and sin are multiplied by.
    """

    name = "string"
    summary = "shifts large distances down onto those that training met often"
    paper = "An et al. 2024, arXiv 2410.18745"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        shift: int | None = None,
        window: int | None = None,
        attention_factor: float = 0.1 * math.log(2) + 1,
        **shared: Any,
    ) -> None:
        super().__init__(shape, **shared)
        self.shift = self.tokens("shift", shift, self.window // 3)
        self.near = self.tokens("window", window, min(128, self.shift // 2))
        self.scale = check_number(self.name, "attention_factor", attention_factor, 0.0, LARGEST_FACTOR, exclusive=True)
        if self.near >= self.shift:
            raise OptionValueError(
                f"{self.name!r} got shift={self.shift} and window={self.near}; distances are shifted down by their "
                "difference, so the shift is the larger one."
            )

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        inv_freq, factor = super().frequencies(length)
        return inv_freq, factor * self.scale

    @property
    def settled(self) -> dict[str, Any]:
        return {"shift": self.shift, "near_window": self.near}

    def zones(self, positions: Positions) -> Sequence[Zone]:
        shifted = positions.query - self.shift + self.near
        return (
            Zone(positions.query, positions.key, high=self.shift),
            Zone(shifted, positions.key, low=self.shift),
        )


@register_scheme
class LMInfinite(Remapped):
    """LM-Infinite: a token attends to the last `window` tokens and to the first `sinks`, which never seem farther than
    the window; the others are not attended (Han et al. 2023, arXiv 2308.16137, section 3).

    Options:
        window: the distance from which only the first tokens are attended, at most the trained window L; L when None.
        sinks: how many first tokens are always attended.
    """

    name = "lm_infinite"
    summary = "attends to the newest tokens and to the first few, and to nothing between"
    paper = "Han et al. 2023, arXiv 2308.16137"
    shift_invariant = False

    def __init__(self, shape: AttentionShape, *, window: int | None = None, sinks: int = 10, **shared: Any) -> None:
        super().__init__(shape, **shared)
        self.near = self.tokens("window", window, self.window)
        self.sinks = self.tokens("sinks", sinks, 10)

    @property
    def settled(self) -> dict[str, Any]:
        return {"near_window": self.near}

    def zones(self, positions: Positions) -> Sequence[Zone]:
        ceiling = torch.full_like(positions.query[:1], self.near)
        return (
            Zone(positions.query, positions.key, high=self.near),
            Zone(ceiling, None, low=self.near, below=self.sinks),
        )
