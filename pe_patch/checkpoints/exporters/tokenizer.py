"""Save the tokenizer with an exported model."""

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
    """Save a tokenizer into an exported folder, with the model's window as its `model_max_length`.

    vLLM limits the length to the smaller of the two, and pipelines truncate at it.

    Args:
        tokenizer: the tokenizer of the model.
        folder: a folder that `pe_patch.export` wrote.
        target: the target of that export.

    Raises:
        OutputError: the folder is not an export, or the tokenizer was loaded from it.
    """
    refuse_input(folder, [getattr(tokenizer, "name_or_path", None)])
    folder = Path(folder).expanduser()
    if not EXPORT.wrote(folder):
        raise OutputError(
            f"{folder} is not an export of pe_patch; export the model first: pe_patch.export(model, {str(folder)!r})."
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
    """Write the tokenizer's files into a folder with the exported config."""
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
