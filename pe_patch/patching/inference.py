"""Find the adapter of a family that has no row, by looking at a built model, and prove it on that model.

`infer` runs the model on six tokens and observes which modules call the attention interface, and which module computes
cos and sin. What it cannot see, such as the pairing of dimensions, it tries. `prove` then checks the candidate step by
step; a candidate that fails is never used.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import compat
from ..adapters import ADAPTERS, Adapter
from ..adapters.adapter import frequencies_of
from ..adapters.check import FREQUENCIES, check_adapter
from ..adapters.inferred import INFERRED, RotatingLayers, adapter_row
from ..core.swaps import Swap, with_swaps
from ..errors import PePatchError
from ..mla.streaming import evaluating
from .patch import Settings
from .probe import (
    RotationTrial,
    arguments,
    capturing,
    native_rotation,
    our_implementation,
    trial_patch,
    using_attention,
    without_rotation,
)
from .targets import UnknownFamilyError, find_stack, unknown_family

logger = logging.getLogger("pe_patch")

PROVED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
"""Base models whose inferred adapter has been proved on their own weights."""
TOLERANCE = 1e-3
"""Largest change of an attention's output, relative to its largest entry, when tokens before the last one trade
places and nothing rotates."""


def infer_missing(model: PreTrainedModel, settings: Settings) -> None:
    """Find and prove the adapter of a family without a row, so that `find_adapter` returns it.

    Args:
        model: the outer model, unwrapped and unpatched.
        settings: the arguments of `patch_model`.

    Raises:
        UnknownFamilyError: no adapter was found, or none could be proved; the message names the step that failed.
    """
    if settings.adapter is not None:
        return
    _, base = find_stack(model, settings.submodule)
    if base.config.model_type in ADAPTERS or base in PROVED:
        return
    known = INFERRED.get(type(base))
    if any(parameter.is_meta for parameter in base.parameters()):
        if known is None:
            seen = _look(model, base)
            INFERRED[type(base)] = replace(seen, interleaved_pairs=_pairs_neighbours(base, seen))
            logger.warning(
                "%s has no row in the table of families. Its adapter was found by looking, and cannot be proved while "
                "its weights are on the meta device. Load the weights before you patch it.",
                base.config.model_type,
            )
        return
    failures: list[str] = []
    for adapter in [*([] if known is None else [known]), *_candidates(model, base)]:
        try:
            complete = with_rotating_layers(model, base, adapter, settings)
            failure = prove(model, base, complete, settings)
        except PePatchError as error:
            failure = str(error)
        except Exception as error:  # anything may fail in a model that nobody has looked at
            failure = f"a pass under this adapter raised {type(error).__name__}: {' '.join(str(error).split())}"
        else:
            if failure is None:
                INFERRED[type(base)] = complete
                PROVED.add(base)
                logger.info("Found and proved an adapter for %s: %s", base.config.model_type, adapter_row(complete))
                return
        failures.append(failure)
    raise _unknown(base, failures[0].rstrip("."))


# Looking


@dataclass
class Observed:
    """What happens in a short pass of an unpatched model."""

    attentions: list[nn.Module]
    """The modules that called the attention interface, in order of their first call."""
    rotary: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]]
    """Arguments, keywords and result of the last call of each module that has frequencies, by its path."""
    forwards_kwargs: bool
    """An extra keyword of the base model arrived at every call of the attention function."""


MARK = "pe_cached"
"""A keyword of this library's attention function, to see whether keywords reach it."""


def observe(base: PreTrainedModel) -> Observed:
    """Run the base model on a few tokens and return what it calls.

    Raises:
        UnknownFamilyError: the model does not run on token ids and positions.
    """
    names = {module: name for name, module in base.named_modules()}
    rotary: dict[str, Any] = {}
    calls: list[tuple[nn.Module, Any, bool | None]] = []

    def rotated(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        rotary[names[module]] = (args, kwargs, result)

    handles = [module.register_forward_hook(rotated, with_kwargs=True) for module in names if _frequency_names(module)]

    def run() -> None:
        implementation = our_implementation(base, None)
        with torch.no_grad(), evaluating(base), using_attention(base.config, implementation):
            try:
                base(**arguments(base), use_cache=False, **{MARK: True})
            except TypeError as error:
                if MARK not in str(error):
                    raise
                base(**arguments(base), use_cache=False)

    try:
        with_swaps([Swap.of(module, "pe_probe", calls, direct=True) for module in names], run)
    except Exception as error:  # anything may fail in a model that nobody has looked at
        why = " ".join(str(error).split())
        raise _unknown(base, f"it does not run on token ids and positions ({type(error).__name__}: {why})") from error
    finally:
        for handle in handles:
            handle.remove()
    attentions = list(dict.fromkeys(module for module, *_ in calls))
    return Observed(attentions, rotary, all(mark is True for *_, mark in calls))


def _frequency_names(module: nn.Module) -> list[str]:
    """Return the names of the frequencies that a rotary module holds, one for each layer type."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return [name for name in names if re.fullmatch(rf"(\w+_)?{FREQUENCIES}", name) and "original" not in name]


def _look(model: PreTrainedModel, base: PreTrainedModel) -> Adapter:
    """Return the adapter as far as a pass shows it; the pairing and the layers that rotate are not known yet."""
    observed = observe(base)
    layers, attention, attention_class = _locate(base, observed.attentions)
    rotary = _rotary(base, observed)
    args, kwargs, result = observed.rotary[rotary]
    per_type = [name for name in _frequency_names(base.get_submodule(rotary)) if name != FREQUENCIES]
    inv_freq = getattr(base.get_submodule(rotary), per_type[0] if per_type else FREQUENCIES)
    first = observed.attentions[0]
    return Adapter(
        layers=layers,
        attention=attention,
        attention_class=attention_class,
        rotary=rotary,
        layout=_layout(result, inv_freq),
        full_precision=_full_precision(base.get_submodule(rotary), args, kwargs),
        rotary_per_layer_type=bool(per_type),
        early_rotation=_early_rotation(base.get_submodule(rotary), inv_freq),
        forwards_kwargs=observed.forwards_kwargs,
        scaling_includes_mscale=_includes_mscale(first, base),
        embedding_multiplier=_embedding_multiplier(base),
        drops_cache_at_window=_drops_cache(model),
        summary="found by looking",
    )


def _locate(base: PreTrainedModel, attentions: list[nn.Module]) -> tuple[str, str, str | None]:
    """Return the path of the list of layers, the path of the attention in a layer, and its class if others share it."""
    if not attentions:
        raise _unknown(base, "no module calls the attention interface")
    paths = {module: name for name, module in base.named_modules()}
    places = [re.fullmatch(r"(.+?)\.(\d+)\.(.+)", paths[module]) for module in attentions]
    if not all(places) or len({(place[1], place[3]) for place in places if place}) > 1:
        listed = ", ".join(paths[module] for module in attentions[:4])
        raise _unknown(base, f"its attention modules do not have one name in one list of layers ({listed})")
    assert places[0] is not None
    layers, attention = places[0][1], places[0][3]
    classes = {type(module).__name__ for module in attentions}
    named = Adapter(layers=layers, attention=attention).attentions(base).values()
    others = {type(module).__name__ for module in named if not any(module is each for each in attentions)}
    if others and (len(classes) > 1 or others & classes):
        raise _unknown(base, f"only some modules {attention!r} of one class call the attention interface")
    return layers, attention, classes.pop() if others else None


def _rotary(base: PreTrainedModel, observed: Observed) -> str:
    """Return the name of the one rotary module, a child of the base model."""
    names = [name for name in observed.rotary if "." not in name]
    inner = [name for name in observed.rotary if "." in name]
    if len(names) != 1 or inner:
        every = ", ".join([*names, *inner[:3]]) or "none"
        raise _unknown(base, f"it needs one rotary module with `{FREQUENCIES}` on the base model, and has: {every}")
    return names[0]


def _layout(result: Any, inv_freq: Tensor) -> str:
    """Return the layout of what the rotary module returned."""
    if isinstance(result, Tensor):
        return "complex"
    cos, sin = result
    if cos.shape[-1] == inv_freq.shape[-1]:
        return "single"
    if sin.is_meta:
        return "halves"
    neighbours = torch.equal(sin[..., 0::2], sin[..., 1::2])
    half = sin.shape[-1] // 2
    return "interleaved" if neighbours and not torch.equal(sin[..., :half], sin[..., half:]) else "halves"


def _early_rotation(rotary: nn.Module, inv_freq: Tensor) -> str | None:
    """Return why nothing can rotate at the scores, if M-RoPE joins its rows to another order of frequencies."""
    compose = getattr(rotary, compat.COMPOSE_AXES, None)
    if compose is None:
        return None
    order = torch.arange(1.0, inv_freq.shape[-1] + 1)
    composed = compose(order.expand(3, 1, 1, -1).clone()).flatten()
    plain = (torch.cat((order, order)), order.repeat_interleave(2))
    if any(torch.equal(composed, each) for each in plain):
        return None
    return "joins the three rows of M-RoPE to another order of frequencies than that of its module"


def _pairs_neighbours(base: PreTrainedModel, adapter: Adapter) -> bool:
    """Return whether the family's `apply_rotary_pos_emb` rotates neighbouring dimensions; a guess if it has none.

    The function needs no weights, so that it can be asked about a model on the meta device.
    """
    likely = adapter.layout in ("interleaved", "complex")
    attention = next(iter(adapter.attentions(base).values()))
    function: Any = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if adapter.layout == "complex" or adapter.rotary_per_layer_type or not callable(function):
        return likely
    half = frequencies_of(base.get_submodule(str(adapter.rotary)), None)[0].shape[-1]
    angles = torch.linspace(0.1, 1.0, half)[None, None]
    doubled = {"halves": torch.cat((angles, angles), -1), "interleaved": angles.repeat_interleave(2, -1)}
    angles = doubled.get(adapter.layout, angles)
    query = torch.zeros(1, 1, 1, 2 * half)
    query[..., 0] = 1.0  # rotates into the other dimension of its pair
    try:
        rotated: Any = function(query, query.clone(), angles.cos(), angles.sin())

    except (TypeError, ValueError, RuntimeError):  # a function with other arguments
        return likely
    return bool(rotated[0][0, 0, 0, 1].abs() > 1e-3)


def _full_precision(rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether cos and sin are float32 for inputs of another dtype."""

    def lowered(value: Any) -> Any:
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.no_grad():
        result = rotary(*map(lowered, args), **{name: lowered(value) for name, value in kwargs.items()})
    return not isinstance(result, Tensor) and result[0].dtype == torch.float32


def _includes_mscale(attention: Any, base: PreTrainedModel) -> bool:
    """Return whether the class multiplies the `mscale_all_dim` factor of YaRN into `attention.scaling`.

    The class builds another attention, without memory, from a config with such a factor.
    """
    scaling = getattr(attention, "scaling", None)
    if not isinstance(scaling, float) or not hasattr(attention, "qk_head_dim"):
        return False
    parameters = {
        **dict(getattr(base.config, "rope_parameters", None) or {}),
        "rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    config = copy.deepcopy(base.config)
    config.rope_parameters = parameters
    with torch.device("meta"):
        other = type(attention)(config, getattr(attention, "layer_idx", 0))
    return other.scaling != attention.qk_head_dim**-0.5


def _embedding_multiplier(base: PreTrainedModel) -> str | None:
    """Return the attribute of the base model by which it multiplies its embeddings, by the name that Granite gives."""
    value = getattr(base, "embedding_multiplier", None)
    return "embedding_multiplier" if isinstance(value, int | float) else None


def _unknown(base: PreTrainedModel, why: str) -> UnknownFamilyError:
    return unknown_family(base.config.model_type, why)


def _drops_cache(model: PreTrainedModel) -> bool:
    """Return whether the model's own code drops the cache at the trained window, as Phi-3's does in generation."""
    method = getattr(type(model), "prepare_inputs_for_generation", None)
    try:
        return "original_max_position_embeddings" in inspect.getsource(method) if method is not None else False
    except OSError:  # a class without a source file
        return False


# Trying and proving


def _candidates(model: PreTrainedModel, base: PreTrainedModel) -> Iterator[Adapter]:
    """Yield the adapters that fit what a pass shows, the most usual pairing first."""
    seen = _look(model, base)
    products = (False, True) if base.dtype in (torch.bfloat16, torch.float16) and not seen.full_precision else (False,)
    likely = seen.layout in ("interleaved", "complex")
    for pairs, product_in_full in product((likely, not likely), products):
        yield replace(seen, interleaved_pairs=pairs, full_precision_product=product_in_full)


def with_rotating_layers(
    model: PreTrainedModel, base: PreTrainedModel, adapter: Adapter, settings: Settings
) -> Adapter:
    """Return the adapter with `rotates`, if some layers of the model do not rotate."""
    trial = RotationTrial.of(model, base, adapter, settings)
    still = set(trial.unrotated(adapter))
    attentions = adapter.attentions(base)
    if not still or still == set(attentions):
        return adapter
    flags = {index: index not in still for index in attentions}
    for name in _flag_names(next(iter(attentions.values()))):
        if all(hasattr(each, name) and bool(getattr(each, name)) == flags[i] for i, each in attentions.items()):
            return replace(adapter, rotates=name)
    return replace(adapter, rotates=RotatingLayers(frozenset(index for index, flag in flags.items() if flag)))


def _flag_names(attention: nn.Module) -> list[str]:
    """Return the attributes of an attention that may say whether it rotates, the clearest names first."""
    plain = [name for name, value in vars(attention).items() if value is None or isinstance(value, bool | int)]
    return sorted(plain, key=lambda name: (not re.search("rope|rotary", name), not re.search("slid|window", name)))


def prove(model: PreTrainedModel, base: PreTrainedModel, adapter: Adapter, settings: Settings) -> str | None:
    """Check an adapter on a short random input. Return None if it holds, else the step that failed.

    The steps: every name exists; the model's rotation equals ours before the cache and at the scores, for positions
    with gaps, in every layer; nothing but the rotation knows positions; the patched model equals the unpatched one bit
    for bit in a full pass, left-padded and with a cache; other frequencies move the logits; undoing restores the model.
    """
    check_adapter(base, adapter)
    trial = RotationTrial.of(model, base, adapter, settings)
    if set(trial.native) != set(adapter.attentions(base)):
        silent = sorted(set(adapter.attentions(base)) - set(trial.native))
        return f"the attention of layer {silent[0]} does not call the attention interface"
    for at_scores in (False, True):
        wrong, error = trial.differing(adapter, at_scores)
        if wrong:
            return trial.message(adapter, wrong, error, at_scores, None)
    if wrong := trial.normalised(adapter):
        return f"layer {wrong[0]} normalises queries and keys after it rotates them, which a row must describe"
    if (layer := _knows_order(model, base, adapter, settings, trial)) is not None:
        return f"layer {layer} knows the order of tokens when nothing rotates, so positions reach it another way"
    return _identity(model, base, adapter, settings)


def _knows_order(
    model: PreTrainedModel, base: PreTrainedModel, adapter: Adapter, settings: Settings, trial: RotationTrial
) -> int | None:
    """Return the first layer whose last output changes if the tokens before trade places and nothing rotates."""
    order = torch.tensor([3, 1, 4, 0, 2, 5], device=base.device)
    with trial_patch(model, without_rotation(base, adapter), adapter, settings):
        before, after = (
            attention_outputs(base, adapter, feed)
            for feed in (trial.inputs, {index: hidden[:, order] for index, hidden in trial.inputs.items()})
        )
    for index, plain in before.items():
        change = (plain[:, -1] - after[index][:, -1]).abs().max()
        if float(change) > TOLERANCE * float(plain.abs().max()) + 1e-12:
            return index
    return None


def attention_outputs(base: PreTrainedModel, adapter: Adapter, feed: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the output of each attention, `[batch, tokens, hidden]`, for given inputs."""
    outputs: dict[int, Tensor] = {}

    def keep(index: int, result: Any) -> None:
        outputs[index] = (result[0] if isinstance(result, tuple) else result).float()

    handles = [
        attention.register_forward_hook(lambda _, __, result, index=index: keep(index, result))
        for index, attention in adapter.attentions(base).items()
    ]
    try:
        with torch.no_grad(), evaluating(base), capturing(base, adapter, {}, {}, feed):
            base(**arguments(base), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _identity(model: PreTrainedModel, base: PreTrainedModel, adapter: Adapter, settings: Settings) -> str | None:
    """Return the first situation in which the patched model differs from the unpatched one, or None."""
    layer_types = list(dict.fromkeys(adapter.layer_types(base, base.config)[i] for i in adapter.attentions(base)))
    before = _situations(model, base)
    for layer_type in layer_types:
        layers = None if len(layer_types) == 1 else [
            i for i in adapter.attentions(base) if adapter.layer_types(base, base.config)[i] == layer_type
        ]  # fmt: skip
        if adapter.rotates is not None and all(adapter.skips_rope(adapter.attentions(base)[i]) for i in layers or []):
            if layers is not None:
                continue
        native = native_rotation(base, adapter, layer_type, False, next(iter(adapter.attentions(base).values())))
        with trial_patch(model, native, adapter, settings, layers):
            patched = _situations(model, base)
        for name, logits in before.items():
            if not torch.equal(logits, patched[name]):
                change = float((logits.float() - patched[name].float()).abs().max())
                return f"the same rotation moves the logits by {change:.1e} in this situation: {name}"
        slower = type("Slower", (native,), {"inverse": native.inverse / 4})
        with trial_patch(model, slower, adapter, settings, layers):
            moved = _situations(model, base, only="a full pass")
        if torch.equal(before["a full pass"], moved["a full pass"]):
            return "other frequencies do not move the logits"
    after = _situations(model, base)
    if not all(torch.equal(logits, after[name]) for name, logits in before.items()):
        return "the model does not give the same logits after the trial was undone"
    return None


def _situations(model: PreTrainedModel, base: PreTrainedModel, only: str | None = None) -> dict[str, Tensor]:
    """Return the logits of a short text in a full pass, left-padded, and with a cache."""
    ids = arguments(base)["input_ids"]
    padded = torch.cat((torch.zeros_like(ids[:, :2]), ids), 1)
    mask = (torch.arange(padded.shape[1], device=ids.device) >= 2).long()[None]
    results: dict[str, Tensor] = {}
    with torch.no_grad(), evaluating(model):
        results["a full pass"] = model(input_ids=ids, use_cache=False)[0]
        if only is None:
            both = torch.cat((torch.cat((ids, ids[:, :2]), 1), padded))
            masks = torch.cat((torch.ones_like(mask), mask))
            results["left-padded"] = model(input_ids=both, attention_mask=masks, use_cache=False)[0][1:, 2:]
            first = model(input_ids=ids[:, :-2], use_cache=True)
            name = next(name for name in compat.CACHE_ARGUMENTS if name in first)
            rest = {compat.cache_argument(type(model).forward) or name: first[name]}
            results["with a cache"] = model(input_ids=ids[:, -2:], use_cache=True, **rest)[0]
    return results
