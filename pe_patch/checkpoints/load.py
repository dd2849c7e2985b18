"""Load a model in each of its forms: saved, saved while patched, an adapter on its base, and a GGUF file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .. import compat
from ..errors import CheckpointError, OptionError, PePatchError, UnknownNameError, UnsupportedError, quoted
from ..mla.protocol import converts
from ..patching import peft_record
from ..patching.api import find_patch, restore_patch
from ..patching.peft import adapter_config, load_adapter
from ..patching.record import RECORD_KEY, check_record, framework_of
from ..patching.saved_config import configured, native_values
from ..patching.targets import unwrap
from ..schemes.registry import find_scheme
from .gguf_file import build_empty_gguf, is_gguf, load_gguf, load_gguf_tokenizer, read_gguf_config

logger = logging.getLogger("pe_patch")

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Keyword arguments of `from_pretrained` that locate the files."""
AUTO_CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
"""Auto class for each `task_type` of an adapter."""


def load_patched(path: str | Path, **from_pretrained_kwargs: Any) -> Any:
    """Load a model that was saved while patched, including its patch, or a PEFT adapter with its base model.

    For an adapter's folder, this loads the base model that its config names, patches it as it was when the adapter was
    saved, and returns a `PeftModel`. The base may be the original model or one that was saved while patched.
    `load_adapter` adds an adapter to a model that you patched.

    Args:
        path: a local folder or a hub name.
        **from_pretrained_kwargs: passed to the model class's `from_pretrained` (dtype, device_map ...); `is_trainable`
            applies to the adapter.

    Returns:
        The patched model, or a `PeftModel`.

    Raises:
        CheckpointError: the checkpoint does not exist, has no patch, or is damaged.
        MismatchError: the base of an adapter was saved under another scheme.
    """
    if is_adapter(path):
        if peft_record.read_record(path) is None:
            raise CheckpointError(
                f"The adapter {path} was not saved from a patched model; load it with peft.AutoPeftModelForCausalLM, "
                "and patch the result to use a scheme."
            )
        return load_adapted(path, **from_pretrained_kwargs)
    stored, source = read_config(path, **_hub(from_pretrained_kwargs)), config_file(path)
    if RECORD_KEY not in stored:
        if str(stored.get("model_type")).startswith(RECORD_KEY):
            raise CheckpointError(
                f"{source} lacks {RECORD_KEY!r}, the record of its patch (model_type is {stored['model_type']!r}). "
                "Restore the file as it was saved."
            )
        raise CheckpointError(f"{path} was not saved from a patched model; load it with AutoModelForCausalLM instead.")
    record = check_record(stored[RECORD_KEY], stored, source)
    config = native_config(stored, record["native"], source)
    architecture = (config.architectures or [None])[0]
    model_class = getattr(transformers, architecture or "", AutoModelForCausalLM)
    return load_restored(path, config, record, model_class, **from_pretrained_kwargs)


def load_model(path: str | Path, auto_class: Any = AutoModelForCausalLM, **from_pretrained_kwargs: Any) -> Any:
    """Load a model in any form: saved, saved while patched, a PEFT adapter, or a GGUF file.

    An adapter is merged into its base, and the weights of a GGUF file become floats, so that the result is an ordinary
    model. Custom code of a checkpoint is not run without `trust_remote_code=True`.

    Args:
        path: a local folder, a GGUF file or a hub name.
        auto_class: the auto class of a model without a patch.
        **from_pretrained_kwargs: passed to the model class's `from_pretrained` (dtype, attn_implementation ...).

    Raises:
        CheckpointError: the checkpoint does not exist, or is damaged.
        UnsupportedError: the model needs custom code, its adapter cannot be merged, or its GGUF file cannot be read.
        MissingPackageError: the package that reads GGUF files is not installed.
    """
    if is_gguf(path):
        return load_gguf(path, auto_class, **from_pretrained_kwargs)
    if is_adapter(path):
        return _merged(path, load_adapted(path, **from_pretrained_kwargs))
    stored = read_config(path, **_hub(from_pretrained_kwargs))
    if not from_pretrained_kwargs.get("trust_remote_code"):
        check_no_custom_code(stored, str(path))
    if RECORD_KEY in stored:
        return load_patched(path, **from_pretrained_kwargs)
    # Without trust_remote_code=False, Transformers would ask on the terminal whether to run code of the checkpoint.
    return auto_class.from_pretrained(path, **{"trust_remote_code": False, **from_pretrained_kwargs})


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a model in any form that `load_model` takes; an adapter without one has its base's."""
    if is_gguf(path):
        return load_gguf_tokenizer(path)
    if is_adapter(path) and compat.find_file(str(path), "tokenizer_config.json") is None:
        return load_tokenizer(_base_of(path, *_adapter(path)))
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_restored(
    path: str | Path,
    config: Any,
    record: dict[str, Any],
    model_class: Any,
    *model_args: Any,
    output_loading_info: bool = False,
    **from_pretrained_kwargs: Any,
) -> Any:
    """Load the weights of a patched model into a Transformers class, and patch it from its record.

    Args:
        path: a local folder or a hub name.
        config: the original config, from before the patch.
        record: a checked record of the patch.
        model_class: a model class or an auto class.
        *model_args: passed to `from_pretrained`.
        output_loading_info: also return Transformers' report of missing and unexpected keys.
        **from_pretrained_kwargs: passed to `from_pretrained`.

    Raises:
        CheckpointError: the weights are damaged, or the record does not fit the model.
    """
    try:
        with _without_load_report():  # it would list weights that the patch removed or added
            loaded: Any = model_class.from_pretrained(
                path, *model_args, config=config, output_loading_info=True, **from_pretrained_kwargs
            )
    except (SafetensorError, json.JSONDecodeError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"The weights in {path} are missing, damaged or do not fit its config: {error}"
        ) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        given = ", ".join(f"{key}={quoted(value)}" for key, value in from_pretrained_kwargs.items()) or "no arguments"
        raise CheckpointError(
            f"{config_file(path)} cannot be built as {model_class.__name__} with {given}: {type(error).__name__}: "
            f"{error}"
        ) from error
    model, report = loaded
    before = set(unwrap(model).state_dict())
    apply_record(model, record, config_file(path))
    after = set(unwrap(model).state_dict())
    _check_missing(path, model, config, set(report["missing_keys"]) & after)
    if unknown := sorted(set(report["unexpected_keys"]) - after):
        logger.warning("%s has %r and %d more weights that this model does not use", path, unknown[0], len(unknown))
    variant = from_pretrained_kwargs.get("variant")
    _load_weights(model, path, after - before, record["scheme"], _hub(from_pretrained_kwargs), variant)
    return (model, report) if output_loading_info else model


def apply_record(model: Any, record: dict[str, Any], source: str) -> None:
    """Patch a native model from a record.

    Raises:
        CheckpointError: the record does not fit the model, or its scheme rejects a value. The message names the file.
    """
    try:
        restore_patch(model, record["scheme"], record["options"], framework_of(record))
    except UnsupportedError as error:
        raise type(error)(f"{source}: {error}") from error
    except (OptionError, UnknownNameError) as error:
        raise CheckpointError(
            f"{source}: the record of the patch ({', '.join((RECORD_KEY + '.options', *framework_of(record)))}) does "
            f"not fit its model: {error}"
        ) from error
    except PePatchError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        # The scheme's arithmetic failed on a value that its option checks do not cover.
        raise CheckpointError(
            f"{source}: the record of the patch, {record['scheme']}({record['options']}), cannot be applied: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_missing(path: str | Path, model: Any, config: Any, missing: set[str]) -> None:
    """Raise if weights are missing from the checkpoint; only warn about those of a new head, as Transformers does."""
    stored = (config.architectures or [None])[0]
    prefix = f"{model.base_model_prefix}."
    fresh = set() if type(model).__name__ == stored else {name for name in missing if not name.startswith(prefix)}
    if lacking := sorted(missing - fresh):
        raise CheckpointError(f"{path} lacks {lacking[0]!r} and {len(lacking) - 1} more weights of {stored}.")
    if fresh:
        logger.warning(
            "%s was saved from a %s, so these weights of %s are new and must be trained: %s",
            path, stored, type(model).__name__, ", ".join(sorted(fresh)),
        )  # fmt: skip


def build_empty(path: str | Path) -> Any:
    """Build a causal language model on the meta device, without weights, and patch it if it was saved patched.

    Args:
        path: as for `load_model`. The adapter itself is left out.

    Raises:
        CheckpointError: the model does not exist, or its patch record is damaged.
    """
    if is_adapter(path):
        record, config = _adapter(path)
        model = build_empty(_base_of(path, record, config))
        if record is not None and find_patch(model) is None:
            with torch.device("meta"):
                _apply_adapter_record(model, path, record)
        model.name_or_path = model.config.name_or_path = str(path)
        return model
    if is_gguf(path):
        return build_empty_gguf(path)
    stored, source = read_config(path), config_file(path)
    check_no_custom_code(stored, str(path))
    if RECORD_KEY not in stored:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    record = check_record(stored[RECORD_KEY], stored, source)
    config = native_config(stored, record["native"], source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        apply_record(model, record, source)
    return model


def is_adapter(path: str | Path) -> bool:
    """Return whether a folder or hub name holds a PEFT adapter without a model."""
    if Path(path).exists():
        return not (Path(path) / "config.json").exists() and (Path(path) / peft_record.CONFIG).exists()
    try:
        config, adapter = (compat.find_file(str(path), name) for name in ("config.json", peft_record.CONFIG))
    except OSError:  # neither a folder nor a hub name; loading it as a model gives the better error
        return False
    return config is None and adapter is not None


def load_adapted(path: str | Path, is_trainable: bool = False, **from_pretrained_kwargs: Any) -> Any:
    """Load the base of an adapter, patch it from the adapter's record if there is one, and add the adapter.

    The base may itself be an adapter, which is merged, or a GGUF file.
    """
    record, config = _adapter(path)
    base = _base_of(path, record, config)
    if config.revision is not None:
        from_pretrained_kwargs.setdefault("revision", config.revision)
    auto_class = AUTO_CLASSES.get(str(config.task_type), AutoModelForCausalLM)
    model = load_model(base, auto_class, **from_pretrained_kwargs)
    if record is not None and find_patch(model) is None:
        _apply_adapter_record(model, path, record)
    if record is None and compat.find_file(str(path), "tokenizer_config.json") is not None:
        tokens = len(AutoTokenizer.from_pretrained(path, trust_remote_code=False))
        if tokens > model.get_input_embeddings().weight.shape[0]:  # it was trained with added tokens
            model.resize_token_embeddings(tokens)
    return load_adapter(model, path, is_trainable=is_trainable)


def _adapter(path: str | Path) -> tuple[dict[str, Any] | None, Any]:
    """Return the record of an adapter, None without one, and PEFT's config of it."""
    from peft import PeftConfig

    record = peft_record.read_record(path)
    return record, PeftConfig.from_pretrained(str(path)) if record is None else adapter_config(path, record)


def _base_of(path: str | Path, record: dict[str, Any] | None, config: Any) -> str:
    """Return the path or hub name of an adapter's base model."""
    if base := config.base_model_name_or_path:
        return base
    patch = "" if record is None else f"patch it with {peft_record.format_record(record)}, "
    raise CheckpointError(
        f"The adapter {path} does not name its base model: load the base, {patch}and call "
        f"pe_patch.load_adapter(model, {quoted(str(path))})."
    )


def _apply_adapter_record(model: Any, path: str | Path, record: dict[str, Any]) -> None:
    """Patch the unpatched base of an adapter from the adapter's record."""
    if converts(find_scheme(record["scheme"], record["options"])[0]):
        raise CheckpointError(
            f"The adapter {path} belongs to a model converted to {record['scheme']!r}, whose weights cannot be rebuilt "
            f"from {model.name_or_path}: load the converted model, and call "
            f"pe_patch.load_adapter(model, {quoted(str(path))})."
        )
    apply_record(model, record, f"{path}/{peft_record.CONFIG}")


def _merged(path: str | Path, adapted: Any) -> Any:
    """Merge a loaded adapter into its base, and return the base."""
    kind = adapted.active_peft_config.peft_type
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise UnsupportedError(
            f"The adapter {path} ({kind}) cannot be merged into its base model, as pe-patch does with adapters. Use it "
            "in Python: pe_patch.load_patched, or peft.AutoPeftModelForCausalLM."
        )
    model = adapted.merge_and_unload()
    logger.warning("Merged the adapter %s into its base %s in memory.", path, model.name_or_path)
    model.name_or_path = model.config.name_or_path = str(path)
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence Transformers' report of missing and unexpected weights."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _hub(from_pretrained_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that locate the files."""
    return {key: from_pretrained_kwargs[key] for key in HUB if from_pretrained_kwargs.get(key) is not None}


def config_file(path: str | Path) -> str:
    """Return the path of a model's config for messages."""
    return f"{path}/config.json"


def read_config(path: str | Path, **hub: Any) -> dict[str, Any]:
    """Return the config.json of a folder or hub name, or the config of a GGUF file.

    Raises:
        CheckpointError: the config is missing or is not a JSON object.
    """
    if is_gguf(path):
        return read_gguf_config(path).to_dict()
    folder = Path(path) / str(hub.get("subfolder") or "")
    if folder.exists() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a saved model; give a folder with a config.json."
        )
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(path), **hub)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:  # TypeError: not an object
        raise CheckpointError(f"Cannot read a model from {path!s}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file(path)} must hold a JSON object, found {quoted(config)}.")
    return config


def check_no_custom_code(stored: dict[str, Any], name: str) -> None:
    """Raise `UnsupportedError` for a config that only custom code of its checkpoint can read.

    Transformers would ask on the terminal whether to run that code.
    """
    family = stored.get("model_type")
    if stored.get("auto_map") and RECORD_KEY not in stored and family not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{name} needs custom code of its checkpoint (auto_map in config.json, model_type {quoted(family)}), which "
            "pe-patch does not run. Load it in Python with from_pretrained(..., trust_remote_code=True) if you trust "
            "it, and patch it with patch_model(model, ..., adapter=pe_patch.Adapter(...))."
        )


def native_config(stored: dict[str, Any], native: dict[str, Any], source: str = "config.json") -> PreTrainedConfig:
    """Return the config that the model had before the patch."""
    return configured(CONFIG_MAPPING[native["model_type"]], native_values(stored, {"native": native}), source)


def _load_weights(
    model: Any, path: str | Path, wanted: set[str], scheme: str, hub: dict[str, Any], variant: str | None = None
) -> None:
    """Load the weights that the patch added, and the original ones that it set aside, from the checkpoint.

    Transformers saves multi-part models under older prefixes and renames only weights that it loads itself. So match
    names by suffix.
    """
    if not wanted:
        return
    patch = find_patch(model)
    prefix = f"{patch.path}." if patch is not None and patch.path else ""
    tails = {f".{name.removeprefix(prefix)}": name for name in wanted}
    loaded: dict[str, torch.Tensor] = {}
    for file in _weight_files(path, hub, variant):
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():
                ends = [tail for tail in tails if f".{stored}".endswith(tail)] if stored not in wanted else []
                name = stored if stored in wanted else tails[max(ends, key=len)] if ends else None
                if name is not None:
                    loaded[name] = tensors.get_tensor(stored)
    if missing := sorted(wanted - set(loaded)):
        raise CheckpointError(f"{path} lacks {missing[0]!r}, a weight of the scheme {scheme!r}.")
    try:
        unwrap(model).load_state_dict(loaded, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights of {scheme!r} do not fit its record: {error}") from error


def _of_variant(name: str, variant: str | None) -> str:
    """Return the file name of a variant, such as model.fp16.safetensors."""
    stem, ending = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _weight_files(path: str | Path, hub: dict[str, Any], variant: str | None) -> list[str]:
    """Return the weight files, of the requested variant ("fp16") if any, as Transformers does."""
    index = compat.find_file(str(path), _of_variant(SAFE_WEIGHTS_INDEX_NAME, variant), **hub)
    if index is None:
        single = compat.find_file(str(path), _of_variant(SAFE_WEIGHTS_NAME, variant), **hub)
        if single is None:
            raise CheckpointError(f"{path} has no safetensors weights, the only supported format.")
        return [single]
    try:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a weight index: {error!r}") from error
    files = [cached_file(str(path), name, **hub) for name in names]
    return [file for file in files if file is not None]
