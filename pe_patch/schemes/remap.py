"""Two-range rotations: distant pairs rotate by remapped positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.checks import LARGEST_FACTOR, check_flag, check_length, check_number
from ..core.positions import Positions
from ..errors import OptionValueError
from .registry import register_scheme
from .remapped_base import Remapped, Zone


class Windowed(Remapped):
    """True positions within a window of near pairs, remapped ones beyond it."""

    window: int | None = None
    """Window of near pairs in tokens, at most the trained window; None for the default."""
    log_scaling: bool = False
    """Multiply queries by max(1, ln(i + 1) / ln L) at position i. It keeps the entropy of attention over more tokens
    than the model was trained for, and makes the scores depend on more than the distance."""

    def setup(self) -> None:
        super().setup()
        self.near_window = self.tokens("window", self.window, self.default_window)
        self.log_scaling = check_flag(self.name, "log_scaling", self.log_scaling)
        if self.log_scaling:
            if self.trained_window < 2:
                raise OptionValueError(
                    f"{self.name!r} cannot scale by ln L with a trained window of {self.trained_window} token."
                )
            self.shift_invariant = False

    @property
    def default_window(self) -> int:
        """Return the default window in tokens."""
        return min(512, self.trained_window // 2)

    @property
    def resolved_options(self) -> dict[str, object]:
        return {"near_window": self.near_window}

    def far_positions(self, positions: Positions) -> tuple[Tensor | None, Tensor | None]:
        """Return the positions by which queries and keys of far pairs rotate."""
        raise NotImplementedError

    def zones(self, positions: Positions) -> Sequence[Zone]:
        return Zone(positions.query, positions.key, high=self.near_window), Zone(
            *self.far_positions(positions), low=self.near_window
        )

    def query_scale(self, positions: Tensor) -> Tensor | None:
        if not self.log_scaling:
            return None
        return ((positions + 1).float().clamp(min=1).log() / math.log(self.trained_window)).clamp(min=1)


@register_scheme
class ReRoPE(Windowed):
    """ReRoPE: distances beyond w count as w (Su 2023, https://kexue.fm/archives/9708).

    A far query rotates by w and a far key not at all. As no distance exceeds w, nothing bounds the length. When
    `window` is None, w is 512 or half the trained window, whichever is less.
    """

    name = "rerope"
    summary = "counts every distance beyond a window as the window"
    paper = "Su 2023, https://kexue.fm/archives/9708"

    def far_positions(self, positions: Positions) -> tuple[Tensor | None, Tensor | None]:
        return torch.full_like(positions.query[:1], self.near_window), None


@register_scheme
class LeakyReRoPE(Windowed):
    """Leaky ReRoPE: beyond w distances grow by 1 / k a token, w + (i - j - w) / k (Su 2023,
    https://kexue.fm/archives/9708).

    A far query rotates by (i + w (k - 1)) / k, a far key by j / k. Distances reach the trained window L at
    (L - w) k + w tokens. When `window` is None, w is 512 or half the trained window, whichever is less.
    """

    name = "leaky_rerope"
    summary = "slows distances down beyond a window"
    paper = "Su 2023, https://kexue.fm/archives/9708"

    k: float = 16
    """Tokens by which a far distance grows by one, at least 1; 1 is plain RoPE."""

    def setup(self) -> None:
        super().setup()
        self.k = check_number(self.name, "k", self.k, 1.0)

    def far_positions(self, positions: Positions) -> tuple[Tensor | None, Tensor | None]:
        shift = self.near_window * (self.k - 1)
        return (positions.query.float() + shift) / self.k, positions.key.float() / self.k

    @property
    def changes_nothing(self) -> bool:
        return self.k == 1 and not self.log_scaling and self.inner.changes_nothing

    @property
    def effective_window(self) -> int | None:
        return int((self.trained_window - self.near_window) * self.k + self.near_window)


@register_scheme
class SelfExtend(Windowed):
    """Self-Extend: beyond W positions are counted in groups of G, floor(i / G) + W - floor(W / G) - floor(j / G)
    (Jin et al. 2024, arXiv 2401.01325, section 3.2).

    Distances reach the trained window L at (L - W) G + W tokens. `factor` is N / L. If G is not given, use the smallest
    G with W + (N - W) / G <= 2 L / 3. W defaults to min(1024, L / 4), or less if the given G needs it. Without
    `factor`, G is 8. The bound of 2 L / 3 is the authors': large distances are less well trained than small ones.
    """

    name = "self_extend"
    summary = "counts positions in groups beyond a window"
    paper = "Jin et al. 2024, arXiv 2401.01325"
    shift_invariant = False

    group: int | None = None
    """G >= 1; 1 is plain RoPE."""
    factor: float | None = None
    """Target window over the trained one, N / L >= 1. If `group` and `window` are given too, they must reach N."""

    def setup(self) -> None:
        super().setup()
        remedy = "Give the target window over the trained one, or leave it out."
        given, target = check_length(self.name, "group", self.group), 0
        if self.factor is not None:
            target = math.ceil(check_number(self.name, "factor", self.factor, 1.0, remedy=remedy) * self.trained_window)
        if given is None:
            self.group_size = self._group_for(target) if target else 8
        else:
            self.group_size = given
            self.near_window = self._window_for(target) if target and self.window is None else self.near_window
        if self._reach() < target:
            raise OptionValueError(
                f"{self.name!r} with group={self.group_size} and window={self.near_window} reaches {self._reach()} "
                f"tokens of the {target} that factor={self.factor} asks for; give a larger group."
            )

    @property
    def default_window(self) -> int:
        return min(1024, self.trained_window // 4)

    def _group_for(self, target: int) -> int:
        """Return the smallest G with W + (N - W) / G <= 2 L / 3, or 1 if there is nothing to extend."""
        if target <= self.trained_window:
            return 1
        room = 2 * self.trained_window - 3 * self.near_window
        if room <= 0:
            raise OptionValueError(
                f"{self.name!r} got window={self.near_window}, which leaves nothing for groups of two thirds of the "
                f"trained window of {self.trained_window}; give a smaller window, or group= too."
            )
        return -(-3 * (target - self.near_window) // room)

    def _window_for(self, target: int) -> int:
        """Return the default W, or a smaller one that W + (N - W) / G <= 2 L / 3 needs."""
        if self.group_size == 1:
            return self.near_window
        most = (2 * self.trained_window * self.group_size - 3 * target) // (3 * (self.group_size - 1))
        if most < 1:
            needed = -(-3 * (target - 1) // (2 * self.trained_window - 3))
            raise OptionValueError(
                f"{self.name!r} with group={self.group_size} leaves no room for a window on the way to {target} "
                f"tokens; give a group of {needed} or more, or window= too."
            )
        return min(self.near_window, most)

    def _reach(self) -> int:
        return (self.trained_window - self.near_window) * self.group_size + self.near_window

    @property
    def changes_nothing(self) -> bool:
        return self.group_size == 1 and not self.log_scaling and self.inner.changes_nothing

    @property
    def effective_window(self) -> int | None:
        return self._reach()

    @property
    def resolved_options(self) -> dict[str, object]:
        return {"group": self.group_size, **super().resolved_options}

    def far_positions(self, positions: Positions) -> tuple[Tensor | None, Tensor | None]:
        shift = self.near_window - self.near_window // self.group_size
        return positions.query // self.group_size + shift, positions.key // self.group_size


@register_scheme
class DCA(Remapped):
    """Dual Chunk Attention (An et al. 2024, arXiv 2402.17463, section 3).

    Keys rotate by j mod u, u = c - w. A query at t = i mod u rotates by t for keys of the same chunk of u tokens, by
    min(t + u, c) for those of the chunk before, so that distances up to w stay exact, and by min(2 u - 1, c) for all
    keys before that. No distance exceeds c, so nothing bounds the length.
    """

    name = "dca"
    summary = "counts positions anew in every chunk, with exact distances within a local window"
    paper = "An et al. 2024, arXiv 2402.17463"
    shift_invariant = False

    chunk_size: int | None = None
    """c in tokens, at most the trained window L; None for 3 L / 4."""
    local_window: int | None = None
    """w in tokens, at most c / 2; None for L / 8 or c / 2, whichever is less."""

    def setup(self) -> None:
        super().setup()
        self.chunk = self.tokens("chunk_size", self.chunk_size, 3 * self.trained_window // 4)
        self.local = self.tokens("local_window", self.local_window, min(self.trained_window // 8, self.chunk // 2))
        if 2 * self.local > self.chunk:  # near keys would lie two chunks back, where distances are not exact
            raise OptionValueError(
                f"{self.name!r} got chunk_size={self.chunk} and local_window={self.local}; a local window is at most "
                "half a chunk."
            )
        self.unit = self.chunk - self.local

    @property
    def resolved_options(self) -> dict[str, object]:
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
    """

    name = "string"
    summary = "shifts large distances down onto those that training met often"
    paper = "An et al. 2024, arXiv 2410.18745"

    shift: int | None = None
    """S in tokens, at most the trained window L; None for L / 3."""
    window: int | None = None
    """W < S, the local window that far tokens stay out of; None for 128 or S / 2, whichever is less."""
    attention_factor: float = 0.1 * math.log(2) + 1
    """Factor on cos and sin."""

    def setup(self) -> None:
        super().setup()
        self.far_shift = self.tokens("shift", self.shift, self.trained_window // 3)
        self.near_window = self.tokens("window", self.window, min(128, self.far_shift // 2))
        scale = self.attention_factor
        self.scale = check_number(self.name, "attention_factor", scale, 0.0, LARGEST_FACTOR, exclusive=True)
        if self.near_window >= self.far_shift:
            raise OptionValueError(
                f"{self.name!r} got shift={self.far_shift} and window={self.near_window}; distances are shifted down "
                "by their difference, so the shift is the larger one."
            )

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        inv_freq, factor = super().frequencies(length)
        return inv_freq, factor * self.scale

    @property
    def resolved_options(self) -> dict[str, object]:
        return {"shift": self.far_shift, "near_window": self.near_window}

    def zones(self, positions: Positions) -> Sequence[Zone]:
        shifted = positions.query - self.far_shift + self.near_window
        return (
            Zone(positions.query, positions.key, high=self.far_shift),
            Zone(shifted, positions.key, low=self.far_shift),
        )


@register_scheme
class LMInfinite(Remapped):
    """LM-Infinite: a token attends to the last `window` tokens and to the first `sinks`, which never seem farther than
    the window; the others are not attended (Han et al. 2023, arXiv 2308.16137, section 3).
    """

    name = "lm_infinite"
    summary = "attends to the newest tokens and to the first few, and to nothing between"
    paper = "Han et al. 2023, arXiv 2308.16137"
    shift_invariant = False

    window: int | None = None
    """Distance in tokens from which on only the first tokens are attended, at most the trained window L; None for L."""
    sinks: int = 10
    """Number of first tokens that are always attended."""

    def setup(self) -> None:
        super().setup()
        self.near_window = self.tokens("window", self.window, self.trained_window)
        self.sinks = self.tokens("sinks", self.sinks, 10)

    @property
    def resolved_options(self) -> dict[str, object]:
        return {"near_window": self.near_window}

    def zones(self, positions: Positions) -> Sequence[Zone]:
        ceiling = torch.full_like(positions.query[:1], self.near_window)
        return (
            Zone(positions.query, positions.key, high=self.near_window),
            Zone(ceiling, None, low=self.near_window, below=self.sinks),
        )
