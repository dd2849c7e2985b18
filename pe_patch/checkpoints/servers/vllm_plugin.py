"""vLLM's plugin: read a patched checkpoint, and register the model classes that serve it.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`. It replaces the
parser of Hugging Face configs, which passes every other checkpoint on unchanged, and adds architectures of its own.
Nothing else of vLLM is changed, so that other models run the code that they ran before.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own: it requires other versions than development does.

from __future__ import annotations

import copy
import os
from typing import Any

from ...errors import UnsupportedError
from ...patching.config import SCALING_KEYS
from ...patching.record import RECORD_KEY
from ...patching.saved_config import read_marked
from .positions import FAMILIES, is_patched, served_positions

TRIED = ("0.31", "0.32")
"""Versions of vLLM on which `benchmarks/real/serve.py` compared this plugin with the patched model."""
OVERRIDE = "PE_PATCH_UNTRIED_VLLM"
"""Environment variable that allows other versions."""
PREFIX = "PePatch"
"""Prefix of the registered architectures."""
SERVED_KEY = "pe_patch_served"
"""Key of the positions in the config that vLLM passes to its processes."""
READ_OTHERWISE = {"proportional", "longrope", "dynamic"}
"""Rope types that vLLM reads otherwise than Transformers: it ignores the factor of the first, and the attention factor
of the second; the third has one base for all lengths."""


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
            if not is_patched(config) and _reads_otherwise(values):
                config = read_marked(values, name_or_path=str(model))
            if is_patched(config):
                check_version()
                config = served_config(config)
            return values, config

    return PePatchConfigParser


def _reads_otherwise(values: dict[str, Any]) -> bool:
    """Return whether a file holds a patch whose rotary parameters Transformers reads as meant and vLLM does not."""
    if not isinstance(values.get(RECORD_KEY), dict):
        return False
    parameters = values.get("rope_parameters") or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    types = {each.get("rope_type") for each in (parameters, *nested)}
    if values.get("model_type") not in FAMILIES:
        types.discard("longrope")  # vLLM's own classes read it: one list for all lengths
    return not types.isdisjoint(READ_OTHERWISE)


def served_config(config: Any) -> Any:
    """Return the family's own config, with the positions and the architecture that vLLM builds from it.

    Args:
        config: the marked config of the checkpoint.

    Raises:
        UnsupportedError: vLLM cannot compute the positions.
    """
    native, positions = served_positions(config, "vLLM")
    native.architectures = [PREFIX + FAMILIES[native.model_type]]
    if positions.longest is not None:
        native.max_position_embeddings = positions.longest
    if len(positions.by_layer) == native.num_hidden_layers and "rope_type" in (native.rope_parameters or {}):
        # No layer keeps the family's scaling, by whose factor vLLM would multiply the longest length that it serves.
        plain = {
            key: value for key, value in native.rope_parameters.items() if key not in SCALING_KEYS - {"rope_theta"}
        }
        native.rope_parameters = {**plain, "rope_type": "default"}
    setattr(native, SERVED_KEY, {**positions.to_dict(), "rope_parameters": copy.deepcopy(native.rope_parameters)})
    setattr(native, RECORD_KEY, getattr(config, RECORD_KEY))  # so that vLLM's cache of compiled code tells them apart
    return native


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
