"""The tokenizer beside an exported model."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from ...errors import OutputError
from ...patching.config import write_json
from ..folders import EXPORT, EXPORT_RECORD, refuse_input, replaced_content


def save_tokenizer(tokenizer: Any, folder: str | Path, target: str = "transformers") -> None:
    """Save a tokenizer into an exported folder, with the window of the model there as its `model_max_length`.

    vLLM takes the smaller of the two for its own limit, and pipelines truncate at it.

    Raises:
        OutputError: where the folder holds no export, or is the one that the tokenizer was loaded from.
    """
    refuse_input(folder, [getattr(tokenizer, "name_or_path", None)])
    folder = Path(folder).expanduser()
    if not EXPORT.wrote(folder):
        raise OutputError(
            f"{folder} holds no export of pe_patch; write the model first: pe_patch.export(model, {str(folder)!r})."
        )
    with replaced_content(folder) as content:
        for name in READ:
            if (folder / name).is_file():
                shutil.copy(folder / name, content / name)
        add_tokenizer(tokenizer, content, target)
        for name in READ:
            (content / name).unlink(missing_ok=True)
        before = json.loads((folder / EXPORT_RECORD).read_text(encoding="utf-8"))
        files = sorted({*before.get("files", []), *(file.name for file in content.iterdir())})
        write_json(content / EXPORT_RECORD, before | {"files": files})


READ = ("config.json", "serve.json")
"""Files of an export that state the window."""


def add_tokenizer(tokenizer: Any, folder: Path, target: str) -> None:
    """Write the tokenizer's files into a folder that holds the exported config."""
    window = _window(folder)
    tokenizer = copy.copy(tokenizer)
    if window is not None:
        tokenizer.model_max_length = window
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if target == "transformers4" and file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("tokenizer_class") == "TokenizersBackend":  # the name is Transformers 5's
            write_json(file, content | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _window(folder: Path) -> int | None:
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
