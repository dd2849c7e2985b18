"""Export for llama.cpp: a checkpoint for its converter, the resulting GGUF keys, and flags for a file without them.

Facts from the source that llama-cpp-python 0.3.36 ships (converter, llama-context.cpp, ggml's rope):

- The ends of YaRN's ramp are always rounded to whole pairs. cos and sin are multiplied by 0.1 ln s + 1 times the key
  `rope.scaling.attn_factor`. `--yarn-attn-factor`, and the key `yarn_attn_factor` that the converter writes, have no
  effect where the ramp applies.
- llama3 becomes a tensor of divisors, `rope_freqs.weight`, which only the converter of the Llama classes writes.
- LongRoPE's lists are written only for Phi-3. The long list applies to all positions once the context exceeds the
  trained window.
- The converter of GPT-NeoX writes neither the base nor a scaling.
- `--grp-attn-n` and `--grp-attn-w` (llama-completion) divide the positions of complete blocks of the cache, so the
  number of neighbours at their true distance changes within a block. Self-Extend keeps it constant for every query.
"""

from __future__ import annotations

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

TOOL, VERSION = "llama.cpp", "as llama-cpp-python 0.3.36 ships it"
OLDEST = "as llama-cpp-python 0.3.17 ships it"
"""Oldest llama.cpp whose converter writes the scaling of an export. That of 0.3.16 drops it and reports success."""
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
"""GGUF architecture of each family whose converter writes the base and the scaling."""
TYPES = {"phi3": ("default", "longrope")}
"""Supported `rope_type`s of architectures that differ from `COMMON`."""
COMMON = ("default", "linear", "yarn")
GGUF = "/model.gguf"


def writer(model: PreTrainedModel, patch: Patch) -> Writer:
    """Check that llama.cpp can express the model, and return the function that writes the export."""
    if patch.scheme.name == "self_extend":
        why = "its group attention (--grp-attn-n) changes the number of near neighbours within a block"
        refuse(patch, TOOL, why)
    rotary = rotary_parameters(patch, TOOL)
    family = patch.base.config.model_type
    if family not in ARCHITECTURES:
        refuse(patch, TOOL, "its converter does not write the rotary base and scaling of this family")
    architecture = ARCHITECTURES[family]
    _check(patch, rotary.parameters, architecture)
    parameters = dict(rotary.parameters)
    if parameters["rope_type"] == "linear":
        parameters["original_max_position_embeddings"] = rotary.trained
    config = config_with(patch, parameters, rotary.window)
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = rotary.trained
    extra = _override(rotary, architecture)
    convert = ["python", "convert_hf_to_gguf.py", FOLDER, "--outfile", FOLDER + GGUF]
    serve = ["llama-server", "-c", str(rotary.window), *extra, "-m"]
    flags = runtime_flags(rotary)
    serving = Serving(
        TOOL,
        VERSION,
        patch.scheme.name,
        rotary.trained,
        rotary.window,
        [convert, ["pe-patch", "doctor", FOLDER + GGUF], [*serve, FOLDER + GGUF]],
        [] if flags is None else [*serve, ORIGINAL + ".gguf", *flags],
        metadata(rotary, architecture),
    )

    def write(folder: Path, final: Path) -> None:
        save_model(model, config, folder)
        serving.write(folder, final)

    return write


def _check(patch: Patch, parameters: dict[str, Any], architecture: str) -> None:
    """Raise `UnsupportedError` unless the converter and the runtime express these rotary parameters."""
    kind = parameters["rope_type"]
    allowed = TYPES.get(architecture, (*COMMON, "llama3") if architecture == "llama" else COMMON)
    if kind not in allowed:
        refuse(patch, TOOL, f"for this family its converter supports {', '.join(allowed)}, not {kind}")
    if kind == "yarn" and not parameters["truncate"]:
        refuse(patch, TOOL, "it always rounds the ends of YaRN's ramp to whole pairs", "Use truncate=True")
    if kind == "longrope" and not one_list(parameters):
        why = "it uses the long list for every sequence once the context exceeds the trained window"
        refuse(patch, TOOL, why, LONG_THROUGHOUT)


def metadata(rotary: RotaryExport, architecture: str) -> dict[str, Any]:
    """Return the GGUF keys, and the names of the tensors, that carry the scheme."""
    parameters = rotary.parameters
    kind, rope = parameters["rope_type"], f"{architecture}.rope."
    keys: dict[str, Any] = {
        f"{architecture}.context_length": rotary.window,
        rope + "freq_base": parameters["rope_theta"],
    }
    if kind in ("linear", "yarn"):
        keys |= {rope + "scaling.type": kind, rope + "scaling.factor": parameters["factor"]}
    if kind in ("yarn", "longrope"):
        keys[rope + "scaling.original_context_length"] = rotary.trained
    if kind == "yarn":
        for beta in ("beta_fast", "beta_slow"):
            keys[f"{rope}scaling.yarn_{beta}"] = parameters[beta]
    tensors = {"llama3": ["rope_freqs.weight"], "longrope": ["rope_factors_long.weight", "rope_factors_short.weight"]}
    return keys | ({"tensors": tensors[kind]} if kind in tensors else {})


def runtime_flags(rotary: RotaryExport) -> list[str] | None:
    """Return the scheme as flags for a file of the original checkpoint, or None if only tensors can express it."""
    parameters = rotary.parameters
    kind = parameters["rope_type"]
    flags = ["--rope-freq-base", repr(float(parameters["rope_theta"]))]
    if kind not in COMMON:
        return None
    if kind == "default":
        return ["--rope-scaling", "none", *flags]
    flags += ["--rope-scaling", kind, "--rope-scale", repr(float(parameters["factor"]))]
    if kind == "yarn":
        flags += ["--yarn-orig-ctx", str(rotary.trained)]
        for flag in ("beta-fast", "beta-slow"):
            flags += [f"--yarn-{flag}", repr(float(parameters[flag.replace("-", "_")]))]
    return flags


def _override(rotary: RotaryExport, architecture: str) -> list[str]:
    """Return the flag that sets the factor of cos and sin, or an empty list if llama.cpp's default is right."""
    parameters = rotary.parameters
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
