"""Keep encoded keys beside a cache, so that a decoding step encodes the new keys only.

Schemes that act at the scores cache keys as projected, and encode all of them in every pass. What a scheme makes of a
cached key rarely changes from one step to the next: the key's own position decides it, and perhaps the regime of the
length. `EncodedKeys` belongs to one cache. It remembers which key tensor of a layer it has encoded, and how much of it.
Any other tensor there means that the cache was changed: rows selected or reordered, or tokens removed. Then the keys
are encoded again. A cropped cache is recognised, since its keys are the first part of the same memory.

PyTorch counts no changes of tensors that were made under `torch.inference_mode`, so keys that are overwritten there in
place are not noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import compat

Result = TypeVar("Result")
Encode = Callable[[Tensor, int], Tensor]
"""Encodes keys `[batch, key_heads, new, head]`, the first of which has the given index in the cache."""
ROOM = 8
"""A copy has room for 1 / ROOM more tokens than it holds, so that it rarely moves as it grows."""
LEAST_ROOM = 64


@dataclass
class Copy:
    """The keys of a layer under one encoding."""

    regime: Hashable
    """The inputs of the encoding other than the positions, as a range of lengths. A new regime needs a new copy."""
    buffer: Tensor
    """`[batch, key_heads, room, head]`."""
    dtype: torch.dtype
    """Type of the keys before they were encoded. Autocast may change it within a text."""
    length: int = 0
    """Number of tokens that it holds."""

    def serves(self, key: Tensor, regime: Hashable) -> bool:
        """Return whether the copy can be extended by keys of this type, in this regime."""
        frozen = self.buffer.is_inference() and not torch.is_inference_mode_enabled()  # it can no longer be written
        same = self.regime == regime and self.dtype == key.dtype and self.buffer.device == key.device
        return same and not frozen


@dataclass
class LayerKeys:
    """The encoded keys of one layer."""

    source: Tensor | None = None
    """The keys of the cache that were encoded, `[batch, key_heads, keys, head]`."""
    version: int = 0
    """Version counter of these keys, which every in-place change increments."""
    copies: dict[Hashable, Copy] = field(default_factory=dict)


class EncodedKeys:
    """The encoded keys of a cache, by layer. Deep copies and pickles leave them out, since they can be made again."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerKeys] = {}
        self.tables: dict[Hashable, Tensor] = {}
        """Tables by distance, `[distances, ...]`, which grow as the text does."""

    def __deepcopy__(self, memo: dict[int, Any]) -> EncodedKeys:
        return EncodedKeys()

    def __reduce__(self) -> tuple[type[EncodedKeys], tuple[()]]:
        return EncodedKeys, ()

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes that one token of one row takes in all copies, without their room to grow."""
        buffers = (copy.buffer for layer in self.layers.values() for copy in layer.copies.values())
        return sum(buffer.shape[1] * buffer.shape[3] * buffer.element_size() for buffer in buffers)

    def drop_what_changed(self, keys_by_layer: dict[int, Tensor]) -> None:
        """Shorten copies to what the cache still holds, and drop those whose keys were replaced.

        Args:
            keys_by_layer: the keys of the cache before this pass, of the layers whose keys can be followed.
        """
        for index, layer in list(self.layers.items()):
            kept = _tokens_kept(layer, keys_by_layer.get(index))
            if kept == 0:
                del self.layers[index]
                continue
            for copy in layer.copies.values():
                copy.length = min(copy.length, kept)


def _tokens_kept(layer: LayerKeys, keys: Tensor | None) -> int:
    """Return how many of the encoded keys are the first ones of `keys`, by the memory that they lie in."""
    source = layer.source
    if keys is None or source is None or keys.device != source.device or keys.dtype != source.dtype:
        return 0
    same_memory = keys.data_ptr() == source.data_ptr() and keys.stride() == source.stride()
    same_rows = keys.shape[:2] == source.shape[:2] and keys.shape[3:] == source.shape[3:]
    if not (same_memory and same_rows and compat.version_counter(keys) == layer.version):
        return 0
    return min(keys.shape[2], source.shape[2])


class EncodedPass:
    """One pass over a cache that may reuse encoded keys.

    Args:
        encoded: the encoded keys of the cache.
        find: returns the index of the layer of the cache that holds these very keys; None if no layer does.
    """

    def __init__(self, encoded: EncodedKeys, find: Callable[[Tensor, int | None], int | None]) -> None:
        self.encoded, self._find = encoded, find
        self._results: dict[Hashable, tuple[Any, tuple[object, ...]]] = {}

    def once(self, name: Hashable, compute: Callable[[], Result], *named: object) -> Result:
        """Return what `compute` returns, computed once for all layers of this pass.

        Args:
            name: identifies the result among all results of the pass.
            compute: computes it.
            named: the objects that the name contains by their identity or address. They live as long as the result, so
                that no later object gets the same one (a rank's slice of a scheme lives for one layer).
        """
        if name in self._results:
            return self._results[name][0]
        result = compute()
        if not torch.compiler.is_compiling():
            self._results[name] = result, named
        return result

    def table(self, name: Hashable, count: int, make: Callable[[int], Tensor]) -> Tensor:
        """Return the first `count` rows of a table that `make` makes with any number of rows; the cache keeps it."""
        tables = self.encoded.tables
        if name not in tables or tables[name].shape[0] < count:
            tables[name] = make(count + max(LEAST_ROOM, count // ROOM))
        return tables[name][:count]

    def keys(self, key: Tensor, hint: int | None, name: Hashable, regime: Hashable, encode: Encode) -> Tensor:
        """Return the encoded keys, of which only the new ones are encoded now.

        Args:
            key: all keys of a layer, as the cache holds them, `[batch, key_heads, keys, head]`.
            hint: the layer of the cache that they probably belong to.
            name: name of the encoding; a scheme may use several.
            regime: what the encoding depends on besides the positions.
            encode: encodes keys. Each result must depend on its own key and index alone.
        """
        index = None if torch.compiler.is_compiling() else self._find(key, hint)
        if index is None:
            return encode(key, 0)
        layer = self.encoded.layers.setdefault(index, LayerKeys())
        copy = layer.copies.get(name)
        if copy is None or not copy.serves(key, regime):
            copy = layer.copies[name] = Copy(regime, key[:, :, :0], key.dtype)
        total, start = key.shape[2], copy.length
        if start < total:
            new = encode(key[:, :, start:], start)
            _make_room(copy, new, total)
            copy.buffer[:, :, start:total] = new
            copy.length = total
        layer.source, layer.version = key, compat.version_counter(key)
        return copy.buffer[:, :, :total]


def _make_room(copy: Copy, new: Tensor, total: int) -> None:
    """Move a copy into a larger buffer if `total` tokens do not fit."""
    if copy.buffer.shape[2] >= total:
        return
    batch, heads, _, width = new.shape
    room = total + max(LEAST_ROOM, total // ROOM)
    buffer = torch.empty(batch, heads, room, width, dtype=new.dtype, device=new.device)
    buffer[:, :, : copy.length] = copy.buffer[:, :, : copy.length]
    copy.buffer = buffer
