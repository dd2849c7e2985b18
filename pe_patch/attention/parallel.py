"""Tensor and sequence parallelism: find which heads and tokens an attention module receives on this rank.

Transformers' tensor parallelism splits the projections, so an attention receives some of the heads for every token.
DeepSpeed's Ulysses splits the sequence and replaces the attention function. It calls the original function with the
whole sequence and some of the heads, drops every mask, and passes no positions other than `position_ids`.
"""

from __future__ import annotations

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

_SUMMED: Any = WeakIdKeyDictionary()
"""Hook handle of each parameter whose gradient is summed over the ranks that share its heads."""


@dataclass(frozen=True)
class Sequence:
    """A sequence that is split over the ranks of a group, in the order of the ranks."""

    group: Any
    """Process group."""
    rank: int
    """Index of this process in the group."""
    size: int
    """Number of processes in the group."""
    in_eval: bool
    """Sequences are split in evaluation too; otherwise every rank evaluates whole sequences."""

    def is_split(self, module: nn.Module) -> bool:
        """Return whether the module currently receives a shard of each sequence."""
        return module.training or self.in_eval

    def gather(self, shard: Tensor) -> Tensor:
        """Gather `[rows, shard]` from every rank into `[rows, sequence]`."""
        shards = [torch.empty_like(shard) for _ in range(self.size)]
        dist.all_gather(shards, shard.contiguous(), group=self.group)
        return torch.cat(shards, 1)


def sequence_of(implementation: str, native_name: str) -> Sequence | None:
    """Return how Ulysses splits sequences for our attention function; None if Ulysses does not wrap it.

    Args:
        implementation: the name under which our function is registered.
        native_name: the name of the function of Transformers that ours calls.

    Raises:
        NoEffectError: another library has replaced our function, or Ulysses wraps the one of Transformers.
        UnsupportedError: the function is FlexAttention's, which is not supported under Ulysses.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _missing)
    if compat.ulysses_around(ALL_ATTENTION_FUNCTIONS.get_interface(native_name, _missing)) is not None:
        raise NoEffectError(
            f"Ulysses is registered for {native_name!r}, which the patched attention calls, so it would drop what the "
            f"scheme does to the scores. Patch the model before it is prepared, and register Ulysses for "
            f"{implementation!r}."
        )
    if hasattr(function, "pe_backend"):
        return None
    if native_name == "flex_attention":
        raise UnsupportedError(
            "backend='flex' is not supported under Ulysses, because the masks that Ulysses drops cannot be restored "
            "for it; use backend='sdpa'."
        )
    ulysses = ulysses_of(implementation)
    if ulysses is None:
        raise NoEffectError(
            f"Something other than DeepSpeed's Ulysses has replaced the attention function {implementation!r} "
            f"({function!r}). How it treats masks and positions is unknown, so the scheme is refused. Remove the "
            "replacement, or call unpatch_model(model)."
        )
    return Sequence(
        ulysses.process_group, ulysses.sp_rank, ulysses.world_size, not getattr(ulysses, "disable_in_eval", False)
    )


def ulysses_of(implementation: str) -> Any:
    """Return DeepSpeed's module that wraps an attention function, or None."""
    return compat.ulysses_around(ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _missing))


def _missing() -> None:
    """Do nothing; the default for an attention function that Transformers does not have."""


def layer_masks(base: Any, layers: int, mask: Tensor | None, past: Any, position_ids: Tensor) -> tuple[Any, ...]:
    """Build the mask of each layer with Transformers' functions: padding, packed documents and sliding windows.

    Args:
        base: the base model.
        layers: number of layers.
        mask: padding mask `[rows, length]`, 1 for real tokens; None without padding.
        past: the cache; None without one.
        position_ids: `[rows, length]`.

    Raises:
        UnsupportedError: the config has a layer type whose mask is unknown.
    """
    config = base.config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        layer_types = [_default_layer_type(config)] * layers
    if unknown := set(layer_types) - set(compat.MASK_FUNCTIONS):
        raise UnsupportedError(
            f"Ulysses drops the masks of the layers, and those of layer type {', '.join(sorted(unknown))} cannot be "
            f"rebuilt. Supported layer types: {', '.join(sorted(compat.MASK_FUNCTIONS))}."
        )
    embeds = torch.empty((*position_ids.shape, 0), dtype=base.dtype, device=position_ids.device)
    masks = {
        layer_type: compat.layer_mask(
            layer_type, past, config=config, inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids
        )
        for layer_type in dict.fromkeys(layer_types)
    }
    return tuple(masks[layer_type] for layer_type in layer_types)


def _default_layer_type(config: Any) -> str:
    """Return the layer type of every layer in a config without `layer_types`."""
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def mask_of_layer(module: nn.Module, masks: tuple[Any, ...] | None, window: int | None) -> Any:
    """Return the mask of one layer, which Ulysses dropped.

    Args:
        module: the attention module.
        masks: the masks from `layer_masks`; None if the model did not pass them.
        window: the sliding window that the layer passes to its attention function, in tokens; None without one.

    Raises:
        NoEffectError: no masks reached the layer.
        UnsupportedError: the layer and its config disagree about the sliding window.
    """
    config, layer = getattr(module, "config", None), module.__dict__.get("pe_layer")
    if masks is None or layer is None:
        raise NoEffectError(
            f"Ulysses drops the mask of {type(module).__name__}, and the patched model did not pass one to it. Call "
            "the model or its base model instead of a layer."
        )
    layer_types = getattr(config, "layer_types", None)
    layer_type = _default_layer_type(config) if layer_types is None else layer_types[layer]
    if config is not None and (window is not None) != (layer_type == "sliding_attention"):
        raise UnsupportedError(
            f"Layer {layer} has sliding_window={window}, but its config gives it the layer type {layer_type!r}. "
            "Ulysses drops its mask, and the config is needed to rebuild it."
        )
    return masks[layer]


def local_heads(module: nn.Module, query: Tensor, key: Tensor, scheme: Any, sequence: Sequence | None) -> Heads | None:
    """Return the range of heads that an attention receives; None for all heads, or if the scheme treats all alike.

    Args:
        module: the attention module.
        query: `[batch, heads, query, head]`.
        key: `[batch, key_heads, key, head]`.
        scheme: the scheme that is bound to the module.
        sequence: how Ulysses splits sequences; None without Ulysses.

    Raises:
        UnsupportedError: heads are split in an unknown way, or unequally.
    """
    total, count = scheme.shape.num_heads, query.shape[1]
    if count == total:
        return None
    if sequence is not None:  # DeepSpeed sums the gradients
        return None if scheme.shares_heads else _head_range(scheme, sequence.rank, sequence.size, query, key)
    is_trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in scheme.parameters())
    if scheme.shares_heads and not is_trained:
        return None
    mesh = tensor_mesh(module)
    if mesh is None:
        raise UnsupportedError(
            f"{type(module).__name__} received {count} of {total} heads, and nothing says which ones, so "
            f"{scheme.name!r} cannot be applied. Supported splits are Transformers' tensor parallelism and DeepSpeed's "
            "Ulysses."
        )
    if is_trained:
        sum_gradients(scheme, mesh)
    return _head_range(scheme, mesh.get_local_rank(), mesh.size(), query, key)


def local_sinks(sinks: Tensor | None, query: Tensor, sequence: Sequence) -> Tensor | None:
    """Return the attention sinks `[heads]` of the heads that Ulysses assigns to this rank."""
    if sinks is None or len(sinks) == query.shape[1]:
        return sinks
    return sinks.unflatten(0, (sequence.size, -1))[sequence.rank]


def _head_range(scheme: Any, rank: int, size: int, query: Tensor, key: Tensor) -> Heads:
    """Return the heads of one rank; raise `UnsupportedError` if the ranks hold different numbers of heads."""
    total, count = scheme.shape.num_heads, query.shape[1]
    if count * size != total:
        raise UnsupportedError(
            f"{total} heads are split over {size} processes, and this one holds {count}. {scheme.name!r} requires "
            f"heads that are shared equally; use a number of processes that divides {total}."
        )
    return Heads(rank * count, (rank + 1) * count, key.shape[1])


def tensor_mesh(module: nn.Module) -> Any:
    """Return the one-dimensional device mesh over which the projections of an attention are split; None if unsplit."""
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
    """Sum the gradients of a scheme's parameters over the ranks of a mesh, each of which sees some of the heads."""
    for parameter in scheme.parameters():
        if not parameter.requires_grad or parameter in _SUMMED:
            continue
        if not parameter.is_leaf:
            raise UnsupportedError(
                f"{scheme.name!r} cannot be trained under tensor parallelism, because another library has replaced "
                "its parameters by tensors that are not leaves."
            )
        # A hook on the leaf runs once in a backward pass, and does not see gradients accumulated earlier.
        _SUMMED[parameter] = parameter.register_hook(partial(_sum, mesh.get_group()))


def _sum(group: Any, gradient: Tensor) -> Tensor:
    """Return the gradient summed over a process group."""
    gradient = gradient.contiguous().clone()
    dist.all_reduce(gradient, group=group)
    return gradient


def check_conversion(attention: nn.Module, name: str) -> None:
    """Raise `UnsupportedError` if the weights to convert are split over processes."""
    if tensor_mesh(attention) is not None:
        raise UnsupportedError(
            f"{name!r} converts whole projections, and tensor parallelism has split them. Convert the model on one "
            "process, save it, and load the saved model with tensor parallelism."
        )


def broadcast_parameters(schemes: Iterable[Any], attention: nn.Module) -> None:
    """Broadcast the parameters of schemes from the first rank of the tensor-parallel group.

    Randomly initialized parameters differ between ranks until then.
    """
    mesh = tensor_mesh(attention)
    if mesh is None:
        return
    for scheme in schemes:
        for parameter in scheme.parameters():
            dist.broadcast(parameter.data, group=mesh.get_group(), group_src=0)


def check_context_parallel(module: nn.Module, name: str) -> None:
    """Raise `UnsupportedError` under accelerate's context parallelism, which drops masks and biases."""
    if compat.drops_masks(module):
        raise UnsupportedError(
            f"Context parallelism computes plain causal attention, so it would drop {name!r}, which acts on the "
            "scores. Use Ulysses (sp_size), or a static rotary scheme."
        )
