"""Writing a patched model as a checkpoint that other tools load without pe_patch."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .configuration import FOREIGN, expressible
from .errors import PePatchError, UnsupportedError, unknown
from .join import Patch
from .patch import find_patch


def export(model: Any, path: str | Path, target: str = "transformers") -> Path:
    """Save a patched model so that `target` loads it, with the same logits, without pe_patch.

    Args:
        model: a patched PreTrainedModel.
        path: folder to write; files of an earlier export there are replaced.
        target: "transformers" (v5 `rope_parameters`).

    Raises:
        UnsupportedError: where the target cannot express the scheme; nothing is written then.
    """
    if target not in TARGETS:
        raise unknown("export target", target, TARGETS)
    if not isinstance(model, PreTrainedModel):
        raise PePatchError(
            f"Export takes the model itself, not {type(model).__name__} round it: merge_and_unload() a PEFT model, "
            "unwrap a prepared or compiled one."
        )
    patch = find_patch(model)
    if patch is None:
        raise PePatchError("This model carries no patch; save_pretrained is all it needs.")
    config = TARGETS[target](patch)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "position_schemes." not in name}
    folder = Path(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        config.save_pretrained(temporary)
        folder.mkdir(exist_ok=True)
        for file in os.listdir(temporary):
            shutil.move(os.path.join(temporary, file), folder / file)
    return folder


def transformers_config(patch: Patch) -> Any:
    """The config under which plain Transformers 5 computes the same logits."""
    record = getattr(patch.head.config, FOREIGN)
    parameters = expressible(patch.adapter, patch.base.config, patch.kinds, record)
    if parameters is None:
        part = (
            " on some of the layers" if "layers" in record else " beside native positions" if patch.keep_native else ""
        )
        raise UnsupportedError(
            f"Transformers' config cannot express {patch.scheme.name!r}{part} on {patch.base.config.model_type}. "
            "save_pretrained keeps the patch for pe_patch.load_patched; nothing was written."
        )
    config = copy.deepcopy(patch.head.config)
    delattr(config, FOREIGN)
    inner = getattr(config, record["native"]["config"]) if "config" in record["native"] else config
    if parameters:
        inner.rope_parameters = parameters
    if patch.scheme.native_window is not None:
        inner.max_position_embeddings = patch.scheme.native_window
    return config


TARGETS: dict[str, Callable[[Patch], Any]] = {"transformers": transformers_config}
