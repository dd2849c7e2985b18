"""What a positional scheme may change, from the simplest place in the computation to the most general."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, InitVar, dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import dataclass_transform

from ..errors import OptionError, UnsupportedError, nearest, quoted
from .head_slices import Heads, declared, part
from .positions import Positions
from .shape import ARITHMETIC as ARITHMETIC
from .shape import AttentionShape as AttentionShape

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine

RESERVED = frozenset({"on_existing", "backend", "adapter", "layers", "submodule", "keep_native", "strict"})
"""Keywords of `patch_model` itself; no scheme may name an option like this."""


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
    """Makes type checkers read the annotated fields of a scheme as keyword arguments."""


@dataclass(kw_only=True, eq=False, repr=False)
class Scheme(_Options, nn.Module):
    """A positional scheme. It overrides the lowest hook that can express it.

    1. `embed` adds to the input embeddings.
    2. `angles` rotates queries and keys before the cache; decoding then costs nothing.
    3. `encode` changes queries and keys at the scores; keys are cached as they were projected.
    4. `bias` adds to the scores.
    5. `attend` is everything after the projections.

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
    """One module for each layer rather than one for the model."""
    own_scores: ClassVar[bool] = False
    """It computes the scores itself (`engine.rows`, `engine.ranges`) instead of handing a bias to one kernel."""
    ranged: ClassVar[bool] = False
    """It makes them by `engine.ranges` alone, for which FlexAttention will do too."""
    shift_invariant = True
    """Adding a constant to every position changes nothing."""
    training_free: ClassVar[bool] = False
    """Meant to work on a rotary model without further training."""

    calls_modules: ClassVar[bool] = False
    """Its `attend` calls modules of the model, for which autocast must choose as it does elsewhere."""
    examples: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What to type for an option that has no default, where a plain number is not it."""

    idle = frozenset[str]()
    """Rungs that it overrides and, with the options given, has no use for."""

    widens_heads: ClassVar[bool] = False
    """Its bias can ride on extra dimensions of the head (`DistanceBias.features`), in every dtype."""

    per_head = cast("Mapping[str, int] | None", None)
    """Attributes with numbers for each head, and along which dimension, for processes that share the heads; empty where
    heads share everything, None where nobody has said."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._own_init = "__init__" in cls.__dict__
        dataclass(kw_only=True, eq=False, repr=False)(cls)
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
    def check_options(cls, options: dict[str, Any]) -> None:
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

    def forward(self, rung: str, *arguments: Any) -> Any:
        """Call a rung by its name, as a module: hooks that fetch offloaded or sharded weights stand before it."""
        heads = getattr(arguments[-1], "heads", None) if rung == "attend" else None
        return getattr(self if heads is None else part(self, heads), rung)(*arguments)

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Add to the input embeddings. hidden `[batch, query, hidden]`, positions `[batch | 1, query]`."""
        return hidden

    def angles(self, positions: Tensor) -> tuple[Tensor, float] | None:
        """Angles by which pairs of a head rotate, `[batch | 1, query, rotary_dim / 2]`, and a factor on cos and sin."""
        return None

    def prepare(self, positions: Positions) -> tuple[Tensor, ...]:
        """What all layers share in one pass; handed back to `encode` and `attend` as `positions.prepared`."""
        return ()

    def encode(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Change query `[batch, heads, query, head]` and key `[batch, key_heads, key, head]` at the scores."""
        return query, key

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor | None:
        """Additive bias on the scaled scores, `[batch | 1, heads, query, key]`, float32.

        `query` comes scaled, so that its products are of the scores' size. Fast paths call it for a few queries at a
        time, so it may not look at the number of queries.
        """
        return None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine) -> Any:
        """Everything after the projections; returns what `engine` returns."""
        query, key = self.encode(query, key, positions)
        return engine(query, key, value, positions, bias=self if overrides(self, "bias") else None)

    @property
    def recorded(self) -> dict[str, Any]:
        """The options as they are saved with the model."""
        return self.options

    @property
    def effective_window(self) -> int | None:
        """The length the patched model is meant for, in tokens; None where nothing bounds it."""
        return None

    @property
    def hard_window(self) -> bool:
        """Whether a position beyond the effective window cannot be encoded at all."""
        return False

    def relative_position(self, length: int) -> Tensor:
        """The distance that the score of a query (row) with a key (column) goes by, `[length, length]`, float32, in a
        first pass; NaN where the pair is not attended."""
        raise UnsupportedError(f"The scores under {self.name!r} do not go by a distance between query and key.")

    def check_heads(self, query: Tensor) -> None:
        """Raise where a module with numbers for every head is handed a part of the heads."""
        if query.shape[1] != self.shape.num_heads:
            raise UnsupportedError(
                f"{self.name!r} has a bias for each of {self.shape.num_heads} heads and was handed {query.shape[1]}, "
                "and nothing says which: heads may be split by Transformers' tensor parallelism or DeepSpeed's Ulysses."
            )

    def check_causal(self, engine: AttentionEngine) -> None:
        """Raise where the attention looks ahead and the scheme does not say what lies there."""
        if not engine.causal:
            raise UnsupportedError(f"{self.name!r} is defined for causal attention only, and this one looks ahead.")

    def adopt(self, table: Tensor) -> None:
        """Take over the learned positions that the model had, `[positions, hidden]`, where they are of use."""

    def constant(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """A float32 table made from the specification on first use on each device. Not a buffer: no cast of the model
        and no uninitialised memory can reach it."""
        entry = self._constants.get((name, device))
        if entry is None:
            entry = self._constants[(name, device)] = make().to(device)
        return entry

    @property
    def settled(self) -> dict[str, Any]:
        """The values in effect of options that followed from others, by name."""
        return {}

    @property
    def rotates_early(self) -> bool:
        """Whether `angles` is all that happens to queries and keys, so that keys may be cached rotated."""
        return overrides(self, "angles") and not self.length_dependent and not self._acts_on_scores(Scheme)

    def _acts_on_scores(self, beyond: type[Scheme]) -> bool:
        """Whether it does more at the scores than the class `beyond`."""
        rungs = {"encode", "bias", "attend"} - self.idle
        return any(getattr(type(self), rung) is not getattr(beyond, rung) for rung in rungs)

    @property
    def shares_heads(self) -> bool:
        """Whether it treats all heads alike, so that any of them do without knowing which they are."""
        return declared(type(self)) and not self.per_head

    @property
    def changes_nothing(self) -> bool:
        """Whether, with these options, it is plain RoPE of the model's own base, at every length."""
        return False

    @property
    def scorer(self) -> Scheme | None:
        """A scheme for the scores beside this one, which rotates."""
        return None

    @property
    def length_dependent(self) -> bool:
        """Whether the encoding depends on how long the sequence is."""
        return False

    def native(self) -> dict[str, Any] | None:
        """The v5 `rope_parameters` by which Transformers computes the same logits in one pass, or None if it cannot."""
        return None

    @property
    def softmax_factor(self) -> float:
        """M, by whose square a family that folds it into its softmax scale (DeepSeek) multiplies that scale."""
        return 1.0

    @property
    def native_window(self) -> int | None:
        """What `max_position_embeddings` must be for `native` to hold; None where it does not matter."""
        return self.effective_window

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.recorded.items())


def _default(declared: Any) -> Any:
    """Return the default of a dataclass field, or `Option.REQUIRED`."""
    if declared.default is not MISSING:
        return declared.default
    return Option.REQUIRED if declared.default_factory is MISSING else declared.default_factory()


def overrides(scheme: Scheme, hook: str) -> bool:
    """Whether the scheme says something on this rung."""
    return hook not in scheme.idle and getattr(type(scheme), hook) is not getattr(Scheme, hook)


def wide(tensor: Tensor) -> Tensor:
    """The same in float32, or in float64 if it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def causal_distance(length: int) -> Tensor:
    """i - j where the key j does not lie ahead of the query i, else NaN; `[length, length]`, float32."""
    at = torch.arange(length, dtype=torch.float32, device="cpu")
    distance = at[:, None] - at
    return distance.masked_fill(distance < 0, torch.nan)


class DistanceBias(Scheme):
    """An additive bias that depends on the distance and the head alone.

    A subclass says `of(distance, head)`, one pointwise function: broadcasting makes the dense bias of it, and
    FlexAttention calls it on scalars. Where the bias is a sum of products of a function of the query's position and one
    of the key's, `features` says so, and the bias rides on a few extra dimensions of the head through any kernel.
    """

    mechanism = "distance bias"

    def of(self, distance: Tensor, head: Tensor) -> Tensor:
        """Bias in float32 for any broadcastable `distance` = query position - key position and head index."""
        raise NotImplementedError

    def relative_position(self, length: int) -> Tensor:
        return causal_distance(length)

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor | None:
        heads = torch.arange(query.shape[1], device=query.device)
        return self.of(positions.distance[:, None], heads[:, None, None])

    def features(self, positions: Positions, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Extra dimensions `[batch | 1, heads, query, e]` and `[batch | 1, 1, key, e]` in `dtype`, whose products
        summed over e and times `scaling` are the bias up to a constant for each query; None where there are none."""
        return None

    def fall(self, device: torch.device) -> Tensor | None:
        """By how much at least the bias of each head falls with every token, `[heads]`; None where nothing says so."""
        return None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine) -> Any:
        self.check_heads(query)
        return engine(query, key, value, positions, bias=self)
