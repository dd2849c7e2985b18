"""The config of a patched model whose scheme Transformers cannot express: valid, and saved for pe_patch alone.

The object keeps its family's class in all but what is written to a file. There the model type is one that Transformers
does not know, and one typed field holds a sentence: `AutoModel` stops at the first, a concrete class such as
`BloomForCausalLM`, which takes any model type, at the second. Both messages say what to do.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..core.swaps import Swap
from ..errors import CheckpointError, PePatchError, UnsupportedError, quoted
from .record import BESIDE, RECORD_KEY, check_record, differences

MODEL_TYPE = "pe_patch (import pe_patch before loading)"
"""The model type of such a config in its file. Transformers quotes it in its error."""
NOTE = (
    "pe_patch saved this model with a positional scheme that Transformers does not have. Load it with "
    "pe_patch.load_patched(folder), or with AutoModelForCausalLM after 'import pe_patch'."
)
"""For readers of the file, and for the error of a class that is loaded without looking at the model type."""
TYPED = ("use_cache", "hidden_size", "vocab_size", "num_hidden_layers")
"""Fields that are numbers or truth values in every family that has them, the least important first."""

ATTENTION = "_attn_implementation_internal"
"""Attribute of a config that a model sets while it is being constructed. `Swap` writes it without asking."""

_classes: dict[type, type] = {}
when_made: list[Callable[[type], None]] = []
"""Called with each class that `marked_class` makes."""


class Marked:
    """Mixed into a config class: validates the values from before the patch, and writes what only pe_patch reads."""

    native_class: type[PreTrainedConfig]

    @property
    def saved_as(self) -> str:
        """The model type in the file."""
        return MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a file of its own kind, as PEFT does to compare a model with the base it came from."""
        if str(config_dict.get("model_type")).startswith(RECORD_KEY):
            return read_marked(config_dict, **kwargs)
        return cls.native_class.from_dict(config_dict, **kwargs)

    def validate(self) -> None:
        """Run the family's own checks on the values from before the patch, since they know nothing of the scheme."""
        native_of(self).validate()

    @property
    def _attn_implementation(self) -> Any:
        """The name of the attention, as Transformers keeps it."""
        return vars(self).get(ATTENTION)

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        whole = value.get("", self._attn_implementation) if isinstance(value, dict) else value
        vars(self)[ATTENTION] = whole
        for name in self.sub_configs:  # type: ignore[attr-defined]
            if (part := getattr(self, name, None)) is not None:
                part._attn_implementation = value.get(name, whole) if isinstance(value, dict) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == ATTENTION:
            scheme = vars(self)[RECORD_KEY]["scheme"]
            raise UnsupportedError(
                f"This {type(self).__name__} is of a model that pe_patch patched with {scheme!r}, and the class of a "
                "model alone cannot apply the scheme, so its positions would be wrong. Use "
                "AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_pretrained(folder) or "
                "pe_patch.load_patched(folder); for another attention, call set_attn_implementation(...) of the model "
                "that you patched."
            )
        super().__setattr__(name, value)

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(self.native_class.to_json_string(self, use_diff))  # type: ignore[arg-type]
        return json.dumps(marked_values(values, self.native_class), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.native_class.to_json_string(self)}"  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.native_class,), self.__dict__


def _empty(native_class: type[PreTrainedConfig]) -> Any:
    cls: Any = marked_class(native_class)
    return cls.__new__(cls)


def marked_class(native_class: type[PreTrainedConfig]) -> type:
    """Return the class of a marked config of this family. It has the family's name, by which Transformers looks up."""
    if issubclass(native_class, Marked):
        return native_class
    if native_class not in _classes:
        names = {name: getattr(native_class, name) for name in ("__module__", "__qualname__", "__doc__")}
        made = type(native_class.__name__, (Marked, native_class), {**names, "native_class": native_class})
        _classes[native_class] = made
        for call in when_made:
            call(made)
    return _classes[native_class]


@dataclass
class Mark(Swap):
    """Have a config written so that only pe_patch reads it. The class is not kept, since it could not be pickled."""

    @classmethod
    def of(cls, owner: Any, attribute: str = "saved_as", replacement: Any = MODEL_TYPE, direct: bool = False) -> Mark:
        return cls(owner, attribute, owner.model_type, replacement, direct)

    def current(self) -> Any:
        """Return the model type that the config is written with."""
        marked = native_class_of(self.owner) is not type(self.owner)
        return MODEL_TYPE if marked else self.original

    def put(self, value: Any) -> None:
        """Have the config written with this model type."""
        native = native_class_of(self.owner)
        self.owner.__class__ = marked_class(native) if value == MODEL_TYPE else native


def native_class_of(config: Any) -> type[PreTrainedConfig]:
    """Return the class that the family gives its configs."""
    return config.native_class if isinstance(config, Marked) else type(config)


def native_of(config: Any) -> Any:
    """Return a copy of a patched model's config with the values from before the patch and without the record."""
    native_values = _record_of(config.__dict__)["native"]
    native = unmarked(copy.deepcopy(config))
    for each in (native, *(value for value in vars(native).values() if isinstance(value, PreTrainedConfig))):
        name = str(vars(each).get(ATTENTION))
        if name.startswith("pe_"):  # SDPA is what Transformers tries by itself, and not every family takes its name
            vars(each)[ATTENTION] = None if name == "pe_sdpa" else name.removeprefix("pe_")
    part = native if (name := native_values.get("config")) is None else getattr(native, name)
    for key in BESIDE:
        if key in native_values and native_values[key] is None and key == "max_position_embeddings":
            if hasattr(part, key):
                delattr(part, key)
        elif key in native_values:
            setattr(part, key, copy.deepcopy(native_values[key]))
    return native


def write_back(config: Any) -> list[str]:
    """Give a patched model's config the values that the patch wrote into it, and return what was changed since.

    The model computes by its patch, whatever the config says: a file with other values would contradict itself.
    """
    record = config.__dict__.get(RECORD_KEY)
    if not isinstance(record, dict) or not isinstance(record.get("native"), dict):
        return []
    inner = record["native"].get("config")
    part: Any = config if inner is None else getattr(config, inner)
    names = {str(part.attribute_map.get(key, key)): str(key) for key in BESIDE}
    changed = []
    for stored, value in record.get("written", {}).items():
        key: Any = names.get(stored, stored)
        found = json.loads(json.dumps(getattr(part, key, None), default=str))
        if apart := differences(key, value, found):
            vars(part)[stored] = copy.deepcopy(value)
            changed += [f"{where}={quoted(theirs)} (it is {quoted(ours)})" for where, ours, theirs in apart]
    return changed


def _record_of(values: dict[str, Any]) -> dict[str, Any]:
    record = values.get(RECORD_KEY)
    if not isinstance(record, dict) or not isinstance(record.get("native"), dict):
        raise PePatchError(
            f"config.{RECORD_KEY}, the record of the patch, is {quoted(record)}: it was changed after patch_model, and "
            "a model saved without it cannot be loaded. Call unpatch_model(model) and patch it again."
        )
    return record


def unmarked(config: Any) -> Any:
    """Take the record and the mark off a config and off its parts, in place; returns it."""
    for each in (config, *(value for value in config.__dict__.values() if isinstance(value, PreTrainedConfig))):
        each.__dict__.pop(RECORD_KEY, None)
        each.__class__ = native_class_of(each)
    return config


def marked_values(values: dict[str, Any], native_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the values of a config as they are written: those that Transformers must not read say so."""
    record, values = copy.deepcopy(_record_of(values)), dict(values)
    native = record["native"]
    part, part_class = values, native_class
    if (name := native.get("config")) is not None:
        part = values[name] = {key: value for key, value in values[name].items() if key != RECORD_KEY}
        part_class = CONFIG_MAPPING[part["model_type"]] if part.get("model_type") in CONFIG_MAPPING else native_class
    native["architectures"] = values.get("architectures")
    fields = getattr(part_class, "__dataclass_fields__", {})
    field = next((field for field in TYPED if field in fields or field in part), TYPED[0])
    native["hidden"] = {field: part[field]} if field in part else {}
    part[field] = NOTE
    return {**values, "architectures": NOTE, "model_type": MODEL_TYPE, RECORD_KEY: record}


def native_values(stored: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config as they were before the patch, from those in its file and a record that holds."""
    native, values = record["native"], {key: value for key, value in stored.items() if key != RECORD_KEY}
    part = values
    if "config" in native:
        part = {key: value for key, value in values[native["config"]].items() if key != RECORD_KEY}
        values[native["config"]] = part
    for field in (field for field in TYPED if str(part.get(field)).startswith(RECORD_KEY)):
        del part[field]
    part |= native.get("hidden", {})
    if "architectures" in native:
        values["architectures"] = native["architectures"]
    if "rope_parameters" in native:
        part["rope_parameters"] = copy.deepcopy(native["rope_parameters"])
    if native.get("max_position_embeddings", 0) is None:
        part.pop("max_position_embeddings", None)
    elif "max_position_embeddings" in native:
        part["max_position_embeddings"] = native["max_position_embeddings"]
    return {**values, "model_type": native["model_type"]}


def mark(config: Any, stored: dict[str, Any], record: dict[str, Any]) -> Any:
    """Give a native config the values and the record of the patch that it was saved with, in place; returns it."""
    name = record["native"].get("config")
    part, values = (config, stored) if name is None else (getattr(config, name), stored[name])
    for key in BESIDE:
        if (written := part.attribute_map.get(key, key)) in values:
            setattr(part, key, copy.deepcopy(values[written]))
    setattr(config, RECORD_KEY, record)
    for each in (config, part):
        each.__class__ = marked_class(type(each))
    return config


def configured(native_class: Any, values: dict[str, Any], source: str, **kwargs: Any) -> Any:
    """Return the config of these values; an error that names the file where the family does not take them."""
    try:
        return native_class.from_dict(values, **kwargs)
    except (StrictDataclassError, AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source} is not a config that {native_class.__name__} takes: {' '.join(str(error).split())}"
        ) from error


def read_marked(config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """Return the config of a saved patched model: of its family's class, marked, with the record.

    Args:
        config_dict: the values in its file.
        **kwargs: those of `PreTrainedConfig.from_dict`.

    Raises:
        CheckpointError: the record is damaged or contradicts the config.
    """
    source = f"{kwargs.get('name_or_path') or '.'}/config.json"
    record = check_record(config_dict.get(RECORD_KEY), config_dict, source)
    unused = kwargs.pop("return_unused_kwargs", False)
    values = native_values(config_dict, record)
    native_class = CONFIG_MAPPING[record["native"]["model_type"]]
    config, left = configured(native_class, values, source, return_unused_kwargs=True, **kwargs)
    mark(config, config_dict, record)
    return (config, left) if unused else config
