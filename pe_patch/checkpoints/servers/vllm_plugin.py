"""vLLM's plugin: read a patched checkpoint, and register the model classes that serve it.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`. It replaces the
parser of Hugging Face configs, which passes every other checkpoint on unchanged, and adds architectures. Nothing else
of vLLM changes, so other models are unaffected.
"""

# pyright: reportMissingImports=false
# vLLM runs in a separate environment: it requires other versions than development does.

from __future__ import annotations

import copy
import os
from typing import Any

from ...errors import UnsupportedError
from ...patching.config import SCALING_KEYS
from ...patching.record import RECORD_KEY
from ...patching.saved_config import read_marked
from .positions import FAMILIES, ServedPositions, is_patched, served_positions

TRIED = ("0.31", "0.32")
"""Versions of vLLM on which `make test-vllm` compared this plugin with the patched model."""
OVERRIDE = "PE_PATCH_UNTRIED_VLLM"
"""Environment variable that allows other versions."""
PREFIX = "PePatch"
"""Prefix of the registered architectures."""
SERVED_KEY = "pe_patch_served"
"""Key of the positions in the config that vLLM passes to its processes."""
KEPT = ("default", "llama3")
"""Rope types that layers without the patch may keep: vLLM's tables equal Transformers' at every length."""
READ_DIFFERENTLY = {"proportional", "longrope", "dynamic"}
"""Rope types that vLLM reads differently: it ignores the factor of the first and the attention factor of the second,
and has one base for all lengths of the third."""


def register() -> None:
    """Register the config parser and the architectures; called by vLLM, perhaps several times."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import get_config_parser, register_config_parser

    before = type(get_config_parser("hf"))
    if getattr(before, "serves_pe_patch", False):
        return
    register_config_parser("hf")(_parser_class(before))
    for architecture in FAMILIES.values():
        ModelRegistry.register_model(PREFIX + architecture, f"{__package__}.vllm_models:{PREFIX}{architecture}")


def _parser_class(native: Any) -> Any:
    """Return a subclass of vLLM's parser that turns the config of a patched checkpoint into one that vLLM serves."""

    class PePatchConfigParser(native):
        serves_pe_patch = True

        def parse(self, model: Any, *arguments: Any, **options: Any) -> Any:
            values, config = super().parse(model, *arguments, **options)
            if not is_patched(config) and _reads_differently(values):
                config = read_marked(values, name_or_path=str(model))
            if is_patched(config):
                check_version()
                check_overrides(options.get("hf_overrides"))
                config = served_config(config)
            return values, config

    return PePatchConfigParser


def _reads_differently(values: dict[str, Any]) -> bool:
    """Return whether a file holds a patch whose rotary parameters Transformers reads as meant and vLLM does not."""
    record = values.get(RECORD_KEY)
    if not isinstance(record, dict):
        return False
    part = (record.get("native") or {}).get("config")
    parameters = (values if part is None else values.get(part) or {}).get("rope_parameters") or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    return any(each.get("rope_type") in READ_DIFFERENTLY for each in (parameters, *nested))


def served_config(config: Any) -> Any:
    """Return the family's own config, with the positions and the architecture that vLLM builds from it.

    Args:
        config: the marked config of the checkpoint.

    Raises:
        UnsupportedError: vLLM cannot compute the positions.
    """
    native, positions = served_positions(config, "vLLM")
    if expected := [name for name in native.architectures or () if name != FAMILIES[native.model_type]]:
        raise UnsupportedError(
            f"vLLM cannot serve {positions.scheme!r} on {expected[0]}: the plugin serves {FAMILIES[native.model_type]}."
        )
    _drop_scalings(native, positions)
    native.architectures = [PREFIX + FAMILIES[native.model_type]]
    if positions.longest is not None:
        native.max_position_embeddings = positions.longest
    setattr(native, SERVED_KEY, {**positions.to_dict(), "rope_parameters": copy.deepcopy(native.rope_parameters)})
    setattr(native, RECORD_KEY, getattr(config, RECORD_KEY))  # so that vLLM's cache of compiled code tells them apart
    return native


def _drop_scalings(native: Any, positions: ServedPositions) -> None:
    """Replace the family's scaling where no layer keeps it: vLLM multiplies the longest served length by its factor.

    Raises:
        UnsupportedError: a layer without the patch keeps a scaling that vLLM computes differently.
    """
    types = getattr(native, "layer_types", None) or [None] * native.num_hidden_layers
    kept = {kind for layer, kind in enumerate(types) if layer not in positions.by_layer}
    parameters = native.rope_parameters or {}
    if "rope_type" in parameters:
        native.rope_parameters = _plain(parameters, bool(kept), positions.scheme)
    else:
        native.rope_parameters = {
            kind: _plain(each, kind in kept, positions.scheme) if isinstance(each, dict) else each
            for kind, each in parameters.items()
        }


def _plain(parameters: dict[str, Any], kept: bool, scheme: str) -> dict[str, Any]:
    """Return rotary parameters without a scaling, or as they are if layers keep them."""
    if not kept:
        plain = {key: value for key, value in parameters.items() if key not in SCALING_KEYS - {"rope_theta"}}
        return {**plain, "rope_type": "default"}
    if parameters["rope_type"] not in KEPT or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            f"vLLM cannot serve {scheme!r} on some of the layers: the others keep the family's own scaling, "
            f"{parameters['rope_type']!r}, which vLLM may compute differently. Patch all layers."
        )
    return dict(parameters)


def check_overrides(overrides: Any) -> None:
    """Raise `UnsupportedError` if --hf-overrides chooses another model class, which would drop the positions.

    Args:
        overrides: vLLM's `hf_overrides`, a dict, a function of a config, or None.
    """
    for name in ("architectures", "model_type"):
        if isinstance(overrides, dict) and name in overrides:
            raise UnsupportedError(
                f"--hf-overrides sets {name}={overrides[name]!r}, and that model would ignore the positions of this "
                f"checkpoint. Remove {name} from --hf-overrides."
            )


def check_version() -> None:
    """Raise `UnsupportedError` unless this version of vLLM was tried, or `OVERRIDE` is set."""
    import vllm

    if vllm.__version__.startswith(tuple(f"{version}." for version in TRIED)) or os.environ.get(OVERRIDE) == "1":
        return
    from ...data.packaged import __version__

    raise UnsupportedError(
        f"The plugin of pe_patch {__version__} was tried on vLLM {' and '.join(TRIED)}, and this is "
        f"{vllm.__version__}. Install one of these, or a newer pe_patch; {OVERRIDE}=1 serves on this one, unchecked: "
        "compare some answers with pe_patch.load_patched first."
    )
