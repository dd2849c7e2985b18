"""Record on a cache which scheme filled it, and the position of every key that it holds.

Cached keys carry no position, and position ids may skip, so a cache remembers them. Caches are also changed from
outside: generation reorders, repeats, selects and crops them, and key-value compressors cut tokens out of the middle. A
record therefore refers to the keys that the last pass left in one layer. When that layer holds other keys now, a
comparison tells which row each row comes from, or that nothing explains the change, which is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..core.encoded_keys import EncodedKeys, EncodedPass
from ..errors import CacheError

RECORD = "pe_patch_record"
"""Attribute of a cache that holds its record. Copies of the cache carry it along."""
PREFIX = "pe_patch_prefix"
"""Attribute of a cache that marks learned keys and values (prefix tuning), which no model has computed."""
EMPTY = "Start from an empty cache."
OVERWRITTEN = -2
"""A version that no tensor has; those made under `torch.inference_mode` have -1."""
HASHED = 8
"""Dimensions of the first head that a hash covers. Two keys that differ agree in all of them only by chance."""


@dataclass
class CacheRecord:
    """The facts that a patched model stores about a cache that it fills."""

    scheme: str
    """Name of the scheme, for messages."""
    specification: str
    """The scheme, its options and what it read from the model, as JSON. Equal specifications give equal keys."""
    positions: Tensor | None = None
    """Position of each key, `[batch | 1, keys]`, int64; None if the scheme needs none at the scores."""
    tokens: int | None = 0
    """Number of tokens that the last pass left in the cache; None if that pass was compiled."""
    finished: bool = True
    """The last pass completed without an error."""
    layer: int = -1
    """Index of the layer whose keys are compared."""
    keys: Tensor | None = None
    """Its keys after the last pass; None if the cache has no plain key tensors."""
    version: int = 0
    """Version counter of these keys, which every in-place change increments; `OVERWRITTEN` once it did."""
    least: int = 0
    """Smallest length to which the cache can be cropped, since its first tokens were encoded for this length."""
    open: bool = False
    """A pass of the patched model is running."""
    encoded: EncodedKeys = field(default_factory=EncodedKeys)
    """Encoded keys that later passes reuse."""

    @property
    def overwritten(self) -> bool:
        """Return whether the keys were changed in place after the last pass."""
        return self.version != _version(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | ({"version": OVERWRITTEN} if self.overwritten else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the facts of a pickle or of the record that is copied, with the version of the copied keys."""
        vars(self).update(state)
        if self.version != OVERWRITTEN:
            self.version = _version(self.keys)


class GuardedUpdate:
    """A replacement of `cache.update` that raises if a model without the patch appends to keys that a scheme
    encoded."""

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


class FollowedReorder:
    """A replacement of `cache.reorder_cache` that gives the rows of a quantized cache their positions in the new order.

    Its keys cannot be compared with those of the last pass, as `_match` does for other caches.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, beam_idx: Tensor) -> Any:
        record: CacheRecord | None = self.cache.__dict__.get(RECORD)
        if record is not None and record.positions is not None and record.positions.shape[0] > 1:
            record.positions = record.positions.index_select(0, beam_idx.to(record.positions.device))
        return type(self.cache).reorder_cache(self.cache, beam_idx)


REPLACED = {"update": GuardedUpdate, "reorder_cache": FollowedReorder}


def forget(cache: Any) -> None:
    """Remove the record from a cache."""
    cache.__dict__.pop(RECORD, None)
    for name, kind in REPLACED.items():
        if isinstance(cache.__dict__.get(name), kind):
            del cache.__dict__[name]


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
            f"before the model was patched, or by another model, so its keys do not fit. {EMPTY} If PEFT's prefix "
            "tuning filled it, call get_peft_model before patch_model."
        )
    if record.specification != specification:
        was = "other options or another model" if record.scheme == scheme else repr(record.scheme)
        raise CacheError(f"This cache was filled under {was}, so its keys do not fit {scheme!r}. {EMPTY}")
    if not tracing and "update" not in cache.__dict__:
        cache.update = GuardedUpdate(cache)
        if any(compat.is_quantized(layer) for layer in cache.layers):
            cache.reorder_cache = FollowedReorder(cache)
    return record


def allow_any_crop(cache: Any) -> None:
    """Let a cache be cropped below the length that its first tokens were encoded for."""
    record: CacheRecord | None = cache.__dict__.get(RECORD)
    if record is not None:
        record.least = 0


def _separate(cache: Any) -> None:
    """Give a shallow copy (`copy.copy`) of a cache its own record instead of the one that it shares."""
    guard = cache.__dict__.get("update")
    if isinstance(guard, GuardedUpdate) and guard.cache is not cache:
        record: CacheRecord | None = cache.__dict__.get(RECORD)
        forget(cache)
        if record is not None:
            positions = None if record.positions is None else record.positions.clone()
            setattr(cache, RECORD, replace(record, positions=positions, encoded=EncodedKeys()))


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
        if rows == 1:  # the user gave position ids before, and gives none now
            query = query.expand(known.shape[0], -1)
        elif known.shape[0] == 1:
            known = known.expand(rows, -1)
        else:
            raise CacheError(f"This cache holds {known.shape[0]} rows and is continued with {rows}. {EMPTY}")
    record.positions = known = torch.cat((known[:, :past_length], query), -1)
    return known


def reuse_encoded_keys(cache: Any, record: CacheRecord) -> EncodedPass | None:
    """Return what a pass may reuse of the keys that earlier passes over this cache have encoded.

    None for a cache whose layers rest in host memory: copies on the device would take the memory that this saves.
    """
    if getattr(cache, "offloading", False):
        return None

    def followed(layer: Any) -> bool:
        keys = getattr(layer, "keys", None)
        return compat.grows_plainly(layer) and isinstance(keys, Tensor) and keys.ndim == 4

    def find(keys: Tensor, hint: int | None) -> int | None:
        layers = cache.layers
        indices = range(len(layers)) if hint is None or not 0 <= hint < len(layers) else (hint, *range(len(layers)))
        return next((index for index in indices if followed(layers[index]) and layers[index].keys is keys), None)

    record.encoded.drop_what_changed({i: layer.keys for i, layer in enumerate(cache.layers) if followed(layer)})
    return EncodedPass(record.encoded, find)


def slots_of(cache: Any) -> int | None:
    """Return the capacity of a static cache in tokens; None if the cache grows or every layer slides."""
    if not getattr(cache, "is_compileable", False):
        return None
    whole = [layer.get_max_length() for layer in cache.layers if not layer.is_sliding]
    return max(whole, default=None)


def close_record(cache: Any, record: CacheRecord, total: int | Tensor) -> None:
    """Record the contents of the cache after a finished pass.

    Args:
        cache: the cache of this pass.
        record: its record.
        total: number of tokens that were read into the cache, including those of this pass.
    """
    if record.positions is None:
        return
    if torch.compiler.is_compiling():
        record.tokens = None
        return
    record.tokens = int(total)
    record.layer, record.keys = _plain_keys(cache) or (-1, None)
    record.version = _version(record.keys)


def token_hashes(keys: Tensor) -> Tensor:
    """Return a hash of the first bits of each key, `[batch, keys]`, for keys `[batch, heads, keys, head]`."""
    sample = keys[:, 0, :, :HASHED].detach().to(torch.float32).contiguous().view(torch.int32).long()
    factors = torch.tensor([(2 * n + 3) * 0x9E3779B1 for n in range(sample.shape[-1])], device=keys.device)
    mixed = (sample ^ (sample >> 13)) * factors
    return (mixed ^ (mixed >> 29)).sum(-1)


def _version(keys: Tensor | None) -> int:
    return 0 if keys is None else compat.version_counter(keys)


def _plain_keys(cache: Any) -> tuple[int, Tensor] | None:
    """Return the index and the keys of the last layer whose keys can be compared.

    Layers that see every token come first, since a sliding layer holds only the newest tokens.
    """
    for sliding in (False, True):
        for index in reversed(range(len(cache.layers))):
            layer = cache.layers[index]
            if getattr(layer, "is_sliding", False) != sliding or not _holds_keys(layer):
                continue
            if layer.keys.ndim == 4 and layer.keys.shape[2] > 0 and not layer.keys.is_meta:
                return index, layer.keys
    return None


def _held(keys: Tensor, tokens: int, static: bool) -> tuple[int, Tensor]:
    """Return the index of the first token whose key a layer holds, and its keys of the first `tokens` tokens.

    A static layer fills its slots from the left; one that slides then rolls, its newest token at the right.
    """
    count = min(keys.shape[2], tokens)
    return tokens - count, keys[:, :, :count] if static else keys[:, :, keys.shape[2] - count :]


def _match(cache: Any, record: CacheRecord, length: int, slots: int | None) -> None:
    """Update a record after changes of its cache: rows selected, repeated or reordered, newest tokens dropped.

    Raises:
        CacheError: the cache was changed in another way.
    """
    changed = f"This cache was changed since {record.scheme!r} filled it"
    tokens = length if record.tokens is None else record.tokens
    if not record.finished and (record.keys is None or length > tokens):
        raise CacheError(f"The last pass over this cache did not finish, so its layers may differ. {EMPTY}")
    if length < record.least:
        raise CacheError(
            f"This cache was cropped to {length} tokens, but its first {record.least} were read in one pass, and "
            f"{record.scheme!r} encoded them for a text of that length. {EMPTY}"
        )
    if length > tokens:
        raise CacheError(f"{changed}: it holds {length} tokens, and {tokens} were read into it. {EMPTY}")
    whole = [each for each in cache.layers if _holds_keys(each) and not getattr(each, "is_sliding", False)]
    if slots is None and any(int(layer.get_seq_length()) != length for layer in whole):
        raise CacheError(f"{changed}: its layers hold different numbers of tokens. {EMPTY}")
    if record.keys is not None:
        keys = cache.layers[record.layer].keys
        written = record.tokens is not None and record.overwritten
        if keys is not record.keys or length != tokens or written or not record.finished:
            if written or not isinstance(keys, Tensor) or keys.shape[2] == 0:
                raise CacheError(f"{changed}: the keys of layer {record.layer} were overwritten. {EMPTY}")
            static = bool(getattr(cache.layers[record.layer], "is_compileable", False))
            _follow_rows(record, _held(record.keys, tokens, static), _held(keys, length, static), changed)
    if slots is None and record.positions is not None:
        record.positions = record.positions[:, :length]


def _holds_keys(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), Tensor) and not compat.is_quantized(layer)


def _follow_rows(record: CacheRecord, before: tuple[int, Tensor], after: tuple[int, Tensor], changed: str) -> None:
    """Give each row of a cache the positions of the recorded row with the same keys.

    `before` and `after` are the token that a layer's keys begin with, and these keys, `[batch, heads, keys, head]`.
    """
    assert record.positions is not None
    start = max(before[0], after[0])
    known, now = (token_hashes(keys[:, :, start - first :]) for first, keys in (before, after))
    known = known[:, : now.shape[1]].to(now.device)
    equal = (now[:, None] == known[None]).all(-1)
    if not bool(equal.any(1).all()):
        raise CacheError(
            f"{changed}: tokens were removed from its middle, or its keys were replaced, and {record.scheme!r} needs "
            f"the position of every key. {EMPTY} Key-value compression works with static rotary schemes."
        )
    positions = record.positions
    in_place = equal.shape[0] == equal.shape[1] and bool(equal.diagonal().all())
    if in_place or positions.shape[0] == 1:
        return
    chosen = positions[equal.int().argmax(1).to(positions.device)]
    alike = (chosen[:, None] == positions[None]).all(-1) | ~equal.to(positions.device)
    if not bool(alike.all()):
        raise CacheError(
            f"{changed}: rows with the same keys have different positions, so their order is lost. {EMPTY}"
        )
    record.positions = chosen
