"""Export a patched model for a target, all files or none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ... import compat
from ...errors import CheckpointError, PePatchError, unknown
from ...patching.api import find_patch
from ...patching.patch import Patch
from ...patching.targets import unwrap
from ..folders import EXPORT, WEIGHTS, check_output, exported_files, replaced_content
from . import llamacpp, sglang, transformers4, vllm, vllm_plugin
from .checkpoint import SERVING_FILES, Writer, write_record
from .checkpoint import read_commands as read_commands
from .native import transformers_config as transformers_config
from .native import transformers_writer
from .tokenizer import add_tokenizer

logger = logging.getLogger("pe_patch")


def export(
    model: nn.Module,
    path: str | Path,
    target: str = "transformers",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a patched model so that `target` loads it, with the same logits, without pe_patch but for "vllm-plugin".

    For a server the folder also holds `serve.json` and `SERVE.md` with the command and flags that serve it. The folder
    is written completely or not at all.

    Args:
        model: a patched PreTrainedModel.
        path: folder to write: new, empty, or an earlier export, which is replaced.
        target: "transformers" (v5 `rope_parameters`), "transformers4" (v4 `rope_scaling`), "vllm", "vllm-plugin" (for
            vLLM with pe_patch installed beside it), "sglang", "llamacpp", or for a model converted to latent attention
            "deepseek" (loads as `DeepseekV3ForCausalLM`; needs `latent_norm=True`).
        tokenizer: tokenizer to save with the model, with the new window. None takes that of the folder or hub name from
            which the model was loaded; a warning says so if there is none.
        overwrite: write into a folder with other content. This removes weights there; other files stay.

    Returns:
        The folder.

    Raises:
        UnsupportedError: the target cannot express the scheme; nothing is written.
        OutputError: `path` has other content, or is the folder that the model was loaded from.
    """
    if not isinstance(model, PreTrainedModel):
        raise PePatchError(
            f"Export needs the model itself, not a {type(model).__name__} around it: call merge_and_unload() on a PEFT "
            "model; unwrap a prepared or compiled one."
        )
    write = check_export(model, target)
    inputs = [getattr(model, "name_or_path", None), getattr(tokenizer, "name_or_path", None)]
    folder = check_output(path, EXPORT, inputs=inputs, overwrite=overwrite)
    if tokenizer is None:
        try:
            tokenizer = compat.source_tokenizer(model)
        except CheckpointError as error:
            logger.warning("No tokenizer is exported: %s. Give export(..., tokenizer=tokenizer).", error)
    shown = Path(path).expanduser()
    stale = [*WEIGHTS, *SERVING_FILES, *exported_files(folder)]
    with replaced_content(folder, stale=stale) as content:
        write(content, shown)
        if tokenizer is not None:
            add_tokenizer(tokenizer, content, target)
        write_record(content, target)
    return shown


def check_export(model: Any, target: str) -> Writer:
    """Check that `target` can express the model, and return the function that writes the export.

    The model may be wrapped (PEFT, accelerate): the check applies to the merged model. Nothing is written.

    Raises:
        UnsupportedError: the target cannot express the scheme.
    """
    if target not in TARGETS:
        raise unknown("export target", target, TARGETS)
    patch = find_patch(model)
    if patch is None:
        raise PePatchError("This model has no patch; save it with save_pretrained.")
    return TARGETS[target](unwrap(model), patch)


def _deepseek(model: PreTrainedModel, patch: Patch) -> Writer:
    from .deepseek import deepseek_writer

    write = deepseek_writer(model, patch)
    return lambda folder, final: write(folder)


TARGETS: dict[str, Callable[[PreTrainedModel, Patch], Writer]] = {
    "transformers": transformers_writer,
    "transformers4": transformers4.writer,
    "vllm": vllm.writer,
    "vllm-plugin": vllm_plugin.writer,
    "sglang": sglang.writer,
    "llamacpp": llamacpp.writer,
    "deepseek": _deepseek,
}
"""Function for each target that checks the model and returns the writer."""
