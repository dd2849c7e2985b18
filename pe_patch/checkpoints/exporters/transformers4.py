"""Export for Transformers 4: `rope_scaling` and the base. Facts from 4.57.6, and tested against it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...patching.config import write_json
from ...patching.patch import Patch
from .checkpoint import Writer, save_model
from .native import RotaryExport, config_with, refuse, rotary_parameters, text_config_name

TOOL = "Transformers 4"
TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
FAMILIES = frozenset(
    "arcee cohere exaone4 gemma gemma2 glm glm4 gpt_neox granite granitemoe hunyuan_v1_dense llama mistral mixtral "
    "olmo olmo2 olmoe persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2".split()
)
"""Families whose 4.57.6 class reads `rope_scaling` and gives the same logits in a tiny model."""
THETA = {"gpt_neox": "rotary_emb_base"}
PART = {"gpt_neox": "rotary_pct"}
"""Names of the base and of the rotary share of the head in a family's 4.x config, if they differ."""
ALSO = {"qwen3_moe": {"num_experts": "num_local_experts"}}
"""Keys of a 4.x config that have another name in 5.x."""
FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    **{family: {"linear": ("type", "factor"), "dynamic": ("type", "factor")} for family in ("olmo", "olmo2")},
    "phi3": {"longrope": ("type", "short_factor", "long_factor")},
}
"""Families whose config accepts `rope_scaling` of some types only, with exactly these keys."""


def writer(model: PreTrainedModel, patch: Patch) -> Writer:
    """Check that Transformers 4 can express the model, and return the function that writes the export."""
    rotary = rotary_parameters(patch, TOOL)
    if rotary.parameters["rope_type"] not in TYPES:
        refuse(patch, TOOL, f"it has no rope_type {rotary.parameters['rope_type']!r}", "Export for 'transformers'")
    family = patch.base.config.model_type
    if family not in FAMILIES:
        refuse(patch, TOOL, "its classes of this family do not read rope_scaling", "Export for 'transformers'")
    _check_fields(patch, rotary, family)
    config = config_with(patch, rotary.parameters, patch.scheme.native_window)
    entries = v4_entries(rotary, family)
    name = text_config_name(patch)

    def write(folder: Path, final: Path) -> None:
        save_model(model, config, folder)
        file = folder / "config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        inner = content if name is None else content[name]
        inner.pop("rope_parameters")
        inner |= entries | {old: inner[new] for old, new in ALSO.get(family, {}).items()}
        if (dtype := content.pop("dtype", None)) is not None:
            content["torch_dtype"] = dtype
        write_json(file, content)

    return write


def v4_entries(rotary: RotaryExport, family: str) -> dict[str, Any]:
    """Return the keys of a 4.x config that equal 5.x's `rope_parameters`."""
    scaling = dict(rotary.parameters)
    entries = {THETA.get(family, "rope_theta"): scaling.pop("rope_theta"), "rope_scaling": None}
    share = scaling.pop("partial_rotary_factor", None)
    if share is not None:
        entries[PART.get(family, "partial_rotary_factor")] = share
    if scaling["rope_type"] == "default":
        return entries
    scaling.setdefault("original_max_position_embeddings", rotary.trained)
    if scaling["rope_type"] == "longrope":
        entries["original_max_position_embeddings"] = rotary.trained  # read by its rotary module
    scaling = {"type": scaling["rope_type"], **scaling}
    if family in FIELDS:
        scaling = {name: scaling[name] for name in FIELDS[family][scaling["rope_type"]]}
    entries["rope_scaling"] = scaling
    return entries


def _check_fields(patch: Patch, rotary: RotaryExport, family: str) -> None:
    """Raise unless a family with fixed keys accepts the type and, for LongRoPE, derives the same attention factor."""
    kind = rotary.parameters["rope_type"]
    if family not in FIELDS or kind == "default":
        return
    if kind not in FIELDS[family]:
        takes = ", ".join(FIELDS[family])
        refuse(patch, TOOL, f"its config of this family accepts {takes}, not {kind}", "Export for 'transformers'")
    if kind == "longrope":
        derived = math.sqrt(1 + math.log(max(rotary.window / rotary.trained, 1)) / math.log(rotary.trained))
        if not math.isclose(derived, rotary.parameters["attention_factor"], rel_tol=1e-6):
            why = f"its class of this family derives the attention factor {derived:.4f} from the two windows"
            refuse(patch, TOOL, why, "Leave attention_factor out")
