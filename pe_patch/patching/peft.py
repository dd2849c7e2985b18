"""Make PEFT write and check the record of `peft_record`, by attributes of single objects.

Nothing of PEFT changes. A PEFT model that exists when its model is patched gets its own `save_pretrained` and
`load_adapter` with the patch. One that is built later gets them when it lists its modules, as optimizers, Trainer and
PEFT's own saving do: `named_modules` of the patched model is replaced, and torch passes it the modules around it.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from .. import compat
from ..core.swaps import ABSENT, Bound, Swap, apply_all, bind, with_swaps
from ..errors import OptionError, PePatchError
from .cache_record import PREFIX
from .peft_record import (
    SchemeWeights,
    adapter_fields,
    check_compatible,
    format_record,
    read_record,
    record_on,
    write_record,
)
from .record import RECORD_KEY
from .targets import unwrap

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger("pe_patch")


def load_adapter(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    **peft_options: Any,
) -> PeftModel:
    """Load a PEFT adapter into a model that has the scheme that it was trained under.

    PEFT itself cannot check the scheme, so `PeftModel.from_pretrained` refuses an adapter of a patched model. Adapters
    without a record are loaded too, with a warning if the model is patched.

    Args:
        model: a Transformers model, or a `PeftModel` around one, which gets one more adapter.
        path: the adapter's folder, or its name on the hub.
        adapter_name: the name of the adapter in the model. An adapter that has this name gets the loaded weights.
        is_trainable: whether the adapter, and those weights of the scheme that were trained with it, require gradients.
        **peft_options: passed to `PeftModel.from_pretrained` or `PeftModel.load_adapter` (`revision`, `token`,
            `torch_device` ...).

    Returns:
        The `PeftModel`: a new one around `model`, or the given one.

    Raises:
        MismatchError: the model has another scheme, or none. It is unchanged.
        CheckpointError: the record of the adapter is damaged, or the weights of its scheme are missing.
        PePatchError: `model` is not a Transformers model.
    """
    from peft import PeftModel

    source = str(path)
    if isinstance(model, PeftModel):
        attach(model)
        model.load_adapter(source, adapter_name, is_trainable=is_trainable, **peft_options)
        return model
    target = unwrap(model)
    record, weights = _check(target, source, others=False, hub=peft_options)
    config = None if record is None else adapter_config(source, record, **peft_options)

    def load() -> Any:
        return PeftModel.from_pretrained(
            model, source, adapter_name, is_trainable=is_trainable, config=config, **peft_options
        )

    # The scheme is checked above, so `attach_containers` need not warn about weights that arrive without a check.
    wrapper = with_swaps([Swap.of(target, "named_modules", ABSENT)], load)
    attach(wrapper)
    weights.load(trainable=is_trainable)
    return wrapper


def adapter_config(source: Any, record: dict[str, Any], **hub: Any) -> Any:
    """Return PEFT's config of an adapter whose `adapter_config.json` holds a record.

    Args:
        source: the folder, or the name of a repository on the hub.
        record: the record, as `read_record` returns it.
        **hub: as for `read_record`.
    """
    from peft import PeftConfig

    fields = adapter_fields(source, **hub)
    del fields[RECORD_KEY]
    return PeftConfig.from_peft_type(**{**fields, "peft_type": record["peft_type"]})


def attach(wrapper: Any) -> None:
    """Make a PEFT model save and load adapters through this module. A second call has no effect."""
    _end_pending(wrapper)
    apply_all(_wrapper_hooks(wrapper))


def detach(model: Any) -> None:
    """Remove what `attach` added to the PEFT models in `model`."""
    for wrapper in _wrappers(model):
        _end_pending(wrapper)
        for name, function in WRAPPER_HOOKS.items():
            if _is_bound(wrapper, name, function):
                del wrapper.__dict__[name]


def attach_containers(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Call `named_modules`, and attach each PEFT model around this one that is listing its modules.

    A module that lists its modules passes `memo`, the set of modules that are listed so far, to each submodule. So a
    PEFT model around this one is in it.
    """
    memo = args[0] if args else kwargs.get("memo")
    for wrapper in _peft_models(memo or ()):
        if _patched_model(wrapper) is model and (hooks := _wrapper_hooks(wrapper)):
            apply_all([*hooks, *_pending_hooks(wrapper)])
    return inner(*args, **kwargs)


class PendingSave:
    """A replacement of `save_pretrained` of an adapter's config, which also writes the record.

    PEFT may list the modules while it saves an adapter for the first time. Then `PeftModel.save_pretrained` is running
    already, and the config is the last thing that it saves.
    """

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config

    def __call__(self, save_directory: Any, **kwargs: Any) -> None:
        type(self.config).save_pretrained(self.config, save_directory, **kwargs)
        write_record(self.model, Path(save_directory))

    def __deepcopy__(self, memo: dict[int, Any]) -> PendingSave:
        """Return a replacement for the copied config. PEFT copies configs alone, which must not copy the model."""
        return PendingSave(*(memo.get(id(item), item) for item in (self.model, self.config)))


def warn_unchecked(wrapper: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `load_state_dict`, and warn if PEFT loads an adapter in a call that began before the model was attached."""
    _end_pending(wrapper)
    record = record_on(wrapper)
    if record is not None and kwargs.get("strict") is False:
        logger.warning(
            "Adapter weights were loaded into a model under %s, and pe_patch could not check which scheme they were "
            "trained under, nor load weights of the scheme that were saved with them. "
            "pe_patch.load_adapter(model, path) does both.", format_record(record),
        )  # fmt: skip
    return inner(*args, **kwargs)


def _pending_hooks(wrapper: Any) -> list[Swap]:
    """Return the swaps for a save or load of the PEFT model that may be running now."""
    configs = wrapper.peft_config.values()
    saves = [Swap.of(config, "save_pretrained", PendingSave(_patched_model(wrapper), config)) for config in configs]
    return [*saves, bind(wrapper, "load_state_dict", warn_unchecked)]


def _end_pending(wrapper: Any) -> None:
    """Remove the swaps of `_pending_hooks`. The methods of the PEFT model itself do their work from now on."""
    for config in wrapper.peft_config.values():
        if isinstance(vars(config).get("save_pretrained"), PendingSave):
            del config.__dict__["save_pretrained"]
    if _is_bound(wrapper, "load_state_dict", warn_unchecked):
        del wrapper.__dict__["load_state_dict"]


def _is_bound(module: Any, name: str, function: Callable[..., Any]) -> bool:
    bound = vars(module).get(name)
    return isinstance(bound, Bound) and bound.function is function


def save_wrapper(wrapper: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PeftModel.save_pretrained`, and write the record of each adapter."""
    _end_pending(wrapper)
    result, given, target = (
        inner(*args, **kwargs),
        call_arguments(wrapper, "save_pretrained", args, kwargs),
        _patched_model(wrapper),
    )
    if target is not None and given.get("is_main_process", True):
        folder, selected = Path(given["save_directory"]), given.get("selected_adapters")
        for name in wrapper.peft_config if selected is None else selected:
            write_record(target, folder if name == "default" else folder / name, given.get("state_dict"))
    return result


def load_into_wrapper(wrapper: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PeftModel.load_adapter` for an adapter that fits, and load its weights of the scheme."""
    _end_pending(wrapper)
    given = call_arguments(wrapper, "load_adapter", args, kwargs)
    source, name, trainable = given["model_id"], given["adapter_name"], given.get("is_trainable", False)
    target = _patched_model(wrapper)
    if target is None:
        return inner(*args, **kwargs)
    record, weights = _check(target, source, bool(set(wrapper.peft_config) - {name}), given)
    if record is not None and name not in wrapper.peft_config:  # else PEFT does not read the config
        _add_adapter(wrapper, name, adapter_config(source, record, **given), given)
    result = inner(*args, **kwargs)
    weights.load(trainable)
    return result


def _add_adapter(wrapper: Any, name: str, config: Any, given: dict[str, Any]) -> None:
    """Add an adapter with fresh weights, as `PeftModel.load_adapter` does before it loads them."""
    trainable = given.get("is_trainable", False)
    if config.is_prompt_learning and trainable:
        raise OptionError(
            f"is_trainable=True, but {given['model_id']} is a {config.peft_type.value} adapter, and PEFT cannot train "
            "a saved one further. Leave is_trainable out."
        )
    config.inference_mode = not trainable
    options = {"low_cpu_mem_usage", "autocast_adapter_dtype"} & set(given)
    wrapper.add_adapter(name, config, **{option: given[option] for option in options})
    if trainable:
        wrapper.set_requires_grad(name)


def load_into_model(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PreTrainedModel.load_adapter` for an adapter that fits, and load its weights of the scheme."""
    given = call_arguments(model, "load_adapter", args, kwargs)
    hub = given.get("adapter_kwargs") or {}
    source, name = given.get("peft_model_id"), given.get("adapter_name") or "default"
    if source is None:  # tensors have no record
        return inner(*args, **kwargs)
    others = bool(set(getattr(model, "peft_config", None) or {}) - {name})
    record, weights = _check(model, source, others, {**given, **hub})
    if record is not None and given.get("peft_config") is None:
        given["peft_config"] = adapter_config(source, record, **{**given, **hub})
        if hub:  # Transformers only reads them for a config that it loads itself
            known = getattr(given.get("load_config"), "download_kwargs", None) or {}
            given["download_kwargs"] = {**known, **hub}
    result = inner(**given)
    weights.load(given.get("is_trainable", False))
    return result


def _check(
    target: PreTrainedModel, source: Any, others: bool, hub: dict[str, Any]
) -> tuple[dict[str, Any] | None, SchemeWeights]:
    """Check that an adapter fits a model, and return its record and its weights of the scheme.

    Args:
        target: the model, unwrapped.
        source: the adapter's folder or repository.
        others: the model has other adapters.
        hub: options of a download, among others.
    """
    record = read_record(source, **hub)
    check_compatible(record, target, source)
    return record, SchemeWeights(target, record, source, others, **hub)


def wrapper_swaps(model: Any) -> list[Swap]:
    """Return the swaps by which PEFT wrappers around a model save and load adapters through this module."""
    return [swap for wrapper in _wrappers(model) for swap in _wrapper_hooks(wrapper)]


def _wrappers(model: Any) -> list[Any]:
    """Return the PEFT models in `model`, itself included."""
    if not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel):
        return []
    return _peft_models(model.modules())


def _peft_models(modules: Iterable[Any]) -> list[Any]:
    """Return those modules that are PEFT models; never import PEFT."""
    peft_model = getattr(sys.modules.get("peft"), "PeftModel", None)
    return [] if peft_model is None else [module for module in modules if isinstance(module, peft_model)]


def mark_prompt(wrapper: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PeftModel.get_prompt` and mark a cache of learned keys and values (prefix tuning) as such."""
    prompt = inner(*args, **kwargs)
    if compat.is_cache(prompt):
        setattr(prompt, PREFIX, True)
    return prompt


WRAPPER_HOOKS: dict[str, Callable[..., Any]] = {
    "save_pretrained": save_wrapper,
    "load_adapter": load_into_wrapper,
    "get_prompt": mark_prompt,
}
"""The replaced methods of an attached PEFT model."""


def _wrapper_hooks(wrapper: Any) -> list[Swap]:
    """Return the swaps for one PEFT wrapper, except those that are in place."""
    return [bind(wrapper, name, function) for name, function in WRAPPER_HOOKS.items() if name not in vars(wrapper)]


def _patched_model(model: Any) -> PreTrainedModel | None:
    """Return the Transformers model inside, or None: PEFT also adapts other modules."""
    try:
        return unwrap(model)
    except PePatchError:
        return None


def call_arguments(module: Any, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, including those of `**kwargs`."""
    bound = inspect.signature(getattr(type(module), name)).bind(module, *args, **kwargs).arguments
    del bound["self"]
    return {**bound, **bound.pop("kwargs", {})}
