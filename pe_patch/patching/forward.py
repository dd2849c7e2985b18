"""The forward of a patched base model: find where every token stands, then let the family's own forward run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from .. import compat
from ..attention.interface import BY_IMPLEMENTATION, NO_PAGING, backend_for, check_backend
from ..attention.parallel import Sequence, layer_masks, sequence_of
from ..core.handover import hand_down, handed_down
from ..core.positions import Positions, counts_holes, document_lengths, from_mask, without_holes
from ..core.scheme import Scheme
from ..errors import BeyondWindowError, NoEffectError, UnsupportedError, quoted
from .cache_record import CacheRecord, close_record, key_positions, open_record, slots_of

logger = logging.getLogger("pe_patch")


@dataclass
class Runtime:
    """What the forward of a patched model needs to know."""

    scheme: Scheme
    embeds: bool
    """The scheme adds to the input embeddings."""
    multiplier: float
    """By which the base model multiplies what it is given as input embeddings."""
    scores: bool
    """Some layer needs the positions of queries and keys at its scores."""
    rotates_at_scores: bool
    """The scheme rotates keys that it takes from the cache."""
    carry: Callable[..., dict[str, Any]] | None
    """How positions reach the layers where keywords do not."""
    arguments: tuple[str, ...]
    """Names of the base forward's positional arguments."""
    cache_argument: str | None
    """What the base forward calls its cache argument; None for a model that reads images."""
    head_arguments: tuple[str, ...]
    head_cache_argument: str | None
    """The same of the outer model's forward."""
    specification: str
    """The scheme, its options and what it read from the model: what a cache must have been filled under."""
    window: int | None
    strict: bool
    warned: bool = field(default=False)
    patch: tuple[int, int] | None = None
    """Height and width of a patch in pixels, for a tower that reads images."""
    keep_native: bool = False
    native_table: tuple[int, str] | None = None
    """Positions of the model's own table that stays beside the scheme, and its class; None without one."""
    layers: int = 0
    carries: bool = True
    """Keywords given to the base model reach the attention function."""
    whole: str | None = None
    """Why a sequence cannot be split over processes here; None where it can."""
    rotary: tuple[str, type] | None = None
    """Attribute of the base model that the patch replaced by a rotary module, and its class."""
    sliding_window: int | None = None
    """Keys that the sliding layers see; None without such layers."""
    chunk: int | None = None
    """Length of the chunks within which chunked layers attend; None without such layers."""


def base_forward(base: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Find the positions and the cache of one pass, then call the base model's own forward."""
    runtime: Runtime = base.pe_runtime
    for name, value in zip(runtime.arguments, args, strict=False):
        kwargs[name] = value
    sequence = _check_attention(base, runtime)
    handed = handed_down("position_ids", base)
    if handed is not None:
        kwargs.setdefault("position_ids", handed)
    ids = kwargs.get("input_ids")
    shown = ids if ids is not None else kwargs.get("inputs_embeds")
    past = compat.take_cache(kwargs, runtime.cache_argument, f"{type(base).__name__}.forward")
    if shown is None:
        return inner(**kwargs)  # the family's own error says it best
    if sequence is not None and runtime.whole is not None:
        raise UnsupportedError(f"Ulysses cannot split sequences under {runtime.scheme.name!r} here: {runtime.whole}.")
    if sequence is not None and sequence.is_split(base):
        return inner(**_before_ulysses(base, runtime, sequence, shown, past, kwargs))
    past = _open_cache(base, runtime, past, kwargs)
    past_length = 0 if past is None else past.get_seq_length()
    _check_window(runtime, shown.shape[1], past_length, kwargs.get("position_ids"))
    record = None
    if past is not None:
        record = open_record(past, runtime.scheme.name, runtime.specification, past_length, runtime.rotates_at_scores)
    kwargs = _with_positions(base, runtime, shown, past_length, past, record, kwargs)
    if sequence is not None:
        kwargs = _with_masks(base, runtime, shown, past_length, past, kwargs)
    if record is None:
        return inner(**kwargs)
    total = past_length + shown.shape[1]  # now: a static cache counts on in the very tensor that it hands out
    record.open, record.finished = True, False
    try:
        output = inner(**kwargs)
        record.finished = True
    finally:
        record.open = False
    close_record(past, record, total)
    return output


def _before_ulysses(
    base: Any, runtime: Runtime, sequence: Sequence, shown: Tensor, past: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Add what Ulysses drops: masks, and the positions of a whole sequence of which this process was given a part."""
    explicit, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if explicit is None:
        raise UnsupportedError(
            "Ulysses splits a sequence over processes, and without position_ids each would count its part from 0: give "
            "this part of the whole sequence's, [rows, part]."
        )
    if explicit.ndim != 2 or not (mask is None or (isinstance(mask, Tensor) and mask.shape == shown.shape[:2])):
        raise UnsupportedError("Under Ulysses position_ids and attention_mask are those of the part, [rows, part].")
    if past is not None and past.get_seq_length() > 0:
        raise UnsupportedError("Under Ulysses a sequence is read at once: leave the cache out.")
    whole = sequence.gather(explicit.to(shown.device).expand(shown.shape[0], -1))
    padding = None if mask is None else sequence.gather(mask.to(shown.device))
    _check_window(runtime, whole.shape[1], 0, whole)
    if runtime.embeds:
        kwargs = _embedded(base, runtime, explicit.to(shown.device), kwargs)
    positions = Positions(whole, whole)
    if runtime.scores:
        positions = _positions(runtime.scheme, whole, None, whole, 0, None, None)
    masks = layer_masks(base, runtime.layers, padding, None, whole)
    return {**kwargs, "pe_positions": positions._replace(masks=masks)}


def _with_masks(
    base: Any, runtime: Runtime, shown: Tensor, past_length: int | Tensor, past: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Add the masks of whole sequences, which Ulysses leaves alone but for these."""
    explicit, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    host = torch.arange(shown.shape[1], device=shown.device)[None] + past_length
    at = host if explicit is None else explicit.to(shown.device)
    positions = kwargs.get("pe_positions") or Positions(at, at)
    masks = layer_masks(base, runtime.layers, mask, past, at.expand(shown.shape[0], -1))
    return {**kwargs, "pe_positions": positions._replace(masks=masks)}


def tower_forward(base: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands before the forward of a tower that reads images: its tokens stand on a grid."""
    runtime: Runtime = base.pe_runtime
    for name, value in zip(runtime.arguments, args, strict=False):
        kwargs[name] = value
    _check_attention(base, runtime)
    pixels = kwargs.get("pixel_values")
    if pixels is None:
        return inner(**kwargs)  # the family's own error says it best
    assert runtime.patch is not None
    rows, columns = (size // one for size, one in zip(pixels.shape[-2:], runtime.patch, strict=True))
    laid_out = cast(Any, runtime.scheme).lay_out(rows, columns, pixels.device)
    index = torch.arange(len(laid_out[0]), device=pixels.device)[None]
    kwargs["pe_positions"] = Positions(index, index, prepared=laid_out)
    if not runtime.keep_native:
        kwargs["interpolate_pos_encoding"] = True  # by which the host looks its table up, and takes any size
    return inner(**kwargs)


def _check_attention(base: Any, runtime: Runtime) -> Sequence | None:
    """How sequences are split over processes, if they are; an error where our attention function would not run."""
    backend = BY_IMPLEMENTATION.get(base.config._attn_implementation)
    if backend is None:
        raise NoEffectError(
            f"config._attn_implementation was set to {quoted(base.config._attn_implementation)} behind the patch, "
            f"which would drop {runtime.scheme.name!r}; call set_attn_implementation(...) of the patched model instead."
        )
    if runtime.rotary is not None and not isinstance(found := getattr(base, runtime.rotary[0]), runtime.rotary[1]):
        raise NoEffectError(
            f"{type(base).__name__}.{runtime.rotary[0]} is a {type(found).__name__} that was put in behind the patch, "
            f"which drops {runtime.scheme.name!r}. Call unpatch_model(model), which puts the original back, change the "
            "model, and patch it again."
        )
    return sequence_of(backend.implementation, backend.native_name)


def _with_positions(
    base: Any,
    runtime: Runtime,
    shown: Tensor,
    past_length: int | Tensor,
    past: Any,
    record: CacheRecord | None,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the keywords of a pass with what the scheme adds to them: positions, embeddings, or both."""
    explicit, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    takes_ids = "position_ids" in runtime.arguments
    acts = runtime.embeds or runtime.scores or runtime.carry is not None
    if acts and explicit is not None and explicit.ndim == 1:  # which families with a table of positions take
        explicit = explicit[None]
        kwargs = {**kwargs, "position_ids": explicit}
    if acts and explicit is not None and explicit.ndim != 2:
        raise UnsupportedError(f"position_ids of {explicit.ndim} dimensions (several axes) are not supported here.")
    host, holes = _host_positions(mask, shown, past_length)
    if holes:
        _check_holes(runtime, mask, past_length)
    if explicit is None and holes and takes_ids:
        kwargs = {**kwargs, "position_ids": host}
    if runtime.carries and runtime.carry is None:
        kwargs = {**kwargs, "pe_cached": past is not None}
    if not acts:
        return kwargs
    ranks = _ranks(mask, shown.shape[1], past_length)
    if explicit is not None:
        query = explicit.to(shown.device)
    elif runtime.scheme.shift_invariant or ranks is None:
        query = host
    else:
        query = ranks
    if runtime.embeds:
        kwargs = _embedded(base, runtime, query, kwargs)
    if runtime.scores or runtime.carry is not None:  # what carries the positions also keeps packed documents apart
        positions = None
        if runtime.scores:
            positions = _positions(runtime.scheme, query, ranks, explicit, past_length, past, record)
        if runtime.carry is None:
            kwargs = {**kwargs, "pe_positions": positions}
        else:
            kwargs = runtime.carry(base, kwargs, positions, explicit)
    return kwargs


def _host_positions(mask: Any, shown: Tensor, past_length: int | Tensor) -> tuple[Tensor, bool]:
    """Return the positions that the host would make, `[batch | 1, count]`, and whether a mask changed them.

    Masked tokens between real ones are no positions: a row with such a hole gets the positions of the row without it.
    """
    count = shown.shape[1]
    index = torch.arange(count, device=shown.device) + past_length
    if not isinstance(mask, Tensor) or mask.ndim != 2:  # a host may hand one mask for each layer type
        return index[None], False
    if isinstance(past_length, int) and mask.shape[1] < past_length + count:
        return index[None], False
    at = without_holes(mask.to(shown.device)).index_select(1, index)
    if not torch.compiler.is_compiling() and bool((at == index).all()):
        return index[None], False
    return at, True


def _check_holes(runtime: Runtime, mask: Any, past_length: int | Tensor) -> None:
    """Raise where masked tokens between real ones would change which keys a sliding or chunked layer sees."""
    if torch.compiler.is_compiling() or not counts_holes(mask, int(past_length), runtime.sliding_window, runtime.chunk):
        return
    kind = "sliding window" if runtime.chunk is None else "attention chunk"
    raise UnsupportedError(
        f"attention_mask has masked tokens between real ones, and this model's {kind} of "
        f"{runtime.sliding_window or runtime.chunk} tokens would count them as tokens. Remove the masked tokens and "
        "put all padding at the start of each row, or give each row in a call without padding."
    )


def _embedded(base: Any, runtime: Runtime, positions: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Input embeddings with what the scheme adds to them, in the place of ids."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = base.get_input_embeddings()(kwargs["input_ids"])
    if runtime.multiplier == 1:
        embeds = runtime.scheme("embed", embeds, positions)
    else:  # what is added is added to what the layers see
        embeds = runtime.scheme("embed", embeds * runtime.multiplier, positions) / runtime.multiplier
    return {**kwargs, "input_ids": None, "inputs_embeds": embeds}


def _ranks(mask: Tensor | None, count: int, past_length: int | Tensor) -> Tensor | None:
    """Rank of each token of this pass among the real ones of its row, `[batch, count]`; None without a 2-D mask."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:  # a host may hand one mask for each layer type
        return None
    if isinstance(past_length, int) and mask.shape[1] < past_length + count:
        raise UnsupportedError(
            f"attention_mask covers {mask.shape[1]} tokens, and {past_length + count} are read: {past_length} in the "
            f"cache and {count} in this pass. Give a mask of [rows, {past_length + count}], or leave it out."
        )
    index = torch.arange(count, device=mask.device) + past_length
    return from_mask(mask).index_select(1, index)


def _open_cache(base: Any, runtime: Runtime, past: Any, kwargs: dict[str, Any]) -> Any:
    """Return the cache of this pass; make the one that the host would make, so that it can be recorded."""
    if past is not None or runtime.cache_argument is None:
        return past
    use_cache = kwargs.get("use_cache")
    use_cache = base.config.use_cache if use_cache is None else use_cache
    if not use_cache or compat.checkpoints_layers(base):
        return None
    kwargs[runtime.cache_argument] = DynamicCache(config=base.config)
    return kwargs[runtime.cache_argument]


def _positions(
    scheme: Scheme,
    query: Tensor,
    ranks: Tensor | None,
    explicit: Tensor | None,
    past_length: int | Tensor,
    past: Any,
    record: CacheRecord | None,
) -> Positions:
    count = query.shape[1]
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
    positions = Positions(query, key, length, fresh, filled, past is not None)
    return positions._replace(prepared=scheme.prepare(positions))


def _check_window(runtime: Runtime, count: int, past_length: int | Tensor, explicit: Tensor | None) -> None:
    """Warn once, or raise if asked to, when a sequence is longer than the scheme is meant for."""
    window, hard = runtime.window, runtime.scheme.hard_window
    if window is None and runtime.native_table is None:
        return
    if torch.compiler.is_compiling() and not (hard or runtime.strict or runtime.native_table):
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
        "model; give the scheme a larger factor (or window, or max_positions)."
    )
    if hard or runtime.strict:
        raise BeyondWindowError(message)
    if not runtime.warned:
        runtime.warned = True
        logger.warning(message)


def _by_name(head: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Put the arguments of an outer model's forward under the names that it takes them by; return the cache."""
    runtime: Runtime = head.pe_base.pe_runtime
    for name, value in zip(runtime.head_arguments, args, strict=False):
        kwargs[name] = value
    return compat.take_cache(kwargs, runtime.head_cache_argument, f"{type(head).__name__}.forward")


def hand_over_positions(head: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands before the forward of a head that keeps `position_ids` to itself, for as long as the call lasts."""
    _by_name(head, args, kwargs)
    position_ids = kwargs.pop("position_ids", None)
    return hand_down("position_ids", head.pe_base, position_ids, inner, **kwargs)


CUT = ("input_ids", "position_ids")


def read_prompt_first(head: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Read a prompt and guesses at its continuation in two passes, under a scheme that follows the length.

    Assisted and prompt-lookup generation read the prompt and the first guesses in one pass over an empty cache. The
    length that counts is the prompt's, so it is read by itself, as in plain generation.
    """
    past = _by_name(head, args, kwargs)
    ids, kept = kwargs.get("input_ids"), kwargs.get("logits_to_keep")
    guesses = kept - 1 if type(kept) is int else 0
    if guesses < 1 or past is None or ids is None or past.get_seq_length() > 0 or not kwargs.get("return_dict", True):
        return inner(**kwargs)

    def read(start: int, stop: int, keep: int) -> Any:
        part = {name: kwargs[name][:, start:stop] for name in CUT if kwargs.get(name) is not None}
        mask = kwargs.get("attention_mask")
        mask = mask[:, :stop] if mask is not None and mask.ndim == 2 else mask
        return inner(**kwargs | part | {"attention_mask": mask, "logits_to_keep": keep})

    count = ids.shape[1]
    first, output = read(0, count - guesses, 1), read(count - guesses, count, guesses)
    if first.get("attentions") is not None:
        raise UnsupportedError(
            "Assisted generation with output_attentions=True needs a scheme that ignores the length."
        )
    output.logits = torch.cat((first.logits, output.logits), 1)
    if first.get("hidden_states") is not None:
        pairs = zip(first.hidden_states, output.hidden_states, strict=True)
        output.hidden_states = tuple(torch.cat(pair, 1) for pair in pairs)
    return output


def layer_rotation(layer: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands before a decoder layer that rotates by the scheme while other layers keep their own rotation."""
    position_ids, native = kwargs.get("position_ids"), kwargs.get("position_embeddings")
    if position_ids is None or native is None:
        raise NoEffectError(
            f"{type(layer).__name__} is not handed position_ids, so that `layers=` would have no effect there; patch "
            "all layers instead."
        )
    like = native[0] if isinstance(native, tuple) else native
    kwargs["position_embeddings"] = layer.__dict__["pe_joint"](like, position_ids)
    return inner(*args, **kwargs)


def set_attn_implementation(model: Any, inner: Callable[..., Any], implementation: Any, *_: Any, **__: Any) -> None:
    """Stands before the model's own: the name of an attention is that of ours which carries the scheme."""
    if isinstance(implementation, dict):
        raise UnsupportedError("Give one name for the patched stack, for example 'sdpa'; unpatch to set several.")
    backend = backend_for(implementation)
    base = model.pe_base
    check_backend(backend, base.pe_runtime.scheme)
    vars(base.config)["_attn_implementation_internal"] = backend.implementation  # what `Marked` guards


def refuse_prefill_chunks(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Raise if `generate` is to read a prompt in chunks under a scheme that follows the length of the prompt."""
    arguments = compat.prefill_arguments(args, kwargs)
    scheme, size, count = model.pe_base.pe_runtime.scheme, *arguments
    if size is not None and size < count and count > scheme.regime_start:
        raise UnsupportedError(
            f"prefill_chunk_size={size} would read a prompt of {count} tokens in parts, and {scheme.name!r} follows "
            "the length of each part, so the result would depend on the chunk. Leave prefill_chunk_size out, or use a "
            "scheme with a fixed factor, for example patch_model(model, 'yarn', factor=4)."
        )
    return inner(*args, **kwargs)


def keep_cache(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Prepare a generation step without the family's own step, which drops the cache at the trained window.

    Phi-3 reads the whole sequence again when the padded length of a batch crosses its window, so that a row in a batch
    would differ from the row alone. A scheme follows the length of each row instead.
    """
    return cast(Any, GenerationMixin).prepare_inputs_for_generation(model, *args, **kwargs)


def refuse_paging(model: Any, inner: Callable[..., Any], *_: Any, **__: Any) -> None:
    """Stands before what `generate_batch` begins with, whose own error does not say what to do."""
    raise UnsupportedError(NO_PAGING)
