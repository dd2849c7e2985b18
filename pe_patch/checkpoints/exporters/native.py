"""What a patch is in Transformers 5's own config, from which every other target is derived."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NoReturn

from transformers import PreTrainedModel

from ...errors import UnsupportedError
from ...mla.protocol import keeps_rotation
from ...patching.build import Patch
from ...patching.config import RECORD_KEY, expressible, native_rope_parameters, refusal
from ...patching.saved_config import unmarked
from ...schemes.rope import Rotary
from .checkpoint import Writer, save_model


def transformers_writer(model: PreTrainedModel, patch: Patch) -> Writer:
    config = transformers_config(patch)
    return lambda folder, final: save_model(model, config, folder)


def transformers_config(patch: Patch) -> Any:
    """The config under which plain Transformers 5 computes the same logits."""
    parameters = _expressed(patch)
    if parameters is None:
        record = getattr(patch.model.config, RECORD_KEY)
        part = (
            " on some of the layers" if "layers" in record else " beside native positions" if patch.keep_native else ""
        )
        why = f": {reason}" if (reason := _refused(patch)) else ""
        raise UnsupportedError(
            f"Transformers' config cannot express {patch.scheme.name!r}{part} on {patch.base.config.model_type}{why}. "
            "save_pretrained keeps the patch for pe_patch.load_patched; nothing was written."
        )
    return config_with(patch, parameters, patch.scheme.native_window)


def config_with(patch: Patch, parameters: dict[str, Any], window: int | None) -> Any:
    """A copy of the model's config without the patch's record, with these rotary parameters and this window."""
    config = unmarked(copy.deepcopy(patch.model.config))
    inner = text_config(patch, config)
    if parameters:
        inner.rope_parameters = parameters
    if window is not None:
        inner.max_position_embeddings = window
    return config


def text_config(patch: Patch, config: Any) -> Any:
    """The part of a whole model's config that speaks of the patched stack."""
    name = text_config_name(patch)
    return config if name is None else getattr(config, name)


def text_config_name(patch: Patch) -> str | None:
    return getattr(patch.model.config, RECORD_KEY)["native"].get("config")


@dataclass(frozen=True)
class Exported:
    """A patch that is one set of rotary parameters for all layers."""

    parameters: dict[str, Any]
    """As Transformers 5 writes them: `rope_type`, `rope_theta` and the options of the type."""
    trained: int
    """Tokens the model was trained on at once."""
    window: int
    """Tokens it reaches with the scheme."""


def rotary_parameters(patch: Patch, tool: str) -> Exported:
    """The patch as one set of rotary parameters, or an error that says why it is none."""
    parameters = _expressed(patch)
    scheme = patch.scheme
    if parameters is None:
        refuse(patch, tool, _why(patch))
    if not isinstance(scheme, Rotary):
        refuse(patch, tool, "these positions are no rotation by fixed frequencies, all that its config can say")
    if "rope_type" not in parameters:
        refuse(patch, tool, "its layers turn by type (sliding or full), which is written for 'transformers' only")
    window = scheme.effective_window
    if window is None:
        window = getattr(patch.base.config, "max_position_embeddings", None) or scheme.trained_window
    return Exported(copy.deepcopy(parameters), int(scheme.trained_window), int(window))


def refuse(patch: Patch, tool: str, why: str, remedy: str = "") -> NoReturn:
    """Raise, naming the tool, the scheme, the family, the reason and what to do instead."""
    remedy = remedy or "save_pretrained keeps the patch for pe_patch.load_patched"
    raise UnsupportedError(
        f"{tool} cannot express {patch.scheme.name!r} on {patch.base.config.model_type}: {why}. "
        f"{remedy}; nothing was written."
    )


def yarn_attention_factor(parameters: dict[str, Any]) -> float:
    """The attention factor over what every tool takes by itself, 0.1 ln s + 1."""
    from ...schemes.config_formats import yarn_temperature

    return parameters["attention_factor"] / yarn_temperature(parameters["factor"])


def one_list(parameters: dict[str, Any]) -> bool:
    """Whether LongRoPE's two lists are the same, so that no length switches between them."""
    return list(parameters["long_factor"]) == list(parameters["short_factor"])


LONG_THROUGHOUT = (
    "Give expected_length beyond the trained window, which uses the long list throughout, or export for 'transformers'"
)


def _expressed(patch: Patch) -> dict[str, Any] | None:
    record = getattr(patch.model.config, RECORD_KEY)
    return expressible(patch.adapter, patch.base.config, patch.scheme_by_layer_type, record)


def _why(patch: Patch) -> str:
    if "layers" in getattr(patch.model.config, RECORD_KEY):
        return "it is on some of the layers, and a config speaks for all of them"
    if patch.keep_native:
        return "it stands beside the model's native positions, and a config names one kind"
    if not isinstance(patch.scheme, Rotary):
        return "these positions are no rotation by fixed frequencies, all that its config can say"
    if patch.scheme.length_dependent:
        return "its frequencies follow the length of the sequence in a way that no rope_type does; give a fixed factor"
    return _refused(patch) or "no rope_type has these frequencies"


def _refused(patch: Patch) -> str:
    """Why the family's config does not take the rotary parameters of the scheme; empty if there are none or it does."""
    if patch.adapter.rotary is None or keeps_rotation(patch.scheme):
        return ""
    config = unmarked(copy.deepcopy(patch.base.config))
    parameters = native_rope_parameters(config, patch.scheme_by_layer_type)
    reason = "" if parameters is None else refusal(config, parameters)
    return f"the config class of this family, {type(config).__name__}, does not take it ({reason})" if reason else ""
