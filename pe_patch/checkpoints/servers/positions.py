"""Reduce a patch to what a server computes: for each layer a rotation by fixed frequencies, ALiBi's slopes, or neither.

A server stores keys after their rotation and reads one table of cos and sin for all sequences. So a scheme is served
if its frequencies do not change while a sequence grows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
from transformers import AutoModelForCausalLM

from ...core.scheme import Scheme
from ...errors import UnsupportedError
from ...patching.api import find_patch
from ...patching.patch import Patch
from ...patching.record import RECORD_KEY
from ...patching.saved_config import Marked, native_of
from ...schemes.absolute import DroPE, NoPE
from ...schemes.bias import ALiBi
from ...schemes.remap import LMInfinite
from ...schemes.remapped_base import Remapped
from ...schemes.rotary import Rotary

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""Model type and architecture of the families that rotate halves of a head in an attribute `rotary_emb`."""


@dataclass(frozen=True)
class LayerPositions:
    """The positions of a layer, as plain values that JSON holds exactly."""

    inv_freq: list[float] | None = None
    """One frequency for each rotated pair, in radians per token, float32; None: no rotation."""
    factor: float = 1.0
    """Factor on cos and sin."""
    slopes: list[float] | None = None
    """One ALiBi slope for each query head; None: no bias."""
    score_scale: float = 1.0
    """Factor on the softmax scale."""


@dataclass(frozen=True)
class ServedPositions:
    """The positions of all patched layers."""

    scheme: str
    """The scheme's name, for messages."""
    distinct: list[LayerPositions]
    """The positions that occur."""
    by_layer: dict[int, int]
    """Index into `distinct` for each patched layer; the other layers keep their family's positions."""
    longest: int | None = None
    """Length in tokens up to which these frequencies are the scheme's; None: at every length."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values as a config can store them, with text keys."""
        return {**asdict(self), "by_layer": {str(layer): index for layer, index in self.by_layer.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ServedPositions:
        """Return the positions that `to_dict` stored."""
        return cls(
            values["scheme"],
            [LayerPositions(**each) for each in values["distinct"]],
            {int(layer): index for layer, index in values["by_layer"].items()},
            values["longest"],
        )


def served_positions(config: Any, server: str) -> tuple[Any, ServedPositions]:
    """Return the family's own config and the positions of a patched checkpoint.

    Builds the model without weights, on the device "meta", and patches it as `load_patched` does.

    Args:
        config: the marked config of the checkpoint, from `AutoConfig.from_pretrained`.
        server: the name of the server, for messages.

    Raises:
        UnsupportedError: the server cannot compute these positions. The message names scheme, reason and remedy.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    patch = find_patch(model)
    assert patch is not None
    native = native_of(config)
    native.max_position_embeddings = config.max_position_embeddings
    return native, positions_of(patch, server)


def positions_of(patch: Patch, server: str) -> ServedPositions:
    """Return what a server computes for a patch.

    Raises:
        UnsupportedError: the server cannot compute these positions. The message names scheme, reason and remedy.
    """
    family = patch.model.config.model_type
    if family not in FAMILIES or type(patch.model).__name__ != FAMILIES[family]:
        refuse(patch, server, f"the plugin serves {', '.join(FAMILIES)}, with text alone")
    if patch.keep_native:
        refuse(patch, server, "it keeps the model's native positions beside those of the scheme")
    distinct: list[LayerPositions] = []
    by_layer: dict[int, int] = {}
    longest: int | None = None
    for layer, scheme in sorted(patch.scheme_by_layer.items()):
        positions = _layer_positions(patch, scheme, server)
        if positions not in distinct:
            distinct.append(positions)
        by_layer[layer] = distinct.index(positions)
        if scheme.length_dependent:
            assert isinstance(scheme, Rotary)
            longest = min(scheme.regime_start, longest or scheme.regime_start)
    return ServedPositions(patch.scheme.name, distinct, by_layer, longest)


def _layer_positions(patch: Patch, scheme: Scheme, server: str) -> LayerPositions:
    """Return the positions of the layers with this scheme."""
    for each in (scheme, scheme.scorer):
        if each is not None and not type(each).__module__.startswith("pe_patch."):
            refuse(patch, server, f"its class {type(each).__name__} is not one of pe_patch's, so it may compute more")
    if isinstance(scheme, ALiBi):
        return LayerPositions(slopes=_single(scheme.head_slopes))
    if isinstance(scheme, NoPE):
        return LayerPositions(score_scale=scheme.softmax_scale if isinstance(scheme, DroPE) else 1.0)
    if not isinstance(scheme, Rotary):
        refuse(patch, server, _why(scheme))
    scorer = scheme.scorer
    if scorer is not None and not isinstance(scorer, ALiBi):
        refuse(patch, server, "its scores depend on the position in a way that a rotation and ALiBi's slopes do not")
    if scheme.length_dependent and scheme.regime_start <= scheme.trained_window:
        why = (
            "the server caches rotated keys, but this scheme's frequencies change while a sequence grows beyond the "
            f"trained window of {scheme.trained_window} tokens"
        )
        refuse(patch, server, why, _fixed_length(scheme))
    if scheme.shape.interleaved or scheme.shape.rotary_start:
        refuse(patch, server, "the plugin rotates the halves of a head, but this attention rotates other pairs")
    inv_freq, factor = scheme.frequencies(scheme.regime_start)
    slopes = None if scorer is None else _single(scorer.head_slopes)
    return LayerPositions(_single(inv_freq.tolist()), float(factor), slopes)


def _fixed_length(scheme: Rotary) -> str:
    """Return how to give a scheme one set of frequencies."""
    if "expected_length" in type(scheme).option_names():
        return "Give expected_length=<the longest length to serve in tokens> and save the model again"
    return "Give a fixed factor and save the model again"


def _single(values: Any) -> list[float]:
    """Return numbers rounded to float32."""
    return torch.tensor(values, dtype=torch.float32, device="cpu").tolist()


def _why(scheme: Scheme) -> str:
    """Return why a server cannot compute a scheme that is no rotation by fixed frequencies."""
    if isinstance(scheme, LMInfinite):
        return (
            "its first tokens stay attended at a fixed distance, and a server's sliding window has no such tokens "
            "(what it calls sinks are learned numbers in the softmax)"
        )
    if isinstance(scheme, Remapped):
        return "its keys have a second position for far queries, but the server caches a key with one rotation"
    if scheme.length_dependent:
        return "it depends on the length of the sequence"
    return "it is neither a rotation by fixed frequencies nor ALiBi nor without positions"


def refuse(patch: Patch, server: str, why: str, remedy: str = "") -> NoReturn:
    """Raise `UnsupportedError` with the server, the scheme, the family, the reason and the remedy."""
    remedy = remedy or "Serve it with pe_patch.load_patched and Transformers, or patch with another scheme"
    family = patch.base.config.model_type
    raise UnsupportedError(f"{server} cannot serve {patch.scheme.name!r} on {family}: {why}. {remedy}.")


def is_patched(config: Any) -> bool:
    """Return whether a config is that of a patched checkpoint that Transformers alone cannot load."""
    record = vars(config).get(RECORD_KEY)
    return isinstance(record, dict) and isinstance(config, Marked)
