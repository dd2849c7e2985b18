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
        target: "transformers" (v5 `rope_parameters`), or for a model converted to latent attention "deepseek" (loads as
            `DeepseekV3ForCausalLM`; needs `latent_norm=True`).

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
    write = TARGETS[target](model, patch)
    folder = Path(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        write(Path(temporary))
        folder.mkdir(exist_ok=True)
        for file in os.listdir(temporary):
            shutil.move(os.path.join(temporary, file), folder / file)
    return folder


Writer = Callable[[Path], None]


def _transformers(model: PreTrainedModel, patch: Patch) -> Writer:
    config = transformers_config(patch)

    def write(folder: Path) -> None:
        weights = {name: tensor for name, tensor in model.state_dict().items() if "position_schemes." not in name}
        model.save_pretrained(folder, state_dict=weights)
        config.save_pretrained(folder)

    return write


def _deepseek(model: PreTrainedModel, patch: Patch) -> Writer:
    from .export_deepseek import deepseek_writer

    return deepseek_writer(model, patch)


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


TARGETS: dict[str, Callable[[PreTrainedModel, Patch], Writer]] = {"transformers": _transformers, "deepseek": _deepseek}
"""What prepares an export, raising whatever stands against it, and gives the function that writes it."""
