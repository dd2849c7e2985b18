"""What a model family must declare so that a scheme can take over its joints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..rotation import cos_sin
from ..scheme import AttentionShape, Scheme

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
    """How that module lays cos and sin out: "halves" [c, c], "interleaved" [c0, c0, c1, c1 ...], "single" [c]."""
    interleaved_pairs: bool = False
    """Rotated pairs are neighbours rather than halves of the head."""
    rotates: str | None = None
    """Attribute of an attention that tells whether this layer rotates; None where all do."""
    late_norm: bool = False
    """Queries and keys are normalised, weight by weight, after the rotation, which therefore cannot be done later."""
    carries: bool = True
    """Keywords given to the base model reach the attention function."""
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
    build_bias: tuple[str, Callable[..., Any]] | None = None
    """A method of the base model that makes the native bias, and what takes its place (with `carry`)."""
    summary: str = ""
    """Models of this family that people know."""

    @property
    def native(self) -> str:
        """The scheme that the family has by itself."""
        return "alibi" if self.alibi else "learned" if self.learned else "rope"

    def attentions(self, base: nn.Module) -> list[nn.Module]:
        """The attention module of each layer, in order."""
        return [getattr(layer, self.attention) for layer in getattr(base, self.layers)]

    def shape(self, base: nn.Module, config: Any) -> AttentionShape:
        """Sizes, read from the modules that were built; the config serves where no module knows."""
        attention = self.attentions(base)[0]
        heads = config.num_attention_heads
        head_dim = _first(attention, "qk_head_dim", "head_dim", "head_size") or config.hidden_size // heads
        rotary = getattr(base, self.rotary) if self.rotary else None
        rotary_dim = 2 * rotary.inv_freq.shape[-1] if rotary is not None else head_dim
        return AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rotary_start=_first(attention, "qk_nope_head_dim") or 0,
            rope_theta=native_theta(rotary, config) if rotary is not None else DEFAULT_THETA,
            trained_length=native_window(config),
            num_layers=len(getattr(base, self.layers)),
            interleaved=self.interleaved_pairs,
        )


def _first(owner: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(owner, name, None)) is not None), None)


def native_parameters(config: Any) -> dict[str, Any]:
    """The config's own rotary parameters, or an empty dict."""
    return dict(getattr(config, "rope_parameters", None) or {})


def native_window(config: Any) -> int:
    """The length the model was trained for: the original one where a scaling has been applied; 0 where unknown."""
    original = native_parameters(config).get("original_max_position_embeddings")
    original = original or getattr(config, "original_max_position_embeddings", None)
    return int(original or getattr(config, "max_position_embeddings", None) or 0)


def native_theta(rotary: Any, config: Any) -> float:
    """The base of the frequencies that the built module turns by.

    The config's number where it gives the module's frequencies; else the one that the module's frequencies tell, since
    a config that was changed after building says nothing about the model.
    """
    parameters = native_parameters(config)
    theta = parameters.get("rope_theta") or DEFAULT_THETA
    inv_freq = getattr(rotary, "original_inv_freq", rotary.inv_freq)
    if parameters.get("rope_type", "default") != "default" or inv_freq.is_meta:
        return float(theta)
    width = 2 * inv_freq.shape[-1]
    built = inv_freq.detach().double().cpu()
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    tolerance = 1e-5 if inv_freq.dtype == torch.float32 else 1e-2
    if width < 4 or torch.allclose(built, float(theta) ** -exponent, rtol=tolerance, atol=0):
        return float(theta)
    told = float(built[1]) ** (-1 / float(exponent[1]))
    if torch.allclose(built, told**-exponent, rtol=tolerance, atol=0):
        return told
    raise UnsupportedError(
        f"The frequencies of {type(rotary).__name__} follow neither the config's rope_theta={theta} nor any other "
        "single base; give theta=<base> for a scheme of your own, or reload the model."
    )


class RotaryJoint(nn.Module):
    """Stands where the family's rotary module stood: cos and sin of the scheme, or of no rotation at all."""

    def __init__(self, scheme: Scheme | None, layout: str, width: int) -> None:
        super().__init__()
        self.__dict__["scheme"] = scheme  # registered once, on the base model
        self.layout, self.width = layout, width

    @property
    def inv_freq(self) -> Tensor:
        """The frequencies in effect, `[rotary_dim / 2]`, float32."""
        scheme = self.__dict__["scheme"]
        return torch.zeros(self.width // 2, device="cpu") if scheme is None else scheme.inv_freq

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by."""
        scheme = self.__dict__["scheme"]
        return 1.0 if scheme is None else scheme.attention_factor

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        scheme = self.__dict__["scheme"]
        if scheme is None:
            width = self.width // 2 if self.layout == "single" else self.width
            shape = (*position_ids.shape, width)
            return torch.ones(shape, dtype=x.dtype, device=x.device), torch.zeros(shape, dtype=x.dtype, device=x.device)
        angles, factor = scheme.angles(position_ids.to(x.device))
        if self.layout == "single":
            return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)
        return cos_sin(angles, factor, x.dtype, interleaved=self.layout == "interleaved")

    def extra_repr(self) -> str:
        scheme = self.__dict__["scheme"]
        return f"scheme={scheme.name if scheme is not None else None}, layout={self.layout!r}"


class NoTable(nn.Module):
    """Stands where a table of learned positions stood and adds nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, ids: Tensor, *_: Any, position_ids: Tensor | None = None, **__: Any) -> Tensor:
        ids = ids if position_ids is None else position_ids
        return torch.zeros((1, 1, self.width), device=ids.device).expand(ids.shape[0], ids.shape[1], -1)
