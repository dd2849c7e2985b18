"""llama.cpp: a checkpoint for its converter, the GGUF keys that follow, and the flags for a file without them.

Facts read in the source that llama-cpp-python 0.3.36 ships (converter, llama-context.cpp, ggml's rope):

- YaRN's ramp ends are always rounded to whole pairs. cos and sin are multiplied by 0.1 ln s + 1 times the key
  `rope.scaling.attn_factor`; `--yarn-attn-factor`, and the key `yarn_attn_factor` that the converter writes, have no
  effect where the ramp is in use.
- llama3 becomes a tensor of divisors, `rope_freqs.weight`, which only the converter of the Llama classes writes.
- LongRoPE's lists are written for Phi-3 only, and the long one is used throughout once the context exceeds the trained
  window.
- The converter of GPT-NeoX writes neither the base nor a scaling.
- `--grp-attn-n` and `--grp-attn-w` (llama-completion) divide the positions of blocks of the cache that are complete, so
  the number of neighbours at their own distance comes and goes with the block: Self-Extend keeps it for every query.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...patching.build import Patch
from .checkpoint import FOLDER, ORIGINAL, Serving, Writer, save_model
from .native import LONG_THROUGHOUT, Exported, config_with, one_list, refuse, rotary_parameters, yarn_attention_factor

TOOL, VERSION = "llama.cpp", "as llama-cpp-python 0.3.36 ships it"
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
}
"""What a GGUF file calls a family whose converter writes the base and the scaling."""
TYPES = {"phi3": ("default", "longrope")}
COMMON = ("default", "linear", "yarn")
GGUF = "/model.gguf"


def writer(model: PreTrainedModel, patch: Patch) -> Writer:
    if patch.scheme.name == "self_extend":
        why = "its group attention (--grp-attn-n) keeps another number of neighbours from block to block"
        refuse(patch, TOOL, why)
    found = rotary_parameters(patch, TOOL)
    family = patch.base.config.model_type
    if family not in ARCHITECTURES:
        refuse(patch, TOOL, "its converter does not write the rotary base and scaling of this family")
    architecture = ARCHITECTURES[family]
    _check(patch, found.parameters, architecture)
    parameters = dict(found.parameters)
    if parameters["rope_type"] == "linear":
        parameters["original_max_position_embeddings"] = found.trained
    config = config_with(patch, parameters, found.window)
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = found.trained
    extra = _override(found, architecture)
    convert = ["python", "convert_hf_to_gguf.py", FOLDER, "--outfile", FOLDER + GGUF]
    serve = ["llama-server", "-c", str(found.window), *extra, "-m"]
    flags = runtime_flags(found)
    serving = Serving(
        TOOL,
        VERSION,
        patch.scheme.name,
        found.trained,
        found.window,
        [convert, [*serve, FOLDER + GGUF]],
        [] if flags is None else [*serve, ORIGINAL + ".gguf", *flags],
        metadata(found, architecture),
    )

    def write(folder: Path, final: Path) -> None:
        save_model(model, config, folder)
        serving.write(folder, final)

    return write


def _check(patch: Patch, parameters: dict[str, Any], architecture: str) -> None:
    kind = parameters["rope_type"]
    allowed = TYPES.get(architecture, (*COMMON, "llama3") if architecture == "llama" else COMMON)
    if kind not in allowed:
        refuse(patch, TOOL, f"of this family its converter takes {', '.join(allowed)}, and this is {kind}")
    if kind == "yarn" and not parameters["truncate"]:
        refuse(patch, TOOL, "it always rounds the ends of YaRN's ramp to whole pairs", "Use truncate=True")
    if kind == "longrope" and not one_list(parameters):
        why = "it takes the long list for every sequence once the context exceeds the trained window"
        refuse(patch, TOOL, why, LONG_THROUGHOUT)


def metadata(found: Exported, architecture: str) -> dict[str, Any]:
    """The GGUF keys, and the tensors in brackets, that say the scheme."""
    parameters = found.parameters
    kind, rope = parameters["rope_type"], f"{architecture}.rope."
    keys: dict[str, Any] = {
        f"{architecture}.context_length": found.window,
        rope + "freq_base": parameters["rope_theta"],
    }
    if kind in ("linear", "yarn"):
        keys |= {rope + "scaling.type": kind, rope + "scaling.factor": parameters["factor"]}
    if kind in ("yarn", "longrope"):
        keys[rope + "scaling.original_context_length"] = found.trained
    if kind == "yarn":
        for beta in ("beta_fast", "beta_slow"):
            keys[f"{rope}scaling.yarn_{beta}"] = parameters[beta]
    tensors = {"llama3": ["rope_freqs.weight"], "longrope": ["rope_factors_long.weight", "rope_factors_short.weight"]}
    return keys | ({"tensors": tensors[kind]} if kind in tensors else {})


def runtime_flags(found: Exported) -> list[str] | None:
    """The scheme as flags over a file of the original checkpoint, or None where only tensors can say it."""
    parameters = found.parameters
    kind = parameters["rope_type"]
    flags = ["--rope-freq-base", repr(float(parameters["rope_theta"]))]
    if kind not in COMMON:
        return None
    if kind == "default":
        return ["--rope-scaling", "none", *flags]
    flags += ["--rope-scaling", kind, "--rope-scale", repr(float(parameters["factor"]))]
    if kind == "yarn":
        flags += ["--yarn-orig-ctx", str(found.trained)]
        for flag in ("beta-fast", "beta-slow"):
            flags += [f"--yarn-{flag}", repr(float(parameters[flag.replace("-", "_")]))]
    return flags


def _override(found: Exported, architecture: str) -> list[str]:
    """The one key that multiplies cos and sin, where it is not what llama.cpp or its converter takes by itself."""
    parameters = found.parameters
    kind = parameters["rope_type"]
    if kind == "yarn":
        value = yarn_attention_factor(parameters)
        if value == 1:
            return []
    elif kind == "longrope":
        value = parameters["attention_factor"]
    else:
        return []
    return ["--override-kv", f"{architecture}.rope.scaling.attn_factor=float:{value!r}"]
