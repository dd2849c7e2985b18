"""What is examined: what a config says, and the rotary modules that Transformers builds from it."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from ..adapters.adapter import frequencies_of
from ..checkpoints.load import native_config, read_config
from ..core.scheme import AttentionShape
from ..errors import CheckpointError, OptionError, UnsupportedError, nearest
from ..patching.config import RECORD_KEY
from ..patching.targets import unwrap

FILES = ("tokenizer_config.json", "tokenizer.json", "generation_config.json")
"""Files beside the config that speak of lengths."""


@dataclass(frozen=True)
class Turning:
    """What one rotary module turns one kind of layer by."""

    name: str
    module: nn.Module
    kind: str | None
    """The layer type, or None where all layers turn alike."""
    inv_freq: Tensor
    """Radians per token, `[rotary_dim / 2]`, as it is kept."""
    attention_factor: float
    """What cos and sin are multiplied by."""

    @property
    def width(self) -> int:
        """How many dimensions of a head rotate."""
        return 2 * self.inv_freq.shape[-1]


@dataclass
class Subject:
    """A checkpoint, a config file or a live model."""

    name: str
    said: dict[str, Any]
    """The config as it is written, or as the live model has it now."""
    config: Any = None
    """What Transformers makes of it, None where it cannot."""
    model: PreTrainedModel | None = None
    """Live, or built without weights; None where Transformers cannot build it."""
    refusal: Exception | None = None
    """Why Transformers builds nothing."""
    live: bool = False
    folder: Path | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def record(self) -> Any:
        """The record of a patch, None where there is none."""
        return self.said.get(RECORD_KEY)

    @property
    def text(self) -> dict[str, Any]:
        """The part of what is said that speaks of the language model."""
        inner = self.said.get("text_config")
        return inner if isinstance(inner, dict) else self.said

    @property
    def text_config(self) -> Any:
        """The config of the language model, None where Transformers makes nothing of it."""
        return None if self.config is None else self.config.get_text_config(decoder=True)

    @property
    def family(self) -> str:
        """The model type of the language model."""
        return str(getattr(self.text_config, "model_type", None) or self.text.get("model_type") or "unknown")

    @property
    def head_dim(self) -> int:
        """The size of one head; 0 where nothing says so."""
        config: Any = self.text_config or _Attributes(self.text)
        heads = getattr(config, "num_attention_heads", None)
        own = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
        return int(own or (config.hidden_size // heads if heads and getattr(config, "hidden_size", None) else 0))

    @property
    def window(self) -> int:
        """`max_position_embeddings` of the language model; 0 where it says none."""
        maximum = self.text.get("max_position_embeddings")
        maximum = getattr(self.text_config, "max_position_embeddings", None) if maximum is None else maximum
        return int(maximum) if isinstance(maximum, int | float) else 0

    def parameters(self, kind: str | None) -> dict[str, Any]:
        """The rotary parameters that Transformers reads, of one layer type."""
        found = getattr(self.text_config, "rope_parameters", None) or {}
        return dict((found if kind is None else found.get(kind)) or {})

    def turnings(self) -> list[Turning]:
        """What every rotary module of the language model turns by; of modules that are alike, the first."""
        found: dict[Any, Turning] = {}
        for name, module in self.model.named_modules() if self.model is not None else ():
            if "position_schemes" in name:  # what a patch has put aside
                continue
            if self.live or getattr(module, "config", None) is self.text_config:
                for turning in _turnings(name, module, self.live):
                    key = (type(module), turning.kind, tuple(turning.inv_freq.tolist()), turning.attention_factor)
                    found.setdefault(key, turning)
        return list(found.values())

    def shape(self, turning: Turning, theta: float, trained: int) -> AttentionShape:
        """The sizes that a rotary scheme goes by."""
        head = self.head_dim or turning.width
        return AttentionShape(
            hidden_size=head, num_heads=1, num_key_value_heads=1, head_dim=head, rotary_dim=turning.width,
            rotary_start=0, rope_theta=theta, trained_length=trained, num_layers=1,
        )  # fmt: skip


class _Attributes:
    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def _turnings(name: str, module: nn.Module, live: bool) -> Iterator[Turning]:
    """The frequencies of a module that has any. An empty one is on the meta device, so it is built once more."""
    buffers = [key for key, _ in module.named_buffers(recurse=False) if key.endswith("inv_freq")]
    kinds = [key.removesuffix("inv_freq") for key in buffers if not key.endswith("original_inv_freq")]
    if not kinds or getattr(module, "config", None) is None:
        return
    built: Any = module if live and not getattr(module, buffers[0]).is_meta else type(module)(module.config)  # type: ignore[call-arg]
    for prefix in kinds:
        kind = prefix.removesuffix("_") or None
        rope_type = getattr(built, "rope_type", None)
        by_length = (rope_type.get(kind) if isinstance(rope_type, dict) else rope_type) in ("dynamic", "longrope")
        inv_freq = frequencies_of(built, kind)[by_length].detach().cpu()  # a long sequence leaves others behind
        yield Turning(name, built, kind, inv_freq, float(getattr(built, f"{prefix}attention_scaling", 1.0)))


def from_model(model: Any) -> Subject:
    """A live model, whatever wraps it."""
    head = unwrap(model)
    config: Any = head.config
    return Subject(type(head).__name__, config.to_dict(), config, head, live=True)


def from_path(path: str | Path) -> Subject:
    """A checkpoint folder, a config file or a hub name.

    Raises:
        OptionError: where there is no such thing.
        CheckpointError: where its config cannot be read.
    """
    name, file = str(path), Path(path).expanduser()
    if not file.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".json")):
        raise OptionError(f"There is no folder or file {name}; give a checkpoint folder, a config.json or a hub name.")
    if file.is_file():
        subject = Subject(name, _read_json(file))
    else:
        said = _read_json(file / "config.json") if (file / "config.json").is_file() else read_config(path)
        subject = Subject(name, said, folder=file if file.is_dir() else None)
        for each in FILES:
            found = cached_file(name, each, _raise_exceptions_for_missing_entries=False) if not file.is_dir() else None
            beside = Path(found) if found else file / each
            if beside.is_file():
                subject.files[each] = _read_json(beside)
    with quiet():
        _build(subject)
    return subject


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__}, not the object that a model's config is.")
    return content


def _build(subject: Subject) -> None:
    """Let Transformers make a config and a model without weights; what it refuses is part of the diagnosis."""
    try:
        subject.config = _config(subject)
    except Exception as error:  # whatever it raises, it does not load
        subject.refusal = error
        return
    try:
        subject.model = build_empty(subject.config, subject.said)
        subject.turnings()  # rotary modules are built on the way
    except Exception as error:
        subject.model, subject.refusal = None, error


def _config(subject: Subject) -> PreTrainedConfig:
    values = copy.deepcopy(subject.said)
    record = values.get(RECORD_KEY)
    if isinstance(record, dict) and isinstance(record.get("native"), dict):
        del values[RECORD_KEY]
        return native_config(values, record["native"])
    family = values.get("model_type")
    if family not in CONFIG_MAPPING:
        known = f"Transformers has no family {family!r}.{nearest(str(family), CONFIG_MAPPING.keys())}"
        raise UnsupportedError(f"{known} Code of the checkpoint's own is not run." if "auto_map" in values else known)
    return CONFIG_MAPPING[str(family)].from_dict(values)


def build_empty(config: Any, said: dict[str, Any]) -> Any:
    """A model on the meta device: every module and no weights."""
    architecture = getattr(transformers, (config.architectures or [""])[0] or "", None)
    fits = architecture is not None and getattr(architecture, "config_class", None) is type(config)
    with torch.device("meta"):
        return architecture._from_config(config) if fits else AutoModel.from_config(config)  # type: ignore[union-attr]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Transformers logs on faults, which the diagnosis says better."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
