"""Record on a cache which scheme filled it, and the position of every key that it holds.

Cached keys carry no position, and position ids may skip, so a cache remembers them. Caches are also changed from
outside: generation reorders, repeats, selects and crops them, and key-value compressors cut tokens out of the middle. A
record therefore keeps a hash of every cached key of one layer. When the keys of that layer are no longer those that the
last pass left, the hashes tell which row each row comes from, or that nothing explains the change, which is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheError

RECORD = "pe_patch_record"
"""Attribute of a cache that holds its record. Copies of the cache carry it along."""
PREFIX = "pe_patch_prefix"
"""Attribute of a cache that marks learned keys and values (prefix tuning), which no model has computed."""
EMPTY = "Start from an empty cache."
HASHED = 8
"""Dimensions of the first head that a hash covers. Two keys that differ agree in all of them only by chance."""


@dataclass
class CacheRecord:
    """What a patched model knows about a cache that it fills."""

    scheme: str
    """Name of the scheme, for messages."""
    specification: str
    """The scheme, its options and what it read from the model, as JSON. Equal specifications give equal keys."""
    positions: Tensor | None = None
    """Position of each key, `[batch | 1, keys]`, int64; None where the scheme needs none at the scores."""
    tokens: int | None = 0
    """Number of tokens that the last pass left in the cache; None if that pass was compiled."""
    finished: bool = True
    """Whether the last pass came to its end."""
    hashes: Tensor | None = None
    """Hash of each key of `layer`, `[batch, keys]`, int64; None where the cache shows no plain keys."""
    layer: int = -1
    keys: Tensor | None = None
    """The keys of `layer` as the last pass left them."""
    version: int = 0
    least: int = 0
    """Number of tokens below which the cache cannot be cropped, since their encoding followed a longer first pass."""
    open: bool = False
    """Whether a pass of the patched model is running."""


class GuardedUpdate:
    """`cache.update` of a recorded cache: raise if a model without the patch appends to keys that a scheme encoded."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache
        record: CacheRecord = cache.__dict__[RECORD]
        if not record.open:
            if layer_idx < len(cache.layers) and cache.layers[layer_idx].get_seq_length() > 0:
                raise CacheError(
                    f"This cache was filled by a model patched with {record.scheme!r}, and a model without that patch "
                    f"continues it, so its keys would not fit. {EMPTY}"
                )
            forget(cache)
        return type(cache).update(cache, key, value, layer_idx, *args, **kwargs)


def forget(cache: Any) -> None:
    """Remove the record from a cache."""
    cache.__dict__.pop(RECORD, None)
    if isinstance(cache.__dict__.get("update"), GuardedUpdate):
        del cache.__dict__["update"]


def open_record(
    cache: Any, scheme: str, specification: str, past_length: int | Tensor, rotates_at_scores: bool = False
) -> CacheRecord:
    """Return the record of a cache for one pass, a new one for an empty cache.

    Args:
        cache: any Transformers cache.
        scheme: name of the model's scheme.
        specification: the scheme, its options and what it read from the model.
        past_length: number of tokens that the cache holds, as the cache reports it.
        rotates_at_scores: whether the scheme rotates keys that it takes from the cache.

    Raises:
        CacheError: the cache holds keys that another scheme, or none, encoded.
    """
    _separate(cache)
    record: CacheRecord | None = getattr(cache, RECORD, None)
    tracing = torch.compiler.is_compiling()
    empty = False if tracing and isinstance(past_length, Tensor) else bool(past_length == 0)
    if empty or (record is None and tracing):
        record = CacheRecord(scheme, specification)
        setattr(cache, RECORD, record)
    elif record is None and getattr(cache, PREFIX, False):
        if rotates_at_scores:
            raise CacheError(
                f"Prefix tuning learns keys that are not rotated again, and {scheme!r} rotates every key that it takes "
                "from the cache. Use a static rotary scheme or a distance bias, or another PEFT method."
            )
        count = int(past_length)
        at = torch.arange(count, device=_device(cache))[None]
        record = CacheRecord(scheme, specification, positions=at, tokens=count)
        setattr(cache, RECORD, record)
    elif record is None:
        raise CacheError(
            f"This cache holds {int(past_length)} tokens that no model patched with {scheme!r} has read: it was filled "
            f"before the model was patched, or by another model, so its keys do not fit. {EMPTY}"
        )
    if record.specification != specification:
        was = "other options or another model" if record.scheme == scheme else repr(record.scheme)
        raise CacheError(f"This cache was filled under {was}, so its keys do not fit {scheme!r}. {EMPTY}")
    if not tracing and "update" not in cache.__dict__:
        cache.update = GuardedUpdate(cache)
    return record


def _separate(cache: Any) -> None:
    """Give a shallow copy (`copy.copy`) of a cache a record for itself; it was made with the original's."""
    guard = cache.__dict__.get("update")
    if isinstance(guard, GuardedUpdate) and guard.cache is not cache:
        del cache.__dict__["update"]
        record: CacheRecord | None = cache.__dict__.get(RECORD)
        if record is not None:
            positions = None if record.positions is None else record.positions.clone()
            setattr(cache, RECORD, replace(record, positions=positions))


def _device(cache: Any) -> torch.device | None:
    return next((layer.keys.device for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)), None)


def key_positions(cache: Any, record: CacheRecord, query: Tensor, past_length: int | Tensor) -> Tensor:
    """Return the positions of all keys that the cache will hold after this pass, `[batch | 1, keys]`, and record them.

    Args:
        cache: the cache of this pass.
        record: its record, from `open_record`.
        query: positions of the tokens of this pass, `[batch | 1, query]`.
        past_length: number of tokens that the cache holds.

    Raises:
        CacheError: the cache was changed since the last pass in a way that does not tell which keys remain.
    """
    slots = slots_of(cache)
    if not torch.compiler.is_compiling() and bool(past_length > 0):
        _match(cache, record, int(past_length), slots)
    rows, count = query.shape
    known = record.positions
    if slots is not None:  # fixed shapes, so that a compiled decoding step is compiled once
        if known is not None and known.shape[1] == slots and known.shape[0] != rows and 1 in (rows, known.shape[0]):
            rows = max(rows, known.shape[0])
            query = query.expand(rows, -1)
            known = known.expand(rows, -1).contiguous()
        if known is None or known.shape != (rows, slots):
            known = torch.zeros(rows, slots, dtype=torch.long, device=query.device)
        record.positions = known
        known.index_copy_(1, torch.arange(count, device=query.device) + past_length, query)
        return known
    if known is None or past_length == 0:
        known = query[:, :0]
    elif known.shape[0] != rows:
        if rows == 1:  # position ids given before and left to the model now
            query = query.expand(known.shape[0], -1)
        elif known.shape[0] == 1:
            known = known.expand(rows, -1)
        else:
            raise CacheError(f"This cache holds {known.shape[0]} rows and is continued with {rows}. {EMPTY}")
    record.positions = known = torch.cat((known[:, :past_length], query), -1)
    return known


def slots_of(cache: Any) -> int | None:
    """Return the capacity of a static cache in tokens; None for one that grows, and where every layer slides."""
    if not getattr(cache, "is_compileable", False):
        return None
    whole = [layer.get_max_length() for layer in cache.layers if not layer.is_sliding]
    return max(whole, default=None)


def close_record(cache: Any, record: CacheRecord, total: int | Tensor) -> None:
    """Note what a finished pass left in the cache.

    Args:
        cache: the cache of this pass.
        record: its record.
        total: number of tokens that were read into the cache, those of this pass included.
    """
    if record.positions is None:
        return
    if torch.compiler.is_compiling():
        record.tokens = None
        return
    record.tokens = total = int(total)
    found = _plain_keys(cache, total)
    if found is None:
        record.hashes = record.keys = None
        return
    record.layer, covered, keys = found
    known = record.hashes
    held = 0 if known is None else min(known.shape[1], total)
    start = max(held, total - covered.shape[2])
    fresh = token_hashes(covered[:, :, covered.shape[2] - (total - start) :])
    if known is None or known.shape[0] != fresh.shape[0]:
        known, held = fresh[:, :0], 0
    gap = torch.zeros(fresh.shape[0], start - held, dtype=torch.long, device=fresh.device)
    record.hashes = torch.cat((known[:, :held].to(fresh.device), gap, fresh), 1)
    record.keys, record.version = keys, _version(keys)


def token_hashes(keys: Tensor) -> Tensor:
    """Return a hash of the first bits of each key, `[batch, keys]`, for keys `[batch, heads, keys, head]`."""
    sample = keys[:, 0, :, :HASHED].detach().to(torch.float32).contiguous().view(torch.int32).long()
    factors = torch.tensor([(2 * n + 3) * 0x9E3779B1 for n in range(sample.shape[-1])], device=keys.device)
    mixed = (sample ^ (sample >> 13)) * factors
    return (mixed ^ (mixed >> 29)).sum(-1)


def _version(keys: Tensor) -> int:
    return 0 if keys.is_inference() else keys._version


def _plain_keys(cache: Any, total: int) -> tuple[int, Tensor, Tensor] | None:
    """Return the last layer whose keys can be looked at: its index, the keys of the newest tokens, and all its keys.

    Layers that see every token come first, since a sliding layer holds only the newest tokens.
    """
    for sliding in (False, True):
        for index in reversed(range(len(cache.layers))):
            layer = cache.layers[index]
            keys = getattr(layer, "keys", None)
            if getattr(layer, "is_sliding", False) != sliding or not isinstance(keys, Tensor) or keys.ndim != 4:
                continue
            if keys.is_meta or keys.shape[2] == 0 or hasattr(layer, "_quantize"):
                continue
            if not getattr(layer, "is_compileable", False):
                return index, keys[:, :, -total:], keys
            # A static layer is filled from the left. A sliding one then rolls, its newest token at the right.
            return index, keys[:, :, :total], keys
    return None


def _match(cache: Any, record: CacheRecord, length: int, slots: int | None) -> None:
    """Follow changes of a cache since the last pass: rows selected, repeated or reordered, newest tokens dropped."""
    changed = f"This cache was changed since {record.scheme!r} filled it"
    if not record.finished and (record.hashes is None or length > record.hashes.shape[1]):
        raise CacheError(f"The last pass over this cache did not finish, so its layers may differ. {EMPTY}")
    if length < record.least:
        raise CacheError(
            f"This cache was cropped to {length} tokens, but its first {record.least} were read in one pass, and "
            f"{record.scheme!r} encoded them for a text of that length. {EMPTY}"
        )
    if record.finished and record.tokens is not None and length > record.tokens:
        raise CacheError(f"{changed}: it holds {length} tokens, and {record.tokens} were read into it. {EMPTY}")
    layers = [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]
    if slots is None and any(int(layer.get_seq_length()) != length for layer in layers if _holds_keys(layer)):
        raise CacheError(f"{changed}: its layers hold different numbers of tokens. {EMPTY}")
    if record.hashes is None or record.keys is None:
        if record.positions is not None and slots is None:
            record.positions = record.positions[:, :length]
        return
    keys = cache.layers[record.layer].keys
    same = keys is record.keys or (keys.data_ptr() == record.keys.data_ptr() and keys.shape == record.keys.shape)
    if record.finished and same and _version(keys) == record.version and length == record.tokens:
        return
    found = _plain_keys(cache, length)
    if found is None or found[0] != record.layer:
        raise CacheError(f"{changed}: layer {record.layer} no longer holds its keys. {EMPTY}")
    covered = found[1]
    start, stop = length - covered.shape[2], min(length, record.hashes.shape[1])
    now = token_hashes(covered[:, :, : stop - start])
    _follow_rows(record, now, start, stop, changed)
    if slots is None and record.positions is not None:
        record.positions = record.positions[:, :length]


def _holds_keys(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), Tensor) and not hasattr(layer, "_quantize")


def _follow_rows(record: CacheRecord, now: Tensor, start: int, stop: int, changed: str) -> None:
    """Give each row of a cache the positions of the recorded row with the same keys.

    `now` holds the hashes of its keys `start` to `stop`, `[rows, stop - start]`.
    """
    assert record.hashes is not None and record.positions is not None
    known = record.hashes[:, start:stop].to(now.device)
    equal = (now[:, None] == known[None]).all(-1)
    if not bool(equal.any(1).all()):
        raise CacheError(
            f"{changed}: tokens were removed from its middle, or its keys were replaced, and {record.scheme!r} needs "
            f"the position of every key. {EMPTY} Key-value compression works with static rotary schemes."
        )
    in_place = equal.shape[0] == equal.shape[1] and bool(equal.diagonal().all())
    source = torch.arange(len(now), device=now.device) if in_place else equal.int().argmax(1)
    record.hashes = record.hashes.to(now.device)[source, :stop]
    if record.positions.shape[0] == 1:
        return
    positions = record.positions
    chosen = positions[source.to(positions.device)]
    alike = (chosen[:, None] == positions[None]).all(-1) | ~equal.to(positions.device)
    if not in_place and not bool(alike.all()):
        raise CacheError(
            f"{changed}: rows with the same keys have different positions, so their order is lost. {EMPTY}"
        )
    record.positions = chosen
