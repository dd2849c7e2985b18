"""The base class of positional schemes, with its hooks from the simplest to the most general.

The sizes of an attention (`AttentionShape`) are all that a scheme knows about a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, InitVar, dataclass, field, fields
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import dataclass_transform

from ..errors import OptionError, UnsupportedError, nearest, quoted
from .head_slices import Heads, declares_head_sharding, slice_heads
from .positions import Positions

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine, Output

RESERVED = frozenset("target_length on_existing backend adapter layers submodule keep_native strict key_copies".split())
"""Keyword arguments of `patch_model`; no option of a scheme may have one of these names."""


ARITHMETIC = ("model", "float32 tables", "float32", "complex")
"""How a family multiplies queries and keys by cos and sin, in half precision:

- "model": cos and sin are cast to the dtype of the model, and so is every product (Llama).
- "float32 tables": cos and sin stay float32, which makes the products float32 (OLMo).
- "float32": cos and sin are cast to the dtype of the model; queries and keys are cast to float32 (Cohere).
- "complex": one complex product in float32 (Llama 4, DeepSeek-V2).

Each casts the result back to the dtype of the model.
"""


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of an attention, read from the built modules."""

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    """Number of dimensions of a head that rotate."""
    rotary_start: int
    """Index of the first of them in the head (DeepSeek rotates the last dimensions)."""
    rope_theta: float
    trained_length: int
    """Trained window in tokens; 0 if unknown."""
    num_layers: int
    interleaved: bool = False
    """Pairs are neighbours (2k, 2k + 1); otherwise halves (k, k + rotary_dim / 2)."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches of a trained image, for a vision encoder."""
    leading_tokens: int = 0
    """Tokens before the patches, such as a class token."""
    latent_rank: int = 0
    """Width of the cached latent (DeepSeek); 0 if the attention caches keys and values."""
    value_dim: int = 0
    """Width of a value and of a head's output; 0 for `head_dim`, the width of queries and keys."""
    arithmetic: str = "model"
    """Dtypes in which the family rotates, one of `ARITHMETIC`. A rotation at the scores rounds in the same way."""
    embedding_size: int = 0
    """Width of the embeddings to which positions are added; 0 for `hidden_size`."""

    @property
    def added_size(self) -> int:
        """Width of what is added to the embeddings."""
        return self.embedding_size or self.hidden_size

    def __post_init__(self) -> None:
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)


@dataclass(frozen=True)
class Option:
    """An option of a scheme, as its class declares it."""

    name: str
    annotation: str
    default: Any
    """`Option.REQUIRED` if the option must be given."""
    REQUIRED: ClassVar[Any] = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """Return whether the option has no default."""
        return self.default is Option.REQUIRED


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
class _Options:
    """Make type checkers read the annotated fields of a scheme as keyword arguments."""


@dataclass(kw_only=True, eq=False, repr=False)
class Scheme(_Options, nn.Module):
    """A positional scheme. A subclass overrides the first of these hooks that can express it.

    1. `embed` adds to the input embeddings.
    2. `angles` rotates queries and keys before the cache; decoding then costs nothing.
    3. `encode` changes queries and keys after the cache is read. The cache holds unrotated keys.
    4. `bias` adds to the scores. A bias by distance and head derives from `DistanceBias` instead.
    5. `attend` computes attention from the projected queries, keys and values.

    The options of a scheme are the annotated fields of its class. Other attributes are `ClassVar`, have no
    annotation, or are set in `setup`. `YaRN(factor=4)` only holds options until a model is patched with it.
    `YaRN(shape, factor=4)` is built for an attention of that shape.
    """

    attention_shape: InitVar[AttentionShape | None] = field(default=None, kw_only=False)

    name: ClassVar[str] = ""
    mechanism: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    per_layer: ClassVar[bool] = False
    """Builds one module for each layer instead of one for the model."""
    own_scores: ClassVar[Literal["rows", "ranges"] | None] = None
    """The method of the engine by which it computes its own scores, instead of passing a bias to one kernel. Every
    backend but flash runs `engine.ranges`; FlexAttention does not run `engine.rows`."""
    shift_invariant = True
    """Adding a constant to every position does not change the output."""
    training_free: ClassVar[bool] = False
    """Works on a trained rotary model without further training, according to its authors."""

    calls_modules: ClassVar[bool] = False
    """`attend` calls modules of the model, so autocast stays on inside it."""
    examples: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Example of a required option that does not take a plain number, by option name."""

    unused_hooks = frozenset[str]()
    """Hooks that the class overrides but that these options do not use."""

    head_sharded_attributes = cast("Mapping[str, int] | None", None)
    """For tensor parallelism: the attributes that have an entry for each head, with the dimension that indexes heads.
    Empty if no attribute has one; None if undeclared, and then a split by heads raises."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._own_init = "__init__" in cls.__dict__
        dataclass(kw_only=True, eq=False, repr=False)(cls)
        if not cls._own_init:
            cls.__init__ = _checking_options(cls.__init__)
        if taken := RESERVED & cls.option_names():
            raise OptionError(
                f"{cls.__name__} declares the option {sorted(taken)[0]!r}, which patch_model reserves for itself; "
                f"rename it (reserved: {', '.join(sorted(RESERVED))})."
            )

    _own_init: ClassVar[bool] = False

    def __new__(cls, attention_shape: AttentionShape | None = None, **options: Any) -> Scheme:
        if cls.__hash__ is None:  # a plain @dataclass above the class compares by value, and torch needs identity
            cls.__eq__, cls.__hash__ = object.__eq__, object.__hash__
        instance = super().__new__(cls)
        nn.Module.__init__(instance)
        if attention_shape is not None or options:  # neither when unpickled or copied: the state follows
            if attention_shape is not None and not isinstance(attention_shape, AttentionShape):
                raise OptionError(
                    f"{cls.__name__} takes its options by name, got {quoted(attention_shape)}. Example: "
                    f"{cls.__name__}(factor=4)."
                )
            cls.check_options(options)
        instance.__dict__["options"] = dict(options)
        return instance

    def __post_init__(self, attention_shape: AttentionShape | None) -> None:
        self.options: dict[str, Any] = self.__dict__.get("options", {})
        self._constants: dict[tuple[str, torch.device], Tensor] = {}
        self._constants_of_parts: dict[Heads, dict[tuple[str, torch.device], Tensor]] = {}
        if attention_shape is not None:
            self.shape: AttentionShape = attention_shape
            self.setup()

    def setup(self) -> None:
        """Check the options and build parameters, once `self.shape` is known. Overrides call `super().setup()` first.

        Raises:
            OptionValueError: an option has a value that it cannot take here.
        """

    @property
    def is_built(self) -> bool:
        """Return whether the scheme was built for an attention, rather than holding options alone."""
        return "shape" in self.__dict__

    @classmethod
    def declared_options(cls) -> list[Option]:
        """Return the options that this scheme takes, those of its base classes last.

        A class that writes an `__init__` declares options as its keyword arguments; with `**kwargs` it also takes those
        of its base class.
        """
        found: dict[str, Option] = {}
        for owner in cls.__mro__:
            if not issubclass(owner, Scheme) or owner is Scheme:
                continue
            if not owner._own_init:
                inherited = [each for each in fields(owner) if each.init]
                declared = [Option(each.name, str(each.type), _default(each)) for each in inherited]
                return list(({each.name: each for each in declared} | found).values())
            parameters = list(inspect.signature(owner.__init__).parameters.values())[2:]
            named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            found = {p.name: Option(p.name, str(p.annotation), p.default) for p in named} | found
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
        return list(found.values())

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the names of the options that this scheme takes."""
        return {option.name for option in cls.declared_options()}

    @classmethod
    def check_options(cls, options: Mapping[str, object]) -> None:
        """Raise `OptionError` for an option that does not exist or a required one that is missing."""
        declared = cls.declared_options()
        allowed = {option.name for option in declared}
        label = cls.name or cls.__name__
        for option in options:
            if option not in allowed:
                known = ", ".join(sorted(allowed)) or "none"
                raise OptionError(
                    f"{label!r} has no option {quoted(option)}.{nearest(option, allowed)} Its options are: {known}."
                )
        for option in declared:
            if option.required and option.name not in options:
                example = cls.examples.get(option.name, f"{option.name}=4")
                raise OptionError(
                    f"{label!r} needs the option {option.name!r}, for example {example}; it has no default."
                )

    def forward(self, hook: str, *arguments: object) -> object:
        """Call a hook by name through `__call__`, so that module hooks that fetch offloaded or sharded weights run."""
        heads = getattr(arguments[-1], "heads", None) if hook == "attend" else None
        return getattr(self if heads is None else slice_heads(self, heads), hook)(*arguments)

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Add to the input embeddings. hidden `[batch, query, hidden]`, positions `[batch | 1, query]`."""
        return hidden

    def angles(self, positions: Tensor) -> tuple[Tensor, float] | None:
        """Return the angles of a head's pairs, `[batch | 1, query, rotary_dim / 2]`, and a factor on cos and sin."""
        return None

    def prepare(self, positions: Positions) -> tuple[Tensor, ...]:
        """Compute what all layers share in one pass; `encode` and `attend` get it as `positions.prepared`."""
        return ()

    @property
    def key_copies(self) -> int:
        """Return how many encoded copies of the cached keys later passes can reuse.

        A scheme with such copies takes them from `positions.encoded`, in `prepare` and `attend`.
        """
        return 0

    @property
    def remembers(self) -> bool:
        """Return whether a pass over a cache shares results: with later passes encoded keys or a table, or among layers
        a bias."""
        return self.key_copies > 0

    def encode(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Change query `[batch, heads, query, head]` and key `[batch, key_heads, key, head]` at the scores."""
        return query, key

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor | None:
        """Return an additive bias on the scaled scores, `[batch | 1, heads, query, key]`, float32.

        `query` is scaled already. Fast paths call this hook for a few queries at a time, so the result must not depend
        on the number of queries.
        """
        return None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        """Compute attention from the projected queries, keys and values; return what `engine` returns."""
        query, key = self.encode(query, key, positions)
        return engine(query, key, value, positions, bias=self if overrides(self, "bias") else None)

    @property
    def recorded(self) -> dict[str, object]:
        """Return the options that are saved with the model."""
        return self.options

    @property
    def effective_window(self) -> int | None:
        """Return the length in tokens that the patched model is meant for; None if unbounded."""
        return None

    @property
    def hard_window(self) -> bool:
        """Return whether positions beyond the effective window cannot be encoded at all."""
        return False

    def relative_position(self, length: int) -> Tensor:
        """Return the distance by which each query (row) sees each key (column) in a first pass over `length` tokens.

        Returns:
            `[length, length]`, float32; NaN where the pair is not attended.

        Raises:
            UnsupportedError: the scores do not depend on a distance between query and key.
        """
        raise UnsupportedError(f"The scores under {self.name!r} do not depend on a distance between query and key.")

    def init_from_table(self, table: Tensor) -> None:
        """Initialise from the learned positions of the model, `[positions, hidden]`, if they are of use."""

    def constant(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """Return a float32 table, computed on first use on each device.

        It is not a buffer: casting the model cannot round it, and loading cannot leave it uninitialised.
        """
        entry = self._constants.get((name, device))
        if entry is None:
            entry = self._constants[(name, device)] = make().to(device)
        return entry

    @property
    def resolved_options(self) -> dict[str, object]:
        """Return the values that options left as None resolved to, by name."""
        return {}

    @property
    def rotates_early(self) -> bool:
        """Return whether `angles` is the only change to queries and keys, so keys can be cached rotated."""
        return overrides(self, "angles") and not self.length_dependent and not self._acts_on_scores(Scheme)

    def _acts_on_scores(self, beyond: type[Scheme]) -> bool:
        """Return whether the scheme overrides more hooks at the scores than the class `beyond`."""
        hooks = {"encode", "bias", "attend"} - self.unused_hooks
        return any(getattr(type(self), hook) is not getattr(beyond, hook) for hook in hooks)

    @property
    def shares_heads(self) -> bool:
        """Return whether all heads are treated alike, so a subset of heads needs no index."""
        return declares_head_sharding(type(self)) and not self.head_sharded_attributes

    @property
    def scorer(self) -> Scheme | None:
        """Return a second scheme that acts at the scores beside this rotation; None without one."""
        return None

    @property
    def length_dependent(self) -> bool:
        """Return whether the encoding depends on the length of the sequence."""
        return False

    def native(self) -> dict[str, object] | None:
        """Return the `rope_parameters` with which Transformers computes the same logits; None if it cannot."""
        return None

    @property
    def native_window(self) -> int | None:
        """Return the `max_position_embeddings` that `native` needs; None if any will do."""
        return self.effective_window

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.recorded.items())


def _checking_options(init: Callable[..., None]) -> Callable[..., None]:
    """Return an `__init__` that raises `OptionError`, with an example, if a required option is missing."""

    @wraps(init)
    def checking(self: Scheme, *arguments: Any, **options: Any) -> None:
        if type(self).__init__ is checking:  # a subclass with its own __init__ passes on a part of the options
            self.check_options(options)
        init(self, *arguments, **options)

    return checking


def _default(declared: Any) -> Any:
    """Return the default of a dataclass field, or `Option.REQUIRED`."""
    if declared.default is not MISSING:
        return declared.default
    return Option.REQUIRED if declared.default_factory is MISSING else declared.default_factory()


def overrides(scheme: Scheme, hook: str) -> bool:
    """Return whether a scheme overrides a hook and these options use it."""
    return hook not in scheme.unused_hooks and getattr(type(scheme), hook) is not getattr(Scheme, hook)


def check_heads(scheme: Scheme, query: Tensor) -> None:
    """Raise `UnsupportedError` if a scheme with entries for every head gets only some of the heads."""
    if query.shape[1] != scheme.shape.num_heads:
        raise UnsupportedError(
            f"{scheme.name!r} has a bias for each of {scheme.shape.num_heads} heads and was handed {query.shape[1]} of "
            "unknown index. Split heads only by Transformers' tensor parallelism or DeepSpeed's Ulysses."
        )


def check_causal(scheme: Scheme, engine: AttentionEngine) -> None:
    """Raise `UnsupportedError` if the attention looks ahead, for a scheme that is defined for causal attention only."""
    if not engine.causal:
        raise UnsupportedError(f"{scheme.name!r} is defined for causal attention only, and this one looks ahead.")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or unchanged if it is float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def causal_distance(length: int) -> Tensor:
    """Return i - j for each query i and key j <= i, else NaN; `[length, length]`, float32."""
    at = torch.arange(length, dtype=torch.float32, device="cpu")
    distance = at[:, None] - at
    return distance.masked_fill(distance < 0, torch.nan)


class DistanceBias(Scheme):
    """An additive bias that depends only on the distance and the head.

    A subclass overrides `score_bias(distance, head)`, which is pointwise: SDPA calls it on tensors, FlexAttention on
    scalars. If the bias is a dot product of a function of the query position and one of the key position, also override
    `bias_as_head_dims`, so that every kernel can add it as extra head dimensions.
    """

    mechanism = "distance bias"
    supports_bias_as_head_dims: ClassVar[bool] = False
    """The bias can be computed by extra dimensions of the heads (`DistanceBias.bias_as_head_dims`) in every dtype."""

    def score_bias(self, distance: Tensor, head: Tensor) -> Tensor:
        """Return the bias in float32 for broadcastable distances and head indices.

        Args:
            distance: position of the query minus position of the key, int64; negative for keys ahead. A scalar under
                FlexAttention.
            head: index of the head, int64.
        """
        raise NotImplementedError

    def relative_position(self, length: int) -> Tensor:
        return causal_distance(length)

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor | None:
        heads = torch.arange(query.shape[1], device=query.device)
        return self.score_bias(positions.distance[:, None], heads[:, None, None])

    @property
    def remembers(self) -> bool:
        return True  # the bias of a decoding step, for all layers of the pass

    def bias_as_head_dims(
        self, positions: Positions, scaling: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Return extra dimensions of queries and keys that compute the bias; None if the bias has no such form.

        Returns:
            `[batch | 1, heads, query, e]` and `[batch | 1, 1, key, e]` in `dtype`. Their products, summed over e and
            multiplied by `scaling`, are the bias up to a constant for each query.
        """
        return None

    def min_slope(self, device: torch.device) -> Tensor | None:
        """Return a lower bound on how much each head's bias falls per token, `[heads]`; None if unknown."""
        return None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        check_heads(self, query)
        return engine(query, key, value, positions, bias=self)
