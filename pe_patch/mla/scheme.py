"""DeepSeek's multi-head latent attention: of models that have it, and of trained models converted to it."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..core.checks import check_flag, check_number
from ..core.positions import Positions
from ..core.projections import Latents, Projections, Statistics
from ..errors import OptionValueError, UnsupportedError, nearest, quoted
from ..schemes.frequency_wrappers import build_inner
from ..schemes.registry import register_scheme
from ..schemes.rope import Rotary
from . import attention as over_latents
from .attention import Features, LatentAttention, LatentSizes
from .checks import DECOMPOSITIONS, METHODS, SELECTIONS, check_freqfold, refuse_unused
from .convert import convert, full_rank, truncated, widest_rank
from .protocol import ProjectionScheme
from .sizes import FRESH, fit_ratio, nope_dim, rope_heads
from .statistics import gather

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine

CONVERSION = (
    "kv_rank", "cache_ratio", "max_loss", "rope_dim", "method", "calibration", "seed", "latent_norm", "select", "svd",
    "freqfold", "balance_kv_ratio",
)  # fmt: skip
"""Options that say how a model is converted; a model that holds latents has no use for them."""


@register_scheme
class MLA(ProjectionScheme):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): the cache holds one latent vector for
    each token, out of which every head's key and value are made, and a rotary key of its own ("decoupled").

    On a model that has it (DeepSeek-V2, V3), decoding is absorbed: queries are brought to the latents instead of the
    latents to keys and values. On others, the trained projections are converted.
    """

    name = "mla"
    mechanism = "latent attention"
    summary = "caches one small latent for all heads, converted from the trained weights, and decodes without expanding"
    paper = "DeepSeek-AI 2024, arXiv 2405.04434; Meng et al. 2025, arXiv 2502.07864; Ji et al. 2025, arXiv 2502.14837"
    own_scores = True
    calls_modules = True
    converts: ClassVar[bool] = True

    kv_rank: int | None = None
    """Width of the latent. Give one of `kv_rank`, `cache_ratio` and `max_loss`."""
    cache_ratio: float | None = None
    """Share of the present cache that the latent may take, in (0, 1)."""
    max_loss: float | None = None
    """Share by which the loss on held-out calibration tokens may grow; the smallest such rank is searched."""
    rope_dim: int | None = None
    """Rotary dimensions that are kept. For "transmla" and "svd" of the one key that all heads share: a divisor of the
    trained rotary width, or a multiple of it up to that of all key-value heads; for "mha2mla" of each key-value head.
    None for as many as possible up to 64, or what `cache_ratio` allows."""
    method: str = "transmla"
    """"transmla" (Meng et al. 2025, arXiv 2502.07864: rotary energy gathered in few dimensions, principal components of
    the activations), "mha2mla" (Ji et al. 2025, arXiv 2502.14837: a choice of rotary dimensions, singular values of the
    weights), "svd" (the rotary step of the first, the weights of the second) or "init" (fresh weights, to be trained
    from scratch)."""
    calibration: Any = None
    """Token ids (`[rows, length]`, or lists of them) or texts. "mha2mla" needs them only for select="2-norm"."""
    seed: int = 0
    """Chooses among the rows of calibration if they have more than 65,536 tokens in all."""
    latent_norm: bool = False
    """Normalise the latent, as DeepSeek's classes do."""
    keep_original: bool = True
    """Keep the weights that are replaced, for `unpatch_model`. They are saved with the model."""
    select: str = "2-norm"
    """Which rotary dimensions "mha2mla" keeps: "2-norm", "high", "low" or "uniform"."""
    svd: str = "joint"
    """One latent for keys and values ("joint"), or one for each ("split", for "mha2mla" only)."""
    freqfold: int | None = None
    """How many neighbouring frequencies "transmla" and "svd" treat as one; None for the least possible."""
    balance_kv_ratio: float = 1.0
    """Factor that balances the norms of keys and values before "transmla" finds components."""
    factor: float | None = None
    """Extend the window with YaRN on the rotary dimensions, with DeepSeek's factor on the softmax scale."""
    over: str | Mapping[str, Any] | None = None
    """Any other static rotary scheme for the rotary dimensions, a name or a dict."""

    def setup(self) -> None:
        super().setup()
        self.inner = self._rotation(self.factor, self.over)
        self.idle = frozenset[str]() if self.inner is not None else frozenset({"angles"})
        self.converting = self.shape.latent_rank == 0
        self.keep_original = check_flag(self.name, "keep_original", self.keep_original)
        self.bounded, self.loss_bound = self.cache_ratio is not None, cast("float | None", None)
        self.rank, self.rotary_width = self.shape.latent_rank, 0
        if not self.converting:
            self._refuse_conversion()
            self.idle |= {"replace"}
            return
        self.method = _one_of("method", self.method, (*METHODS, FRESH))
        self.select, self.svd = _one_of("select", self.select, SELECTIONS), _one_of("svd", self.svd, DECOMPOSITIONS)
        self.latent_norm = check_flag(self.name, "latent_norm", self.latent_norm)
        self.balance_kv_ratio = check_number(self.name, "balance_kv_ratio", self.balance_kv_ratio, 0.0, exclusive=True)
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise OptionValueError(f"'mla' got seed={quoted(self.seed)}; give a whole number.")
        refuse_unused(self.method, select=self.select, freqfold=self.freqfold, balance_kv_ratio=self.balance_kv_ratio)
        self._settle_sizes(self.kv_rank, self.cache_ratio, self.max_loss, self.rope_dim)

    # ---- options

    def _rotation(self, factor: float | None, over: Any) -> Rotary | None:
        if factor is None and over is None:
            return None
        if factor is not None and over is not None:
            raise OptionValueError("'mla' got factor and over; factor is YaRN, so give the factor inside over.")
        if factor is not None:
            over = {"rope_type": "yarn", "factor": factor, "mscale": 1.0, "mscale_all_dim": 1.0}
        inner, _ = build_inner(self.name, over, self.shape, None, None)
        if inner.length_dependent:
            raise UnsupportedError(
                f"'mla' caches its rotary key rotated, and {inner.name!r} changes frequencies with the length: use a "
                "static scheme ('yarn', 'ntk', 'linear', 'llama3')."
            )
        return inner

    def _refuse_conversion(self) -> None:
        given = [option for option in self.options if option in CONVERSION or option == "keep_original"]
        if given:
            raise OptionValueError(
                f"This model holds latents already (rank {self.shape.latent_rank}), so there is nothing to convert: "
                f"leave {given[0]} out. Without it 'mla' makes it decode without expanding them."
            )

    def _settle_sizes(self, kv_rank: Any, cache_ratio: Any, max_loss: Any, rope_dim: Any) -> None:
        given = {"kv_rank": kv_rank, "cache_ratio": cache_ratio, "max_loss": max_loss}
        chosen = [name for name, value in given.items() if value is not None]
        if len(chosen) != 1:
            told = f"got {' and '.join(chosen)}" if chosen else "was not told how small the cache is to be"
            raise OptionValueError(
                f"'mla' {told}: give one of kv_rank=<width of the latent>, cache_ratio=<share of the cache to keep, "
                "such as 1/8> or max_loss=<share by which the loss may grow, such as 0.02>."
            )
        for name, value in (("kv_rank", kv_rank), ("rope_dim", rope_dim)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise OptionValueError(f"'mla' got {name}={quoted(value)}; give a whole number of dimensions.")
        if self.method == FRESH and max_loss is not None:
            raise OptionValueError("method='init' has no loss to keep to; give kv_rank or cache_ratio.")
        if max_loss is not None:
            self.loss_bound = check_number(self.name, "max_loss", max_loss, 0.0)
        split = self.split
        if split and self.method != "mha2mla":
            raise OptionValueError(f"svd='split' is of method='mha2mla'; {self.method!r} has one latent for both.")
        if split and self.latent_norm:
            raise OptionValueError("latent_norm=True needs one latent for keys and values: leave svd='split' out.")
        if cache_ratio is not None:
            ratio = check_number(self.name, "cache_ratio", cache_ratio, 0.0, 1.0, exclusive=True)
            of, latents = self.shape, 2 if split else 1
            kv_rank, rope_dim = fit_ratio(
                of.num_key_value_heads, of.head_dim, of.rotary_dim, self.method, latents, ratio, rope_dim
            )
        self.rotary_width = self._default_rope_dim() if rope_dim is None else int(rope_dim)
        self.rank = 0 if kv_rank is None else int(kv_rank)

    def _default_rope_dim(self) -> int:
        rotary = self.shape.rotary_dim
        one_key = self.method != "mha2mla"  # which has to divide the trained width
        return max(n for n in range(2, min(64, rotary) + 1, 2) if not one_key or rotary % n == 0)

    def check(self, projections: Projections) -> None:
        """Raise where the sizes do not fit what a layer projects; a rank that is still to be searched becomes the
        largest."""
        if self.method == FRESH:
            self._check_fresh()
            return
        most = full_rank(projections, self.method, self.rotary_width, self.svd)
        if self.method != "mha2mla":
            check_freqfold(projections, self.method, self.rotary_width, self.freqfold)
        if self.loss_bound is not None:
            self.rank = most
        if self.bounded:
            self.rank = min(self.rank, most)
        widest = widest_rank(projections, self.method, self.rotary_width, self.svd)
        if not 1 <= self.rank <= widest:
            lossless = f" ({most} lose nothing)" if most < widest else ""
            raise OptionValueError(
                f"'mla' got kv_rank={self.rank}; with rope_dim={self.rotary_width} the keys that do not rotate and the "
                f"values have {widest} dimensions here, so give 1 to {widest}{lossless}."
            )

    def _check_fresh(self) -> None:
        rotary = self.shape.rotary_dim
        widths = [width for width in range(2, rotary + 1, 2) if rotary % width == 0]
        if self.rotary_width not in widths:
            raise OptionValueError(
                f"'mla' got rope_dim={self.rotary_width}; fresh layers take their frequencies from the {rotary} rotary "
                f"dimensions of this model: give one of {', '.join(map(str, widths))}."
            )
        if self.rank < 1:
            raise OptionValueError(f"'mla' got kv_rank={self.rank}; give at least 1.")

    @property
    def split(self) -> bool:
        return self.svd == "split"

    @property
    def needs_calibration(self) -> bool:
        """Whether tokens must be seen before weights can be made."""
        if not self.converting or self.method == FRESH:
            return False
        by_norms = self.method == "mha2mla" and self.select == "2-norm"
        return self.method != "mha2mla" or by_norms or self.latent_norm or self.loss_bound is not None

    @property
    def recorded(self) -> dict[str, Any]:
        """The options as they are saved with the model: sizes as they came out, and no calibration text."""
        if not self.converting:
            return dict(self.options)
        left_out = ("calibration", "seed", "cache_ratio", "max_loss")
        kept = {name: value for name, value in self.options.items() if name not in left_out}
        return {**kept, "kv_rank": self.rank, "rope_dim": self.rotary_width}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.recorded.items())

    @property
    def settled(self) -> dict[str, Any]:
        if not self.converting:
            rope = self.shape.rotary_dim
            return {"cached_per_token_and_layer": f"{self.rank + rope} numbers, decoded without expanding them"}
        before, after = self.cached_before, self.cached
        return {
            "latent_rank": self.rank,
            "rotary_key": self.rope_cached,
            "cached_per_token_and_layer": f"{after} numbers, {before} before ({after / before:.1%})",
        }

    @property
    def rope_cached(self) -> int:
        """Numbers of a token's rotary keys."""
        return rope_heads(self.method, self.shape.num_key_value_heads) * self.rotary_width

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the cache of one layer."""
        if not self.converting:
            return self.rank + self.shape.rotary_dim
        return self.rank * (2 if self.split else 1) + self.rope_cached

    @property
    def cached_before(self) -> int:
        """The same of the model as it was."""
        return 2 * self.shape.num_key_value_heads * self.shape.head_dim if self.converting else self.cached

    # ---- rotation

    @property
    def rotates_early(self) -> bool:
        return self.inner is not None

    @property
    def inv_freq(self) -> Tensor | None:
        return None if self.inner is None else self.inner.inv_freq

    @property
    def attention_scaling(self) -> float:
        return 1.0 if self.inner is None or self.converting else self.inner.attention_scaling

    @property
    def softmax_factor(self) -> float:
        """DeepSeek's place for YaRN's temperature. After a conversion only some dimensions rotate any more, so that
        what was meant for cos and sin of all of them goes here too."""
        if self.inner is None:
            return 1.0
        whole = self.inner.attention_scaling if self.converting else 1.0
        return whole * self.inner.softmax_factor

    def angles(self, positions: Tensor) -> tuple[Tensor, float] | None:
        assert self.inner is not None
        angles, factor = self.inner.angles(positions) or (positions, 1.0)
        return angles, 1.0 if self.converting else factor

    @property
    def rescaling(self) -> float:
        fresh = (
            (self.shape.head_dim / (self.shape.head_dim + self.rotary_width)) ** 0.5 if self.method == FRESH else 1.0
        )
        return fresh * self.softmax_factor**2

    @property
    def starts_fresh(self) -> bool:
        return self.converting and self.method == FRESH and not self.restored

    @property
    def keeps_rotation(self) -> bool:
        return self.inner is None and not self.converting

    @classmethod
    def touches_rotation(cls, options: dict[str, Any]) -> bool:
        return options.get("factor") is not None or options.get("over") is not None

    @property
    def effective_window(self) -> int | None:
        return None if self.inner is None else self.inner.effective_window

    @property
    def native_window(self) -> int | None:
        return None if self.inner is None else self.inner.native_window

    def native(self) -> dict[str, Any] | None:
        return None if self.inner is None or self.converting else self.inner.native()

    # ---- conversion

    def observe(self, projections: Projections, hidden: Tensor, seen: Statistics | None) -> Statistics:
        return gather(projections, hidden, seen)

    def convert(self, projections: Projections, seen: Statistics | None) -> Latents:
        """The latents of one layer."""
        return convert(
            projections, seen, method=self.method, kv_rank=self.rank, rope_dim=self.rotary_width, select=self.select,
            svd=self.svd, freqfold=self.freqfold, balance_kv_ratio=self.balance_kv_ratio, latent_norm=self.latent_norm,
        )  # fmt: skip

    def narrowed(self, latents: Latents, rank: int, seen: Statistics | None) -> Latents:
        """The same conversion at a smaller rank."""
        return truncated(latents, rank, seen)

    def sizes(self, of: Projections) -> LatentSizes:
        """What the module that takes a layer's place is made of."""
        heads = rope_heads(self.method, of.kv_heads)
        return LatentSizes(
            hidden=of.hidden, heads=of.heads, up_heads=of.heads if self.method == FRESH else of.kv_heads,
            kv_heads=of.kv_heads, head_dim=of.head_dim,
            nope=nope_dim(self.method, of.kv_heads, of.head_dim, of.rotary_dim, self.rotary_width),
            rope=self.rotary_width,
            rope_heads=heads, rank=self.rank, split=self.split, query_bias=of.query_bias is not None,
            rope_bias=of.key_bias is not None and of.key_norm is None, value_bias=of.value_bias is not None,
            norm=self.latent_norm,
        )  # fmt: skip

    def replace(self, projections: Projections, seen: Any) -> nn.Module | None:
        if self.restored or self.method == FRESH:
            return self.fresh(projections)
        return self.filled(projections, self.convert(projections, seen))

    def filled(self, projections: Projections, latents: Latents) -> LatentAttention:
        """A module for one layer, converted."""
        return self.fresh(projections).take(latents, projections)

    def fresh(self, projections: Projections) -> LatentAttention:
        """A module for one layer, its weights not yet filled in."""
        factory = {"dtype": projections.query.dtype, "device": projections.query.device}
        features = None if projections.key_norm is None else Features.copy(projections)
        module = LatentAttention(self.sizes(projections), features, **factory)
        if self.method == FRESH:
            every = self.shape.rotary_dim // self.rotary_width
            module.frequency.copy_(torch.arange(0, self.shape.rotary_dim // 2, every)[None])
        return module

    # ---- attention

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine) -> Any:
        """key and value are what is cached: latents `[batch, 1, key, rank]` and rotated keys."""
        heads: Any = engine.module.mla
        return over_latents.attention(heads, query, key, value, engine)


def _one_of(option: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value in allowed:
        return value
    raise OptionValueError(
        f"'mla' got {option}={quoted(value)}.{nearest(str(value), allowed)} There are: {', '.join(allowed)}."
    )
