"""Express a patch in Transformers 5's config, from which all other targets are derived."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NoReturn

from transformers import PreTrainedModel

from ...errors import UnsupportedError
from ...mla.protocol import keeps_rotation
from ...patching.config import expressible, native_rope_parameters, refusal
from ...patching.patch import Patch
from ...patching.record import RECORD_KEY
from ...patching.saved_config import unmarked
from ...schemes.rotary import Rotary
from .checkpoint import Writer, save_model


def transformers_writer(model: PreTrainedModel, patch: Patch) -> Writer:
    """Check that Transformers 5 can express the model, and return the function that writes the export."""
    config = transformers_config(patch)
    return lambda folder, final: save_model(model, config, folder)


def transformers_config(patch: Patch) -> Any:
    """Return the config under which plain Transformers 5 computes the same logits.

    Raises:
        UnsupportedError: the config cannot express the scheme.
    """
    parameters = _expressed(patch)
    if parameters is None:
        record = getattr(patch.model.config, RECORD_KEY)
        where = (
            " on some of the layers" if "layers" in record else " beside native positions" if patch.keep_native else ""
        )
        why = f": {reason}" if (reason := _refused(patch)) else ""
        raise UnsupportedError(
            f"Transformers' config cannot express {patch.scheme.name!r}{where} on {patch.base.config.model_type}{why}. "
            "save_pretrained keeps the patch for pe_patch.load_patched; nothing was written."
        )
    return config_with(patch, parameters, patch.scheme.native_window)


def config_with(patch: Patch, parameters: dict[str, Any], window: int | None) -> Any:
    """Return a copy of the model's config without the patch record, with these rotary parameters and this window."""
    config = unmarked(copy.deepcopy(patch.model.config))
    inner = text_config(patch, config)
    if parameters:
        inner.rope_parameters = parameters
    if window is not None:
        inner.max_position_embeddings = window
    return config


def text_config(patch: Patch, config: Any) -> Any:
    """Return the part of a multi-part model's config for the patched decoder."""
    name = text_config_name(patch)
    return config if name is None else getattr(config, name)


def text_config_name(patch: Patch) -> str | None:
    """Return the attribute of that part in the model's config, or None if the config has no parts."""
    return getattr(patch.model.config, RECORD_KEY)["native"].get("config")


@dataclass(frozen=True)
class RotaryExport:
    """A patch as one set of rotary parameters for all layers."""

    parameters: dict[str, Any]
    """Transformers 5's `rope_parameters`: `rope_type`, `rope_theta` and the options of the type."""
    trained: int
    """Window in tokens that the model was trained on."""
    window: int
    """Window in tokens that the model reaches with the scheme."""


def rotary_parameters(patch: Patch, tool: str) -> RotaryExport:
    """Return the patch as one set of rotary parameters.

    Raises:
        UnsupportedError: the patch is not one set of rotary parameters.
    """
    parameters = _expressed(patch)
    scheme = patch.scheme
    if parameters is None:
        refuse(patch, tool, _why(patch))
    if not isinstance(scheme, Rotary):
        refuse(patch, tool, "its config can only express a rotation by fixed frequencies")
    if "rope_type" not in parameters:
        refuse(
            patch, tool, "its layers rotate by type (sliding or full), which only the target 'transformers' supports"
        )
    window = scheme.effective_window
    if window is None:
        window = getattr(patch.base.config, "max_position_embeddings", None) or scheme.trained_window
    return RotaryExport(copy.deepcopy(parameters), int(scheme.trained_window), int(window))


def refuse(patch: Patch, tool: str, why: str, remedy: str = "") -> NoReturn:
    """Raise `UnsupportedError` with the tool, the scheme, the family, the reason and the remedy."""
    if not remedy:
        rotates = patch.adapter.rotary is not None and not keeps_rotation(patch.scheme)
        readable = "It reads 'linear', 'ntk', 'llama3' and 'yarn' with a fixed factor; " if rotates else ""
        remedy = f"{readable}save_pretrained keeps this patch for pe_patch.load_patched"
    raise UnsupportedError(
        f"{tool} cannot express {patch.scheme.name!r} on {patch.base.config.model_type}: {why}. "
        f"{remedy}; nothing was written."
    )


def yarn_attention_factor(parameters: dict[str, Any]) -> float:
    """Return the attention factor relative to every tool's default, 0.1 ln s + 1."""
    from ...schemes.config_formats import yarn_temperature

    return parameters["attention_factor"] / yarn_temperature(parameters["factor"])


def one_list(parameters: dict[str, Any]) -> bool:
    """Return whether LongRoPE's two lists are equal, so that no length switches between them."""
    return list(parameters["long_factor"]) == list(parameters["short_factor"])


LONG_THROUGHOUT = (
    "Give expected_length beyond the trained window, which always uses the long list, or export for 'transformers'"
)


def _expressed(patch: Patch) -> dict[str, Any] | None:
    """Return Transformers' rotary parameters for the patch, or None if there are none."""
    record = getattr(patch.model.config, RECORD_KEY)
    return expressible(patch.adapter, patch.base.config, patch.scheme_by_layer_type, record)


def _why(patch: Patch) -> str:
    """Return why the patch has no rotary parameters."""
    if "layers" in getattr(patch.model.config, RECORD_KEY):
        return "it applies to some of the layers, but a config applies to all"
    if patch.keep_native:
        return "it keeps the model's native positions, but a config holds one kind"
    if not isinstance(patch.scheme, Rotary):
        return "its config can only express a rotation by fixed frequencies"
    if patch.scheme.length_dependent:
        return "its frequencies depend on the sequence length in a way that no rope_type does; give a fixed factor"
    return _refused(patch) or "no rope_type has these frequencies"


def _refused(patch: Patch) -> str:
    """Return why the family's config rejects the scheme's rotary parameters, or an empty string."""
    if patch.adapter.rotary is None or keeps_rotation(patch.scheme):
        return ""
    config = unmarked(copy.deepcopy(patch.base.config))
    parameters = native_rope_parameters(config, patch.scheme_by_layer_type)
    reason = "" if parameters is None else refusal(config, parameters)
    return f"the config class of this family, {type(config).__name__}, rejects it ({reason})" if reason else ""
