"""Save the tokenizer with an exported model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ...patching.config import write_json


def add_tokenizer(tokenizer: Any, folder: Path, target: str) -> None:
    """Write the tokenizer's files into a folder with the exported config.

    `model_max_length` becomes the model's window: vLLM limits the length to the smaller of the two, and pipelines
    truncate at it.
    """
    window = _window(folder)
    tokenizer = copy.copy(tokenizer)
    if window is not None:
        tokenizer.model_max_length = window
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if target == "transformers4" and file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("tokenizer_class") == "TokenizersBackend":  # a name that only Transformers 5 knows
            write_json(file, content | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _window(folder: Path) -> int | None:
    """Return the window of an exported model in tokens."""
    serving = folder / "serve.json"
    if serving.is_file():
        return json.loads(serving.read_text(encoding="utf-8"))["window"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    window = config.get("max_position_embeddings")
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if window is not None and rotary.get("rope_type") == "dynamic":  # its config holds the trained window
        return int(window * rotary["factor"])
    return window
