"""What a model family must declare so that a scheme can take over its joints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..core.scheme import AttentionShape, Scheme
from ..errors import UnsupportedError
from ..schemes.rope import cos_sin
from .projections import ProjectionNames
from .trained_window import TrainedWindow, native_parameters, trained_window
from .vision import Tower

DEFAULT_THETA = 10000.0
"""Base of the frequencies where a family has no rotation of its own."""


@dataclass(frozen=True)
class Adapter:
    """Where a family keeps what positions touch. Every path is an attribute of the base model or of one layer.

    Llama is `Adapter()`; a plain rotary family is one row.
    """

    layers: str = "layers"
    """The list of decoder layers on the base model."""
    attention: str = "self_attn"
    """The attention on a layer."""
    rotary: str | None = "rotary_emb"
    """The module on the base model that makes cos and sin for all layers."""
    layout: str = "halves"
    """How that module lays cos and sin out: "halves" [c, c], "interleaved" [c0, c0, c1, c1 ...], "single" [c], or
    "complex" c + i s in one tensor."""
    full_precision: bool = False
    """cos and sin stay float32, whatever the dtype of the model, and so do their products with queries and keys."""
    full_precision_product: bool = False
    """Queries and keys are cast to float32 before they are multiplied by cos and sin, which are in the dtype of the
    model."""
    typed: bool = False
    """That module is called for each of `config.layer_types`, each with frequencies of its own."""
    interleaved_pairs: bool = False
    """Rotated pairs are neighbours rather than halves of the head."""
    embedding_multiplier: str | None = None
    """Attribute of the base model by which it multiplies input embeddings that it is given."""
    rotates: str | Callable[[Any], bool] | None = None
    """Whether an attention rotates: an attribute of it, or a function; None where all do."""
    late_norm: bool = False
    """Queries and keys are normalised, weight by weight, after the rotation, which therefore cannot be done later."""
    norm_after_rotation: str | None = None
    """A module without weights on an attention that normalises queries and keys after the rotation, which cancels any
    factor on cos and sin. It waits for a rotation that a scheme makes at the scores. Attentions that lack it do not
    normalise."""
    carries: bool = True
    """Keywords given to the base model reach the attention function."""
    drops_cache_at_window: bool = False
    """Generation drops the cache and reads the whole sequence again when it crosses the trained window."""
    folds_scale: bool = False
    """YaRN's factor over all dimensions is multiplied into `attention.scaling` when the model is built."""
    learned: str | None = None
    """The module on the base model that holds learned positions."""
    learned_offset: int = 0
    """Rows of that table before the one of position zero."""
    alibi: bool = False
    """The family adds ALiBi to its scores."""
    forward: Callable[..., Any] | None = None
    """The attention's forward, only for families that do not call the attention interface."""
    carry: Callable[..., dict[str, Any]] | None = None
    """How positions reach the attention where the base model carries no extra keywords (with `forward`)."""
    keep_positions: Callable[..., Any] | None = None
    """Wraps the base model's own forward and holds what `carry` added (with `build_bias`)."""
    build_bias: tuple[str, Callable[..., Any]] | None = None
    """A method of the base model that makes the native bias, and what takes its place (with `carry`)."""
    projections: ProjectionNames | None = None
    """What the attention calls its projections, where latents may take their place; None where that is not known."""
    tower: Tower | None = None
    """How images become tokens, for a tower that reads them."""
    summary: str = ""
    """Models of this family that people know."""

    @property
    def native(self) -> str:
        """The scheme that the family has by itself."""
        return "alibi" if self.alibi else "learned" if self.learned or self.tower else "rope"

    @property
    def arithmetic(self) -> str:
        """The dtypes in which the family rotates, one of `scheme.ARITHMETIC`."""
        if self.layout == "complex":
            return "complex"
        if self.full_precision:
            return "float32 tables"
        return "float32" if self.full_precision_product else "model"

    def blocks(self, base: nn.Module) -> Any:
        """The list of layers."""
        return attrgetter(self.layers)(base)

    def attentions(self, base: nn.Module) -> list[nn.Module]:
        """The attention module of each layer, in order."""
        return [getattr(layer, self.attention) for layer in self.blocks(base)]

    def kinds(self, base: nn.Module, config: Any) -> list[str | None]:
        """The layer type of each layer where types rotate by frequencies of their own; else None for each."""
        count = len(self.blocks(base))
        return list(config.layer_types)[:count] if self.typed else [None] * count

    def rests(self, attention: nn.Module) -> bool:
        """Whether this layer leaves queries and keys alone though the family rotates."""
        if self.rotates is None:
            return False
        return not (self.rotates(attention) if callable(self.rotates) else getattr(attention, self.rotates))

    def softmax_scale(self, attention: Any, scheme: Scheme) -> float:
        """What this attention multiplies its scores by under a scheme: d^-1/2 M^2 for heads of d dimensions, in the
        order of operations of Transformers."""
        return attention.qk_head_dim**-0.5 * scheme.softmax_factor * scheme.softmax_factor

    def joint(self, base: nn.Module, scheme: Scheme | None, kind: str | None = None) -> RotaryJoint:
        """What stands in the place of the rotary module, for one layer type where it serves several."""
        assert self.rotary is not None
        width = 2 * frequencies_of(getattr(base, self.rotary), kind)[0].shape[-1]
        return RotaryJoint(scheme, self.layout, width, self.full_precision)

    def window(self, base: nn.Module, config: Any, layer: int = 0) -> TrainedWindow:
        """Return the window that the model was trained for, as the scaling of this layer has it."""
        return trained_window(base, config, self.kinds(base, config)[layer])

    def shape(self, base: nn.Module, config: Any, layer: int = 0) -> AttentionShape:
        """Sizes of one layer, read from the modules that were built; the config serves where no module knows."""
        attention = self.attentions(base)[layer]
        kind = self.kinds(base, config)[layer]
        heads = config.num_attention_heads
        head_dim = _first(attention, "qk_head_dim", "head_dim", "head_size") or config.hidden_size // heads
        rotary = getattr(base, self.rotary) if self.rotary else None
        rotary_dim = 2 * frequencies_of(rotary, kind)[0].shape[-1] if rotary is not None else head_dim
        return AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rotary_start=_first(attention, "qk_nope_head_dim") or 0,
            rope_theta=native_theta(rotary, config, kind) if rotary is not None else DEFAULT_THETA,
            trained_length=self.window(base, config, layer).length or 0,
            num_layers=len(self.blocks(base)),
            interleaved=self.interleaved_pairs,
            grid=self.tower.grid(config) if self.tower else None,
            leading_tokens=self.tower.leading_tokens if self.tower else 0,
            latent_rank=_first(attention, "kv_lora_rank") or 0,
            value_dim=_first(attention, "v_head_dim") or head_dim,
            arithmetic=self.arithmetic,
        )


def _first(owner: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(owner, name, None)) is not None), None)


def frequencies_of(rotary: Any, kind: str | None) -> tuple[Tensor, Tensor]:
    """The frequencies that a native rotary module turns by, `[rotary_dim / 2]`, and those it was built with."""
    prefix = "" if kind is None else f"{kind}_"
    inv_freq = getattr(rotary, f"{prefix}inv_freq")
    return inv_freq, getattr(rotary, f"{prefix}original_inv_freq", inv_freq)


def native_theta(rotary: Any, config: Any, kind: str | None = None) -> float:
    """The base of the frequencies that the built module turns by.

    The config's number where it gives the module's frequencies; else the one that the module's frequencies tell, since
    a config that was changed after building says nothing about the model.
    """
    parameters = native_parameters(config, kind)
    theta = float(parameters.get("rope_theta") or DEFAULT_THETA)
    inv_freq = frequencies_of(rotary, kind)[1]
    width = 2 * inv_freq.shape[-1]
    if parameters.get("rope_type") == "dynamic" and (alpha := parameters.get("alpha")):
        theta *= float(alpha) ** (width / (width - 2))  # HunYuan's: a larger base at every length, trained with
    elif parameters.get("rope_type", "default") != "default":
        return theta
    if inv_freq.is_meta:
        return theta
    built = inv_freq.detach().double().cpu()
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    tolerance = 1e-5 if inv_freq.dtype == torch.float32 else 1e-2
    if width < 4 or torch.allclose(built, theta**-exponent, rtol=tolerance, atol=0):
        return theta
    told = float(built[1]) ** (-1 / float(exponent[1]))
    if torch.allclose(built, told**-exponent, rtol=tolerance, atol=0):
        return told
    raise UnsupportedError(
        f"The frequencies of {type(rotary).__name__} follow neither the config's rope_theta={theta} nor any other "
        "single base; give theta=<base> for a scheme of your own, or reload the model."
    )


class RotaryJoint(nn.Module):
    """Stands where the family's rotary module stood: cos and sin of the scheme, or of no rotation at all."""

    def __init__(self, scheme: Scheme | None, layout: str, width: int, full_precision: bool = False) -> None:
        super().__init__()
        self.__dict__["scheme"] = scheme  # registered once, on the base model
        self.layout, self.width, self.full_precision = layout, width, full_precision

    @property
    def inv_freq(self) -> Tensor:
        """The frequencies in effect, `[rotary_dim / 2]`, float32."""
        scheme = self.__dict__["scheme"]
        return torch.zeros(self.width // 2, device="cpu") if scheme is None else scheme.inv_freq

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by."""
        scheme = self.__dict__["scheme"]
        return 1.0 if scheme is None else scheme.attention_scaling

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor, Tensor]:
        scheme = self.__dict__["scheme"]
        dtype = torch.float32 if self.full_precision or self.layout == "complex" else x.dtype
        if scheme is None:
            half = self.layout in ("single", "complex")
            shape = (*position_ids.shape, self.width // 2 if half else self.width)
            cos = torch.ones(shape, dtype=dtype, device=x.device)
            sin = torch.zeros_like(cos)
            return torch.complex(cos, sin) if self.layout == "complex" else (cos, sin)
        angles, factor = scheme.angles(position_ids.to(x.device))
        if self.layout == "complex":
            return torch.polar(torch.ones_like(angles), angles) * factor
        if self.layout == "single":
            return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
        return cos_sin(angles, factor, dtype, interleaved=self.layout == "interleaved")

    def extra_repr(self) -> str:
        scheme = self.__dict__["scheme"]
        return f"scheme={scheme.name if scheme is not None else None}, layout={self.layout!r}"


class TypedJoint(nn.Module):
    """Stands where the rotary module of several layer types stood: joints for some types, the native one for others."""

    def __init__(self, joints: dict[str, RotaryJoint], native: nn.Module) -> None:
        super().__init__()
        self.joints = nn.ModuleDict(joints)
        self.__dict__["native"] = native  # registered once, on the base model

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> Any:
        joint = self.joints[layer_type] if layer_type in self.joints else self.__dict__["native"]
        return joint(x, position_ids, layer_type)


class NoTable(nn.Module):
    """Stands where a table of learned positions stood and adds nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, ids: Tensor, *_: Any, position_ids: Tensor | None = None, **__: Any) -> Tensor:
        ids = ids if position_ids is None else position_ids
        # Whole numbers, which leave the dtype of the embeddings that they are added to as it is.
        zeros = torch.zeros((1, 1, self.width), dtype=torch.int8, device=ids.device)
        return zeros.expand(ids.shape[0], ids.shape[1], -1)
