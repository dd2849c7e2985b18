"""From a name on the command line to a model with its scheme."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import CheckpointError, OptionError, PrintableFilter

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer from a folder or the hub; a folder that was saved patched comes back patched."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

    from .load import load_patched

    if dtype not in DTYPES:
        raise OptionError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}.")
    quiet_host()
    _check_folder(name)
    saved, _ = PreTrainedConfig.get_config_dict(name)
    read = load_patched if saved.get("pe_patch") else AutoModelForCausalLM.from_pretrained
    model: Any = read(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(where).eval(), AutoTokenizer.from_pretrained(name)


def empty_model(name: str) -> Any:
    """Return the model on the meta device: every module and no weights. One that was saved patched is patched."""
    from .load import build_empty

    quiet_host()
    _check_folder(name)
    return build_empty(name)


def apply(
    model: Any, scheme: str | None, factor: str | None, options: Sequence[str] | None, on_existing: str | None
) -> None:
    """Patch the scheme in, if one was named."""
    from ..patching.api import patch_model

    given = parse_options(options or ())
    if factor is not None:
        given["factor"] = _value(factor)
    if scheme is None:
        if given or on_existing:
            raise OptionError("Options of a scheme were given but no --scheme.")
        return
    if on_existing is not None:
        given["on_existing"] = on_existing
    patch_model(model, _value(scheme) if scheme.lstrip().startswith("{") else scheme, **given)


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as a dict; values are JSON or YAML, so `true`, `1e-4` and `[1, 2]` are what they look like."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(f"An option is written key=value, got {word!r}.")
        found[key] = _value(value)
    return found


def continue_text(model: Any, tokenizer: Any, text: str, max_new_tokens: int) -> tuple[str, int]:
    """The greedy continuation of a text, and how many tokens the text has."""
    if not text:
        raise OptionError("The prompt is empty.")
    inputs = tokenizer(text, return_tensors="pt", verbose=False)
    ids = inputs["input_ids"].to(model.device)
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True), ids.shape[1]


def quiet_host() -> None:
    """Switch off Transformers' progress bars for loading and saving, which drown what a command has to say, and escape
    what it logs, which may quote a checkpoint."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    for handler in logging.get_logger("transformers").handlers:
        if not any(isinstance(each, PrintableFilter) for each in handler.filters):
            handler.addFilter(PrintableFilter())


def _check_folder(name: str) -> None:
    """A path that is not there would be looked up on the hub, with a confusing answer."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    folder = Path(name).expanduser()
    if looks_local and not folder.is_dir():
        raise CheckpointError(f"There is no folder {name}.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"The folder {name} holds no model: it has no config.json.")


def _value(word: str) -> Any:
    # JSON first: YAML 1.1 takes 1e-4 for a string.
    try:
        return json.loads(word)
    except ValueError:
        try:
            return yaml.safe_load(word)
        except yaml.YAMLError as error:
            raise OptionError(f"Not a value in JSON or YAML: {word!r}.") from error
