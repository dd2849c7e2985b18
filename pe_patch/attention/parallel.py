"""Heads and sequences that are shared among processes: which part of both an attention is handed, and by whom.

Two parties do it. Transformers' tensor parallelism splits the projections, so that an attention sees some heads of
every token. DeepSpeed's Ulysses splits the sequence and stands in the place of the attention function: it hands that
function the whole sequence and some heads, drops every mask, and knows nothing of positions but `position_ids`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import compat
from ..core.head_slices import Heads
from ..errors import NoEffectError, UnsupportedError

ULYSSES = "deepspeed.runtime.sequence_parallel.ulysses_sp"
CONTEXT_PARALLEL = "_attach_context_parallel_hooks"
"""In the name of the hook by which accelerate takes the masks away from attentions."""

_SUMMED: Any = WeakIdKeyDictionary()
"""The hook on each parameter whose gradient is summed over the processes that share its heads."""


@dataclass(frozen=True)
class Sequence:
    """A sequence of which each process of a group holds a part, in the order of their ranks."""

    group: Any
    rank: int
    size: int
    in_eval: bool
    """Sequences are split in evaluation too; otherwise every process then has whole ones of its own."""

    def splits(self, module: nn.Module) -> bool:
        """Whether what this module is given now is a part of a sequence."""
        return module.training or self.in_eval

    def whole(self, part: Tensor) -> Tensor:
        """The tensor `[rows, whole]` of which this process has `[rows, part]`."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, 1)


def sequence_of(implementation: str, host: str) -> Sequence | None:
    """How Ulysses splits sequences before our attention function of this name; None where nothing stands before it.

    Raises:
        NoEffectError: something else has taken the function's place, or has taken that of `host`, the function of
            Transformers that ours ends in.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _nothing)
    if _ulysses(ALL_ATTENTION_FUNCTIONS.get_interface(host, _nothing)) is not None:
        raise NoEffectError(
            f"Ulysses was registered for {host!r}, which the patch ends in, so that it would drop what the scheme does "
            f"to the scores. Patch the model before it is prepared, with {implementation!r} for Ulysses' attention."
        )
    if hasattr(function, "pe_backend"):
        return None
    if host == "flex_attention":
        raise UnsupportedError("FlexAttention's masks are not put back under Ulysses; use 'sdpa'.")
    ulysses = ulysses_of(implementation)
    if ulysses is None:
        raise NoEffectError(
            f"Something other than DeepSpeed's Ulysses has replaced the attention function {implementation!r} "
            f"({function!r}), and what it does with masks and positions is not known."
        )
    return Sequence(
        ulysses.process_group, ulysses.sp_rank, ulysses.world_size, not getattr(ulysses, "disable_in_eval", False)
    )


def ulysses_of(implementation: str) -> Any:
    """DeepSpeed's module that stands before an attention function, or None."""
    return _ulysses(ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _nothing))


def _nothing() -> None:
    """Stands for an attention function that Transformers does not have."""


def _ulysses(function: Any) -> Any:
    """DeepSpeed's module inside the function that it registers, or None."""
    deepspeed = sys.modules.get(ULYSSES)
    if deepspeed is None:
        return None
    cells = (cell.cell_contents for cell in getattr(function, "__closure__", None) or ())
    return next((held for held in cells if isinstance(held, deepspeed.UlyssesSPAttentionHF)), None)


def layer_masks(base: Any, layers: int, mask: Tensor | None, past: Any, position_ids: Tensor) -> tuple[Any, ...]:
    """The mask of each layer as Transformers makes it for tokens at `[rows, length]`: padding, documents packed into
    one row, and sliding windows."""
    config = base.config
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [_only_kind(config)] * layers
    if unknown := set(kinds) - set(compat.MASK_FUNCTIONS):
        raise UnsupportedError(
            f"Ulysses drops the masks of layers, and how those of {', '.join(sorted(unknown))} look is not known here."
        )
    embeds = torch.empty((*position_ids.shape, 0), dtype=base.dtype, device=position_ids.device)
    made = {
        kind: compat.layer_mask(
            kind, past, config=config, inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids
        )
        for kind in dict.fromkeys(kinds)
    }
    return tuple(made[kind] for kind in kinds)


def _only_kind(config: Any) -> str:
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def mask_of_layer(module: nn.Module, masks: tuple[Any, ...] | None, window: int | None) -> Any:
    """The mask of one layer, where Ulysses has dropped what the layer was handed.

    `window` is the sliding window that the layer itself asks for.
    """
    config, layer = getattr(module, "config", None), module.__dict__.get("pe_layer")
    if masks is None or layer is None:
        raise NoEffectError(
            f"Ulysses drops the mask of {type(module).__name__}, and none reached it on another way. Call the model or "
            "its base model rather than a layer of it."
        )
    kinds = getattr(config, "layer_types", None)
    kind = _only_kind(config) if kinds is None else kinds[layer]
    if config is not None and (window is not None) != (kind == "sliding_attention"):
        raise UnsupportedError(f"Layer {layer} slides or not against what its config says; Ulysses drops its mask.")
    return masks[layer]


def local_heads(module: nn.Module, query: Tensor, key: Tensor, scheme: Any, sequence: Sequence | None) -> Heads | None:
    """Which heads an attention under a scheme was handed, None for all, or where it makes no difference.

    Raises:
        UnsupportedError: heads are split in a way that is not known here, or gradients could not be right.
    """
    whole, count = scheme.shape.num_heads, query.shape[1]
    if count == whole:
        return None
    if sequence is not None:  # DeepSpeed sums the gradients
        return None if scheme.shares_heads else _range(scheme, sequence.rank, sequence.size, query, key)
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in scheme.parameters())
    if scheme.shares_heads and not learns:
        return None
    mesh = tensor_mesh(module)
    if mesh is None:
        raise UnsupportedError(
            f"{type(module).__name__} was handed {count} of {whole} heads, and nothing says which, so {scheme.name!r} "
            "cannot be right: heads may be split by Transformers' tensor parallelism or by DeepSpeed's Ulysses."
        )
    if learns:
        sum_gradients(scheme, mesh)
    return _range(scheme, mesh.get_local_rank(), mesh.size(), query, key)


def local_sinks(sinks: Tensor | None, query: Tensor, sequence: Sequence) -> Tensor | None:
    """The attention sinks, one for each head, of the heads that Ulysses hands out here."""
    if sinks is None or len(sinks) == query.shape[1]:
        return sinks
    return sinks.unflatten(0, (sequence.size, -1))[sequence.rank]


def _range(scheme: Any, rank: int, size: int, query: Tensor, key: Tensor) -> Heads:
    whole, count = scheme.shape.num_heads, query.shape[1]
    if count * size != whole:
        raise UnsupportedError(
            f"{whole} heads over {size} processes, of which this one has {count}: {scheme.name!r} needs heads that are "
            "shared equally. Take a number of processes that divides them."
        )
    return Heads(rank * count, (rank + 1) * count, key.shape[1])


def tensor_mesh(module: nn.Module) -> Any:
    """The processes over which tensor parallelism has split the projections of an attention, a mesh of one dimension;
    None where it has not."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    from torch.distributed.tensor import DTensor

    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            continue
        mesh = parameter.device_mesh
        names = mesh.mesh_dim_names or ("tp",) * mesh.ndim
        for dimension, placement in enumerate(parameter.placements):
            if placement.is_shard() and (names[dimension] == "tp" or mesh.ndim == 1):
                return mesh if mesh.ndim == 1 else mesh[names[dimension]]
    return None


def sum_gradients(scheme: Any, mesh: Any) -> None:
    """Have the gradients of a scheme's parameters summed over processes of which each sees some of the heads."""
    for parameter in scheme.parameters():
        if not parameter.requires_grad or parameter in _SUMMED:
            continue
        if not parameter.is_leaf:
            raise UnsupportedError(f"{scheme.name!r} cannot be trained with its parameters wrapped as they are here.")
        # On the leaf, so that it is called once in a backward pass and sees nothing that was there before.
        _SUMMED[parameter] = parameter.register_hook(partial(_sum, mesh.get_group()))


def _sum(group: Any, gradient: Tensor) -> Tensor:
    gradient = gradient.contiguous().clone()
    dist.all_reduce(gradient, group=group)
    return gradient


def check_conversion(attention: nn.Module, name: str) -> None:
    """Raise where weights that are to be converted are split over processes."""
    if tensor_mesh(attention) is not None:
        raise UnsupportedError(
            f"{name!r} is made of whole projections, and tensor parallelism has split them: convert the model on one "
            "process, save it, and load that."
        )


def agree(schemes: Iterable[Any], attention: nn.Module) -> None:
    """Give the processes that share the heads of a model the same new parameters: those that start at random differ."""
    mesh = tensor_mesh(attention)
    if mesh is None:
        return
    for scheme in schemes:
        for parameter in scheme.parameters():
            dist.broadcast(parameter.data, group=mesh.get_group(), group_src=0)


def check_masks(module: nn.Module, name: str) -> None:
    """Raise where accelerate's context parallelism takes an attention for a plain causal one."""
    for hook in module._forward_pre_hooks.values():
        if CONTEXT_PARALLEL in getattr(hook, "__qualname__", ""):
            raise UnsupportedError(
                f"Context parallelism computes plain causal attention, so it would drop {name!r}, which acts at the "
                "scores. Use Ulysses (sp_size), or a static rotary scheme."
            )
