"""Load models by name and parse scheme options, for the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from ..data.packaged import DEMO, DEMO_MODEL
from ..errors import CheckpointError, OptionError, PrintableFilter, nearest, quoted
from .folders import WEIGHTS

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Values of `--dtype`."""
SHORT_DTYPES: Mapping[str, str] = MappingProxyType(
    {"fp32": "float32", "f32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16",
     "half": "float16"}
)  # fmt: skip
"""Other names of dtypes."""


def load(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer, with the patch if it was saved patched.

    Args:
        name: a local folder of a model or an adapter, a GGUF file, a hub name or `demo`.
        dtype: one of `DTYPES`, or a short name such as bf16.
        device: a device; None uses CUDA if available.

    Raises:
        OptionError: the dtype or the device does not exist.
        UnsupportedError: the model needs custom code, or cannot be read from its GGUF file.
        CheckpointError: the folder or file does not exist or holds no model.
    """
    from .load import load_model, load_tokenizer

    dtype, where = full_dtype(dtype), check_device(device)
    quiet_transformers()
    name = check_source(name)
    try:
        model = load_model(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        return model.to(where).eval(), load_tokenizer(name)
    except RecursionError as error:  # Transformers reads further files, such as tokenizer_config.json
        raise CheckpointError(f"A JSON file of {name} is nested too deep to be read: {error}.") from error


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
    return build_empty(check_source(name, weights=False))


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


def check_source(name: str, weights: bool = True) -> str:
    """Return the path or hub name of a model, with `~` expanded; `demo` is the model that comes with the package.

    Transformers would look up a missing folder on the hub and report it confusingly.

    Args:
        name: a local folder of a model or an adapter, a GGUF file, a hub name or `demo`.
        weights: the model's weights are needed, not only its config.

    Raises:
        CheckpointError: the folder or file does not exist, is not a model, or is called `demo`.
    """
    from .load import is_adapter, is_gguf

    if name == DEMO:
        if Path(DEMO).exists():
            raise CheckpointError(
                f"{DEMO} is the model that comes with the package, and there is a folder {DEMO} here. Type ./{DEMO} "
                f"for the folder, or {DEMO_MODEL} for the packaged model."
            )
        return str(DEMO_MODEL)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if is_gguf(path) or path.is_file():
        if not path.is_file():
            raise CheckpointError(f"The file {name} does not exist.")
        if not is_gguf(path):
            raise CheckpointError(f"{name} is a file; give a folder, a GGUF file (NAME.gguf) or a hub name.")
        return str(path)
    if looks_local and not path.is_dir():
        raise CheckpointError(f"The folder {name} does not exist.")
    if not path.is_dir() or is_adapter(path):
        return str(path) if looks_local else name
    complete = (path / "config.json").is_file()
    files = sorted(path.glob("*.gguf"))
    others = [file for pattern in WEIGHTS if pattern != "*.gguf" for file in path.glob(pattern)]
    if files and not (complete and (others or not weights)):
        more = f" ({len(files)} GGUF files are there)" if len(files) > 1 else ""
        raise CheckpointError(
            f"The folder {name} has its weights in GGUF files. Give the file instead of the folder: {files[0]}{more}"
        )
    if not complete:
        raise CheckpointError(f"The folder {name} is not a model: it has no config.json.")
    return str(path)


def _value(word: str) -> Any:
    # Try JSON first: YAML 1.1 reads 1e-4 as a string.
    try:
        return json.loads(word)
    except RecursionError as error:
        raise OptionError(f"A value is nested too deep: {word[:40]!r}...") from error
    except ValueError:
        try:
            return yaml.safe_load(word)
        except yaml.YAMLError as error:
            raise OptionError(f"A value must be JSON or YAML, got {word!r}.") from error
