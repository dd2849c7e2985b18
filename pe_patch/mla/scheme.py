"""Multi-head latent attention as a scheme: for models that have it, and for models converted to it."""

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
from ..schemes.rotary import Rotary
from . import attention as over_latents
from .attention import LatentAttention, LatentSizes, NormalizedProjections
from .calibration import Calibration
from .checks import DECOMPOSITIONS, METHODS, SELECTIONS, check_freqfold, refuse_unused
from .convert import convert_layer, full_rank, truncated, widest_rank
from .protocol import ProjectionScheme
from .sizes import FRESH, fit_ratio, nope_dim, rope_heads
from .statistics import gather

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine, Output

CONVERSION = (
    "kv_rank", "cache_ratio", "max_loss", "rope_dim", "method", "calibration", "seed", "latent_norm", "select", "svd",
    "freqfold", "balance_kv_ratio",
)  # fmt: skip
"""Options of the conversion, which do not apply to a model with native latent attention."""


@register_scheme
class MLA(ProjectionScheme):
    """Multi-head latent attention (MLA): the cache holds a latent vector and a decoupled rotary key for each token.

    The keys and values of all heads are linear functions of the latent. On a model that has MLA (DeepSeek-V2, V3), the
    scheme makes decoding absorbed: queries are projected to the latent space, and latents are not expanded to keys and
    values. On other models, the scheme converts the trained projections.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
    """

    name = "mla"
    mechanism = "latent attention"
    summary = "caches one small latent for all heads, converted from the trained weights, and decodes without expanding"
    paper = "DeepSeek-AI 2024, arXiv 2405.04434; Meng et al. 2025, arXiv 2502.07864; Ji et al. 2025, arXiv 2502.14837"
    own_scores = "rows"
    calls_modules = True
    converts: ClassVar[bool] = True

    kv_rank: int | None = None
    """Width of the latent. Give exactly one of `kv_rank`, `cache_ratio` and `max_loss`."""
    cache_ratio: float | None = None
    """Size of the new cache relative to the present one, in (0, 1)."""
    max_loss: float | None = None
    """Largest allowed relative increase of the held-out loss. The smallest rank that meets it is used."""
    rope_dim: int | None = None
    """Rotary dimensions to keep. "transmla", "svd": width of the shared key, a divisor or a multiple of the trained
    rotary width, up to that of all key-value heads. "mha2mla": per key-value head. None for up to 64, or as many as
    `cache_ratio` allows."""
    method: str = "transmla"
    """"transmla" (Meng et al. 2025, arXiv 2502.07864: rotary energy concentrated in few dimensions, principal
    components of the activations), "mha2mla" (Ji et al. 2025, arXiv 2502.14837: a selection of rotary dimensions,
    singular vectors of the weights), "svd" (the rotary step of "transmla", the singular vectors of "mha2mla") or "init"
    (random weights, to train from scratch)."""
    calibration: Calibration | None = None
    """Token ids (`[rows, length]`, or lists of them) or texts. "mha2mla" needs them only for select="2-norm",
    `latent_norm` or `max_loss`."""
    seed: int = 0
    """Random seed that selects rows of calibration if they have more than 65,536 tokens in all."""
    latent_norm: bool = False
    """Normalize the latent (RMSNorm), as DeepSeek's classes do."""
    keep_original: bool = True
    """Keep the replaced weights for `unpatch_model`. They are saved with the model."""
    select: str = "2-norm"
    """The rotary dimensions that "mha2mla" keeps: "2-norm", "high", "low" or "uniform"."""
    svd: str = "joint"
    """One latent for keys and values ("joint"), or one for each ("split", for "mha2mla" only)."""
    freqfold: int | None = None
    """Number of neighboring frequencies that "transmla" and "svd" treat as one; None for the smallest that spans a
    sixteenth of the frequencies, or 1 if `rope_dim` exceeds the trained rotary width."""
    balance_kv_ratio: float = 1.0
    """Norm of the keys without position relative to the values before "transmla" computes principal components."""
    factor: float | None = None
    """Extend the window by this factor with YaRN on the rotary dimensions, with DeepSeek's factor on the softmax
    scale."""
    over: str | Mapping[str, object] | None = None
    """Another static rotary scheme for the rotary dimensions, as a name or a dict."""

    def setup(self) -> None:
        super().setup()
        self.inner = self._rotation(self.factor, self.over)
        self.unused_hooks = frozenset[str]() if self.inner is not None else frozenset({"angles"})
        self.converting = self.shape.latent_rank == 0
        self.keep_original = check_flag(self.name, "keep_original", self.keep_original)
        self.bounded, self.loss_bound = self.cache_ratio is not None, cast("float | None", None)
        self.rank, self.rotary_width = self.shape.latent_rank, 0
        if not self.converting:
            self._refuse_conversion()
            self.unused_hooks |= {"replace"}
            return
        self.method = _checked_choice("method", self.method, (*METHODS, FRESH))
        self.select = _checked_choice("select", self.select, SELECTIONS)
        self.svd = _checked_choice("svd", self.svd, DECOMPOSITIONS)
        self.latent_norm = check_flag(self.name, "latent_norm", self.latent_norm)
        self.balance_kv_ratio = check_number(self.name, "balance_kv_ratio", self.balance_kv_ratio, 0.0, exclusive=True)
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise OptionValueError(f"'mla' got seed={quoted(self.seed)}; it must be a whole number.")
        refuse_unused(self.method, select=self.select, freqfold=self.freqfold, balance_kv_ratio=self.balance_kv_ratio)
        self._resolve_sizes(self.kv_rank, self.cache_ratio, self.max_loss, self.rope_dim)

    # ---- options

    def _rotation(self, factor: float | None, over: Any) -> Rotary | None:
        """Return the scheme that rotates the rotary dimensions; None for the model's own rotation."""
        if factor is None and over is None:
            return None
        if factor is not None and over is not None:
            raise OptionValueError(
                "'mla' got factor and over. factor= alone means YaRN; put the factor of another scheme into over, for "
                "example over={'rope_type': 'linear', 'factor': 4}."
            )
        if factor is not None:
            over = {"rope_type": "yarn", "factor": factor, "mscale": 1.0, "mscale_all_dim": 1.0}
        inner, _ = build_inner(self.name, over, self.shape, None, None)
        if inner.length_dependent:
            raise UnsupportedError(
                f"'mla' caches its rotary key after rotation, and the frequencies of {inner.name!r} change with the "
                "length. Use a static scheme ('yarn', 'ntk', 'linear', 'llama3')."
            )
        return inner

    def _refuse_conversion(self) -> None:
        """Raise `OptionValueError` for an option of the conversion on a model with native latent attention."""
        unused = [option for option in self.options if option in CONVERSION or option == "keep_original"]
        if unused:
            raise OptionValueError(
                f"This model holds latents already (rank {self.shape.latent_rank}), so there is nothing to convert: "
                f"leave {unused[0]} out. 'mla' then makes the model decode without expanding its latents."
            )

    def _resolve_sizes(self, kv_rank: Any, cache_ratio: Any, max_loss: Any, rope_dim: Any) -> None:
        """Check the options of size, and set `rank`, `rotary_width` and `loss_bound`."""
        sizes = {"kv_rank": kv_rank, "cache_ratio": cache_ratio, "max_loss": max_loss}
        chosen = [name for name, value in sizes.items() if value is not None]
        if len(chosen) != 1:
            problem = f"got {' and '.join(chosen)}" if chosen else "needs the size of the latent"
            raise OptionValueError(
                f"'mla' {problem}: give exactly one of kv_rank=<width of the latent>, cache_ratio=<size of the new "
                "cache relative to the present one, such as 1/8> or max_loss=<allowed relative increase of the loss, "
                "such as 0.02>."
            )
        for name, value in (("kv_rank", kv_rank), ("rope_dim", rope_dim)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise OptionValueError(f"'mla' got {name}={quoted(value)}; give a whole number of dimensions.")
        if self.method == FRESH and max_loss is not None:
            raise OptionValueError(
                "method='init' starts from random weights, so max_loss has no meaning; give kv_rank or cache_ratio."
            )
        if max_loss is not None:
            self.loss_bound = check_number(self.name, "max_loss", max_loss, 0.0)
        split = self.split
        if split and self.method != "mha2mla":
            raise OptionValueError(
                f"svd='split' is an option of method='mha2mla'; {self.method!r} uses one latent for keys and values."
            )
        if split and self.latent_norm:
            raise OptionValueError("latent_norm=True needs one latent for keys and values: leave svd='split' out.")
        if cache_ratio is not None:
            ratio = check_number(self.name, "cache_ratio", cache_ratio, 0.0, 1.0, exclusive=True)
            shape, latents = self.shape, 2 if split else 1
            kv_rank, rope_dim = fit_ratio(
                shape.num_key_value_heads, shape.head_dim, shape.rotary_dim, self.method, latents, ratio, rope_dim
            )
        self.rotary_width = self._default_rope_dim() if rope_dim is None else int(rope_dim)
        self.rank = 0 if kv_rank is None else int(kv_rank)

    def _default_rope_dim(self) -> int:
        """Return the largest allowed number of rotary dimensions up to 64."""
        rotary = self.shape.rotary_dim
        must_divide = self.method != "mha2mla"  # a shared rotary key must divide the trained width
        return max(n for n in range(2, min(64, rotary) + 1, 2) if not must_divide or rotary % n == 0)

    def check(self, projections: Projections) -> None:
        """Raise `OptionValueError` if the sizes do not fit a layer's projections.

        With `max_loss` this also sets the rank to the full rank, from which the search starts; with `cache_ratio` it
        limits the rank to the full rank.
        """
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
            lossless = f" ({most} is lossless)" if most < widest else ""
            raise OptionValueError(
                f"'mla' got kv_rank={self.rank}; with rope_dim={self.rotary_width} the keys without rotation and the "
                f"values have {widest} dimensions, so give 1 to {widest}{lossless}."
            )

    def _check_fresh(self) -> None:
        """Raise `OptionValueError` if the sizes of randomly initialized layers do not fit the model."""
        rotary = self.shape.rotary_dim
        widths = [width for width in range(2, rotary + 1, 2) if rotary % width == 0]
        if self.rotary_width not in widths:
            raise OptionValueError(
                f"'mla' got rope_dim={self.rotary_width}; method='init' takes frequencies from the {rotary} rotary "
                f"dimensions of this model: give one of {', '.join(map(str, widths))}."
            )
        if self.rank < 1:
            raise OptionValueError(f"'mla' got kv_rank={self.rank}; give at least 1.")

    @property
    def split(self) -> bool:
        """Return whether keys and values have one latent each."""
        return self.svd == "split"

    @property
    def needs_calibration(self) -> bool:
        """Return whether the conversion needs calibration tokens."""
        if not self.converting or self.method == FRESH:
            return False
        by_norms = self.method == "mha2mla" and self.select == "2-norm"
        return self.method != "mha2mla" or by_norms or self.latent_norm or self.loss_bound is not None

    @property
    def recorded(self) -> dict[str, object]:
        """Return the options to save with the model: with the resulting sizes, without calibration text."""
        if not self.converting:
            return dict(self.options)
        excluded = ("calibration", "seed", "cache_ratio", "max_loss")
        saved = {name: value for name, value in self.options.items() if name not in excluded}
        return {**saved, "kv_rank": self.rank, "rope_dim": self.rotary_width}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.recorded.items())

    @property
    def resolved_options(self) -> dict[str, object]:
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
        """Return the number of rotary key dimensions cached for each token in one layer."""
        return rope_heads(self.method, self.shape.num_key_value_heads) * self.rotary_width

    @property
    def cached(self) -> int:
        """Return the number of values cached for each token in one layer."""
        if not self.converting:
            return self.rank + self.shape.rotary_dim
        return self.rank * (2 if self.split else 1) + self.rope_cached

    @property
    def cached_before(self) -> int:
        """Return the number of values that the unconverted model caches for each token in one layer."""
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
        """Return the factor on queries and on keys, whose square DeepSeek applies to the softmax scale (YaRN).

        After a conversion only some dimensions rotate, so this factor includes the scale of cos and sin.
        """
        if self.inner is None:
            return 1.0
        rotation_scale = self.inner.attention_scaling if self.converting else 1.0
        return rotation_scale * self.inner.softmax_factor

    def angles(self, positions: Tensor) -> tuple[Tensor, float] | None:
        assert self.inner is not None
        angles, factor = self.inner.angles(positions) or (positions, 1.0)
        return angles, 1.0 if self.converting else factor

    @property
    def softmax_rescale(self) -> float:
        width_factor = 1.0
        if self.method == FRESH:  # heads are wider than the trained ones by the rotary dimensions
            width_factor = (self.shape.head_dim / (self.shape.head_dim + self.rotary_width)) ** 0.5
        return width_factor * self.softmax_factor**2

    @property
    def random_init(self) -> bool:
        return self.converting and self.method == FRESH and not self.restored

    @property
    def keeps_rotation(self) -> bool:
        return self.inner is None and not self.converting

    @classmethod
    def replaces_rotation(cls, options: Mapping[str, object]) -> bool:
        return options.get("factor") is not None or options.get("over") is not None

    @property
    def effective_window(self) -> int | None:
        return None if self.inner is None else self.inner.effective_window

    @property
    def native_window(self) -> int | None:
        return None if self.inner is None else self.inner.native_window

    def native(self) -> dict[str, object] | None:
        return None if self.inner is None or self.converting else self.inner.native()

    # ---- conversion

    def collect_statistics(self, projections: Projections, hidden: Tensor, statistics: Statistics | None) -> Statistics:
        return gather(projections, hidden, statistics)

    def convert(self, projections: Projections, statistics: Statistics | None) -> Latents:
        """Convert one layer at the scheme's rank."""
        return convert_layer(
            projections, statistics, method=self.method, kv_rank=self.rank, rope_dim=self.rotary_width,
            select=self.select, svd=self.svd, freqfold=self.freqfold, balance_kv_ratio=self.balance_kv_ratio,
            latent_norm=self.latent_norm,
        )  # fmt: skip

    def truncated(self, latents: Latents, rank: int, statistics: Statistics | None) -> Latents:
        """Truncate a conversion to a smaller rank."""
        return truncated(latents, rank, statistics)

    def sizes(self, projections: Projections) -> LatentSizes:
        """Return the sizes of the module that replaces the projections of a layer."""
        return LatentSizes(
            hidden=projections.hidden,
            heads=projections.heads,
            up_heads=projections.heads if self.method == FRESH else projections.kv_heads,
            kv_heads=projections.kv_heads,
            head_dim=projections.head_dim,
            nope=nope_dim(
                self.method, projections.kv_heads, projections.head_dim, projections.rotary_dim, self.rotary_width
            ),
            rope=self.rotary_width,
            rope_heads=rope_heads(self.method, projections.kv_heads),
            rank=self.rank,
            split=self.split,
            query_bias=projections.query_bias is not None,
            rope_bias=projections.key_bias is not None and projections.key_norm is None,
            value_bias=projections.value_bias is not None,
            norm=self.latent_norm,
        )

    def replace(self, projections: Projections, statistics: Statistics | None) -> nn.Module | None:
        if self.restored or self.method == FRESH:
            return self.random_module(projections)
        return self.converted_module(projections, self.convert(projections, statistics))

    def converted_module(self, projections: Projections, latents: Latents) -> LatentAttention:
        """Return the module of one layer with the weights of a conversion."""
        return self.random_module(projections).load_conversion(latents, projections)

    def random_module(self, projections: Projections) -> LatentAttention:
        """Return the module of one layer with the weights of PyTorch's default initialization."""
        factory = {"dtype": projections.query.dtype, "device": projections.query.device}
        features = None if projections.key_norm is None else NormalizedProjections.copy(projections)
        module = LatentAttention(self.sizes(projections), features, **factory)
        if self.method == FRESH:
            step = self.shape.rotary_dim // self.rotary_width
            module.frequency.copy_(torch.arange(0, self.shape.rotary_dim // 2, step)[None])
        return module

    # ---- attention

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        """Compute attention over the cached tensors: `key` is latents `[batch, 1, key, rank]`, `value` rotated keys."""
        heads: Any = engine.module.mla
        return over_latents.attention(heads, query, key, value, engine)


def _checked_choice(option: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return the value; raise `OptionValueError` if it is not one of `allowed`."""
    if value in allowed:
        return value
    raise OptionValueError(
        f"'mla' got {option}={quoted(value)}.{nearest(str(value), allowed)} Use one of {', '.join(allowed)}."
    )
