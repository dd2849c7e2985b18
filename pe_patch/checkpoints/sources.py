"""Load models by name and parse scheme options, for the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import CheckpointError, OptionError, PrintableFilter

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Values of `--dtype`."""


def load(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder or the hub, with the patch if it was saved patched.

    Args:
        name: a local folder or a hub name.
        dtype: one of `DTYPES`.
        device: a device; None uses CUDA if available.

    Raises:
        OptionError: `dtype` is not one of `DTYPES`.
        CheckpointError: the folder does not exist or holds no model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

    from .load import load_patched

    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    quiet_transformers()
    _check_folder(name)
    saved, _ = PreTrainedConfig.get_config_dict(name)
    read = load_patched if saved.get("pe_patch") else AutoModelForCausalLM.from_pretrained
    model: Any = read(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(where).eval(), AutoTokenizer.from_pretrained(name)


def empty_model(name: str) -> Any:
    """Build the model on the meta device, without weights, and patch it if it was saved patched."""
    from .load import build_empty

    quiet_transformers()
    _check_folder(name)
    return build_empty(name)


def apply(
    model: Any, scheme: str | None, factor: str | None, options: Sequence[str] | None, on_existing: str | None
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
        if values or on_existing:
            raise OptionError("Scheme options need a scheme; add --scheme NAME.")
        return
    if on_existing is not None:
        values["on_existing"] = on_existing
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


def continue_text(model: Any, tokenizer: Any, text: str, max_new_tokens: int) -> tuple[str, int]:
    """Return the greedy continuation of a text, and the number of tokens in the text."""
    if not text:
        raise OptionError("The prompt is empty.")
    inputs = tokenizer(text, return_tensors="pt", verbose=False)
    ids = inputs["input_ids"].to(model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), ids.shape[1]


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
