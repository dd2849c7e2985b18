"""Read the facts about a model from its config and from its modules, built without weights."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import compat
from ..adapters import ADAPTERS, Adapter
from ..adapters.adapter import table_rows
from ..adapters.trained_window import AuthorFacts, TrainedWindow, config_rope_parameters
from ..checkpoints.load import read_config
from ..checkpoints.sources import empty_model
from ..core.scheme import AttentionShape
from ..errors import CheckpointError, OptionError, PePatchError, UnsupportedError
from ..patching.build import existing_scheme
from ..patching.inference import adapter_for
from ..schemes.registry import find_scheme
from ..schemes.rotary import Rotary

logger = logging.getLogger("pe_patch")


@dataclass(frozen=True)
class Parameters:
    """The number of weights of each kind; tied weights count once."""

    total: int
    active: int
    """Weights used per token: of the experts, only those that a token is routed to."""
    embedding: int
    """Input embeddings, including the table of learned positions."""
    tied: bool
    """True if the output embeddings share the weights of the input embeddings."""
    linear: int
    """Inputs plus outputs of all linear layers except the output embeddings: the LoRA weights per rank."""
    norms: int


@dataclass(frozen=True)
class CacheLayer:
    """The cache of one layer."""

    numbers_per_token: int
    sliding_window: int | None
    """Tokens that the layer keeps; None keeps all."""
    rotates: bool
    """True if the layer rotates queries and keys."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts about an unpatched model."""

    name: str
    family: str
    dtype: str
    positions: str
    """The native scheme of the family: rope, alibi or learned."""
    shape: AttentionShape
    """The attention shape of the layers to patch; its trained length is the one before any scaling."""
    parameters: Parameters
    cache: tuple[CacheLayer, ...]
    vocabulary: int
    config_window: int
    """The window that the config allows, in tokens; 0 if undeclared."""
    window: int
    """The trained window in tokens, including any scaling in the config."""
    trained: TrainedWindow
    """The trained windows with and without scaling, and their sources."""
    existing: Rotary | None
    """The rotation of the model, including any scaling in its config; None without rotation."""
    scaling: dict[str, Any]
    """The rope parameters of that scaling; empty without a scaling."""
    layers: tuple[int, ...]
    """The layers to patch if layer types rotate by different bases; empty for all layers."""
    layer_type: str | None
    word: AuthorFacts | None
    """Statements of the authors that the config lacks; None without any."""

    @property
    def original(self) -> int:
        """The trained window in tokens, before any scaling."""
        return self.shape.trained_length

    @property
    def sliding(self) -> dict[int, int]:
        """The number of sliding layers by window in tokens."""
        return dict(Counter(layer.sliding_window for layer in self.cache if layer.sliding_window))

    @property
    def unrotated(self) -> int:
        """The number of layers without positions in a rotary family; 0 elsewhere."""
        return sum(not layer.rotates for layer in self.cache) if self.positions == "rope" else 0

    @property
    def rotation_slides(self) -> int:
        """The largest sliding window of a rotating layer, in tokens; 0 if any of them does not slide."""
        windows = [layer.sliding_window for layer in self.cache if layer.rotates]
        return max((window or 0 for window in windows), default=0) if all(windows) else 0

    @property
    def all_slide(self) -> bool:
        """True if every layer has a sliding window."""
        return all(layer.sliding_window for layer in self.cache)

    @property
    def item_bytes(self) -> int:
        """Bytes per number in this dtype."""
        return getattr(torch, self.dtype).itemsize


def build(source: Any) -> Any:
    """Build a model on the meta device from a folder, a hub name or a config.

    Raises:
        OptionError: if `source` is none of these.
        PePatchError: if the config is of a patched model, or no causal language model can be built from it.
        UnsupportedError: if the config is not of a causal language model.
    """
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        _check_causal_and_unpatched(source.to_dict())
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(source))
    if not isinstance(source, str | Path):
        raise OptionError(f"advise takes a folder, a hub name or a Transformers config, got {source!r}.")
    try:
        model = empty_model(str(source))
    except CheckpointError:
        # The patch is the reason to report, even if its record in the config is damaged.
        if (Path(source) / "config.json").is_file():
            _check_causal_and_unpatched(read_config(source))
        raise
    except (ValueError, KeyError) as error:
        _check_causal_and_unpatched(read_config(source))
        raise PePatchError(f"Cannot build a causal language model from the config of {source} ({error}).") from error
    _check_causal_and_unpatched(model.config.to_dict())
    return model


def _check_causal_and_unpatched(config: dict[str, Any]) -> None:
    """Raise unless a config is of an unpatched causal language model."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if record := config.get("pe_patch"):
        raise PePatchError(
            f"This config was saved with a patch, {record.get('scheme')!r}, but advice needs an unpatched model. "
            "Pass the original model."
        )
    family = str(config.get("model_type"))
    if family not in CONFIG_MAPPING:
        raise UnsupportedError(f"Transformers has no model type {family!r}, which this config names.")
    if CONFIG_MAPPING[family] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedError(f"{family!r} is not a causal language model; advice covers only those.")


def read_facts(model: Any, name: str, trained_length: int | None = None, dtype: str | None = None) -> ModelFacts:
    """Read the facts about a model that was built without weights.

    Args:
        model: a causal language model on the meta device.
        name: its path or hub name, for messages.
        trained_length: the trained window in tokens; overrides the config and the authors' statements.
        dtype: the dtype of weights and cache; None takes the config's.

    Raises:
        OptionError: if the trained window is unknown.
    """
    base, adapter = adapter_for(model)
    config = base.config
    layer_type, layers = _slowest_layers(adapter, base)
    first = layers[0] if layers else next(iter(adapter.attentions(base)))
    trained = adapter.window(base, config, first)
    if trained_length is not None:
        trained = trained.with_scaled_window(trained_length, "trained_length")
    if trained.scaled_length is None or trained.length is None:
        question = trained.missing_window_message(composed=trained.scaled, option="trained_length")
        raise OptionError(f"Advice needs the trained window of {name}, but {question}")
    shape = replace(adapter.shape(base, config, first), trained_length=trained.length)
    config_window = int(getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None) or 0)
    scaling = {} if adapter.rotary is None else _scaling(config, layer_type)
    return ModelFacts(
        name=Path(name).name or name,
        family=config.model_type,
        dtype=str(dtype or model.dtype).removeprefix("torch."),
        positions=adapter.native,
        shape=shape,
        parameters=_parameters(model, config, adapter, base),
        cache=_cache(model, base, adapter, shape),
        vocabulary=config.vocab_size,
        config_window=config_window,
        window=trained.scaled_length,
        trained=trained,
        existing=None if adapter.rotary is None else _existing(base, adapter, first, trained, scaling, shape),
        scaling=scaling,
        layers=layers,
        layer_type=layer_type,
        word=None if trained_length else trained.word,
    )


def _slowest_layers(adapter: Adapter, base: PreTrainedModel) -> tuple[str | None, tuple[int, ...]]:
    """Return the layer type with the largest base and its layers; no layers if there is only one type.

    Of two types with one base, that is the one which looks farther.
    """
    layer_types: list[Any] = adapter.layer_types(base, base.config)
    by_type: dict[Any, list[int]] = {}
    for index in adapter.attentions(base):
        by_type.setdefault(layer_types[index], []).append(index)
    if len(by_type) < 2:
        return next(iter(by_type)), ()

    def reach(layer_type: Any) -> tuple[float, bool]:
        near = str(layer_type).startswith(("sliding", "chunked"))
        return adapter.shape(base, base.config, by_type[layer_type][0]).rope_theta, not near

    slowest = max(by_type, key=reach)
    return slowest, tuple(by_type[slowest])


def _scaling(config: Any, layer_type: str | None) -> dict[str, Any]:
    """Return the rope parameters of the scaling in a config, or an empty dict without one."""
    parameters = config_rope_parameters(config, layer_type)
    return {} if parameters.get("rope_type", "default") == "default" else parameters


def _existing(
    base: Any, adapter: Adapter, layer: int, trained: TrainedWindow, scaling: dict[str, Any], shape: AttentionShape
) -> Rotary:
    """Build the rotation that the model already has."""
    native = existing_scheme(base, adapter, layer, trained) if scaling else "rope"
    scheme, options = find_scheme(native, {}, shape)
    rotation = scheme(shape, **options)
    assert isinstance(rotation, Rotary)
    return rotation


def _parameters(model: Any, config: Any, adapter: Adapter, base: nn.Module) -> Parameters:
    """Count the weights over the modules, each tensor once."""
    sizes = {id(p): (name, p.numel()) for name, p in model.named_parameters()}  # yields tied weights once
    expert_weights = sum(size for name, size in sizes.values() if ".experts." in name)
    num_experts = next((n for key in NUM_EXPERTS_KEYS if (n := getattr(config, key, None))), 1)
    experts_per_token = getattr(config, "num_experts_per_tok", None) or num_experts
    input_embeddings, output_embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    rows = table_rows(adapter.learned_table(base)[2]).numel() if adapter.learned else 0
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not output_embeddings]
    conv = [m for m in model.modules() if type(m).__name__ == "Conv1D"]  # GPT-2's linear layers
    total = sum(size for _, size in sizes.values())
    return Parameters(
        total=total,
        active=total - expert_weights + expert_weights * experts_per_token // num_experts,
        embedding=input_embeddings.weight.numel() + rows,
        tied=output_embeddings is not None and output_embeddings.weight is input_embeddings.weight,
        linear=sum(m.in_features + m.out_features for m in linear) + sum(sum(m.weight.shape) for m in conv),
        norms=sum(p.numel() for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters()),
    )


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return rope parameters, flat or by layer type, without their scaling."""
    kept = ("rope_theta", "partial_rotary_factor")
    if any(isinstance(value, dict) for value in parameters.values()):
        return {key: _plain(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    return {"rope_type": "default"} | {key: parameters[key] for key in kept if key in parameters}


NUM_EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
"""The config keys that state the number of routed experts."""


@torch.no_grad()
def _cache(model: Any, base: PreTrainedModel, adapter: Adapter, shape: AttentionShape) -> tuple[CacheLayer, ...]:
    """Run two tokens through a copy of the model and read the size of each layer's cache.

    A layer without keys, such as a convolution, has a state of one size and is left out. If the family does not run
    without values, the sizes of its attention are used.
    """
    from transformers import AutoModelForCausalLM

    rotates = {
        index: adapter.rotary is not None and not adapter.skips_rope(attention)
        for index, attention in adapter.attentions(base).items()
    }
    # Tensors on the meta device have no values, so nothing may read one. Eager attention, bfloat16 and plain
    # frequencies read none. Length-dependent frequencies would; they do not change the size of the cache.
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    if parameters := getattr(text, "rope_parameters", None):
        text.rope_parameters = _plain(parameters)
    try:
        with torch.device("meta"):
            twin: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
            ids = torch.zeros(1, 2, dtype=torch.long)
            cache = compat.cache_of(twin(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True))
    except Exception as error:  # anything may fail in a family that reads values
        if base.config.model_type in ADAPTERS:
            raise
        logger.debug("%s does not run on the meta device: %s", type(model).__name__, error)
        numbers = shape.latent_rank + shape.rotary_dim if shape.latent_rank else shape.head_dim + shape.value_dim
        numbers *= 1 if shape.latent_rank else shape.num_key_value_heads
        return tuple(
            CacheLayer(numbers_per_token=numbers, sliding_window=None, rotates=each) for each in rotates.values()
        )
    layers = [] if cache is None else list(enumerate(cache.layers))
    layers = [(index, layer) for index, layer in layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    if not layers:
        raise UnsupportedError(
            f"advice needs a cache of keys and values for every token; {model.config.model_type!r} has another cache."
        )
    return tuple(
        CacheLayer(
            numbers_per_token=(layer.keys.numel() + layer.values.numel()) // 2,
            sliding_window=getattr(layer, "sliding_window", None),
            rotates=rotates.get(index, False),
        )
        for index, layer in layers
    )
