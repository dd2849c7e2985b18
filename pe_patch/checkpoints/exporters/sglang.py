"""Export for SGLang. Facts from the source of 0.5.23: `get_rope`, its rotary modules, models, `get_context_length`.

- YaRN's attention factor is (0.1 m ln s + 1) / (0.1 m' ln s + 1) if `mscale` m and `mscale_all_dim` m' are set, and
  0.1 ln s + 1 otherwise. It ignores `attention_factor` and reads `beta_fast`, `beta_slow` and `truncate`.
- LongRoPE reads `short_mscale` and `long_mscale`. Once any position of a batch exceeds the trained window, the whole
  batch uses the long list, over keys that were cached with the short one. The token whose position equals the window is
  rotated as token 0. Neither happens with two equal lists and the served window instead of the trained one.
- The length limit is max_position_embeddings, times the factor unless original_max_position_embeddings is set.
- "dynamic" uses one base for every sequence. Llama and Qwen ignore a partial rotary factor.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...patching.patch import Patch
from .checkpoint import FOLDER, ORIGINAL, Serving, Writer, save_model
from .native import (
    LONG_THROUGHOUT,
    RotaryExport,
    config_with,
    one_list,
    refuse,
    rotary_parameters,
    yarn_attention_factor,
)

TOOL, VERSION = "SGLang", "0.5.23"
FAMILIES = frozenset("granite llama mistral phi3 qwen2 qwen2_moe qwen3 qwen3_moe".split())
"""Families whose class passes the config's rotary parameters to `get_rope`; others (Gemma, Mixtral, StableLM) do
not."""


def writer(model: PreTrainedModel, patch: Patch) -> Writer:
    """Check that SGLang can express the model, and return the function that writes the export."""
    rotary = rotary_parameters(patch, TOOL)
    if patch.base.config.model_type not in FAMILIES:
        refuse(patch, TOOL, "it has no class of this family that reads a rotary scaling from the config")
    if rotary.parameters["rope_type"] == "proportional" or rotary.parameters.get("partial_rotary_factor", 1) != 1:
        refuse(patch, TOOL, "its class of this family always rotates the whole head")
    parameters = translated(patch, rotary)
    config = config_with(patch, parameters, rotary.window)
    if hasattr(config, "original_max_position_embeddings"):  # Phi-3's top-level value overrides the one in the dict
        config.original_max_position_embeddings = parameters.get("original_max_position_embeddings", rotary.trained)
    overrides = {"rope_parameters": parameters, "max_position_embeddings": rotary.window}
    start, length = ["python", "-m", "sglang.launch_server", "--model-path"], ["--context-length", str(rotary.window)]
    serving = Serving(
        TOOL,
        VERSION,
        patch.scheme.name,
        rotary.trained,
        rotary.window,
        [[*start, FOLDER, *length]],
        [*start, ORIGINAL, "--json-model-override-args", json.dumps(overrides), *length],
        notes=NOTES.get(parameters["rope_type"], []),
    )

    def write(folder: Path, final: Path) -> None:
        save_model(model, config, folder)
        serving.write(folder, final)

    return write


def translated(patch: Patch, rotary: RotaryExport) -> dict[str, Any]:
    """Return SGLang's `rope_parameters`."""
    parameters = dict(rotary.parameters)
    kind = parameters["rope_type"]
    if kind == "dynamic":
        refuse(patch, TOOL, "its 'dynamic' uses one base for sequences of all lengths", "Use 'ntk'")
    if kind == "linear":
        parameters |= {"factor": float(parameters["factor"]), "original_max_position_embeddings": rotary.trained}
    if kind == "yarn":
        parameters = {name: value for name, value in parameters.items() if not name.startswith("mscale")}
        if yarn_attention_factor(parameters) != 1:
            scale = 0.1 * math.log(parameters["factor"])  # with m' = 0 the denominator is 1
            parameters |= {"mscale": (parameters["attention_factor"] - 1) / scale, "mscale_all_dim": 0.0}
    if kind == "longrope":
        if not one_list(parameters):
            refuse(
                patch,
                TOOL,
                "it switches lists for a whole batch, over keys cached with the other list",
                LONG_THROUGHOUT,
            )
        parameters |= dict.fromkeys(("short_mscale", "long_mscale"), parameters["attention_factor"])
        parameters["original_max_position_embeddings"] = rotary.window
    return parameters


NOTES = {
    "longrope": [
        "original_max_position_embeddings is the served window: both lists are equal, and SGLang rotates the "
        "token whose position equals it as token 0."
    ]
}
