"""Loading a model that was saved with its patch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from . import peft_record
from .configuration import FOREIGN, VERSION
from .errors import CheckpointError, PePatchError
from .patch import find_patch, restore_patch
from .resolve import unwrap
from .schemes.find import find_scheme

logger = logging.getLogger("pe_patch")

QUIET: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
AUTO_CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
"""The head that an adapter's `task_type` stands for."""


def load_patched(path: str | Path, **from_pretrained_kwargs: Any) -> Any:
    """Load a model that was saved while patched, patch included; or a PEFT adapter with the model it belongs to.

    From an adapter's folder come the base model that its config names, patched as it was when the adapter was saved,
    and the adapter on it: a `PeftModel`. The base may be the original model, or one that was saved patched.

    Args:
        path: a local folder or a hub name.
        **from_pretrained_kwargs: handed to the model class's `from_pretrained` (dtype, device_map ...); `is_trainable`
            is for the adapter.

    Raises:
        CheckpointError: where there is no such checkpoint, it carries no patch, or it is damaged.
        MismatchError: where the base that an adapter names was saved under another scheme.
    """
    if is_adapter(path):
        return _load_adapted(path, **from_pretrained_kwargs)
    stored = read_config(path)
    record = stored.pop(FOREIGN, None)
    if record is None:
        raise CheckpointError(f"{path} was not saved from a patched model; load it with AutoModelForCausalLM instead.")
    if record.get("version", 0) > VERSION:
        raise CheckpointError(
            f"{path} was saved by a newer pe_patch (record version {record['version']}, not {VERSION}): upgrade."
        )
    try:
        scheme, options, config = record["scheme"], record["options"], native_config(stored, record["native"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"The record of the patch in {path} is damaged: {error}.") from error
    architecture = (stored.get("architectures") or [None])[0]
    model_class = getattr(transformers, architecture or "", AutoModelForCausalLM)
    try:
        with _without_load_report():  # which calls missing what a patch took away, and unexpected what it put there
            loaded: Any = model_class.from_pretrained(
                path, config=config, output_loading_info=True, **from_pretrained_kwargs
            )
    except (SafetensorError, json.JSONDecodeError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"The weights in {path} are missing, damaged or do not fit its config: {error}"
        ) from error
    model, report = loaded
    before = set(unwrap(model).state_dict())
    restore_patch(model, scheme, options, _framework(record))
    after = set(unwrap(model).state_dict())
    if missing := sorted(set(report["missing_keys"]) & after):
        raise CheckpointError(f"{path} lacks {missing[0]!r} and {len(missing) - 1} more weights of {architecture}.")
    if unknown := sorted(set(report["unexpected_keys"]) - after):
        logger.warning("%s holds %r and %d more weights that this model has no use for", path, unknown[0], len(unknown))
    _load_weights(model, path, after - before, scheme)
    return model


def is_adapter(path: str | Path) -> bool:
    """Whether a folder or hub name holds a PEFT adapter and no model of its own."""
    if Path(path).exists():
        return not (Path(path) / "config.json").exists() and (Path(path) / peft_record.CONFIG).exists()
    try:
        config, adapter = (cached_file(str(path), name, **QUIET) for name in ("config.json", peft_record.CONFIG))
    except OSError:  # neither a folder nor a hub name, which whoever reads it as a model says better
        return False
    return config is None and adapter is not None


def _load_adapted(path: str | Path, is_trainable: bool = False, **from_pretrained_kwargs: Any) -> Any:
    """The base of an adapter, patched from the adapter's record, with the adapter on it."""
    from peft import PeftConfig, PeftModel  # late: it is slow to import, and most models carry no adapter

    record = peft_record.read_record(path)
    if record is None:
        raise CheckpointError(
            f"The adapter {path} was not saved from a patched model; load it with peft.AutoPeftModelForCausalLM, and "
            "patch what comes out if you want it under a scheme."
        )
    config = PeftConfig.from_pretrained(str(path))
    base = config.base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"The adapter {path} does not say which model it belongs to: load that, patch it with "
            f"{peft_record.told(record)}, and hand it to PeftModel.from_pretrained."
        )
    if config.revision is not None:
        from_pretrained_kwargs.setdefault("revision", config.revision)
    if FOREIGN in read_config(base):
        model = load_patched(base, **from_pretrained_kwargs)
    elif find_scheme(record["scheme"], record["options"])[0].converts:
        raise CheckpointError(
            f"The adapter {path} belongs to a model converted to {record['scheme']!r}, whose weights cannot be made "
            f"again from {base}: load the converted model, and hand it to PeftModel.from_pretrained."
        )
    else:
        auto_class = AUTO_CLASSES.get(str(config.task_type), AutoModelForCausalLM)
        model = auto_class.from_pretrained(base, **from_pretrained_kwargs)
        restore_patch(model, record["scheme"], record["options"], _framework(record))
    return PeftModel.from_pretrained(model, str(path), is_trainable=is_trainable)


def _framework(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says to `patch_model` beside the scheme and its options."""
    return {key: record[key] for key in ("layers", "submodule", "keep_native", "strict") if key in record}


@contextmanager
def _without_load_report() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a folder or hub name, as a dict; a clear error where there is none."""
    if Path(path).exists() and not (Path(path) / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json, so it is not a saved model; give the folder that holds one.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"No model can be read from {path!s}: {error}") from error
    return config


def native_config(stored: dict[str, Any], native: dict[str, Any]) -> PreTrainedConfig:
    """The config that the model had before it was patched."""
    values = dict(stored)
    target = values
    if "config" in native:
        target = values[native["config"]] = dict(values[native["config"]])
    if "rope_parameters" in native:
        target["rope_parameters"] = native["rope_parameters"]
    if native.get("max_position_embeddings", 0) is None:
        target.pop("max_position_embeddings", None)
    elif "max_position_embeddings" in native:
        target["max_position_embeddings"] = native["max_position_embeddings"]
    values["model_type"] = native["model_type"]
    return CONFIG_MAPPING[native["model_type"]].from_dict(values)


def _load_weights(model: Any, path: str | Path, wanted: set[str], scheme: str) -> None:
    """Read the tensors that the patch brought with it, and the native ones it put aside, from the checkpoint.

    Transformers saves models of several towers under names of earlier versions, which differ before the tower's own
    part of the name; what it loads itself it renames.
    """
    if not wanted:
        return
    patch = find_patch(model)
    prefix = f"{patch.path}." if patch is not None and patch.path else ""
    tails = {f".{name.removeprefix(prefix)}": name for name in wanted}
    found = {}
    for file in _weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():
                ends = [tail for tail in tails if f".{stored}".endswith(tail)] if stored not in wanted else []
                name = stored if stored in wanted else tails[max(ends, key=len)] if ends and prefix else None
                if name is not None:
                    found[name] = tensors.get_tensor(stored)
    if missing := sorted(wanted - set(found)):
        raise CheckpointError(f"{path} lacks {missing[0]!r}, a weight of the scheme {scheme!r}.")
    unwrap(model).load_state_dict(found, strict=False)


def _weight_files(path: str | Path) -> list[str]:
    index = cached_file(str(path), SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        single = cached_file(str(path), SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if single is None:
            raise PePatchError(f"{path} holds no safetensors weights, the only kind that is read here.")
        return [single]
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    files = [cached_file(str(path), name) for name in names]
    return [file for file in files if file is not None]
