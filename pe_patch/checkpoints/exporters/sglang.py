"""SGLang. Facts read in the source of 0.5.23: `get_rope`, its rotary modules, its models, `get_context_length`.

- YaRN's attention factor is (0.1 m ln s + 1) / (0.1 m' ln s + 1) where `mscale` m and `mscale_all_dim` m' are there,
  and 0.1 ln s + 1 otherwise; `attention_factor` is not read. `beta_fast`, `beta_slow` and `truncate` are.
- LongRoPE reads `short_mscale` and `long_mscale`. Once any position of a batch is beyond the trained window, the whole
  batch uses the long list, over keys cached with the other; and the token whose position equals the window is turned
  as token 0. With one list and the served window in place of the trained one neither happens.
- The length is max_position_embeddings, times the factor unless original_max_position_embeddings stands beside it.
- "dynamic" is one base for every sequence; Llama and Qwen ignore a proportion of the head that turns.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...patching.build import Patch
from .checkpoint import FOLDER, ORIGINAL, Serving, Writer, save_model
from .native import LONG_THROUGHOUT, Exported, config_with, one_list, refuse, rotary_parameters, yarn_attention_factor

TOOL, VERSION = "SGLang", "0.5.23"
FAMILIES = frozenset("granite llama mistral phi3 qwen2 qwen2_moe qwen3 qwen3_moe".split())
"""Whose class hands the config's rotary parameters to `get_rope`; others (Gemma, Mixtral, StableLM) drop them."""


def writer(model: PreTrainedModel, patch: Patch) -> Writer:
    found = rotary_parameters(patch, TOOL)
    if patch.base.config.model_type not in FAMILIES:
        refuse(patch, TOOL, "it has no class of this family that reads a rotary scaling from the config")
    if found.parameters["rope_type"] == "proportional" or found.parameters.get("partial_rotary_factor", 1) != 1:
        refuse(patch, TOOL, "its class of this family turns the whole head, whatever the config says")
    parameters = translated(patch, found)
    config = config_with(patch, parameters, found.window)
    if hasattr(config, "original_max_position_embeddings"):  # Phi-3: it goes before the one in the dict
        config.original_max_position_embeddings = parameters.get("original_max_position_embeddings", found.trained)
    overrides = {"rope_parameters": parameters, "max_position_embeddings": found.window}
    start, length = ["python", "-m", "sglang.launch_server", "--model-path"], ["--context-length", str(found.window)]
    serving = Serving(
        TOOL,
        VERSION,
        patch.scheme.name,
        found.trained,
        found.window,
        [[*start, FOLDER, *length]],
        [*start, ORIGINAL, "--json-model-override-args", json.dumps(overrides), *length],
        notes=NOTES.get(parameters["rope_type"], []),
    )

    def write(folder: Path, final: Path) -> None:
        save_model(model, config, folder)
        serving.write(folder, final)

    return write


def translated(patch: Patch, found: Exported) -> dict[str, Any]:
    """`rope_parameters` for SGLang."""
    parameters = dict(found.parameters)
    kind = parameters["rope_type"]
    if kind == "dynamic":
        refuse(patch, TOOL, "its 'dynamic' turns all sequences by one base, whatever their length", "Use 'ntk'")
    if kind == "linear":
        parameters |= {"factor": float(parameters["factor"]), "original_max_position_embeddings": found.trained}
    if kind == "yarn":
        parameters = {name: value for name, value in parameters.items() if not name.startswith("mscale")}
        if yarn_attention_factor(parameters) != 1:
            scale = 0.1 * math.log(parameters["factor"])  # with m' = 0 the quotient is the factor itself
            parameters |= {"mscale": (parameters["attention_factor"] - 1) / scale, "mscale_all_dim": 0.0}
    if kind == "longrope":
        if not one_list(parameters):
            refuse(patch, TOOL, "it switches lists for a whole batch, over keys cached with the other", LONG_THROUGHOUT)
        parameters |= dict.fromkeys(("short_mscale", "long_mscale"), parameters["attention_factor"])
        parameters["original_max_position_embeddings"] = found.window
    return parameters


NOTES = {
    "longrope": [
        "original_max_position_embeddings is the served window: both lists are the same, and SGLang turns the token "
        "whose position equals it as token 0."
    ]
}
