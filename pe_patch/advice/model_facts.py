"""What a model is, read from its config and from its modules built without weights."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compat
from ..adapters import Adapter
from ..adapters.authors import AuthorsWord
from ..adapters.trained_window import TrainedWindow, native_parameters
from ..checkpoints.loading import empty_model
from ..core.scheme import AttentionShape
from ..errors import CheckpointError, OptionError, PePatchError, UnsupportedError
from ..patching.existing import existing_scheme
from ..patching.targets import find_adapter, find_stack
from ..schemes.registry import find_scheme
from ..schemes.rope import Rotary


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights; tied ones count once."""

    total: int
    active: int
    """Those that a token passes: of experts only the ones it is sent to."""
    embedding: int
    """Input embeddings, with the table of learned positions."""
    tied: bool
    """Output embeddings are the input embeddings."""
    linear: int
    """Inputs plus outputs of all linear layers but the output embeddings: what one rank of adapters has."""
    norms: int


@dataclass(frozen=True)
class CacheLayer:
    """What one layer caches."""

    numbers_per_token: int
    sliding_window: int | None
    """Tokens that it keeps; None keeps all."""
    rotates: bool


@dataclass(frozen=True)
class ModelFacts:
    """A model as it stands, before anything is done to it."""

    name: str
    family: str
    dtype: str
    positions: str
    """The scheme that the family has by itself: rope, alibi or learned."""
    shape: AttentionShape
    """Of the layers that look farthest; its trained length is the one before any scaling."""
    parameters: Parameters
    cache: tuple[CacheLayer, ...]
    vocabulary: int
    config_window: int
    """What the config allows, 0 where it says nothing."""
    window: int
    """What the model has been trained for as it stands, with whatever scaling it carries."""
    trained: TrainedWindow
    """That window and the one before any scaling, with their sources."""
    existing: Rotary | None
    """Its rotation as it stands, with the scaling that its config carries; None without rotation."""
    scaling: dict[str, Any]
    """What the config says of that scaling; empty where there is none."""
    layers: tuple[int, ...]
    """Which layers to patch where types of layers rotate by bases of their own; empty for all."""
    layer_type: str | None
    word: AuthorsWord | None

    @property
    def original(self) -> int:
        """The trained window before any scaling."""
        return self.shape.trained_length

    @property
    def sliding(self) -> dict[int, int]:
        """How many layers keep how many tokens, of those that slide."""
        return dict(Counter(layer.sliding_window for layer in self.cache if layer.sliding_window))

    @property
    def unrotated(self) -> int:
        """Layers without positions in a family that rotates."""
        return sum(not layer.rotates for layer in self.cache) if self.positions == "rope" else 0

    @property
    def rotation_slides(self) -> int:
        """The farthest that a rotating layer looks back where all of them slide, else 0."""
        windows = [layer.sliding_window for layer in self.cache if layer.rotates]
        return max((window or 0 for window in windows), default=0) if all(windows) else 0

    @property
    def all_slide(self) -> bool:
        return all(layer.sliding_window for layer in self.cache)

    @property
    def item_bytes(self) -> int:
        return getattr(torch, self.dtype).itemsize


def build(source: Any) -> Any:
    """The model on the meta device, from a folder, a name on the hub or a config."""
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        _check(source.to_dict())
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(source))
    if not isinstance(source, str | Path):
        raise OptionError(f"advise takes a folder, a name on the hub or a Transformers config, not {source!r}.")
    try:
        model = empty_model(str(source))
    except CheckpointError:
        if (Path(source) / "config.json").is_file():  # a patched model is refused for that, whatever its record is like
            _check(json.loads((Path(source) / "config.json").read_text(encoding="utf-8")))
        raise
    except (ValueError, KeyError) as error:
        _check(PreTrainedConfig.get_config_dict(str(source))[0])
        raise PePatchError(f"No causal language model can be built from the config of {source} ({error}).") from error
    _check(model.config.to_dict())
    return model


def _check(config: dict[str, Any]) -> None:
    """Raise where a config is of something else than a causal language model as it was trained."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if record := config.get("pe_patch"):
        raise PePatchError(
            f"This config was saved with a patch, {record.get('scheme')!r}, and advice is about models as they were "
            "trained: give the one that it was made from."
        )
    family = str(config.get("model_type"))
    if family not in CONFIG_MAPPING:
        raise UnsupportedError(f"Transformers knows no model of the type {family!r} that this config names.")
    if CONFIG_MAPPING[family] not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(f"{family!r} is no causal language model, and advice is about those.")


def read_facts(model: Any, name: str, trained_length: int | None = None, dtype: str | None = None) -> ModelFacts:
    """What there is to know of a model that was built without weights.

    Args:
        trained_length: the window it was trained for, where the caller knows better than config and authors.
        dtype: of weights and cache; the config's own when None.
    """
    _, base = find_stack(model, None)
    config, adapter = base.config, find_adapter(base, None)
    layer_type, layers = _farthest(adapter, base)
    first = layers[0] if layers else 0
    trained = adapter.window(base, config, first)
    if trained_length is not None:
        trained = trained.settle_scaled(trained_length, "trained_length")
    if trained.scaled_length is None or trained.length is None:
        question = trained.question(composed=trained.scaled, option="trained_length")
        raise OptionError(f"Advice starts from the window that {name} was trained for, and {question}")
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
        cache=_cache(
            model, [adapter.rotary is not None and not adapter.skips_rope(one) for one in adapter.attentions(base)]
        ),
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


def _farthest(adapter: Adapter, base: nn.Module) -> tuple[str | None, tuple[int, ...]]:
    """Of several types of layers the one that turns most slowly, and its layers."""
    kinds: list[Any] = adapter.layer_types(base, base.config)
    if len(set(kinds)) < 2:
        return kinds[0], ()
    farthest = max(set(kinds), key=lambda kind: adapter.shape(base, base.config, kinds.index(kind)).rope_theta)
    return farthest, tuple(index for index, kind in enumerate(kinds) if kind == farthest)


def _scaling(config: Any, layer_type: str | None) -> dict[str, Any]:
    """What a config says of a scaling that it carries, or nothing."""
    parameters = native_parameters(config, layer_type)
    return {} if parameters.get("rope_type", "default") == "default" else parameters


def _existing(
    base: Any, adapter: Adapter, layer: int, trained: TrainedWindow, scaling: dict[str, Any], shape: AttentionShape
) -> Rotary:
    """The rotation that the model has."""
    found = existing_scheme(base, adapter, layer, trained) if scaling else "rope"
    scheme, options = find_scheme(found, {}, shape)
    built = scheme(shape, **options)
    assert isinstance(built, Rotary)
    return built


def _parameters(model: Any, config: Any, adapter: Adapter, base: nn.Module) -> Parameters:
    """Counted over the modules, each tensor once."""
    sizes = {id(p): (name, p.numel()) for name, p in model.named_parameters()}  # tied weights come once
    experts = sum(size for name, size in sizes.values() if ".experts." in name)
    number = next((n for key in EXPERTS if (n := getattr(config, key, None))), 1)
    chosen = getattr(config, "num_experts_per_tok", None) or number
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    table = getattr(base, adapter.learned) if adapter.learned else None
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not out]
    conv = [m for m in model.modules() if type(m).__name__ == "Conv1D"]  # GPT-2's linear layers
    total = sum(size for _, size in sizes.values())
    return Parameters(
        total=total,
        active=total - experts + experts * chosen // number,
        embedding=sum(m.weight.numel() for m in (into, table) if m is not None),
        tied=out is not None and out.weight is into.weight,
        linear=sum(m.in_features + m.out_features for m in linear) + sum(sum(m.weight.shape) for m in conv),
        norms=sum(p.numel() for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters()),
    )


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters, flat or for each layer type, without their scaling."""
    kept = ("rope_theta", "partial_rotary_factor")
    if any(isinstance(value, dict) for value in parameters.values()):
        return {kind: _plain(value) if isinstance(value, dict) else value for kind, value in parameters.items()}
    return {"rope_type": "default"} | {key: parameters[key] for key in kept if key in parameters}


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configs call the number of experts that a token is sent to some of."""


@torch.no_grad()
def _cache(model: Any, rotating: list[bool]) -> tuple[CacheLayer, ...]:
    """Read off the cache that the model itself fills, layer by layer."""
    from transformers import AutoModelForCausalLM

    # Nothing here may look at a value, since tensors on the meta device have none. Eager attention and bfloat16 do not,
    # nor do plain frequencies; those that follow the length would, and a cache is the same under either.
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    if parameters := getattr(text, "rope_parameters", None):
        text.rope_parameters = _plain(parameters)
    with torch.device("meta"):
        twin: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
        ids = torch.zeros(1, 2, dtype=torch.long)
        cache = compat.cache_of(twin(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True))
    if cache is None or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in cache.layers):
        raise UnsupportedError(
            f"{model.config.model_type!r} caches something else than keys and values for every token."
        )
    return tuple(
        CacheLayer(
            numbers_per_token=(layer.keys.numel() + layer.values.numel()) // 2,
            sliding_window=getattr(layer, "sliding_window", None),
            rotates=rotates,
        )
        for layer, rotates in zip(cache.layers, rotating, strict=True)
    )
