"""vLLM. Facts read in the source of 0.33.0: `get_rope`, its rotary modules, and how it derives the model's length.

- `attention_factor`, `beta_fast`, `beta_slow` and `truncate` of YaRN are read; LongRoPE's attention factor is not, but
  `short_mscale` and `long_mscale` are.
- The limit on the length is max_position_embeddings, times the factor for `linear` (not for yarn, llama3, longrope).
- "dynamic" turns every sequence by one base, whatever its length, and by the plain one unless
  `max_trained_positions` is there; LongRoPE uses the long list throughout as soon as the served length exceeds the
  trained one; "proportional" ignores a factor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...patching.build import Patch
from .checkpoint import FOLDER, ORIGINAL, Serving, Writer, save_model
from .native import LONG_THROUGHOUT, Exported, config_with, one_list, refuse, rotary_parameters

TOOL, VERSION = "vLLM", "0.33.0"
OWN = frozenset(
    "apertus cohere gemma gemma2 granite llama mistral mixtral olmoe phi3 qwen2 qwen2_moe qwen3 qwen3_moe "
    "stablelm".split()
)
"""Whose own vLLM class hands the config's `rope_parameters` to `get_rope` whole."""
THROUGH_TRANSFORMERS = frozenset("arcee gpt_neox olmo olmo2 phi seed_oss smollm3 starcoder2".split())
"""Which vLLM runs as Transformers' own class, with that class's rotation."""
NEIGHBOURS = frozenset({"cohere"})
"""Whose rotation pairs neighbouring dimensions, which vLLM's LongRoPE does not know."""


def writer(model: PreTrainedModel, patch: Patch) -> Writer:
    found = rotary_parameters(patch, TOOL)
    family = patch.base.config.model_type
    if family not in OWN | THROUGH_TRANSFORMERS:
        refuse(patch, TOOL, "its classes of this family were not found to read rope_parameters as Transformers does")
    parameters, limit = translated(patch, found)
    config = config_with(patch, parameters, limit)
    if hasattr(config, "original_max_position_embeddings"):  # Phi-3: it goes before the one in the dict
        config.original_max_position_embeddings = found.trained
    overrides = {"rope_parameters": parameters, "max_position_embeddings": limit}
    length = ["--max-model-len", str(found.window)]
    serving = Serving(
        TOOL,
        VERSION,
        patch.scheme.name,
        found.trained,
        found.window,
        [["vllm", "serve", FOLDER, *length]],
        ["vllm", "serve", ORIGINAL, "--hf-overrides", json.dumps(overrides), *length],
        notes=_notes(family, parameters),
    )

    def write(folder: Path, final: Path) -> None:
        save_model(model, config, folder)
        serving.write(folder, final)

    return write


def translated(patch: Patch, found: Exported) -> tuple[dict[str, Any], int]:
    """`rope_parameters` and max_position_embeddings for vLLM."""
    parameters, family = dict(found.parameters), patch.base.config.model_type
    kind = parameters["rope_type"]
    if kind == "dynamic":
        refuse(patch, TOOL, "its 'dynamic' turns all sequences by one base, whatever their length", "Use 'ntk'")
    if kind == "linear":
        parameters |= {"factor": float(parameters["factor"]), "original_max_position_embeddings": found.trained}
        return parameters, found.trained
    if kind == "proportional" and family in OWN and parameters.get("factor", 1) != 1:
        refuse(patch, TOOL, "its 'proportional' ignores the factor", "Use factor=1")
    if kind == "longrope":
        if not one_list(parameters):
            why = "it takes the long list for every sequence once the served length exceeds the trained one"
            refuse(patch, TOOL, why, LONG_THROUGHOUT)
        if family in NEIGHBOURS:
            refuse(patch, TOOL, "its LongRoPE pairs the halves of a head, and this family pairs neighbours")
        parameters |= dict.fromkeys(("short_mscale", "long_mscale"), parameters["attention_factor"])
    return parameters, found.window


def _notes(family: str, parameters: dict[str, Any]) -> list[str]:
    notes = []
    if family in THROUGH_TRANSFORMERS:
        notes.append("vLLM runs this family as Transformers' own class.")
    if parameters["rope_type"] == "linear":
        notes.append("max_position_embeddings is the trained window: vLLM multiplies it by the factor.")
    if parameters["rope_type"] == "longrope":
        notes.append("Keep --max-model-len: without it vLLM may serve the trained window only.")
    if parameters["rope_type"] == "yarn":
        notes.append("Versions before 0.33 may not read attention_factor or truncate; check yours if they matter.")
    return notes
