"""Find the adapter of a family that has no row, by looking at a built model, and prove it on that model.

`infer_missing` runs the model on six tokens and observes which modules call the attention interface, and which module
computes cos and sin. It tries each value that a pass does not show, such as the pairing of dimensions. `prove` then
checks the candidate step by step; a candidate that fails is never used.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import compat
from ..adapters import ADAPTERS, Adapter
from ..adapters.adapter import table_rows
from ..adapters.check import FREQUENCIES, check_adapter
from ..adapters.inferred import INFERRED, LATEST, RotatingLayers, adapter_row
from ..adapters.trained_window import named_table
from ..core.swaps import Swap, with_swaps
from ..errors import PePatchError, UnsupportedError
from ..mla.streaming import evaluating
from ..schemes.absolute import Learned, NoPE
from .patch import Settings
from .probe import (
    LENGTH,
    POSITIONS,
    RotationTrial,
    arguments,
    different,
    has_no_values,
    native_rotation,
    our_implementation,
    run,
    trial_patch,
    using_attention,
    without_cache,
    without_rotation,
)
from .targets import UnknownFamilyError, find_adapter, find_stack, unknown_family

logger = logging.getLogger("pe_patch")

MOVED = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative change of an attention's last output if earlier tokens are permuted without rotation.

Other dtypes use `MOVED_EXACT`.
"""
MOVED_EXACT = 1e-3


def infer_missing(model: PreTrainedModel, settings: Settings) -> None:
    """Find and prove the adapter of a family without a row, so that `find_adapter` returns it for this model.

    Args:
        model: the outer model, unwrapped and unpatched.
        settings: the arguments of `patch_model`.

    Raises:
        UnknownFamilyError: no adapter was found, or none could be proved; the message names the step that failed.
    """
    if settings.adapter is not None:
        return
    _, base = find_stack(model, settings.submodule)
    if base.config.model_type in ADAPTERS or base in INFERRED:
        return
    trial = replace(settings, backend=None)
    before = _Modules(base)
    if getattr(base.config, "reset_position_index_per_cell", False):
        raise _unknown(base, "its positions begin again in each cell of a table (reset_position_index_per_cell)")
    try:
        if has_no_values(base):
            INFERRED[base] = LATEST.get(type(base)) or _look(model, base)
            logger.warning(
                "%s has no row in the table of families. Its adapter was inferred and not verified, since its weights "
                "are on the meta device. Load the weights before you patch it.",
                base.config.model_type,
            )
            return
        failures: list[tuple[Adapter, str]] = []
        for adapter in _candidates(model, base, trial):
            failure = prove(model, base, adapter, trial)
            if failure is None:
                INFERRED[base] = LATEST[type(base)] = adapter
                logger.info("Inferred and verified an adapter for %s: %s", base.config.model_type, adapter_row(adapter))
                return
            failures.append((adapter, failure))
    except UnknownFamilyError:
        raise
    except UnsupportedError as error:
        raise _unknown(base, str(error).rstrip(".")) from error
    except Exception as error:  # anything may fail in a model that nobody has looked at
        why = f"a pass over {LENGTH} tokens raised {type(error).__name__}: {' '.join(str(error).split())}"
        raise _unknown(base, why) from error
    finally:
        before.restore()
    adapter, failure = failures[0]
    raise _unknown(base, f"{failure.rstrip('.')}. The best guess was {adapter_row(adapter)}")


class _Modules:
    """Remember the modules of a model and their plain attributes, since a pass may change them.

    BigBird replaces its sparse attention for good when it reads a short text.
    """

    def __init__(self, base: nn.Module) -> None:
        self.before = [(module, dict(compat.submodules_of_any(module)), _plain(module)) for module in base.modules()]

    def restore(self) -> None:
        """Put back what was changed."""
        for module, children, plain in self.before:
            if list(compat.submodules_of_any(module).items()) != list(children.items()):
                compat.replace_submodules(module, children)
            for name, value in plain.items():
                if vars(module).get(name) != value:
                    vars(module)[name] = value


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are numbers, strings or truth values."""
    return {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}


def adapter_for(model: PreTrainedModel) -> tuple[PreTrainedModel, Adapter]:
    """Return the stack of an unpatched model that `patch_model` would patch, and its adapter, inferred if need be.

    Raises:
        PePatchError: there is no such stack, or no adapter.
    """
    infer_missing(model, Settings())
    _, base = find_stack(model, None)
    return base, find_adapter(base, None)


def known_adapter(model: PreTrainedModel) -> Adapter | None:
    """Return what `adapter_for` does, or None if there is no adapter."""
    try:
        return adapter_for(model)[1]
    except PePatchError:
        return None


def _unknown(base: PreTrainedModel, why: str) -> UnknownFamilyError:
    return unknown_family(base.config.model_type, why)


# Looking


@dataclass
class Observed:
    """Record the modules that a short pass of an unpatched model calls."""

    attentions: list[nn.Module]
    """The modules that called the attention interface, in order of their first call; without any, the modules that
    are named as attentions."""
    calls_interface: bool
    """Modules called the attention interface."""
    rotary: list[str]
    """Paths of the modules that have frequencies and were called."""
    receivers: set[nn.Module]
    """Modules that received the cos and sin of one of these."""
    forwards_kwargs: bool
    """An extra keyword of the base model arrived at every call of the attention function."""


ROUNDED = 32
"""Steps of float32, relative to the largest number, by which equal rows may differ after matrix products."""
MARK = "pe_cached"
"""A keyword of this library's attention function, to see whether keywords reach it."""


def observe(base: PreTrainedModel) -> Observed:
    """Run the base model on a few tokens and return what it calls.

    Raises:
        UnknownFamilyError: the model does not run on token ids and positions.
    """
    names = {module: name for name, module in base.named_modules()}
    rotary: dict[str, None] = {}
    rotations: list[Tensor] = []
    receivers: set[nn.Module] = set()
    calls: list[tuple[nn.Module, Any, bool | None]] = []
    called: set[nn.Module] = set()

    def rotated(module: nn.Module, _: Any, result: Any) -> None:
        rotary[names[module]] = None
        rotations.extend(_tensors(result))

    def received(module: nn.Module, args: Any, kwargs: Any) -> None:
        called.add(module)
        if any(given is each for given in _tensors((args, tuple(kwargs.values()))) for each in rotations):
            receivers.add(module)

    handles = [module.register_forward_hook(rotated) for module in names if _frequency_names(module)]
    handles += [module.register_forward_pre_hook(received, with_kwargs=True) for module in names]

    def pass_once(ours: bool) -> None:
        implementation = our_implementation(base, None) if ours else None
        with torch.no_grad(), evaluating(base), using_attention(base.config, implementation):
            try:
                base(**arguments(base), **without_cache(base), **({MARK: True} if ours else {}))
            except TypeError as error:
                if MARK not in str(error):
                    raise
                base(**arguments(base), **without_cache(base))

    def passes() -> None:
        try:
            pass_once(ours=True)
        except Exception:  # a family that builds its attention by another name than ours
            calls.clear()
        if not calls:
            pass_once(ours=False)

    try:
        with_swaps([Swap.of(module, "pe_probe", calls, direct=True) for module in names], passes)
    except Exception as error:  # anything may fail in a model that nobody has looked at
        why = " ".join(str(error).split())
        raise _unknown(base, f"it does not run on token ids and positions ({type(error).__name__}: {why})") from error
    finally:
        for handle in handles:
            handle.remove()
    attentions = list(dict.fromkeys(module for module, *_ in calls))
    marked = bool(calls) and all(mark is True for *_, mark in calls)
    return Observed(attentions or _by_name(names, called), bool(attentions), list(rotary), receivers, marked)


OTHER_ATTENTIONS = re.compile("Linear|Lightning|Delta|Mamba|Conv|Cross|Indexer")
"""Parts of the class names of modules that do not attend to keys in a cache, or not to those of this model."""


def _observe_without_values(base: PreTrainedModel) -> Observed:
    """Return what `observe` would, for a model on the meta device.

    Not every family runs there. Then the names of its classes are all there is to go by.
    """
    config = copy.deepcopy(base.config)
    compat.store_implementation(config, "eager")  # of the implementations that read no values
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # the dtype of kernels for experts
        with torch.device("meta"):
            twin = type(base)(config)
        observed = observe(cast(PreTrainedModel, twin))
        found = [base.get_submodule(name) for name in _paths(twin, observed.attentions)]
        receivers = {base.get_submodule(name) for name in _paths(twin, observed.receivers)}
        return replace(observed, attentions=found, receivers=receivers)
    except Exception as error:  # anything may fail there
        logger.debug("%s does not run on the meta device: %s", type(base).__name__, error)
    finally:
        torch.set_default_dtype(default)
    names = {module: name for name, module in base.named_modules()}
    attentions = [m for m in _by_name(names, set(names)) if not OTHER_ATTENTIONS.search(type(m).__name__)]
    rotary = [name for name, module in base.named_children() if _frequency_names(module)]
    return Observed(attentions, True, rotary, set(), True)


def _paths(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    """Return the paths of modules inside a model."""
    paths = {module: name for name, module in model.named_modules()}
    return [paths[module] for module in modules]


def _by_name(names: Iterable[nn.Module], called: set[nn.Module]) -> list[nn.Module]:
    """Return the innermost modules that were called and whose class is named as an attention."""
    found = [module for module in names if module in called and "Attention" in type(module).__name__]
    outer = {each for each in found for inner in found if inner is not each and inner in set(each.modules())}
    return [module for module in found if module not in outer]


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for each in inner for tensor in _tensors(each)]


def _frequency_names(module: nn.Module) -> list[str]:
    """Return the names of the frequencies that a rotary module holds, one for each layer type."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return [name for name in names if re.fullmatch(rf"(\w+_)?{FREQUENCIES}", name) and "original" not in name]


def _look(model: PreTrainedModel, base: PreTrainedModel) -> Adapter:
    """Return the adapter as far as a pass shows it. The pairing is likely, and the layers that rotate are unknown.

    On the meta device, the rotary module is built again from its config, so that it has values.
    """
    empty = has_no_values(base)
    observed = _observe_without_values(base) if empty else observe(base)
    seen = Adapter(
        **_locate(base, observed.attentions),
        calls_interface=observed.calls_interface,
        forwards_kwargs=observed.forwards_kwargs,
        rotary=None,
        summary="inferred, not verified" if empty else "inferred",
    )
    if not observed.rotary:
        table = _named_table(base) if empty else _position_table(base)
        if table is not None:
            return replace(seen, learned=table[0], learned_offset=table[1], first_position_id=table[2])
        if empty:
            raise _unknown(base, "its weights are on the meta device, where nothing shows its positions")
        multiplier, adds = _input_embeddings(base, seen)
        return replace(seen, unpositioned=True, embedding_multiplier=multiplier, takes_embeddings=adds)
    (name, per_attention), first = _rotary(base, observed, seen), observed.attentions[0]
    built = replace(seen, rotary=name, rotary_per_attention=per_attention).rotary_module(base)
    rotary = type(built)(base.config) if empty else built
    per_type = [each for each in _frequency_names(rotary) if each != FREQUENCIES]
    inv_freq = getattr(rotary, per_type[0] if per_type else FREQUENCIES)
    layout = _layout(_call_rotary(rotary, torch.float32), inv_freq)
    multiplier, adds = (None, False) if empty else _input_embeddings(base, seen)
    return replace(
        seen,
        rotary=name,
        rotary_per_attention=per_attention,
        layout=layout,
        interleaved_pairs=_pairs_neighbours(first, layout, inv_freq.shape[-1]),
        full_precision=layout != "complex" and _call_rotary(rotary, torch.bfloat16)[0].dtype == torch.float32,
        rotary_per_layer_type=bool(per_type),
        early_rotation=_other_receivers(base, observed, seen) or _reordered(rotary, inv_freq, per_type),
        scaling_includes_mscale=_includes_mscale(first, base),
        embedding_multiplier=multiplier,
        takes_embeddings=adds,
        drops_cache_at_window=_drops_cache(model),
    )


def _position_table(base: PreTrainedModel) -> tuple[str, int, int] | None:
    """Return the path of the module that returns a row of its table for each position, and two numbers.

    They are the row of position zero, and the `position_ids` of the first token.

    Raises:
        UnknownFamilyError: several modules do.
    """
    given = arguments(base)
    given["input_ids"] = given["input_ids"].flip(1)  # so that no table of tokens is read in the order of positions
    explicit = given.pop("position_ids", None)
    counted = _rows_by_position(base, given, torch.arange(LENGTH, device=given["input_ids"].device))
    if explicit is None or not counted:
        return next(((path, first, 0) for path, first in counted.items()), None)
    chosen = _rows_by_position(base, {**given, "position_ids": explicit}, explicit[0])
    path, first = next(iter(counted.items()))
    if path not in chosen:
        raise _unknown(base, f"its table {path} does not follow position_ids")
    return path, first, first - chosen[path]


def _rows_by_position(base: PreTrainedModel, given: dict[str, Tensor], positions: Tensor) -> dict[str, int]:
    """Return the path of the module that returns a row of its table for each position, and the row of position zero.

    Raises:
        UnknownFamilyError: several modules do.
    """
    names = {module: name for name, module in base.named_modules() if not list(module.children())}
    found: dict[str, int] = {}

    def compare(module: Any, _: Any, result: Any) -> None:
        rows = table_rows(module) if hasattr(module, "weight") or hasattr(module, "weights") else None
        if not (isinstance(rows, Tensor) and isinstance(result, Tensor) and rows.ndim == 2 and result.ndim > 1):
            return
        if rows.shape[1] != result.shape[-1] or result.shape[-2] != LENGTH or len(rows) <= int(positions[-1]):
            return
        returned = result.reshape(-1, LENGTH, result.shape[-1])[0].to(rows.dtype)
        for first in (rows == returned[0]).all(1).nonzero().flatten().tolist():
            index = positions - positions[0] + first
            if int(index[-1]) < len(rows) and torch.equal(rows[index], returned):
                found[names[module]] = first - int(positions[0])

    handles = [module.register_forward_hook(compare) for module in names]
    try:
        with torch.no_grad(), evaluating(base):
            base(**given, **without_cache(base))
    finally:
        for handle in handles:
            handle.remove()
    if len(found) > 1:
        raise _unknown(base, f"several modules return a row for each position: {', '.join(found)}")
    return found


def _named_table(base: PreTrainedModel) -> tuple[str, int, int] | None:
    """Return what `_position_table` does, for a table under a usual name in a model without values."""
    found = named_table(base)
    if found is None:
        return None
    path, table, first = found
    return path, first, 0 if hasattr(table, "offset") else first  # RoBERTa's table has no `offset`


def _locate(base: PreTrainedModel, attentions: list[nn.Module]) -> dict[str, Any]:
    """Return the fields of an adapter that say where the layers and their attentions are."""
    if not attentions:
        raise _unknown(base, "no module calls the attention interface or is named as an attention")
    paths = {module: name for name, module in base.named_modules()}
    places = [re.fullmatch(r"(.+?)\.(\d+)(?:\.(.+))?", paths[module]) for module in attentions]
    lists = {place[1] for place in places if place}
    inside = list(dict.fromkeys(place[3] or "" for place in places if place))
    several = re.fullmatch(r"(.+)\.0", inside[0]) if len(inside) > 1 else None
    if several and inside == [f"{several[1]}.{number}" for number in range(len(inside))]:
        fields: dict[str, Any] = {"attention": several[1], "attentions_per_layer": len(inside)}
    else:
        fields = {"attention": inside[0] if inside else ""}
    if not all(places) or len(lists) > 1 or (len(inside) > 1 and "attentions_per_layer" not in fields):
        listed = ", ".join(paths[module] for module in attentions[:4])
        raise _unknown(base, f"its attention modules are not at one path in the layers of one list ({listed})")
    fields["layers"] = lists.pop()
    named = list(Adapter(**fields).attentions(base).values())
    if len(set(named)) < len(named):
        raise _unknown(base, "several of its layers share one attention module")
    classes = {type(module).__name__ for module in attentions}
    others = {type(module).__name__ for module in named if not any(module is each for each in attentions)}
    if others and (len(classes) > 1 or others & classes):
        raise _unknown(base, f"only some modules {fields['attention']!r} of one class call the attention interface")
    return fields | {"attention_class": classes.pop() if others else None}


def _rotary(base: PreTrainedModel, observed: Observed, seen: Adapter) -> tuple[str, bool]:
    """Return the name of the rotary module, a child of the base model or of each attention, and which of both."""
    names = [name for name in observed.rotary if "." not in name]
    inner = [name for name in observed.rotary if "." in name]
    if len(names) == 1 and not inner:
        return names[0], False
    modules = {base.get_submodule(name) for name in inner}
    for name in {name.rpartition(".")[2] for name in inner if not names}:
        if modules == {getattr(attention, name, None) for attention in seen.attentions(base).values()}:
            return name, True
    every = ", ".join([*names, *inner[:3]]) or "none"
    raise _unknown(base, f"it needs one rotary module with `{FREQUENCIES}` on the base model, and has: {every}")


def _other_receivers(base: PreTrainedModel, observed: Observed, seen: Adapter) -> str | None:
    """Return why nothing can rotate at the scores, if other modules than layers and attentions receive cos and sin."""
    blocks = set(seen.blocks(base))
    paths = {module: name for name, module in base.named_modules()}
    others = sorted(paths[module] for module in observed.receivers - blocks - set(observed.attentions))
    return f"also passes cos and sin to {others[0]}" if others else None


def _reordered(rotary: nn.Module, inv_freq: Tensor, per_type: list[str]) -> str | None:
    """Return why nothing can rotate at the scores, if M-RoPE joins its rows to another order of frequencies."""
    compose = compat.compose_axes(rotary, _type_of(per_type))
    if compose is None:
        return None
    order = torch.arange(1.0, inv_freq.shape[-1] + 1)
    composed = compose(order.expand(3, 1, 1, -1).clone()).flatten()
    if any(torch.equal(composed, each) for each in (torch.cat((order, order)), order.repeat_interleave(2))):
        return None
    return "joins the three rows of M-RoPE to another order of frequencies than that of its module"


def _layout(result: Any, inv_freq: Tensor) -> str:
    """Return the layout of what the rotary module returned."""
    if isinstance(result, Tensor):
        return "complex"
    _, sin = result
    if sin.shape[-1] == inv_freq.shape[-1]:
        return "single"
    neighbours = torch.equal(sin[..., 0::2], sin[..., 1::2])
    half = sin.shape[-1] // 2
    return "interleaved" if neighbours and not torch.equal(sin[..., :half], sin[..., half:]) else "halves"


def _call_rotary(rotary: nn.Module, dtype: torch.dtype) -> Any:
    """Return what a rotary module returns for the positions of a run and hidden states of a dtype."""
    device = next(rotary.buffers()).device
    hidden = torch.zeros(1, LENGTH, 1, dtype=dtype, device=device)
    positions = torch.tensor([POSITIONS], device=device)
    if hasattr(rotary, compat.COMPOSE_AXES):
        positions = positions.expand(3, 1, -1)
    kind = _type_of([name for name in _frequency_names(rotary) if name != FREQUENCIES])
    with torch.no_grad():
        return rotary(hidden, positions, *([] if kind is None else [kind]))


def _type_of(per_type: list[str]) -> str | None:
    """Return the first layer type of a rotary module, from the names of its frequencies; None without types."""
    return per_type[0].removesuffix(f"_{FREQUENCIES}") if per_type else None


def _includes_mscale(attention: Any, base: PreTrainedModel) -> bool:
    """Return whether the class multiplies the `mscale_all_dim` factor of YaRN into `attention.scaling`.

    The class builds another attention, without memory, from a config with such a factor.
    """
    scaling = getattr(attention, "scaling", None)
    if not isinstance(scaling, float) or not hasattr(attention, "qk_head_dim"):
        return False
    config = copy.deepcopy(base.config)
    config.rope_parameters = {
        **dict(getattr(base.config, "rope_parameters", None) or {}),
        "rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    with torch.device("meta"):
        other = type(attention)(config, getattr(attention, "layer_idx", 0))
    return other.scaling != attention.qk_head_dim**-0.5


def _input_embeddings(base: PreTrainedModel, adapter: Adapter) -> tuple[str | None, bool]:
    """Return the attribute by which the model multiplies its input embeddings, and whether more can be added to them.

    One token, repeated, enters the first layer: as an id, as its embedding, and as twice its embedding.

    Raises:
        UnknownFamilyError: equal tokens enter the first layer differently, so that positions are added before it.
    """
    ids = torch.ones_like(arguments(base)["input_ids"])
    with torch.no_grad():
        embedded = base.get_input_embeddings()(ids)
    by_id = _entered(base, adapter, ids)
    if not tokens_alike(by_id):
        raise _unknown(base, "equal tokens enter its first layer differently, so positions are added to the embeddings")
    try:
        by_embedding, doubled = (_entered(base, adapter, None, factor * embedded) for factor in (1, 2))
    except Exception:  # a family that needs token ids beside the embeddings, such as Gemma 4
        return None, False
    adds = torch.equal(by_id, by_embedding) and torch.allclose(doubled, 2 * by_embedding, rtol=1e-2)
    factor = float(by_embedding.float().norm() / embedded.float().norm())
    name = "embedding_multiplier"
    value = getattr(base, name, None)
    if isinstance(value, int | float) and abs(factor - value) < 1e-2 * value:
        return name, adds
    return None, adds and abs(factor - 1) < 1e-2


def _entered(base: PreTrainedModel, adapter: Adapter, ids: Tensor | None, embeds: Tensor | None = None) -> Tensor:
    """Return what enters the first layer, `[streams, tokens, hidden]`: the largest tensor of that width.

    A model may carry several streams of hidden states.
    """
    first, entered = adapter.blocks(base)[0], []

    def record(_: Any, args: Any, kwargs: Any) -> None:
        hidden = [each for each in _tensors((args, tuple(kwargs.values()))) if each.is_floating_point()]
        width = getattr(base.config, "hidden_size", None)
        entered.append(max(hidden, key=lambda each: (each.shape[-1] == width, each.shape[-1], each.numel())))

    given = {**arguments(base), "input_ids": ids, **({} if embeds is None else {"inputs_embeds": embeds})}
    handle = first.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad(), evaluating(base):
            base(**given, **without_cache(base))
    finally:
        handle.remove()
    hidden = entered[0]
    axis = next(n for n in range(hidden.ndim - 1) if hidden.shape[n] == LENGTH)
    return hidden.movedim(axis, -2).reshape(-1, LENGTH, hidden.shape[-1])


def tokens_alike(hidden: Tensor) -> bool:
    """Return whether the tokens of hidden states `[streams, tokens, hidden]` are equal but for rounding.

    A matrix product may round equal rows differently, by their place among the rows. In half precision such a
    difference of float32 survives in few numbers, and positions change nearly all.
    """
    change = (hidden - hidden[:, :1]).abs().float()
    largest, eps = float(hidden.abs().max()), torch.finfo(hidden.dtype).eps
    if torch.finfo(hidden.dtype).bits < 32:
        return float(change.max()) <= 2 * eps * largest and float((change > 0).float().mean()) < 0.1
    return float(change.max()) <= ROUNDED * eps * largest


def _drops_cache(model: PreTrainedModel) -> bool:
    """Return whether the model's own code drops the cache at the trained window, as Phi-3's does in generation."""
    method = getattr(type(model), "prepare_inputs_for_generation", None)
    try:
        return "original_max_position_embeddings" in inspect.getsource(method) if method is not None else False
    except OSError:  # a class without a source file
        return False


def _pairs_neighbours(attention: nn.Module, layout: str, half: int) -> bool:
    """Return whether the family's `apply_rotary_pos_emb` rotates neighbouring dimensions; a guess if it has none.

    The function needs no weights, so that it can be asked about a model on the meta device.
    """
    likely = layout in ("interleaved", "complex")
    function: Any = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if layout == "complex" or not callable(function):
        return likely
    angles = torch.linspace(0.1, 1.0, half)[None, None]
    doubled = {"halves": torch.cat((angles, angles), -1), "interleaved": angles.repeat_interleave(2, -1)}
    angles = doubled.get(layout, angles)
    query = torch.zeros(1, 1, 1, 2 * half)
    query[..., 0] = 1.0  # rotates into the other dimension of its pair
    try:
        rotated: Any = function(query, query.clone(), angles.cos(), angles.sin())
    except (TypeError, ValueError, RuntimeError):  # a function with other arguments
        return likely
    return bool(rotated[0][0, 0, 0, 1].abs() > 1e-3)


# Trying and proving


def _candidates(model: PreTrainedModel, base: PreTrainedModel, settings: Settings) -> Iterator[Adapter]:
    """Yield the adapters that agree with what a pass shows, the most usual pairing first."""
    seen = _look(model, base)
    known = LATEST.get(type(base))
    if seen.rotary is None or not seen.calls_interface:
        yield from [seen] if known is None or known == seen else [known, seen]
        return
    trial = RotationTrial.of(model, base, seen, settings)
    if known is not None:
        yield _with_rotating_layers(base, known, trial)
    for pairs in (seen.interleaved_pairs, not seen.interleaved_pairs):
        adapter = _with_rotating_layers(base, replace(seen, interleaved_pairs=pairs), trial)
        yield _with_product(adapter, trial)


def _with_rotating_layers(base: PreTrainedModel, adapter: Adapter, trial: RotationTrial) -> Adapter:
    """Return the adapter with `rotates`, if some layers of the model do not rotate."""
    adapter = replace(adapter, rotates=None)
    still, attentions = set(trial.unrotated(adapter)), adapter.attentions(base)
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
    likely = [name for name in plain if re.search("rope|rotary|slid|window|local|global", name)]
    return sorted(likely, key=lambda name: not re.search("rope|rotary", name))


def _with_product(adapter: Adapter, trial: RotationTrial) -> Adapter:
    """Return the adapter with the dtype of the product with cos and sin that comes nearest in a model of 16 bits."""
    if trial.base.dtype not in (torch.bfloat16, torch.float16) or adapter.full_precision or adapter.layout == "complex":
        return adapter
    if adapter.bars_rotation_at_scores is not None or not adapter.forwards_kwargs:
        return adapter
    options = [replace(adapter, full_precision_product=each) for each in (False, True)]
    return min(options, key=trial.distance)


def prove(model: PreTrainedModel, base: PreTrainedModel, adapter: Adapter, settings: Settings) -> str | None:
    """Check an adapter on a short input. Return None if it holds, else the step that failed.

    The steps: every name exists; every layer of one type has as many heads; the model's rotation equals ours before the
    cache and at the scores, for positions with gaps, in every layer; no attention depends on the order of tokens
    without rotation; the patched model equals the unpatched one bit for bit in a full pass, left-padded and with a
    cache; other frequencies change the output; undoing the patch restores it.

    If the attentions do not call the attention interface, nothing rotates at the scores, and nobody sees queries and
    keys: the steps about them are left out.
    """
    check_adapter(base, adapter)
    trial = RotationTrial.of(model, base, adapter, settings)
    if adapter.calls_interface:
        failure = _heads(base, adapter, trial) or (_rotation(base, adapter, trial) if adapter.rotary else None)
        if failure is not None:
            return failure
    if (layer := _depends_on_order(model, base, adapter, settings, trial)) is not None:
        what = "without rotation" if adapter.rotary else "as it attends"
        return f"layer {layer} depends on the order of tokens {what}, so it has another source of positions"
    if adapter.rotary is None:
        return _embeddings(model, base, adapter, settings)
    return _identity(model, base, adapter, settings)


def _heads(base: PreTrainedModel, adapter: Adapter, trial: RotationTrial) -> str | None:
    """Return which layer does not call the attention interface, or has other heads than those of its type; or None."""
    attentions, seen = adapter.attentions(base), trial.native.queries_and_keys
    if silent := sorted(set(attentions) - set(seen)):
        return f"the attention of layer {silent[0]} does not call the attention interface"
    layer_types = adapter.layer_types(base, base.config)
    for layer_type in dict.fromkeys(layer_types):
        shapes = {tuple(t.shape for t in seen[i]) for i in attentions if layer_types[i] == layer_type}
        if len(shapes) > 1:
            return "its layers have different numbers of heads, or heads of different sizes"
    return None


def _rotation(base: PreTrainedModel, adapter: Adapter, trial: RotationTrial) -> str | None:
    """Return where the rotation of an adapter differs from the model's, or None."""
    if empty := [i for i, tensors in trial.native.queries_and_keys.items() if any(not bool(t.any()) for t in tensors)]:
        return f"queries or keys of layer {empty[0]} are zero, so that nothing shows how they rotate"
    for at_scores in (False, True):
        wrong, error = trial.differing(adapter, at_scores)
        if wrong:
            why = "" if error is None else f" ({type(error).__name__}: {error})"
            return different(adapter, type(base).__name__, trial.in_words(wrong), at_scores) + why
    if wrong := trial.normalised(adapter):
        return (
            f"layer {wrong[0]} normalises queries and keys after it rotates them, which needs an adapter with "
            "`norm_after_rotation` or `weighted_norm_after_rotation`"
        )
    return None


def _embeddings(model: PreTrainedModel, base: PreTrainedModel, adapter: Adapter, settings: Settings) -> str | None:
    """Return in which situation a family that does not rotate differs under its own positions, or None.

    Its own positions are those of its table, or none.
    """
    native = Learned if adapter.learned else NoPE
    before = _situations(base, adapter)
    if not _same(before, _situations(base, adapter)):
        return "the unpatched model does not give the same output twice"
    with trial_patch(model, native, adapter, settings):
        patched = _situations(base, adapter)
    for name, output in before.items():
        if not torch.equal(output, patched[name]):
            change = float((output.float() - patched[name].float()).abs().max())
            return f"the same positions change the output by {change:.1e} {name}"
    if adapter.learned:
        with trial_patch(model, NoPE, adapter, settings):
            if _same(before, _situations(base, adapter)):
                return "the output does not change without the table of positions"
            entered = _entered(base, adapter, torch.ones_like(arguments(base)["input_ids"]))
        if not tokens_alike(entered):
            return "equal tokens enter its first layer differently without the table, so it has another one"
    if not _same(before, _situations(base, adapter)):
        return "the model does not give the same output after the trial was undone"
    return None


def _depends_on_order(
    model: PreTrainedModel, base: PreTrainedModel, adapter: Adapter, settings: Settings, trial: RotationTrial
) -> int | None:
    """Return the first layer whose last output changes if earlier tokens are permuted and nothing rotates."""
    order = torch.tensor([3, 1, 4, 0, 2, 5])
    permuted = {index: hidden[:, order.to(hidden.device)] for index, hidden in trial.native.inputs.items()}
    with trial_patch(model, without_rotation(base, adapter), adapter, settings):
        before, after = (run(base, adapter, feed).outputs for feed in (trial.native.inputs, permuted))
    for index, plain in before.items():
        change = (plain[:, -1].float() - after[index][:, -1].float()).abs().max()
        if float(change) > MOVED.get(plain.dtype, MOVED_EXACT) * float(plain.float().abs().max()):
            return index
    return None


def _identity(model: PreTrainedModel, base: PreTrainedModel, adapter: Adapter, settings: Settings) -> str | None:
    """Return the first situation in which the patched base model differs from the unpatched one, or None."""
    attentions, layer_types = adapter.attentions(base), adapter.layer_types(base, base.config)
    before = _situations(base, adapter)
    if not _same(before, _situations(base, adapter)):
        return "the unpatched model does not give the same output twice"
    for layer_type in dict.fromkeys(layer_types[index] for index in attentions):
        layers = [index for index in attentions if layer_types[index] == layer_type]
        if all(adapter.skips_rope(attentions[index]) for index in layers):
            continue
        chosen = None if len(layers) == len(attentions) else layers
        native = native_rotation(base, adapter, layer_type, False, attentions[layers[0]])
        with trial_patch(model, native, adapter, settings, chosen):
            patched = _situations(base, adapter)
        for name, output in before.items():
            if not torch.equal(output, patched[name]):
                change = float((output.float() - patched[name].float()).abs().max())
                return f"the same rotation changes the output by {change:.1e} {name}"
        slower = type("Slower", (native,), {"inverse": native.inverse / 4})
        with trial_patch(model, slower, adapter, settings, chosen):
            if _same(before, _situations(base, adapter)):
                return "other frequencies do not change the output"
    if not _same(before, _situations(base, adapter)):
        return "the model does not give the same output after the trial was undone"
    return None


def _same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(torch.equal(output, after[name]) for name, output in before.items() if name in after)


def _situations(base: PreTrainedModel, adapter: Adapter) -> dict[str, Tensor]:
    """Return the outputs of the base model for a short text in a full pass, left-padded, and with a cache.

    A model with a table of positions is left-padded with explicit positions, and not at all if it takes none, since it
    counts padding then.
    """
    ids = arguments(base)["input_ids"]
    padded = torch.cat((torch.zeros_like(ids[:, :2]), ids), 1)
    mask = (torch.arange(padded.shape[1], device=ids.device) >= 2).long()[None]
    both, masks = torch.cat((torch.cat((ids, ids[:, :2]), 1), padded)), torch.cat((torch.ones_like(mask), mask))
    given: dict[str, Tensor] = {}
    if "position_ids" in compat.argument_names(type(base).forward):
        given["position_ids"] = (masks.cumsum(-1) - 1).clamp(min=0) + adapter.first_position_id
    keeps = compat.cache_argument(type(base).forward)
    with torch.no_grad(), evaluating(base):
        found = {"in a full pass": base(input_ids=ids, **without_cache(base))[0], "as called": base(input_ids=ids)[0]}
        if given or adapter.learned is None:
            left = base(input_ids=both, attention_mask=masks, **given, **without_cache(base))[0]
            found["with left padding"] = left[1:, 2:]
        if keeps is not None:
            first = base(input_ids=ids[:, :-2], use_cache=True)
            name = next((name for name in compat.CACHE_ARGUMENTS if first.get(name) is not None), None)
            cached = {keeps: first[name]} if name is not None else {}
            found["with a cache"] = base(input_ids=ids[:, -2:], use_cache=True, **cached)[0]
    return found
