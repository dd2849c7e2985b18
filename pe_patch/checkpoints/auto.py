"""Load patched models through Transformers' auto classes, by entries in their registries.

`AutoConfig` finds a config class by the model type in the file. The config that it returns has the family's class, and
a marker that leads `AutoModel...` to this module, which loads and patches the model.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from .. import compat
from ..errors import UnsupportedError
from ..mla.protocol import converts
from ..patching import saved_config
from ..patching.record import RECORD_KEY
from ..patching.saved_config import EARLIER_TYPES, MODEL_TYPE, native_of, read_marked
from ..schemes.registry import find_scheme
from .load import apply_record, config_file, load_restored


class SavedConfig(PreTrainedConfig):
    """Config class of all saved patched models in Transformers' registry."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of a patched model, in its family's class, with the patch record."""
        return read_marked(config_dict, **kwargs)


_EARLIER = [type("EarlierConfig", (SavedConfig,), {"model_type": model_type}) for model_type in EARLIER_TYPES]
"""Config classes of models that earlier versions saved."""


class _Loader(compat.BuiltFromConfig):
    """Load a patched model if an auto class finds its config; registered as a model class."""

    auto: Any

    @classmethod
    def from_pretrained(cls, path: Any, *model_args: Any, config: Any, **kwargs: Any) -> Any:
        record = getattr(config, RECORD_KEY)
        native = native_of(config)
        implementation = compat.attention_implementation(config)
        if implementation is not None and not implementation.startswith("pe_"):
            kwargs.setdefault("attn_implementation", implementation)
        return load_restored(path, native, record, cls.auto, *model_args, **kwargs)

    @classmethod
    def build(cls, config: Any, **kwargs: Any) -> Any:
        """Build a patched model with new weights."""
        record = getattr(config, RECORD_KEY)
        model = cls.auto.from_config(native_of(config), **kwargs)
        if converts(find_scheme(record["scheme"], record["options"])[0]) and model.device.type != "meta":
            raise UnsupportedError(
                f"{record['scheme']!r} is computed from a model's weights, so it cannot be built from a config: use "
                "from_pretrained, or build the model under torch.device('meta') to inspect it."
            )
        apply_record(model, record, config_file(config.name_or_path))
        return model


def _auto_classes() -> list[Any]:
    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    return [getattr(transformers, name) for name in names]


_loaders: list[tuple[Any, type]] = []


def _register_models(config_class: type) -> None:
    """Register this config class with all auto classes."""
    if not _loaders:
        _loaders.extend((auto, type(auto.__name__, (_Loader,), {"auto": auto})) for auto in _auto_classes())
    module = config_class.__module__
    config_class.__module__ = __name__  # Transformers 5.17 skips classes whose module is in Transformers
    try:
        for auto, loader in _loaders:
            auto.register(config_class, loader, exist_ok=True)
    finally:
        config_class.__module__ = module


def register() -> None:
    """Register the config classes. pe_patch calls this once on import."""
    for config_class in (SavedConfig, *_EARLIER):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    saved_config.when_made.append(_register_models)
