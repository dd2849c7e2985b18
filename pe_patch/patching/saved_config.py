"""Mark the config of a patched model whose scheme Transformers cannot express, so that only pe_patch can load it.

In memory a marked config behaves like its family's class. In a file its model type is one that Transformers does not
know, and one typed field holds a sentence. `AutoModel` raises at the first; a concrete class such as
`BloomForCausalLM`, which accepts any model type, raises at the second. Both errors name the remedy.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .. import compat
from ..core.swaps import Swap
from ..errors import CheckpointError, PePatchError, UnsupportedError, quoted
from .record import BESIDE, RECORD_KEY, check_record, differences

logger = logging.getLogger("pe_patch")

MODEL_TYPE = "pe_patch (import pe_patch before loading; for vLLM: pip install 'pe_patch[vllm]')"
"""The model type of a marked config in its file. Transformers quotes it in its error, and servers show that error."""
EARLIER_TYPES = (RECORD_KEY, "pe_patch (import pe_patch before loading)")
"""The model types that earlier versions wrote."""
NOTE = (
    "pe_patch saved this model with a positional scheme that Transformers does not have. Load it with "
    "pe_patch.load_patched(folder), or with AutoModelForCausalLM after 'import pe_patch'."
)
"""The sentence for readers of the file, and for the error of a class that ignores the model type."""
TYPED = ("use_cache", "hidden_size", "vocab_size", "num_hidden_layers")
"""Fields that are numbers or booleans in every family that has them, the least important first."""

_classes: dict[type, type] = {}
when_made: list[Callable[[type], None]] = []
"""Functions to call with each class that `marked_class` creates."""


class Marked(compat.StoredImplementation):
    """A mixin for config classes that validates the values from before the patch and saves for pe_patch alone."""

    native_class: type[PreTrainedConfig]
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]]

    @property
    def saved_as(self) -> str:
        """The model type in the file."""
        return MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of a marked file, or of a plain one, as PEFT reads it to compare base models."""
        if str(config_dict.get("model_type")).startswith(RECORD_KEY):
            return read_marked(config_dict, **kwargs)
        return cls.native_class.from_dict(config_dict, **kwargs)

    def validate(self) -> None:
        """Run the family's checks on the values from before the patch, since they reject those of the scheme."""
        native_of(self).validate()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == compat.IMPLEMENTATION:
            scheme = vars(self)[RECORD_KEY]["scheme"]
            raise UnsupportedError(
                f"This {type(self).__name__} belongs to a model that pe_patch patched with {scheme!r}. A model class "
                "alone cannot apply the scheme, so its positions would be wrong. Use "
                "AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_pretrained(folder) or "
                "pe_patch.load_patched(folder); for another attention, call set_attn_implementation(...) of the model "
                "that you patched."
            )
        super().__setattr__(name, value)

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(self.native_class.to_json_string(cast(PreTrainedConfig, self), use_diff))
        return json.dumps(marked_values(values, self.native_class), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.native_class.to_json_string(cast(PreTrainedConfig, self))}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.native_class,), self.__dict__


def _empty(native_class: type[PreTrainedConfig]) -> Any:
    cls: Any = marked_class(native_class)
    return cls.__new__(cls)


def marked_class(native_class: type[PreTrainedConfig]) -> type:
    """Return the class for marked configs of this family, with the family's name, which Transformers looks up."""
    if issubclass(native_class, Marked):
        return native_class
    if native_class not in _classes:
        names = {name: getattr(native_class, name) for name in ("__module__", "__qualname__", "__doc__")}
        marked_family = type(native_class.__name__, (Marked, native_class), {**names, "native_class": native_class})
        _classes[native_class] = marked_family
        for call in when_made:
            call(marked_family)
    return _classes[native_class]


@dataclass
class Mark(Swap):
    """A swap that marks a config, so that only pe_patch reads its file.

    The swap stores the model type and not the marked class, which cannot be pickled.
    """

    @classmethod
    def of(cls, owner: Any, attribute: str = "saved_as", replacement: Any = MODEL_TYPE, direct: bool = False) -> Mark:
        """Return the swap that marks the config `owner`."""
        return cls(owner, attribute, owner.model_type, replacement, direct)

    def current(self) -> Any:
        """Return the model type that is written into the file of the config."""
        marked = native_class_of(self.owner) is not type(self.owner)
        return MODEL_TYPE if marked else self.original

    def put(self, value: Any) -> None:
        """Write this model type into the file of the config from now on."""
        native = native_class_of(self.owner)
        self.owner.__class__ = marked_class(native) if value == MODEL_TYPE else native


def native_class_of(config: Any) -> type[PreTrainedConfig]:
    """Return the family's class of a config, marked or not."""
    return config.native_class if isinstance(config, Marked) else type(config)


def native_of(config: Any) -> Any:
    """Return a copy of a patched model's config with the values from before the patch and without the record."""
    native_values = _record_of(config.__dict__)["native"]
    native = unmarked(copy.deepcopy(config))
    for each in (native, *(value for value in vars(native).values() if isinstance(value, PreTrainedConfig))):
        name = str(vars(each).get(compat.IMPLEMENTATION))
        if name.startswith("pe_"):  # SDPA is Transformers' default, and not every family accepts its name
            compat.store_implementation(each, None if name == "pe_sdpa" else name.removeprefix("pe_"))
    patched = native if (name := native_values.get("config")) is None else getattr(native, name)
    for key in BESIDE:
        if key in native_values and native_values[key] is None and key == "max_position_embeddings":
            if hasattr(patched, key):
                delattr(patched, key)
        elif key in native_values:
            setattr(patched, key, copy.deepcopy(native_values[key]))
    return native


def write_back(config: Any) -> list[str]:
    """Restore the values that a patch wrote into its config, in place, and return the changes that this reverts.

    The model computes by its patch even if the config was changed, so a file with other values would contradict itself.
    """
    record = config.__dict__.get(RECORD_KEY)
    if not isinstance(record, dict) or not isinstance(record.get("native"), dict):
        return []
    inner = record["native"].get("config")
    patched: Any = config if inner is None else getattr(config, inner)
    names = {str(patched.attribute_map.get(key, key)): str(key) for key in BESIDE}
    changed = []
    for stored, value in record.get("written", {}).items():
        key: Any = names.get(stored, stored)
        current = json.loads(json.dumps(getattr(patched, key, None), default=str))
        if apart := differences(key, value, current):
            vars(patched)[stored] = copy.deepcopy(value)
            changed += [f"{where}={quoted(theirs)} (it is {quoted(ours)})" for where, ours, theirs in apart]
    return changed


def sync_before_saving(model: Any) -> None:
    """Make the patch and the config of a model agree with what it computes, before they are saved.

    Layers may have been removed, and the config changed, after the patch.
    """
    for patch in [module.__dict__["pe_patch"] for module in model.modules() if "pe_patch" in module.__dict__]:
        patch.renumber()
    if changed := write_back(model.config):
        logger.warning(
            "The config was changed after patch_model: %s. The model does not compute by it, so it is saved as it was. "
            "To change the positions, call patch_model(model, ..., on_existing='replace').",
            "; ".join(changed),
        )


def _record_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the record in the values of a config.

    Raises:
        PePatchError: it was changed or removed.
    """
    record = values.get(RECORD_KEY)
    if not isinstance(record, dict) or not isinstance(record.get("native"), dict):
        raise PePatchError(
            f"config.{RECORD_KEY}, the record of the patch, is {quoted(record)}: it was changed after patch_model, and "
            "a model saved without it cannot be loaded. Call unpatch_model(model) and patch it again."
        )
    return record


def unmarked(config: Any) -> Any:
    """Remove the record and the mark from a config and from its sub-configs, in place, and return it."""
    for each in (config, *(value for value in config.__dict__.values() if isinstance(value, PreTrainedConfig))):
        each.__dict__.pop(RECORD_KEY, None)
        each.__class__ = native_class_of(each)
    return config


def marked_values(values: dict[str, Any], native_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the values for the file of a marked config, with the notes that stop Transformers from reading it."""
    record, values = copy.deepcopy(_record_of(values)), dict(values)
    native = record["native"]
    patched, patched_class = values, native_class
    if (name := native.get("config")) is not None:
        patched = values[name] = {key: value for key, value in values[name].items() if key != RECORD_KEY}
        patched_class = (
            CONFIG_MAPPING[patched["model_type"]] if patched.get("model_type") in CONFIG_MAPPING else native_class
        )
    native["architectures"] = values.get("architectures")
    fields = getattr(patched_class, "__dataclass_fields__", {})
    field = next((field for field in TYPED if field in fields or field in patched), TYPED[0])
    native["hidden"] = {field: patched[field]} if field in patched else {}
    patched[field] = NOTE
    return {**values, "architectures": NOTE, "model_type": MODEL_TYPE, RECORD_KEY: record}


def native_values(stored: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config from before the patch.

    Args:
        stored: the values in the file.
        record: the record of the patch, already checked.
    """
    native, values = record["native"], {key: value for key, value in stored.items() if key != RECORD_KEY}
    patched = values
    if "config" in native:
        patched = {key: value for key, value in values[native["config"]].items() if key != RECORD_KEY}
        values[native["config"]] = patched
    for field in (field for field in TYPED if str(patched.get(field)).startswith(RECORD_KEY)):
        del patched[field]
    patched |= native.get("hidden", {})
    if "architectures" in native:
        values["architectures"] = native["architectures"]
    if "rope_parameters" in native:
        patched["rope_parameters"] = copy.deepcopy(native["rope_parameters"])
    family = patched.get("model_type") if patched is not values else native["model_type"]
    renamed = CONFIG_MAPPING[family].attribute_map if family in CONFIG_MAPPING else {}
    window = renamed.get("max_position_embeddings", "max_position_embeddings")  # `model_max_length`, for example
    if native.get("max_position_embeddings", 0) is None:
        patched.pop(window, None)
    elif "max_position_embeddings" in native:
        patched[window] = native["max_position_embeddings"]
    return {**values, "model_type": native["model_type"]}


def mark(config: Any, stored: dict[str, Any], record: dict[str, Any]) -> Any:
    """Write a patch's values and record into a native config, mark it, and return it; in place.

    Args:
        config: the native config.
        stored: the values in the file of the patched model.
        record: the record of the patch.
    """
    name = record["native"].get("config")
    patched, values = (config, stored) if name is None else (getattr(config, name), stored[name])
    for key in BESIDE:
        if (written := patched.attribute_map.get(key, key)) in values:
            setattr(patched, key, copy.deepcopy(values[written]))
    setattr(config, RECORD_KEY, record)
    for each in (config, patched):
        each.__class__ = marked_class(type(each))
    return config


def configured(native_class: Any, values: dict[str, Any], source: str, **kwargs: Any) -> Any:
    """Return a config with these values.

    Raises:
        CheckpointError: the family rejects them; the message names the file.
    """
    try:
        return native_class.from_dict(values, **kwargs)
    except (StrictDataclassError, AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source} is not a config that {native_class.__name__} takes: {' '.join(str(error).split())}"
        ) from error


def read_marked(config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """Return the marked config of a saved patched model, with its record.

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
