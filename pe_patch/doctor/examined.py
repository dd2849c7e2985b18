"""Read a checkpoint or a live model and build its rotary modules as Transformers does."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from .. import compat
from ..adapters.adapter import frequencies_of
from ..checkpoints.load import build_empty as build_empty_model
from ..checkpoints.load import is_adapter, is_gguf, native_config, read_config
from ..core.scheme import AttentionShape
from ..errors import CheckpointError, OptionError, UnsupportedError, nearest
from ..patching.record import RECORD_KEY
from ..patching.targets import unwrap

FILES = ("tokenizer_config.json", "tokenizer.json", "generation_config.json")
"""Files beside the config that state lengths."""


@dataclass(frozen=True)
class BuiltRotation:
    """The frequencies that one rotary module uses for one layer type."""

    name: str
    module: nn.Module
    layer_type: str | None
    """None if the module does not distinguish layer types."""
    inv_freq: Tensor
    """Radians per token, `[rotary_dim / 2]`, in the dtype of the module."""
    attention_factor: float
    """The factor on cos and sin."""

    @property
    def width(self) -> int:
        """The number of rotating dimensions of a head."""
        return 2 * self.inv_freq.shape[-1]


@dataclass
class ExaminedModel:
    """A checkpoint, a config file or a live model."""

    name: str
    raw_config: dict[str, Any]
    """The config as written in the file, or the current config of a live model."""
    config: Any = None
    """The Transformers config; None if Transformers cannot build it."""
    model: PreTrainedModel | None = None
    """The live model, or one built without weights; None if Transformers cannot build it."""
    refusal: Exception | None = None
    """The exception if Transformers cannot build the config or the model."""
    live: bool = False
    folder: Path | None = None
    gguf: Path | None = None
    """The GGUF file, if the checkpoint is one."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The contents of the `FILES` that exist, by name."""

    @property
    def record(self) -> Any:
        """The record of a patch; None without a patch."""
        return self.raw_config.get(RECORD_KEY)

    @property
    def raw_text_config(self) -> dict[str, Any]:
        """The part of the raw config about the language model."""
        inner = self.raw_config.get("text_config")
        return inner if isinstance(inner, dict) else self.raw_config

    @property
    def text_config(self) -> Any:
        """The Transformers config of the language model; None if Transformers cannot build it."""
        return None if self.config is None else self.config.get_text_config(decoder=True)

    @property
    def family(self) -> str:
        """The model type of the language model."""
        return str(getattr(self.text_config, "model_type", None) or self.raw_text_config.get("model_type") or "unknown")

    @property
    def head_dim(self) -> int:
        """The dimensions of one head, or of its rotating part under latent attention; 0 if unknown."""
        config: Any = self.text_config or _Attributes(self.raw_text_config)
        heads = getattr(config, "num_attention_heads", None)
        declared = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
        return int(declared or (config.hidden_size // heads if heads and getattr(config, "hidden_size", None) else 0))

    @property
    def window(self) -> int:
        """`max_position_embeddings` of the language model; 0 if undeclared."""
        maximum = self.raw_text_config.get("max_position_embeddings")
        maximum = getattr(self.text_config, "max_position_embeddings", None) if maximum is None else maximum
        return int(maximum) if isinstance(maximum, int | float) else 0

    def parameters(self, layer_type: str | None) -> dict[str, Any]:
        """Return the rope parameters that Transformers reads for a layer type; for all layers if None."""
        parameters = getattr(self.text_config, "rope_parameters", None) or {}
        return dict((parameters if layer_type is None else parameters.get(layer_type)) or {})

    def rotations(self) -> list[BuiltRotation]:
        """Return the distinct rotations of the rotary modules in the language model."""
        distinct: dict[Any, BuiltRotation] = {}
        for name, module in self.model.named_modules() if self.model is not None else ():
            if "position_schemes" in name:  # modules that a patch keeps aside
                continue
            if self.live or getattr(module, "config", None) is self.text_config:
                for rotation in _rotations_of(name, module, self.live):
                    frequencies = tuple(rotation.inv_freq.tolist())
                    key = (type(module), rotation.layer_type, frequencies, rotation.attention_factor)
                    distinct.setdefault(key, rotation)
        return list(distinct.values())

    def shape(self, rotation: BuiltRotation, theta: float, trained: int) -> AttentionShape:
        """Return the shape from which a scheme computes the frequencies of `rotation`."""
        head = self.head_dim or rotation.width
        return AttentionShape(
            hidden_size=head, num_heads=1, num_key_value_heads=1, head_dim=head, rotary_dim=rotation.width,
            rotary_start=0, rope_theta=theta, trained_length=trained, num_layers=1,
        )  # fmt: skip


class _Attributes:
    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def _rotations_of(name: str, module: nn.Module, live: bool) -> Iterator[BuiltRotation]:
    """Yield the rotations of a module by layer type, if it has any frequencies.

    A module on the meta device has no values, so this builds it again.
    """
    buffers = [key for key, _ in module.named_buffers(recurse=False) if key.endswith("inv_freq")]
    prefixes = [key.removesuffix("inv_freq") for key in buffers if not key.endswith("original_inv_freq")]
    if not prefixes or getattr(module, "config", None) is None:
        return
    built: Any = module if live and not getattr(module, buffers[0]).is_meta else cast(Any, type(module))(module.config)
    for prefix in prefixes:
        layer_type = prefix.removesuffix("_") or None
        rope_type = getattr(built, "rope_type", None)
        if isinstance(rope_type, dict):
            rope_type = rope_type.get(layer_type)
        # The buffer of a length-dependent type changes with each sequence; its original frequencies do not.
        use_original = rope_type in ("dynamic", "longrope")
        inv_freq = frequencies_of(built, layer_type)[use_original].detach().cpu()
        attention_factor = float(getattr(built, f"{prefix}attention_scaling", 1.0))
        yield BuiltRotation(name, built, layer_type, inv_freq, attention_factor)


def from_model(model: Any) -> ExaminedModel:
    """Read a live model, without the wrappers around it."""
    model = unwrap(model)
    config: Any = model.config
    return ExaminedModel(type(model).__name__, config.to_dict(), config, model, live=True)


def from_path(path: str | Path) -> ExaminedModel:
    """Read a checkpoint folder, a GGUF or config file or a hub name, and build the model without weights.

    Raises:
        OptionError: if the path does not exist.
        CheckpointError: if its config cannot be read.
    """
    name, file = str(path), Path(path).expanduser()
    if not file.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".json")):
        raise OptionError(
            f"There is no folder or file {name}; give a checkpoint folder, a GGUF file, a config.json or a hub name."
        )
    if is_adapter(file):  # its config is that of its base, plus the patch
        with quiet():
            examined = from_model(build_empty_model(file))
        examined.name = name
        return examined
    if is_gguf(file):
        examined = ExaminedModel(name, read_config(file), gguf=file)
    elif file.is_file():
        examined = ExaminedModel(name, _read_json(file))
    else:
        raw_config = _read_json(file / "config.json") if (file / "config.json").is_file() else read_config(path)
        examined = ExaminedModel(name, raw_config, folder=file if file.is_dir() else None)
        for companion in FILES:
            if file.is_dir():
                location = file / companion
            else:
                cached = compat.find_file(name, companion)
                location = Path(cached) if cached else file / companion
            if location.is_file():
                examined.files[companion] = _read_json(location)
    with quiet():
        _build(examined)
    return examined


def _with_special_floats(values: dict[str, Any]) -> Any:
    """Return a JSON object, or a float if it encodes one: Transformers writes infinity as {"__float__": "..."}."""
    return float(values["__float__"]) if values.keys() == {"__float__"} else values


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_hook=_with_special_floats)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__}; the config of a model is a JSON object.")
    return content


def _build(examined: ExaminedModel) -> None:
    """Build the Transformers config and a model without weights; record the exception if that fails."""
    try:
        examined.config = _config(examined)
    except Exception as error:  # any exception means that the checkpoint does not load
        examined.refusal = error
        return
    try:
        examined.model = build_empty(examined.config)
        examined.rotations()  # builds the rotary modules, which may raise too
    except Exception as error:
        examined.model, examined.refusal = None, error


def _config(examined: ExaminedModel) -> PreTrainedConfig:
    values = copy.deepcopy(examined.raw_config)
    record = values.get(RECORD_KEY)
    if isinstance(record, dict) and isinstance(record.get("native"), dict):
        del values[RECORD_KEY]
        return native_config(values, record["native"])
    family = values.get("model_type")
    if family not in CONFIG_MAPPING:
        known = f"Transformers has no family {family!r}.{nearest(str(family), CONFIG_MAPPING.keys())}"
        raise UnsupportedError(f"{known} Custom code of the checkpoint is not run." if "auto_map" in values else known)
    return CONFIG_MAPPING[str(family)].from_dict(values)


def build_empty(config: Any) -> Any:
    """Build a model on the meta device: every module and no weights."""
    architecture = getattr(transformers, (config.architectures or [""])[0] or "", None)
    fits = architecture is not None and getattr(architecture, "config_class", None) is type(config)
    with torch.device("meta"):
        return compat.from_config(architecture, config) if fits else AutoModel.from_config(config)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and warnings of Transformers inside the context; the diagnosis reports the faults."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
