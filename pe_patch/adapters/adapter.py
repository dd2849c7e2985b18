"""Declare where a model family keeps what positions touch, and the modules that replace its native positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .. import compat
from ..core.handover import current_value
from ..core.scheme import AttentionShape, Scheme
from ..errors import UnsupportedError
from ..schemes.rotary import cos_sin
from .projections import ProjectionNames
from .trained_window import TrainedWindow, config_rope_parameters, trained_window
from .vision import VisionEncoder

DEFAULT_THETA = 10000.0
"""Base of the rotary frequencies for a family that does not rotate."""


@dataclass(frozen=True)
class Adapter:
    """A description of where a model family keeps its layers, attentions and native positions.

    Every path is an attribute of the base model or of one layer. Llama is `Adapter()`.
    """

    layers: str = "layers"
    """Attribute of the base model: the list of its layers. May be a dotted path."""
    attention: str = "self_attn"
    """Attribute of a layer: its attention module. May be a dotted path; empty if `layers` lists attentions. In a hybrid
    model, layers without it do not attend."""
    attention_class: str | None = None
    """Name of the class of the attention modules, for a hybrid family whose other layers have another module under
    the same name. None if every module under that name attends."""
    attentions_per_layer: int = 1
    """Number of attentions in a list at `attention` of each layer (LongCat: 2). Layer indices then count
    attentions."""
    rotary: str | None = "rotary_emb"
    """Attribute of the base model: the module that computes cos and sin for all layers. None if the family does not
    rotate."""
    rotary_per_attention: bool = False
    """Each attention has a separate rotary module, and `rotary` is its attribute."""
    layout: str = "halves"
    """Layout of the cos and sin that this module returns: "halves" [c, c], "interleaved" [c0, c0, c1, c1 ...],
    "single" [c], "sin_first" [c] with the sin before the cos, or "complex" c + i s in one tensor."""
    full_precision: bool = False
    """cos and sin are float32 in a model of any dtype, and so are their products with queries and keys."""
    full_precision_product: bool = False
    """Queries and keys are cast to float32 before the multiplication by cos and sin, which have the dtype of the
    model."""
    rotary_per_layer_type: bool = False
    """The rotary module is called once for each of `config.layer_types`, with separate frequencies for each."""
    interleaved_pairs: bool = False
    """The two dimensions of a rotated pair are neighbours; otherwise they are half a head apart."""
    embedding_multiplier: str | None = None
    """Attribute of the base model: the factor that it multiplies `inputs_embeds` by. None if there is no factor."""
    rotates: str | Callable[[nn.Module], bool] | None = None
    """Attribute of an attention, or function of it, that is true if this layer rotates. None if all layers do."""
    weighted_norm_after_rotation: bool = False
    """A norm with weights follows the rotation of queries and keys, so that the rotation cannot move to the scores."""
    norm_after_rotation: str | None = None
    """Attribute of an attention: a norm without weights that follows the rotation of queries and keys. None if there is
    none. The norm cancels any factor on cos and sin. If a scheme rotates at the scores, the norm runs after that
    rotation. Attentions without the attribute do not normalise."""
    early_rotation: str | None = None
    """The reason why queries and keys can only be rotated before the cache, as a clause with "this family" as its
    subject. None if a scheme can also rotate them at the scores."""
    forwards_kwargs: bool = True
    """The base model forwards extra keyword arguments to the attention function."""
    takes_embeddings: bool = True
    """The first layer receives `inputs_embeds` unchanged, or multiplied by `embedding_multiplier`, so that a scheme can
    add to them."""
    drops_cache_at_window: bool = False
    """Generation drops the cache and processes the whole sequence again when it crosses the trained window."""
    scaling_includes_mscale: bool = False
    """The model multiplies the `mscale_all_dim` factor of YaRN into `attention.scaling` when it is built."""
    learned: str | None = None
    """Path from the base model to its table of positions, such as "wpe", which may also be fixed. None if it has
    none."""
    learned_offset: int = 0
    """Number of rows of that table before the row of position zero."""
    first_position_id: int = 0
    """The `position_ids` of the first token, if the family counts from another number (RoBERTa: 2)."""
    alibi: bool = False
    """The family adds an ALiBi bias to its scores."""
    unpositioned: bool = False
    """The family has no positions, such as a hybrid model whose other layers order the tokens."""
    calls_interface: bool = True
    """The attentions call the attention interface of Transformers. Otherwise only schemes that act before the scores
    apply: static rotary ones, and those that add to the embeddings."""
    at_scores: Adapter | None = None
    """Adapter for the schemes that act at the scores, which replaces the family's own attention code. For a family
    that does not call the attention interface; the other schemes leave that code alone. None if there is none."""
    refuses: Callable[[PreTrainedConfig], str | None] | None = None
    """Function of the config that returns why such a model cannot be patched, as a clause about "this model", or None.
    None if every model of the family can."""
    own_bias: bool = False
    """The attentions add a bias by distance that no scheme replaces, beside the table of positions. Only the table can
    be extended."""
    forward: Callable[..., object] | None = None
    """Replacement for the forward of the attention, for a family that does not call the attention interface; else
    None."""
    pass_positions: Callable[..., dict[str, object]] | None = None
    """Function that passes positions to the attention of a base model that drops keyword arguments; else None. Use with
    `forward`."""
    wrap_base_forward: Callable[..., object] | None = None
    """Wrapper of the base model's forward that stores what `pass_positions` added; else None. Use with
    `replace_bias_builder`."""
    replace_bias_builder: tuple[str, Callable[..., object]] | None = None
    """Name of the base model's method that builds the native bias, and its replacement; else None. Use with
    `pass_positions`."""
    score_method: tuple[str, Callable[..., object]] | None = None
    """Name of the attention's method that computes scores and output, and its replacement, for a family that does not
    call the interface; else None. Use with `pass_positions` and `wrap_base_forward`."""
    still_rotation: Callable[[nn.Module], tuple[str, object]] | None = None
    """Function of an attention that returns the attribute by which it rotates, and what stops it, for a family without
    a rotary module; else None. Schemes then rotate at the scores."""
    eager_only: bool = False
    """Masks have the format of eager attention, so no other backend applies."""
    projections: ProjectionNames | None = None
    """Names of the projections of an attention that can be converted to latents. None if it cannot."""
    vision_encoder: VisionEncoder | None = None
    """How a vision encoder turns images into tokens. None for a text model."""
    summary: str = ""
    """Well-known models of this family."""

    @property
    def native(self) -> str:
        """The name of the native scheme: "alibi", "learned", "nope" or "rope"."""
        if self.alibi:
            return "alibi"
        return "nope" if self.unpositioned else "learned" if self.learned or self.vision_encoder else "rope"

    def learned_table(self, base: nn.Module) -> tuple[nn.Module, str, nn.Module]:
        """Return the module that holds the table of positions, the table's name in it, and the table."""
        assert self.learned is not None
        owner, _, name = self.learned.rpartition(".")
        holder = attrgetter(owner)(base) if owner else base
        return holder, name, getattr(holder, name)

    @property
    def arithmetic(self) -> str:
        """The dtypes in which the family rotates, a member of `scheme.ARITHMETIC`."""
        if self.layout == "complex":
            return "complex"
        if self.full_precision:
            return "float32 tables"
        return "float32" if self.full_precision_product else "model"

    @property
    def bars_rotation_at_scores(self) -> str | None:
        """The reason why no scheme can rotate at the scores, as a clause about "this family". None if one can."""
        if self.weighted_norm_after_rotation:
            return "normalises queries and keys after rotating"
        return self.early_rotation

    def blocks(self, base: nn.Module) -> nn.ModuleList:
        """Return the list of layers."""
        return attrgetter(self.layers)(base)

    def attentions(self, base: nn.Module) -> dict[int, nn.Module]:
        """Return the attention modules by layer index. A layer that does not attend has none."""
        found = (attention for layer in self.blocks(base) for attention in self.attentions_of(layer))
        return {index: attention for index, attention in enumerate(found) if attention is not None}

    def attentions_of(self, layer: nn.Module) -> list[nn.Module | None]:
        """Return the attention modules of a layer, `attentions_per_layer` of them; None where it does not attend."""
        module: Any = layer
        for name in self.attention.split(".") if self.attention else ():
            module = getattr(module, name, None)
        if self.attentions_per_layer > 1:
            return list(module)
        attends = isinstance(module, nn.Module) and self.attention_class in (None, type(module).__name__)
        return [module if attends else None]

    def count(self, base: nn.Module) -> int:
        """Return the number of layers, as layer indices count them."""
        return len(self.blocks(base)) * self.attentions_per_layer

    def block(self, base: nn.Module, index: int) -> nn.Module:
        """Return the layer that holds the attention of an index."""
        return self.blocks(base)[index // self.attentions_per_layer]

    def rotary_module(self, base: nn.Module, layer: int | None = None) -> nn.Module:
        """Return the rotary module of a layer; of the first that attends for None."""
        assert self.rotary is not None
        if not self.rotary_per_attention:
            return cast(nn.Module, getattr(base, self.rotary))
        attentions = self.attentions(base)
        owner = attentions[next(iter(attentions)) if layer is None else layer]
        return cast(nn.Module, getattr(owner, self.rotary))

    def layer_types(self, base: nn.Module, config: PreTrainedConfig) -> list[str | None]:
        """Return the type of each layer, or None for each if all layers share their frequencies."""
        count = self.count(base)
        return list(config.layer_types)[:count] if self.rotary_per_layer_type else [None] * count

    def skips_rope(self, attention: nn.Module) -> bool:
        """Return whether this attention does not rotate, in a family whose other layers do."""
        if self.rotates is None:
            return False
        return not (self.rotates(attention) if callable(self.rotates) else getattr(attention, self.rotates))

    def softmax_scale(self, attention: nn.Module, scheme: Scheme) -> float:
        """Return the factor on the scores of this attention under a scheme: d^-1/2 M^2 for heads of d dimensions.

        M is 1 for a scheme without a `softmax_factor`. The order of operations is that of Transformers, so that the
        result is equal bit for bit.
        """
        factor = getattr(scheme, "softmax_factor", 1.0)
        return cast(int, attention.qk_head_dim) ** -0.5 * factor * factor

    def rotary_embedding(
        self, base: nn.Module, scheme: Scheme | None, layer_type: str | None = None
    ) -> PatchedRotaryEmbedding:
        """Return the replacement of the rotary module for one scheme, and for one layer type if it has several.

        Args:
            base: the model that holds the layers.
            scheme: the scheme that gives cos and sin; None for no rotation.
            layer_type: the layer type; None if all layers share their frequencies.
        """
        native = self.rotary_module(base)
        width = 2 * frequencies_of(native, layer_type)[0].shape[-1]
        compose = compat.compose_axes(native, layer_type)
        return PatchedRotaryEmbedding(scheme, self.layout, width, self.full_precision, compose)

    def window(self, base: nn.Module, config: PreTrainedConfig, layer: int) -> TrainedWindow:
        """Return the window that the model was trained for, according to the scaling of this layer."""
        return trained_window(base, config, self.layer_types(base, config)[layer])

    def shape(
        self, base: nn.Module, config: PreTrainedConfig, layer: int | None = None, window: TrainedWindow | None = None
    ) -> AttentionShape:
        """Return the sizes of one layer, from the built modules, or from the config if no module has them.

        Args:
            base: the model that holds the layers.
            config: its config.
            layer: index of a layer that attends; None for the first.
            window: the trained window where it is known already.
        """
        attentions = self.attentions(base)
        layer = next(iter(attentions)) if layer is None else layer
        attention = attentions[layer]
        layer_type = self.layer_types(base, config)[layer]
        heads = config.num_attention_heads
        head_dim = _first(attention, "qk_head_dim", "head_dim", "head_size") or config.hidden_size // heads
        rotary = self.rotary_module(base) if self.rotary else None
        turned = _first(attention, "rotary_dim") or head_dim
        rotary_dim = 2 * frequencies_of(rotary, layer_type)[0].shape[-1] if rotary is not None else turned
        return AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rotary_start=_first(attention, "qk_nope_head_dim") or 0,
            rope_theta=native_theta(rotary, config, layer_type) if rotary is not None else DEFAULT_THETA,
            trained_length=(window or self.window(base, config, layer)).length or 0,
            num_layers=self.count(base),
            interleaved=self.interleaved_pairs,
            grid=self.vision_encoder.grid(config) if self.vision_encoder else None,
            leading_tokens=self.vision_encoder.leading_tokens if self.vision_encoder else 0,
            latent_rank=_first(attention, "kv_lora_rank") or 0,
            value_dim=_first(attention, "v_head_dim") or head_dim,
            arithmetic=self.arithmetic,
            embedding_size=table_rows(self.learned_table(base)[2]).shape[1] if self.learned else 0,
        )


TABLE = "embed_positions"
"""Attribute of a rotary module that holds a table of sines and cosines, `[positions, rotary_dim]`, the sines first."""


def table_rows(table: Any) -> Tensor:
    """Return the rows of a table of positions, `[rows, width]`, which XGLM keeps in a buffer of another name."""
    return cast(Tensor, table.weight if hasattr(table, "weight") else table.weights)


def _first(owner: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(owner, name, None)) is not None), None)


def frequencies_of(rotary: Any, layer_type: str | None) -> tuple[Tensor, Tensor]:
    """Return the frequencies of a native rotary module, current and as built, each `[rotary_dim / 2]`.

    Those of a module with a table of sines and cosines (GPT-J) are the angles of position 1.
    """
    if hasattr(rotary, TABLE):
        sin, cos = getattr(rotary, TABLE)[1].chunk(2)
        inv_freq = torch.atan2(sin, cos)
        return inv_freq, inv_freq
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq = getattr(rotary, f"{prefix}inv_freq")
    return inv_freq, getattr(rotary, f"{prefix}original_inv_freq", inv_freq)


def native_theta(rotary: Any, config: PreTrainedConfig, layer_type: str | None = None) -> float:
    """Return the base of the frequencies of a built rotary module.

    If the base in the config does not give the module's frequencies, compute the base from the frequencies: a config
    that was changed after the model was built does not describe the model.

    Raises:
        UnsupportedError: the frequencies follow no single base.
    """
    parameters = config_rope_parameters(config, layer_type)
    theta = float(parameters.get("rope_theta") or DEFAULT_THETA)
    inv_freq = frequencies_of(rotary, layer_type)[1]
    width = 2 * inv_freq.shape[-1]
    if parameters.get("rope_type") == "dynamic" and (alpha := parameters.get("alpha")):
        theta *= float(alpha) ** (width / (width - 2))  # HunYuan trains with a larger base, at every length
    elif parameters.get("rope_type", "default") != "default":
        return theta
    if inv_freq.is_meta:
        return theta
    built = inv_freq.detach().double().cpu()
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    tolerance = 1e-5 if inv_freq.dtype == torch.float32 else 1e-2
    if width < 4 or torch.allclose(built, theta**-exponent, rtol=tolerance, atol=0):
        return theta
    fitted = float(built[1]) ** (-1 / float(exponent[1]))
    if torch.allclose(built, fitted**-exponent, rtol=tolerance, atol=0):
        return fitted
    raise UnsupportedError(
        f"The frequencies of {type(rotary).__name__} follow neither the config's rope_theta={theta} nor any other "
        "single base. Give theta=<base> to the scheme, or reload the model."
    )


class PatchedRotaryEmbedding(nn.Module):
    """Return the cos and sin of a scheme in place of the family's rotary module.

    The family's own code multiplies them with queries and keys (`apply_rotary_pos_emb`).

    Args:
        scheme: the scheme; None for no rotation, which is cos 1 and sin 0.
        layout: as for `Adapter.layout`.
        width: number of rotated dimensions of a head.
        full_precision: as for `Adapter.full_precision`.
        compose: for a family with M-RoPE, the function that joins the cos or sin of three rows of positions (time,
            height, width), `[3, batch, tokens, width / 2]`, to `[batch, tokens, width]`. None for one row.
    """

    def __init__(
        self,
        scheme: Scheme | None,
        layout: str,
        width: int,
        full_precision: bool = False,
        compose: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["scheme"] = scheme  # registered once, on the base model
        self.compose = compose
        self.layout, self.width, self.full_precision = layout, width, full_precision

    @property
    def inv_freq(self) -> Tensor:
        """Inverse frequencies of the scheme, `[rotary_dim / 2]`, float32; zeros without a scheme."""
        scheme = self.__dict__["scheme"]
        return torch.zeros(self.width // 2, device="cpu") if scheme is None else scheme.inv_freq

    @property
    def attention_scaling(self) -> float:
        """Factor of the scheme on cos and sin; 1 without a scheme."""
        scheme = self.__dict__["scheme"]
        return 1.0 if scheme is None else scheme.attention_scaling

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Return cos and sin, each `[batch | 1, tokens, width]`; width / 2 if "single" or "sin_first", one tensor if
        "complex".

        Args:
            x: a tensor with the dtype and the device of the result.
            position_ids: positions of the tokens, `[batch | 1, tokens]`; with M-RoPE also `[3, batch | 1, tokens]`.
        """
        scheme = self.__dict__["scheme"]
        dtype = torch.float32 if self.full_precision or self.layout == "complex" else x.dtype
        if self.compose is not None:
            return self._composed(position_ids.to(x.device).expand(3, -1, -1), dtype)
        if scheme is None:
            half = self.layout in ("single", "sin_first", "complex")
            shape = (*position_ids.shape, self.width // 2 if half else self.width)
            cos = torch.ones(shape, dtype=dtype, device=x.device)
            sin = torch.zeros_like(cos)
            if self.layout == "sin_first":
                return sin, cos
            return torch.complex(cos, sin) if self.layout == "complex" else (cos, sin)
        angles, factor = scheme.angles(position_ids.to(x.device))
        if self.layout == "complex":
            return torch.polar(torch.ones_like(angles), angles) * factor
        if self.layout in ("single", "sin_first"):
            cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
            return (cos, sin) if self.layout == "single" else (sin, cos)
        return cos_sin(angles, factor, dtype, interleaved=self.layout == "interleaved")

    def _composed(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin for three rows of positions, `[3, batch | 1, tokens]`, joined as the family joins them."""
        scheme = self.__dict__["scheme"]
        assert self.compose is not None
        if scheme is None:
            angles, factor = torch.zeros(*position_ids.shape, self.width // 2, device=position_ids.device), 1.0
        else:
            angles, factor = scheme.angles(position_ids.flatten(0, 1))
            angles = angles.unflatten(0, position_ids.shape[:2])
        cos, sin = self.compose(angles.cos() * factor), self.compose(angles.sin() * factor)
        return cos.to(dtype), sin.to(dtype)

    def extra_repr(self) -> str:
        scheme = self.__dict__["scheme"]
        return f"scheme={scheme.name if scheme is not None else None}, layout={self.layout!r}"


class PerLayerTypeRotary(nn.Module):
    """A replacement of a rotary module that serves several layer types.

    Args:
        by_type: the replacement for each patched layer type.
        native: the family's rotary module, which serves the other types.
    """

    def __init__(self, by_type: dict[str, PatchedRotaryEmbedding], native: nn.Module) -> None:
        super().__init__()
        self.by_type = nn.ModuleDict(by_type)
        self.__dict__["native"] = native  # registered once, on the base model

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the native module that is not a frequency, such as the list of its layer types."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "native" or name.endswith("inv_freq"):
                raise
            return getattr(self.__dict__["native"], name)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> Any:
        """Return the cos and sin of one layer type, as its module does."""
        module = self.by_type[layer_type] if layer_type in self.by_type else self.__dict__["native"]
        return module(x, position_ids, layer_type)


ADDED = "added to the embeddings"
"""Name under which the forward of the base model hands the vectors of a pass to `PatchedPositionTable`."""


class PatchedPositionTable(nn.Module):
    """Return what a scheme adds to the embeddings of a pass, in place of the rows of a table of positions.

    Args:
        base: the model that holds the table.
        width: size of a row.
    """

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.__dict__["base"] = base  # no child: the table is inside it
        self.width = width

    def forward(self, ids: Any = None, *_: Any, position_ids: Tensor | None = None, **__: Any) -> Tensor:
        """Return `[batch | 1, tokens, width]`: zeros if the scheme adds nothing.

        Args:
            ids: position ids, token ids or embeddings, `[batch, tokens, ...]`, or the shape `(batch, tokens)`.
            position_ids: position ids where the table of the family takes them beside `ids`.
        """
        added = current_value(ADDED, self.__dict__["base"])
        if added is not None:
            return cast(Tensor, added)
        given = ids if position_ids is None else position_ids
        shape = list(given.shape if isinstance(given, Tensor) else given)
        batch, tokens = shape[:2] if len(shape) > 1 else (1, shape[0])
        # The zeros are integers, so that adding them keeps the dtype of the embeddings.
        device = given.device if isinstance(given, Tensor) else next(self.__dict__["base"].parameters()).device
        return torch.zeros((1, 1, self.width), dtype=torch.int8, device=device).expand(batch, tokens, -1)
