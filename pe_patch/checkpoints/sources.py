"""Load models by name and parse scheme options, for the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from ..errors import CheckpointError, OptionError, PrintableFilter, nearest, quoted

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Values of `--dtype`."""
SHORT_DTYPES: Mapping[str, str] = MappingProxyType(
    {"fp32": "float32", "f32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16",
     "half": "float16"}
)  # fmt: skip
"""Other names of dtypes."""


def load(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder or the hub, with the patch if it was saved patched.

    Args:
        name: a local folder or a hub name.
        dtype: one of `DTYPES`, or a short name such as bf16.
        device: a device; None uses CUDA if available.

    Raises:
        OptionError: the dtype or the device does not exist.
        UnsupportedError: the model needs custom code.
        CheckpointError: the folder does not exist or holds no model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .load import check_no_custom_code, load_patched, read_config

    dtype, where = full_dtype(dtype), check_device(device)
    quiet_transformers()
    _check_folder(name)
    saved = read_config(name)
    check_no_custom_code(saved, name)
    read = load_patched if saved.get("pe_patch") else AutoModelForCausalLM.from_pretrained
    # Without trust_remote_code=False, Transformers would ask on the terminal whether to run code of the checkpoint.
    model: Any = read(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype), trust_remote_code=False)
    return model.to(where).eval(), AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def full_dtype(name: str, choices: Sequence[str] = DTYPES) -> str:
    """Return the full name of a dtype: bfloat16 for bf16.

    Raises:
        OptionError: the dtype is not one of `choices`.
    """
    word = str(name).removeprefix("torch.")
    word = SHORT_DTYPES.get(word.lower(), word)
    if word in choices:
        return word
    raise OptionError(f"dtype must be one of {', '.join(choices)}, got {quoted(name)}.{nearest(word, choices)}")


def check_device(name: str | None) -> str:
    """Return the name of a device on which tensors can be made; None gives CUDA if available, else the CPU.

    Raises:
        OptionError: the device does not exist here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise OptionError(
            f"The device {quoted(name)} cannot be used here ({reason}). Available: {', '.join(here)}."
        ) from error
    return name


def check_loaded(model: Any, tokenizer: Any) -> None:
    """Raise `OptionError` for a path or anything else in the place of a loaded model or its tokenizer."""
    for option, value, fits, loader in (
        ("model", model, hasattr(model, "config") and callable(model), "AutoModelForCausalLM.from_pretrained(path)"),
        ("tokenizer", tokenizer, callable(tokenizer), "AutoTokenizer.from_pretrained(path)"),
    ):
        if not fits:
            order = "Pass the model, then its tokenizer, then the rest."
            raise OptionError(
                f"{option} must be a loaded {option}, got {quoted(value)}. {order} Load it with {loader}."
            )


def empty_model(name: str) -> Any:
    """Build the model on the meta device, without weights, and patch it if it was saved patched."""
    from .load import build_empty

    quiet_transformers()
    _check_folder(name)
    return build_empty(name)


def apply(
    model: Any,
    scheme: str | None,
    factor: str | None,
    options: Sequence[str] | None,
    on_existing: str | None,
    target_length: int | None = None,
) -> None:
    """Patch the model with the scheme given on the command line, if any.

    Raises:
        OptionError: there are options but no scheme.
    """
    from ..patching.api import patch_model

    values = parse_options(options or ())
    if factor is not None:
        values["factor"] = _value(factor)
    if scheme is None:
        if values or on_existing or target_length:
            raise OptionError("Scheme options need a scheme; add --scheme NAME.")
        return
    if on_existing is not None:
        values["on_existing"] = on_existing
    if target_length is not None:
        values["target_length"] = target_length
    patch_model(model, _value(scheme) if scheme.lstrip().startswith("{") else scheme, **values)


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value` words into a dict. Values are JSON or YAML, such as `true`, `1e-4` or `[1, 2]`.

    Raises:
        OptionError: a word is not key=value, or its value is not JSON or YAML.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(f"An option must be key=value, got {word!r}.")
        options[key] = _value(value)
    return options


def quiet_transformers() -> None:
    """Disable Transformers' progress bars, and escape its log messages, which may quote a checkpoint."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    for handler in logging.get_logger("transformers").handlers:
        if not any(isinstance(each, PrintableFilter) for each in handler.filters):
            handler.addFilter(PrintableFilter())


def _check_folder(name: str) -> None:
    """Raise for a missing folder, which Transformers would look up on the hub and report confusingly."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    folder = Path(name).expanduser()
    if looks_local and not folder.is_dir():
        raise CheckpointError(f"The folder {name} does not exist.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"The folder {name} is not a model: it has no config.json.")


def _value(word: str) -> Any:
    # Try JSON first: YAML 1.1 reads 1e-4 as a string.
    try:
        return json.loads(word)
    except ValueError:
        try:
            return yaml.safe_load(word)
        except yaml.YAMLError as error:
            raise OptionError(f"A value must be JSON or YAML, got {word!r}.") from error
