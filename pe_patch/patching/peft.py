"""Make PEFT write and check the record of `peft_record`, without replacing any function of PEFT.

Three additions take effect when PEFT is imported: its table of adapter types gets the entry `PE_PATCH`, a torch hook
runs when a PEFT model is built, and that instance then saves and loads through this module. They have no effect on a
model without a patch and an adapter without a record.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from .. import compat
from ..core.swaps import Bound, Swap, apply_all, bind
from ..errors import CheckpointError, OptionError, PePatchError
from .cache_record import PREFIX
from .peft_record import TYPE, SchemeWeights, check_compatible, checked, read_record, scheme_modules, write_record
from .record import RECORD_KEY
from .saved_config import write_back
from .targets import unwrap

logger = logging.getLogger("pe_patch")

SOURCE = "pe_source"
"""Attribute of a config with the folder that it was read from, for messages."""


class RecordedConfig:
    """The entry `PE_PATCH` in PEFT's table: create a config of the recorded type, with the record as an attribute."""

    def __new__(cls, **fields: Any) -> Any:
        from peft import PeftConfig

        record = checked(fields.pop(RECORD_KEY, None), fields.get("base_model_name_or_path"))
        if record is None:
            raise CheckpointError(f"An adapter config of peft_type {TYPE} holds no record of its scheme.")
        config = PeftConfig.from_peft_type(**{**fields, "peft_type": record["peft_type"]})
        config.__dict__[RECORD_KEY] = record
        return config

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the config of a saved adapter, with the name of its source."""
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(*args, **kwargs)
        config.__dict__[SOURCE] = args[0]
        return config


def inject_adapter(
    tuner: Any, inner: Callable[..., Any], model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Call PEFT's `inject_adapter` after a check that the adapter fits the model's scheme."""
    config, target = tuner.peft_config[adapter_name], _patched_model(model)
    if target is not None:
        if (record := config.__dict__.get(RECORD_KEY)) is not None:
            check_compatible(record, target, config.__dict__.get(SOURCE))
        _refuse_copies(target, config)
    return inner(model, adapter_name, *args, **kwargs)


def _refuse_copies(target: PreTrainedModel, config: Any) -> None:
    """Raise `OptionError` if `modules_to_save` names the scheme: PEFT would train a copy that nothing reads."""
    schemes = scheme_modules(target)
    if schemes is None:
        return
    whole = {schemes, *schemes.children()}
    names = [name for name, module in target.named_modules() if module in whole or schemes in module.children()]
    for wanted in getattr(config, "modules_to_save", None) or ():
        if any(f".{name}".endswith(f".{wanted}") for name in names):
            raise OptionError(
                f"modules_to_save={wanted!r} would copy the scheme, and the copy would have no effect. Leave it out, "
                "and call pe_patch.patching.peft_record.train_scheme(model) after get_peft_model: the scheme's weights "
                "then train in place and are saved with the adapter."
            )


def save_wrapper(wrapper: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PeftModel.save_pretrained`, and write the record of each adapter."""
    result, given, target = (
        inner(*args, **kwargs),
        _given(wrapper, "save_pretrained", args, kwargs),
        _patched_model(wrapper),
    )
    if target is not None and given.get("is_main_process", True):
        folder, selected = Path(given["save_directory"]), given.get("selected_adapters")
        for name in wrapper.peft_config if selected is None else selected:
            write_record(target, folder if name == "default" else folder / name, given.get("state_dict"))
    return result


def load_into_wrapper(wrapper: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PeftModel.load_adapter` for an adapter that fits, and load its weights of the scheme."""
    given = _given(wrapper, "load_adapter", args, kwargs)
    return _load(wrapper, inner, given["model_id"], given["adapter_name"], given, args, kwargs)


def load_into_model(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PreTrainedModel.load_adapter` for an adapter that fits, and load its weights of the scheme."""
    given = _given(model, "load_adapter", args, kwargs)
    given |= given.get("adapter_kwargs") or {}
    source, name = given.get("peft_model_id"), given.get("adapter_name") or "default"
    if source is None:  # tensors have no record
        return inner(*args, **kwargs)
    return _load(model, inner, source, name, given, args, kwargs)


def _load(
    model: Any, inner: Callable[..., Any], source: Any, name: str, given: dict[str, Any], args: Any, kwargs: Any
) -> Any:
    target = _patched_model(model)
    if target is None:
        return inner(*args, **kwargs)
    record = read_record(source, **given)
    check_compatible(record, target, source)
    others = bool(set(getattr(model, "peft_config", None) or {}) - {name})
    weights = SchemeWeights(target, record, source, others, **given)
    result = inner(*args, **kwargs)
    weights.load(trainable=given.get("is_trainable", False))
    return result


def _sync_before_saving(model: Any) -> None:
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


def save_base(base: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PreTrainedModel.save_pretrained` of a base model."""
    _sync_before_saving(base)
    return inner(*args, **kwargs)


def save_model(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PreTrainedModel.save_pretrained`, and write the record if it saved an adapter from `add_adapter`."""
    _sync_before_saving(model)
    result, given = inner(*args, **kwargs), _given(model, "save_pretrained", args, kwargs)
    if getattr(model, "_hf_peft_config_loaded", False) and given.get("is_main_process", True):
        write_record(model, Path(given["save_directory"]), given.get("state_dict"))
    return result


def saving_swaps(model: PreTrainedModel, base: PreTrainedModel) -> list[Swap]:
    """Return the swaps for saving a model, and for loading adapters without a PEFT wrapper."""
    swaps = [bind(model, "save_pretrained", save_model), bind(model, "load_adapter", load_into_model)]
    return swaps if base is model else [*swaps, bind(base, "save_pretrained", save_base)]


def wrapper_swaps(model: Any) -> list[Swap]:
    """Return the swaps by which PEFT wrappers around a model save and load adapters through this module."""
    if "peft" not in sys.modules or not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel):
        return []
    from peft import PeftModel

    return [swap for module in model.modules() if isinstance(module, PeftModel) for swap in _wrapper_hooks(module)]


def mark_prompt(wrapper: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PeftModel.get_prompt` and mark a cache of learned keys and values (prefix tuning) as such."""
    prompt = inner(*args, **kwargs)
    if compat.is_cache(prompt):
        setattr(prompt, PREFIX, True)
    return prompt


def _wrapper_hooks(wrapper: Any) -> list[Swap]:
    """Return the swaps for one PEFT wrapper, except those that are in place."""
    functions = {"save_pretrained": save_wrapper, "load_adapter": load_into_wrapper, "get_prompt": mark_prompt}
    return [bind(wrapper, name, function) for name, function in functions.items() if name not in vars(wrapper)]


def _patched_model(model: Any) -> PreTrainedModel | None:
    """Return the Transformers model inside, or None: PEFT also adapts other modules."""
    try:
        return unwrap(model)
    except PePatchError:
        return None


def _given(module: Any, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, including those of `**kwargs`."""
    bound = inspect.signature(getattr(type(module), name)).bind(module, *args, **kwargs).arguments
    del bound["self"]
    return {**bound, **bound.pop("kwargs", {})}


def _on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if name not in ("base_model", "model"):
        return
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if name == "base_model" and isinstance(module, PeftModel):
        apply_all(_wrapper_hooks(module))
    elif name == "model" and isinstance(module, BaseTuner):
        setattr(module, "inject_adapter", Bound(module, "inject_adapter", inject_adapter))  # noqa: B010


def _register() -> None:
    from peft import mapping

    types: dict[Any, Any] = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    if TYPE not in types:
        types[TYPE] = RecordedConfig
        register_module_module_registration_hook(_on_registration)


class _RegisteringLoader(Loader):
    """A loader that runs a module's own loader and then `_register`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.inner
        self.inner.exec_module(module)
        _register()


class _WhenImported(MetaPathFinder):
    """A finder that finds no module itself, but makes PEFT's import call `_register`."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def listen() -> None:
    """Register with PEFT now or when it is imported. pe_patch calls this once, at import."""
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())
