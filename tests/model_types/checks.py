"""Patch a model type of Transformers, tiny and with random weights in float32, and check what came of it."""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pe_patch import load_patched, patch_model, unpatch_model
from pe_patch.adapters import ADAPTERS, Adapter
from pe_patch.adapters.trained_window import config_rope_parameters
from pe_patch.errors import PePatchError
from pe_patch.patching.api import find_patch
from pe_patch.patching.targets import find_stack
from pe_patch.schemes.config_formats import OF_THE_FAMILY

from .tiny import VOCABULARY, WINDOW, tiny

LENGTH, PADDING, CACHED = 24, 5, 20
ROUNDING = 1e-5
"""Largest difference of logits that are equal up to rounding, relative to the largest logit."""
FORMULATION = 2e-4
"""The same for a full pass against a cached or padded one, in which other kernels run."""
HOLDS = "holds"
CHECKS = {
    "identity": "the native scheme changes no bit: full pass, left-padded, cached, generated",
    "frequencies": "YaRN x4 has the frequencies and the factor of Transformers' own function",
    "at_scores": "rotation at the scores equals rotation before the cache",
    "cached": "under YaRN x4, or the native scheme, a cached pass equals a full one",
    "padded": "and a left-padded text equals the same text alone",
    "reloaded": "and so does the model after `save_pretrained` and `load_patched`",
    "undone": "undoing changes no bit",
}


MECHANISMS: dict[str, tuple[str, dict[str, Any]]] = {
    "static rotary": ("yarn", {"factor": 4.0}),
    "rotary at the scores": ("self_extend", {"group": 4, "window": 8}),
    "biases": ("alibi", {}),
    "added to embeddings": ("sinusoidal", {}),
}
"""A scheme for each mechanism."""


@dataclass
class Outcome:
    """The result of all checks of one model type."""

    model_type: str
    status: str = "not built"
    """ "row", "inferred", "refused", "failed" or "not built"."""
    reason: str = ""
    """Why it is not supported."""
    native: str = ""
    """Name of the native scheme."""
    attending: int = 0
    """Layers that attend."""
    layers: int = 0
    """All layers."""
    family: str = ""
    """`model_type` of the stack that was patched."""
    mechanisms: list[str] = field(default_factory=list)
    """The members of `MECHANISMS` that its models take."""
    latent: bool = False
    """It can be converted to latent attention."""
    checks: dict[str, str] = field(default_factory=dict)
    """Each check with "holds", "does not apply: ...", or what was found."""

    @property
    def supported(self) -> bool:
        """Whether the type can be patched and every check holds or does not apply."""
        known = all(found.startswith(HOLDS) or found.startswith("does not apply") for found in self.checks.values())
        return self.status in ("row", "inferred") and known


def outcome(model_type: str) -> Outcome:
    """Build a type, patch it, and check the patch."""
    found = Outcome(model_type)
    try:
        model: Any = tiny(model_type)
        before = situations(model)
    except Exception as error:  # a type may fail in any way
        found.reason = in_words(error)
        return found
    try:
        patch_model(model, "nope", on_existing="replace")
    except PePatchError as error:
        found.status, found.reason = "refused", in_words(error)
        return found
    except Exception as error:
        found.status, found.reason = "failed", in_words(error)
        return found
    patch: Any = find_patch(model)
    adapter, base = patch.adapter, patch.base
    found.status = "row" if base.config.model_type in ADAPTERS else "inferred"
    found.native, found.attending = adapter.native, len(adapter.attentions(base))
    found.layers = len(adapter.blocks(base))
    unpatch_model(model)
    found.family, found.latent = base.config.model_type, adapter.projections is not None
    found.mechanisms = mechanisms(model, adapter)
    for name, check in {
        "undone": lambda: equal(before, situations(model)),
        "identity": lambda: identity(model, adapter, before),
        "frequencies": lambda: frequencies(model, adapter, base),
        "at_scores": lambda: at_scores(model, adapter),
        "cached": lambda: cached(model, adapter),
        "padded": lambda: padded(model, adapter),
        "reloaded": lambda: reloaded(model, adapter),
    }.items():
        try:
            found.checks[name] = check()
        except Exception as error:
            found.checks[name] = in_words(error)
        if find_patch(model) is not None:
            unpatch_model(model)
    return found


def mechanisms(model: Any, adapter: Adapter) -> list[str]:
    """Return the mechanisms of which a scheme can be patched in and runs."""
    found = []
    for name, (scheme, options) in MECHANISMS.items():
        rotary = name.startswith(("static", "rotary"))
        if rotary and adapter.native != "rope" and scheme == "yarn":
            continue
        *_, layers = by_type(model, adapter).values() if rotary else [None]
        given = options | ({"original_max_position_embeddings": WINDOW} if rotary else {})
        try:
            patch_model(model, scheme, on_existing="replace", layers=layers, **given)
            logits(model)
            found.append(name)
        except PePatchError:
            pass
        if find_patch(model) is not None:
            unpatch_model(model)
    return found


# The checks. Each returns HOLDS, why it does not apply, or what it found.


def identity(model: Any, adapter: Adapter, before: dict[str, Tensor]) -> str:
    """Patch with the native scheme and compare bit for bit."""
    for scheme, layers in native_schemes(model, adapter):
        patch_model(model, scheme, on_existing="replace", layers=layers, **window(model, adapter))
        if not (found := equal(before, situations(model))).startswith(HOLDS):
            return found
        unpatch_model(model)
    return found


def frequencies(model: Any, adapter: Adapter, base: Any) -> str:
    """Compare the frequencies under YaRN with those of Transformers' function, in float32."""
    if adapter.native != "rope":
        return "does not apply: it does not rotate"
    shapes = {index: adapter.shape(base, base.config, index) for index in adapter.attentions(base)}
    as_yarn(model, adapter)
    patch: Any = find_patch(model)
    layer, scheme = next(iter(patch.scheme_by_layer.items()))
    shape = shapes[layer]
    width, trained = shape.rotary_dim, shape.trained_length or WINDOW
    config = transformers.LlamaConfig(
        hidden_size=width, num_attention_heads=1, head_dim=width, max_position_embeddings=4 * trained,
        rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "rope_theta": shape.rope_theta,
            "original_max_position_embeddings": trained,
        },
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    if not torch.allclose(scheme.inv_freq, expected, rtol=1e-5) or abs(scheme.attention_scaling - factor) > 1e-6:
        return f"frequencies {scheme.inv_freq.tolist()}, expected {expected.tolist()}"
    return HOLDS


def at_scores(model: Any, adapter: Adapter) -> str:
    """Compare Self-Extend with a group of one, which is RoPE, with RoPE."""
    if adapter.native != "rope":
        return "does not apply: it does not rotate"
    adapter = adapter.at_scores or adapter
    if adapter.bars_rotation_at_scores or not adapter.forwards_kwargs:
        reason = adapter.bars_rotation_at_scores or "drops keywords on the way to its layers"
        return f"does not apply: {reason}"
    differences = []
    for layers in by_type(model, adapter).values():
        patch_model(model, "rope", on_existing="replace", layers=layers, **window(model, adapter))
        early = logits(model)
        patch_model(model, "self_extend", group=1, window=8, original_max_position_embeddings=64,
                    on_existing="replace", layers=layers)  # fmt: skip
        differences.append(difference(early, logits(model)))
        unpatch_model(model)
    return bounded(max(differences), ROUNDING)


def cached(model: Any, adapter: Adapter) -> str:
    """Compare a pass in three parts with a full one."""
    try:
        own = difference(logits(model), in_parts(model))
    except (AttributeError, TypeError, ValueError) as error:
        return f"does not apply: the unpatched model keeps no cache ({in_words(error)})"
    if own > FORMULATION:
        return f"does not apply: the unpatched model differs by {own:.0e}"
    as_yarn(model, adapter)
    return bounded(difference(logits(model), in_parts(model)), FORMULATION)


def padded(model: Any, adapter: Adapter) -> str:
    """Compare a left-padded text with the same text alone."""
    own = difference(logits(model), left_padded(model))
    if own > FORMULATION and adapter.learned is None:
        return f"does not apply: the unpatched model differs by {own:.0e}"
    as_yarn(model, adapter)
    return bounded(difference(logits(model), left_padded(model)), FORMULATION)


def reloaded(model: Any, adapter: Adapter) -> str:
    """Save the patched model, load it, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        before = logits(model)
        model.save_pretrained(folder)
        own = difference(before, logits(type(model).from_pretrained(folder).eval()))
    as_yarn(model, adapter)
    before = logits(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = load_patched(folder).eval()
    if find_patch(again) is None:
        return "the reloaded model is not patched"
    return bounded(difference(before, logits(again)), max(ROUNDING, 2 * own))


# Schemes


def native_schemes(model: Any, adapter: Adapter) -> list[tuple[Any, list[int] | None]]:
    """Return the schemes that the family has anyway, each with its layers; None for all."""
    if adapter.native != "rope":
        return [(adapter.native, None)]
    groups = by_type(model, adapter)
    parameters = [dict(config_rope_parameters(base_of(model).config, kind)) for kind in groups]
    for each in parameters:
        for key in OF_THE_FAMILY:
            each.pop(key, None)
    if all(each.get("rope_type", "default") == "default" for each in parameters):
        return [("rope", None)]
    return list(zip(parameters, groups.values(), strict=True))


def as_yarn(model: Any, adapter: Adapter) -> None:
    """Patch with YaRN x4, in the layers of one type if types have frequencies of their own."""
    if adapter.native == "rope":
        *_, layers = by_type(model, adapter).values()
        patch_model(model, "yarn", factor=4.0, on_existing="replace", layers=layers, **window(model, adapter))
    else:
        patch_model(model, adapter.native)


def window(model: Any, adapter: Adapter) -> dict[str, int]:
    """Return the option that states the trained window, for a rotary family whose config names none."""
    base = base_of(model)
    known = adapter.native != "rope" or adapter.shape(base, base.config).trained_length
    return {} if known else {"original_max_position_embeddings": WINDOW}


def by_type(model: Any, adapter: Adapter) -> dict[str | None, list[int] | None]:
    """Return the layers that rotate, by layer type; None for all if they share their frequencies."""
    base, found = base_of(model), {}
    types, attentions = adapter.layer_types(base, base.config), adapter.attentions(base)
    for index, attention in attentions.items():
        if not adapter.skips_rope(attention):
            found.setdefault(types[index], []).append(index)
    return {None: None} if len({types[index] for index in attentions}) == 1 else found


def base_of(model: Any) -> Any:
    """Return the model that holds the layers."""
    return find_stack(model, None)[1]


# Runs


def tokens() -> Tensor:
    """Return the ids of a text, [1, LENGTH]."""
    return torch.randint(4, VOCABULARY - 1, (1, LENGTH), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any, **given: Any) -> Tensor:
    """Return the logits of the text in a full pass, [1, LENGTH, vocabulary]."""
    torch.manual_seed(0)
    given.setdefault("input_ids", tokens())
    return model(**given, use_cache=False).logits


def left_padded(model: Any) -> Tensor:
    """Return the logits of the text behind padding, in a batch with a longer text, [1, LENGTH, vocabulary].

    Positions are given to a family that counts padding unless it gets them.
    """
    ids = tokens()
    padded_ids = torch.cat((torch.zeros_like(ids[:, :PADDING]), ids), 1)
    longer = torch.cat((ids, ids[:, :PADDING]), 1)
    mask = torch.ones(2, LENGTH + PADDING, dtype=torch.long)
    mask[1, :PADDING] = 0
    given = {"input_ids": torch.cat((longer, padded_ids)), "attention_mask": mask}
    explicit = model.__dict__.get("survey_explicit")
    if explicit is None and "position_ids" in inspect.signature(model.forward).parameters:
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        alone, both = logits(model), [logits(model, **given, **each)[1:, PADDING:] for each in ({}, positions)]
        near = [difference(alone, each) for each in both]
        explicit = positions if near[1] < near[0] else {}
        model.__dict__["survey_explicit"] = explicit
    return logits(model, **given, **(explicit or {}))[1:, PADDING:]


@torch.no_grad()
def in_parts(model: Any) -> Tensor:
    """Return the logits of the text, read in parts with a cache, [1, LENGTH, vocabulary]."""
    torch.manual_seed(0)
    ids, cache, parts = tokens(), None, []
    for start, end in ((0, CACHED), *((index, index + 1) for index in range(CACHED, LENGTH))):
        result = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        parts.append(result.logits)
    return torch.cat(parts, 1)


def situations(model: Any) -> dict[str, Tensor]:
    """Return logits and tokens of the text in each situation that the model can be run in."""
    found = {"in a full pass": logits(model)}
    runs: dict[str, Callable[[Any], Tensor]] = {
        "with left padding": left_padded, "with a cache": in_parts, "in generation": generated,
    }  # fmt: skip
    for name, run in runs.items():
        try:
            found[name] = run(model)
            if name == "with left padding" and difference(found["in a full pass"], found[name]) > FORMULATION:
                found[name] = torch.tensor(float("nan"))  # it counts padding, or mixes it into the text
            if name == "in generation":
                again = logits(model, input_ids=found[name]).argmax(-1)[:, LENGTH - 1 : -1]
                if not torch.equal(again, found[name][:, LENGTH:]):
                    found[name] = torch.tensor(float("nan"))  # its generation disagrees with its own full pass
        except Exception as error:  # a type without a cache, for example
            found[name] = torch.tensor(float("nan"))
            logging.getLogger("survey").debug("%s: %s", name, error)
    return found


def generated(model: Any) -> Tensor:
    """Return eight greedy tokens after the text."""
    return model.generate(input_ids=tokens(), do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0)


def equal(before: dict[str, Tensor], after: dict[str, Tensor]) -> str:
    """Compare situations bit for bit; logits that differ by less than `ROUNDING` are named as such."""
    rounding = 0.0
    for name, expected in before.items():
        if expected.isnan().all():
            continue
        if not torch.equal(expected, after[name]):
            if expected.shape != after[name].shape or not expected.is_floating_point():
                return f"other tokens {name}"
            found = difference(expected, after[name])
            if found > ROUNDING:
                return f"differs by {found:.0e} {name}"
            rounding = max(rounding, found)
    return HOLDS if not rounding else f"{HOLDS} up to rounding, {rounding:.0e}"


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of logits, relative to the largest logit."""
    return float((one - other).abs().max() / one.abs().max())


def bounded(found: float, allowed: float) -> str:
    """Return HOLDS or the difference."""
    return HOLDS if found <= allowed else f"differs by {found:.0e}"


def in_words(error: BaseException) -> str:
    """Return an error in one line."""
    name = "" if isinstance(error, PePatchError) else f"{type(error).__name__}: "
    return f"{name}{' '.join(str(error).split())}"[:400]
