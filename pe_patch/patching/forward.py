"""Compute positions in the forward of a patched model, then call the family's own forward."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin

from .. import compat
from ..adapters.adapter import ADDED
from ..attention.interface import BY_IMPLEMENTATION, NO_PAGING, backend_for, check_backend
from ..attention.parallel import Sequence, layer_masks, sequence_of
from ..core.handover import call_with_value, current_value
from ..core.positions import (
    Positions,
    document_lengths,
    positions_from_mask,
    positions_skipping_gaps,
    slot_mask_is_wrong,
)
from ..core.scheme import Scheme
from ..errors import BeyondWindowError, NoEffectError, UnsupportedError, quoted
from .cache_record import (
    CacheRecord,
    allow_any_crop,
    close_record,
    key_positions,
    open_record,
    reuse_encoded_keys,
    slots_of,
)

logger = logging.getLogger("pe_patch")


@dataclass
class Runtime:
    """The facts about a patch that the forward of a patched model uses."""

    scheme: Scheme
    """The scheme of the first patched layer."""
    embeds: bool
    """The scheme adds to the input embeddings."""
    table_width: int | None
    """Width of the family's table of positions, in whose place the scheme adds. None to add to the input embeddings."""
    table_rows: int
    """Positions of that table; 0 without one. A longer pass needs ids that the family takes from buffers otherwise."""
    has_token_types: bool
    """The family takes token types from a buffer if none are given."""
    first_position_id: int
    """The `position_ids` of the first token."""
    multiplier: float
    """Factor by which the base model multiplies `inputs_embeds`."""
    scores: bool
    """At least one layer needs the positions of queries and keys at its scores."""
    rotates_at_scores: bool
    """The scheme rotates keys that it takes from the cache."""
    pass_positions: Callable[..., dict[str, Any]] | None
    """Function that passes positions to the layers of a family that drops keyword arguments; else None."""
    arguments: tuple[str, ...]
    """Names of the base forward's positional arguments."""
    cache_argument: str | None
    """Name of the base forward's cache argument; None for a vision encoder."""
    model_arguments: tuple[str, ...]
    """Names of the positional arguments of the outer model's forward."""
    model_cache_argument: str | None
    """Name of its cache argument."""
    specification: str
    """The scheme, its options and what it read from the model, as JSON. A cache must have been filled under the
    same."""
    window: int | None
    """Effective window in tokens; None if the scheme has no limit."""
    strict: bool
    """Raise for a sequence beyond the window instead of warning."""
    key_copies: bool = False
    """Keep encoded copies of cached keys for later passes."""
    warned: bool = field(default=False)
    """The warning has been logged."""
    patch: tuple[int, int] | None = None
    """Height and width of a patch in pixels; None for a text model."""
    keep_native: bool = False
    """The native positions remain beside the scheme."""
    native_table: tuple[int, str] | None = None
    """Size and class name of a native position table that remains beside the scheme; None if there is none."""
    layers: int = 0
    """Number of layers of the model."""
    forwards_kwargs: bool = True
    """The base model forwards extra keyword arguments to the attention function."""
    calls_interface: bool = True
    """The attentions call the attention interface."""
    eager_only: bool = False
    """The family only has eager attention."""
    unsplittable: str | None = None
    """The reason why Ulysses cannot split sequences of this model over processes; None if it can."""
    rotary: tuple[str, type] | None = None
    """Attribute of the base model that holds the patch's rotary module, and its class; None if it was not replaced."""
    sliding_window: int | None = None
    """Number of keys that sliding layers attend to; None without such layers."""
    chunk: int | None = None
    """Number of tokens in a chunk of chunked attention layers; None without such layers."""


def base_forward(base: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute the positions and open the cache of one pass, then call the base model's own forward."""
    runtime: Runtime = base.pe_runtime
    for name, value in zip(runtime.arguments, args, strict=False):
        kwargs[name] = value
    sequence = _check_attention(base, runtime)
    from_model = current_value("position_ids", base)
    if from_model is not None:
        kwargs["position_ids"] = from_model if kwargs.get("position_ids") is None else kwargs["position_ids"]
    ids = kwargs.get("input_ids")
    inputs = ids if ids is not None else kwargs.get("inputs_embeds")
    past = compat.take_cache(kwargs, runtime.cache_argument, f"{type(base).__name__}.forward")
    if inputs is None:
        return inner(**kwargs)  # which raises the family's own error
    if sequence is not None and runtime.unsplittable is not None:
        raise UnsupportedError(
            f"Ulysses cannot split sequences under {runtime.scheme.name!r} here: {runtime.unsplittable}."
        )
    if sequence is not None and sequence.is_split(base):
        return inner(**_before_ulysses(base, runtime, sequence, inputs, past, kwargs))
    past = _open_cache(base, runtime, past, kwargs)
    past = getattr(past, "self_attention_cache", past)  # of an encoder-decoder's two caches
    past_length = 0 if past is None else past.get_seq_length()
    explicit = kwargs.get("position_ids")
    counted = explicit if explicit is None or not runtime.first_position_id else explicit - runtime.first_position_id
    _check_window(runtime, inputs.shape[1], past_length, counted)
    record = None
    if past is not None:
        record = open_record(past, runtime.scheme.name, runtime.specification, past_length, runtime.rotates_at_scores)
    kwargs = _with_positions(base, runtime, inputs, past_length, past, record, kwargs)
    if ADDED in kwargs:
        inner = partial(call_with_value, ADDED, base, kwargs.pop(ADDED), inner)
    if sequence is not None:
        kwargs = _with_masks(base, runtime, inputs, past_length, past, kwargs)
    if record is None:
        return inner(**kwargs)
    total = past_length + inputs.shape[1]  # before the pass, since a static cache increments `past_length` in place
    record.open, record.finished = True, False
    try:
        output = inner(**kwargs)
        record.finished = True
    finally:
        record.open = False
    close_record(past, record, total)
    return output


def _before_ulysses(
    base: Any, runtime: Runtime, sequence: Sequence, inputs: Tensor, past: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the keywords of a pass with what Ulysses drops: masks, and the positions of the whole sequence.

    Raises:
        UnsupportedError: `position_ids` are missing, have another shape than the inputs, or the cache is not empty.
    """
    explicit, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if explicit is None:
        raise UnsupportedError(
            "Ulysses splits a sequence over processes, and without position_ids each process would count from 0: give "
            "position_ids [rows, part], the slice of the whole sequence's that this process computes."
        )
    if explicit.ndim != 2 or not (mask is None or (isinstance(mask, Tensor) and mask.shape == inputs.shape[:2])):
        raise UnsupportedError(
            "Under Ulysses position_ids and attention_mask must have the shape [rows, part] of this process's part."
        )
    if past is not None and past.get_seq_length() > 0:
        raise UnsupportedError("Under Ulysses a sequence is read in one pass: leave the cache out.")
    whole = sequence.gather(explicit.to(inputs.device).expand(inputs.shape[0], -1))
    padding = None if mask is None else sequence.gather(mask.to(inputs.device))
    _check_window(runtime, whole.shape[1], 0, whole)
    if runtime.embeds:
        kwargs = _embedded(base, runtime, explicit.to(inputs.device), kwargs)
    positions = Positions(whole, whole)
    if runtime.scores:
        positions = _positions(runtime, whole, None, whole, 0, None, None)
    masks = layer_masks(base, runtime.layers, padding, None, whole)
    return {**kwargs, "pe_positions": positions._replace(masks=masks)}


def _with_masks(
    base: Any, runtime: Runtime, inputs: Tensor, past_length: int | Tensor, past: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the keywords of a pass with the masks of each layer, for a sequence that Ulysses does not split."""
    explicit, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    counted = torch.arange(inputs.shape[1], device=inputs.device)[None] + past_length
    at = counted if explicit is None else explicit.to(inputs.device)
    positions = kwargs.get("pe_positions") or Positions(at, at)
    masks = layer_masks(base, runtime.layers, mask, past, at.expand(inputs.shape[0], -1))
    return {**kwargs, "pe_positions": positions._replace(masks=masks)}


def vision_forward(base: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute the grid positions of an image's tokens, then call the vision encoder's own forward."""
    runtime: Runtime = base.pe_runtime
    for name, value in zip(runtime.arguments, args, strict=False):
        kwargs[name] = value
    _check_attention(base, runtime)
    pixels = kwargs.get("pixel_values")
    if pixels is None:
        return inner(**kwargs)  # which raises the family's own error
    assert runtime.patch is not None
    rows, columns = (size // patch for size, patch in zip(pixels.shape[-2:], runtime.patch, strict=True))
    grid = cast(Any, runtime.scheme).lay_out(rows, columns, pixels.device)
    index = torch.arange(len(grid[0]), device=pixels.device)[None]
    kwargs["pe_positions"] = Positions(index, index, prepared=grid)
    if not runtime.keep_native:
        kwargs["interpolate_pos_encoding"] = True  # calls the replaced method; any image size
    return inner(**kwargs)


def _check_attention(base: Any, runtime: Runtime) -> Sequence | None:
    """Return how sequences are split over processes, or None.

    Raises:
        NoEffectError: the attention or the rotary module was changed after the patch, so the scheme would not run.
    """
    implementation = compat.attention_implementation(base.config)
    backend = BY_IMPLEMENTATION.get(implementation)
    if backend is None and runtime.calls_interface:
        raise NoEffectError(
            f"config._attn_implementation was set to {quoted(implementation)} after the patch, "
            f"which would drop {runtime.scheme.name!r}. Call model.set_attn_implementation(...) instead."
        )
    if runtime.rotary is not None and not isinstance(current := getattr(base, runtime.rotary[0]), runtime.rotary[1]):
        raise NoEffectError(
            f"{type(base).__name__}.{runtime.rotary[0]} is a {type(current).__name__} that was assigned after the "
            f"patch, which drops {runtime.scheme.name!r}. Call unpatch_model(model), which restores the original, "
            "change the model, and patch it again."
        )
    return None if backend is None else sequence_of(backend.implementation, backend.native_name)


def _only_row(runtime: Runtime, explicit: Tensor) -> Tensor:
    """Return the positions of text, `[batch, tokens]`, from the equal rows of M-RoPE, `[rows, batch, tokens]`.

    Raises:
        UnsupportedError: the rows differ, as they do for the tokens of images and videos.
    """
    if not bool((explicit == explicit[:1]).all()):
        raise UnsupportedError(
            f"{runtime.scheme.name!r} needs one position for each token, and images and videos have three here "
            "(M-RoPE). Use a static rotary scheme such as 'yarn', or give text alone."
        )
    return explicit[0]


def _with_positions(
    base: Any,
    runtime: Runtime,
    inputs: Tensor,
    past_length: int | Tensor,
    past: Any,
    record: CacheRecord | None,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the keywords of a pass with what the scheme adds: positions, embeddings, or both.

    Args:
        base: the model that holds the layers.
        runtime: the facts about its patch.
        inputs: `input_ids` or `inputs_embeds`, `[batch, tokens, ...]`.
        past_length: number of tokens in the cache.
        past: the cache, or None.
        record: its record, or None.
        kwargs: the keywords of the pass.
    """
    explicit, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    takes_ids = "position_ids" in runtime.arguments
    acts = runtime.embeds or runtime.scores or runtime.table_rows > 0 or runtime.pass_positions is not None
    if acts and explicit is not None and explicit.ndim == 1:  # families with a table of positions accept this shape
        explicit = explicit[None]
        kwargs = {**kwargs, "position_ids": explicit}
    if acts and explicit is not None and runtime.first_position_id:
        explicit = (explicit - runtime.first_position_id).clamp(min=0)  # padding has smaller ids
    if acts and explicit is not None and explicit.ndim == 3:
        explicit = _only_row(runtime, explicit)
    if acts and explicit is not None and explicit.ndim != 2:
        raise UnsupportedError(f"position_ids of {explicit.ndim} dimensions (several axes) are not supported here.")
    native, holes = _native_positions(mask, inputs, past_length)
    if holes:
        _check_holes(runtime, mask, past_length)
    if explicit is None and holes and takes_ids:
        kwargs = {**kwargs, "position_ids": native + runtime.first_position_id}
    if runtime.forwards_kwargs and runtime.pass_positions is None:
        kwargs = {**kwargs, "pe_cached": past is not None}
    if not acts:
        return kwargs
    ranks = _ranks(mask, inputs.shape[1], past_length)
    if explicit is not None:
        query = explicit.to(inputs.device)
    elif runtime.scheme.shift_invariant or ranks is None:
        query = native
    else:
        query = ranks
    if runtime.table_rows and isinstance(past_length, int) and past_length + inputs.shape[1] > runtime.table_rows:
        kwargs = _with_ids_of_long_text(runtime, inputs, query, kwargs)
    if runtime.embeds and runtime.table_width is not None:
        dtype = base.get_input_embeddings().weight.dtype
        zeros = torch.zeros(1, dtype=dtype, device=inputs.device).expand(*query.shape, runtime.table_width)
        kwargs = {**kwargs, ADDED: runtime.scheme("embed", zeros, query)}
    elif runtime.embeds:
        if runtime.first_position_id and takes_ids and kwargs.get("position_ids") is None:
            kwargs = {**kwargs, "position_ids": native + runtime.first_position_id}  # RoBERTa reads them from token ids
        kwargs = _embedded(base, runtime, query, kwargs)
    if runtime.scores or runtime.pass_positions is not None:  # `pass_positions` also masks packed documents
        positions = None
        if runtime.scores:
            positions = _positions(runtime, query, ranks, explicit, past_length, past, record)
        if runtime.pass_positions is None:
            kwargs = {**kwargs, "pe_positions": positions}
        else:
            kwargs = runtime.pass_positions(base, kwargs, positions, explicit)
    return kwargs


def _with_ids_of_long_text(runtime: Runtime, inputs: Tensor, query: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords with position ids and token types, of which BERT's buffers hold no more than its table.

    Args:
        runtime: the facts about the patch.
        inputs: `input_ids` or `inputs_embeds`, `[batch, tokens, ...]`.
        query: positions of these tokens, `[batch | 1, tokens]`.
        kwargs: the keywords of the pass.
    """
    kwargs = dict(kwargs)
    if "position_ids" in runtime.arguments and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = query + runtime.first_position_id
    if runtime.has_token_types and kwargs.get("token_type_ids") is None:
        kwargs["token_type_ids"] = torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    return kwargs


def _native_positions(mask: Any, inputs: Tensor, past_length: int | Tensor) -> tuple[Tensor, bool]:
    """Return the positions that the model would compute, `[batch | 1, count]`, and whether a mask changes them.

    Masked tokens between real ones take no position: a row with such a hole gets the positions of the row without it.
    """
    count = inputs.shape[1]
    index = torch.arange(count, device=inputs.device) + past_length
    if not isinstance(mask, Tensor) or mask.ndim != 2:  # generation may pass a dict with a mask for each layer type
        return index[None], False
    if isinstance(past_length, int) and mask.shape[1] < past_length + count:
        return index[None], False
    at = positions_skipping_gaps(mask.to(inputs.device)).index_select(1, index)
    if not torch.compiler.is_compiling() and bool((at == index).all()):
        return index[None], False
    return at, True


def _check_holes(runtime: Runtime, mask: Any, past_length: int | Tensor) -> None:
    """Raise if masked tokens between real ones would change which keys a sliding or chunked layer attends to."""
    if torch.compiler.is_compiling() or not slot_mask_is_wrong(
        mask, int(past_length), runtime.sliding_window, runtime.chunk
    ):
        return
    kind = "sliding window" if runtime.chunk is None else "attention chunk"
    raise UnsupportedError(
        f"attention_mask has masked tokens between real ones, and this model's {kind} of "
        f"{runtime.sliding_window or runtime.chunk} tokens would count them as tokens. Remove the masked tokens and "
        "put all padding at the start of each row, or give each row in a call without padding."
    )


def _embedded(base: Any, runtime: Runtime, positions: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords with the scheme's input embeddings in place of `input_ids`."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = base.get_input_embeddings()(kwargs["input_ids"])
    if runtime.multiplier == 1:
        embeds = runtime.scheme("embed", embeds, positions)
    else:  # the scheme adds to the multiplied embeddings, which the layers see
        embeds = runtime.scheme("embed", embeds * runtime.multiplier, positions) / runtime.multiplier
    return {**kwargs, "input_ids": None, "inputs_embeds": embeds}


def _ranks(mask: Tensor | None, count: int, past_length: int | Tensor) -> Tensor | None:
    """Return the rank of each token of this pass among the real ones of its row, `[batch, count]`.

    Without a 2-D mask return None.

    Raises:
        UnsupportedError: the mask covers fewer tokens than are read.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2:  # generation may pass a dict with a mask for each layer type
        return None
    if isinstance(past_length, int) and mask.shape[1] < past_length + count:
        raise UnsupportedError(
            f"attention_mask covers {mask.shape[1]} tokens, but {past_length + count} are read: {past_length} in the "
            f"cache and {count} in this pass. Give a mask of [rows, {past_length + count}], or leave it out."
        )
    index = torch.arange(count, device=mask.device) + past_length
    return positions_from_mask(mask).index_select(1, index)


def _open_cache(base: Any, runtime: Runtime, past: Any, kwargs: dict[str, Any]) -> Any:
    """Return the cache of this pass; create the one that the model would create, so that it gets a record."""
    if past is not None or runtime.cache_argument is None:
        return past
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(base.config, "use_cache", False) if use_cache is None else use_cache
    if not use_cache or compat.checkpoints_layers(base):
        return None
    kwargs[runtime.cache_argument] = compat.new_cache(base, crossing=kwargs.get("encoder_hidden_states") is not None)
    return kwargs[runtime.cache_argument]


def _positions(
    runtime: Runtime,
    query: Tensor,
    ranks: Tensor | None,
    explicit: Tensor | None,
    past_length: int | Tensor,
    past: Any,
    record: CacheRecord | None,
) -> Positions:
    """Return the positions of the queries of this pass and of all keys, with what the scheme prepares for them.

    Args:
        runtime: the facts about the patch.
        query: positions of the tokens of this pass, `[batch | 1, count]`.
        ranks: their ranks among the real tokens, `[batch, count]`, or None without a mask.
        explicit: the user's `position_ids`, or None.
        past_length: number of tokens in the cache.
        past: the cache, or None.
        record: its record, or None.
    """
    scheme, count = runtime.scheme, query.shape[1]
    fresh = past is None or (count > 1 and bool(past_length == 0))
    key = query if record is None else key_positions(past, record, query, past_length)
    length = None
    if scheme.length_dependent:
        if not fresh:
            length = (query if explicit is not None or ranks is None else ranks) + 1
        elif explicit is not None:
            length = document_lengths(query)
        elif ranks is not None:
            length = (ranks[:, -1:] + 1).expand(-1, count)
        else:
            length = count
        if fresh and record is not None and not torch.compiler.is_compiling():
            longest = length if isinstance(length, int) else int(length.max())
            record.least = count if longest > cast(Any, scheme).regime_start else 0
    filled = None if past is None or slots_of(past) is None else past_length + count
    encoded = None
    if runtime.key_copies and record is not None and not fresh and not torch.is_grad_enabled():
        encoded = None if torch.compiler.is_compiling() else reuse_encoded_keys(past, record)
    positions = Positions(query, key, length, fresh, filled, past is not None, encoded=encoded)
    return positions._replace(prepared=scheme.prepare(positions))


def _check_window(runtime: Runtime, count: int, past_length: int | Tensor, explicit: Tensor | None) -> None:
    """Warn once about a sequence beyond the scheme's effective window.

    Raises:
        BeyondWindowError: the window is hard, `strict` is set, or the sequence is longer than a native table.
    """
    window, hard = runtime.window, runtime.scheme.hard_window
    if window is None and runtime.native_table is None:
        return
    if torch.compiler.is_compiling() and not (hard or runtime.strict or runtime.native_table):
        return
    if explicit is not None and explicit.is_meta:  # no values to look at
        return
    longest = int(past_length) + count if explicit is None else int(explicit.max()) + 1
    if runtime.native_table is not None and longest > runtime.native_table[0]:
        raise BeyondWindowError(
            f"A sequence of {longest} tokens is beyond the {runtime.native_table[0]} positions of the model's own "
            f"{runtime.native_table[1]}, which keep_native=True keeps. Leave keep_native out, or read "
            "fewer tokens."
        )
    if window is None or longest <= window:
        return
    message = (
        f"A sequence of {longest} tokens is beyond the {window} that {runtime.scheme.name!r} is set up for on this "
        "model. Give the scheme a larger factor (or window, or max_positions)."
    )
    if hard or runtime.strict:
        raise BeyondWindowError(message)
    if not runtime.warned:
        runtime.warned = True
        logger.warning(message)


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Move the positional arguments of an outer model's forward into `kwargs`, in place, and return the cache."""
    runtime: Runtime = model.pe_base.pe_runtime
    for name, value in zip(runtime.model_arguments, args, strict=False):
        kwargs[name] = value
    return compat.take_cache(kwargs, runtime.model_cache_argument, f"{type(model).__name__}.forward")


def hand_down_position_ids(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Pass `position_ids` to the base model for one call of an outer model that does not forward them."""
    _by_name(model, args, kwargs)
    position_ids = kwargs.pop("position_ids", None)
    return call_with_value("position_ids", model.pe_base, position_ids, inner, **kwargs)


def count_from_first(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the position ids of a prompt in generation, counted as the family counts them.

    Transformers counts from zero. RoBERTa's table begins at two, so that without this a continuation would not be the
    one that a full pass gives.
    """
    return inner(*args, **kwargs) + model.pe_base.pe_runtime.first_position_id


GUESSED = "pe_patch_guessed"
"""Attribute of an empty cache that marks that its first pass will read a prompt and guesses at its continuation."""


def mark_guessing(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Mark the cache of assisted or prompt-lookup generation for `read_prompt_first`."""
    cache = compat.guessing_cache(args, kwargs)
    if cache is not None:
        setattr(cache, GUESSED, cache.get_seq_length() == 0)
    return inner(*args, **kwargs)


CUT = ("input_ids", "position_ids")
"""Arguments that `read_prompt_first` splits along the tokens."""


def read_prompt_first(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Read a prompt and the guesses at its continuation in two passes, for a scheme that depends on the length.

    Assisted and prompt-lookup generation read both in one pass over an empty cache. The scheme must use the length of
    the prompt, so the prompt is read alone, as in plain generation.
    """
    past = _by_name(model, args, kwargs)
    if past is None or torch.compiler.is_compiling() or not past.__dict__.pop(GUESSED, False):
        return inner(**kwargs)
    ids, kept = kwargs.get("input_ids"), kwargs.get("logits_to_keep")
    guesses = kept - 1 if type(kept) is int else 0
    if guesses < 1 or ids is None:
        return inner(**kwargs)

    def read(start: int, stop: int, keep: int) -> Any:
        cut = {name: kwargs[name][:, start:stop] for name in CUT if kwargs.get(name) is not None}
        mask = kwargs.get("attention_mask")
        mask = mask[:, :stop] if mask is not None and mask.ndim == 2 else mask
        return inner(**kwargs | cut | {"attention_mask": mask, "logits_to_keep": keep})

    count = ids.shape[1]
    first, output = read(0, count - guesses, 1), read(count - guesses, count, guesses)
    if first.get("attentions") is not None:
        raise UnsupportedError(
            "Assisted generation with output_attentions=True needs a scheme that does not depend on the length."
        )
    output.logits = torch.cat((first.logits, output.logits), 1)
    if first.get("hidden_states") is not None:
        pairs = zip(first.hidden_states, output.hidden_states, strict=True)
        output.hidden_states = tuple(torch.cat(pair, 1) for pair in pairs)
    return output


def layer_rotation(layer: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a layer with the cos and sin of its scheme, while other layers keep their native rotation.

    Raises:
        NoEffectError: the layer does not receive `position_ids`.
    """
    position_ids, native = kwargs.get("position_ids"), kwargs.get("position_embeddings")
    if position_ids is None or native is None:
        raise NoEffectError(
            f"{type(layer).__name__} does not receive position_ids, so `layers=` would have no effect there. Patch all "
            "layers instead."
        )
    like = native[0] if isinstance(native, tuple) else native
    kwargs["position_embeddings"] = layer.__dict__["pe_rotary"](like, position_ids)
    return inner(*args, **kwargs)


def set_attn_implementation(model: Any, inner: Callable[..., Any], implementation: Any, *_: Any, **__: Any) -> None:
    """Set the attention to this library's implementation with the given name, which applies the scheme.

    Raises:
        UnsupportedError: a dict of names, or a name that the family has no attention for.
    """
    if isinstance(implementation, dict):
        raise UnsupportedError("Give one name for the patched stack, for example 'sdpa'; unpatch to set several.")
    backend = backend_for(implementation)
    base = model.pe_base
    if base.pe_runtime.eager_only and backend.name != "eager":
        raise UnsupportedError(f"{type(base).__name__} only has eager attention, and not {quoted(implementation)}.")
    check_backend(backend, base.pe_runtime.scheme)
    compat.store_implementation(base.config, backend.implementation)  # `Marked` refuses setattr


def before_prompt(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Check how `generate` will read a prompt under a scheme that depends on its length.

    An assistant drops the last tokens of its prompt when its guesses are wrong. Its drafts may then differ from those
    of a fresh start, and the model that checks them does not depend on them, so its cache may be cropped to any length.

    Raises:
        UnsupportedError: it would read the prompt in chunks.
    """
    size, count, cache, drafts = compat.prefill_arguments(args, kwargs)
    scheme = model.pe_base.pe_runtime.scheme
    if drafts and cache is not None:
        allow_any_crop(cache)
    if size is not None and size < count and count > scheme.regime_start:
        raise UnsupportedError(
            f"prefill_chunk_size={size} would read a prompt of {count} tokens in chunks, and {scheme.name!r} depends "
            "on the length of each chunk, so the result would depend on the chunk size. Leave prefill_chunk_size out, "
            "or use a scheme with a fixed factor, for example patch_model(model, 'yarn', factor=4)."
        )
    return inner(*args, **kwargs)


def keep_cache(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Prepare a generation step by Transformers' default, since the family's own drops the cache at the trained window.

    Phi-3 processes the whole sequence again when the padded length of a batch crosses its window, so that a row in a
    batch would differ from the row alone. A scheme uses the length of each row instead.
    """
    return cast(Any, GenerationMixin).prepare_inputs_for_generation(model, *args, **kwargs)


def refuse_paging(model: Any, inner: Callable[..., Any], *_: Any, **__: Any) -> None:
    """Raise for `generate_batch`; the error of Transformers would not say what to do instead."""
    raise UnsupportedError(NO_PAGING)
