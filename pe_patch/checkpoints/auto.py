"""Loading patched models by Transformers' auto classes: entries in their registries, made when pe_patch is imported.

`AutoConfig` finds a class by the model type in the file and asks it for the config. What comes back is of the family's
own class, but for the mark that leads `AutoModel...` here, where the model is loaded and patched.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from ..errors import UnsupportedError
from ..mla.protocol import converts
from ..patching import saved_config
from ..patching.record import RECORD_KEY
from ..patching.saved_config import MODEL_TYPE, native_of, read_marked
from ..schemes.registry import find_scheme
from .load import apply_record, config_file, load_restored


class SavedConfig(PreTrainedConfig):
    """Represent every saved patched model in the registry of configs."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of a patched model: of its family's class, with the record."""
        return read_marked(config_dict, **kwargs)


class EarlierConfig(SavedConfig):
    """The same for what earlier versions wrote."""

    model_type = RECORD_KEY


class _Loader:
    """Load a patched model when an auto class looks up its config; registered as a model class."""

    auto: Any

    @classmethod
    def from_pretrained(cls, path: Any, *model_args: Any, config: Any, **kwargs: Any) -> Any:
        record = getattr(config, RECORD_KEY)
        native = native_of(config)
        if config._attn_implementation is not None and not config._attn_implementation.startswith("pe_"):
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        return load_restored(path, native, record, cls.auto, *model_args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Return a patched model with new weights."""
        record = getattr(config, RECORD_KEY)
        model = cls.auto.from_config(native_of(config), **kwargs)
        if converts(find_scheme(record["scheme"], record["options"])[0]) and model.device.type != "meta":
            raise UnsupportedError(
                f"{record['scheme']!r} is made from the weights of a model, so it cannot be built from a config: use "
                "from_pretrained, or build the model under torch.device('meta') to look at it."
            )
        apply_record(model, record, config_file(config.name_or_path))
        return model


def _auto_classes() -> list[Any]:
    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    return [getattr(transformers, name) for name in names]


_loaders: list[tuple[Any, type]] = []


def _register_models(config_class: type) -> None:
    """Have every auto class load configs of this class here."""
    if not _loaders:
        _loaders.extend((auto, type(auto.__name__, (_Loader,), {"auto": auto})) for auto in _auto_classes())
    for auto, loader in _loaders:
        auto.register(config_class, loader, exist_ok=True)


def register() -> None:
    """Make the entries. Called once, when pe_patch is imported."""
    for config_class in (SavedConfig, EarlierConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    saved_config.when_made.append(_register_models)
