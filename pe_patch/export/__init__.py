"""Writing a patched model as a checkpoint that other tools load without pe_patch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import PePatchError, unknown
from ..join import Patch
from ..patch import find_patch
from ..resolve import unwrap
from . import llamacpp, sglang, transformers4, vllm
from .checkpoint import SERVING_FILES, Writer
from .checkpoint import read_commands as read_commands
from .native import transformers_config as transformers_config
from .native import transformers_writer
from .tokenizer import save_tokenizer as save_tokenizer


def export(model: Any, path: str | Path, target: str = "transformers") -> Path:
    """Save a patched model so that `target` loads it, with the same logits, without pe_patch.

    For a server the folder also holds `serve.json` and `SERVE.md`: the command and flags that serve it. The tokenizer
    is not part of the model: `save_tokenizer(tokenizer, folder, target)` writes it beside, with the new window.

    Args:
        model: a patched PreTrainedModel.
        path: folder to write; files of an earlier export there are replaced.
        target: "transformers" (v5 `rope_parameters`), "transformers4" (v4 `rope_scaling`), "vllm", "sglang",
            "llamacpp", or for a model converted to latent attention "deepseek" (loads as `DeepseekV3ForCausalLM`;
            needs `latent_norm=True`).

    Raises:
        UnsupportedError: where the target cannot express the scheme; nothing is written then.
    """
    if not isinstance(model, PreTrainedModel):
        raise PePatchError(
            f"Export takes the model itself, not {type(model).__name__} round it: merge_and_unload() a PEFT model, "
            "unwrap a prepared or compiled one."
        )
    write = check_export(model, target)
    folder = Path(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        write(Path(temporary), folder)
        folder.mkdir(exist_ok=True)
        for file in SERVING_FILES:  # of an earlier export for a server
            (folder / file).unlink(missing_ok=True)
        for file in os.listdir(temporary):
            shutil.move(os.path.join(temporary, file), folder / file)
    return folder


def check_export(model: Any, target: str) -> Writer:
    """What writes an export to `target`; whatever stands against it is raised now, and nothing is written yet.

    Here a model may be wrapped (PEFT, accelerate): what it will be once it is merged is what counts.
    """
    if target not in TARGETS:
        raise unknown("export target", target, TARGETS)
    patch = find_patch(model)
    if patch is None:
        raise PePatchError("This model carries no patch; save_pretrained is all it needs.")
    return TARGETS[target](unwrap(model), patch)


def _deepseek(model: PreTrainedModel, patch: Patch) -> Writer:
    from .deepseek import deepseek_writer

    write = deepseek_writer(model, patch)
    return lambda folder, final: write(folder)


TARGETS: dict[str, Callable[[PreTrainedModel, Patch], Writer]] = {
    "transformers": transformers_writer,
    "transformers4": transformers4.writer,
    "vllm": vllm.writer,
    "sglang": sglang.writer,
    "llamacpp": llamacpp.writer,
    "deepseek": _deepseek,
}
"""What prepares an export, raising whatever stands against it, and gives the function that writes it."""
