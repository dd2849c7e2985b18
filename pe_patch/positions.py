"""Where every query and every key stands."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """Token positions of one forward pass.

    A NamedTuple of tensors, so that device hooks, gradient checkpointing and compilation carry it through the layers
    as an argument; there is no such thing as "the current positions".
    """

    query: Tensor
    """Position of each query, `[batch | 1, query]`, int64."""
    key: Tensor
    """Position of each key in the cache and in this pass, `[batch | 1, key]`, int64."""
    length: Tensor | None = None
    """For each query the number of tokens by which a length-dependent scheme chooses its regime, `[batch | 1, query]`.
    None where no such scheme is in use."""
    fresh: bool = True
    """Whether the cache was empty before this pass."""
    prepared: tuple[Tensor, ...] = ()
    """What the scheme computed once for all layers (`Scheme.prepare`)."""

    @property
    def distance(self) -> Tensor:
        """How far each key lies behind each query, `[batch | 1, query, key]`."""
        return self.query[:, :, None] - self.key[:, None, :]

    def fit(self, key_length: int) -> Positions:
        """The same positions for a cache layer that holds another number of keys.

        A sliding layer keeps the newest keys only; a static one has slots that no token has reached, which the mask
        hides, so that any position will do for them.
        """
        surplus = key_length - self.key.shape[1]
        if surplus == 0:
            return self
        if surplus < 0:
            return self._replace(key=self.key[:, -key_length:])
        return self._replace(key=torch.cat((self.key, self.key[:, -1:].expand(-1, surplus)), -1))


def from_mask(mask: Tensor) -> Tensor:
    """Rank of each token among the real ones of its row, `[batch, length]`; padding stands at zero."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def document_lengths(positions: Tensor) -> Tensor:
    """Number of tokens of the document that each token belongs to, `[batch, length]`.

    Documents packed into one row restart their position ids, so a document begins wherever the next position is not
    the successor of the one before; its length is the last position in it plus one (skipped ids count as read).
    """
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    document = starts.cumsum(-1) - 1
    last = torch.zeros_like(positions).scatter_reduce(1, document, positions, reduce="amax", include_self=True)
    return last.gather(1, document) + 1


def remember(cache: Any, query: Tensor, past_length: int | Tensor, slots: int | None) -> Tensor:
    """Positions of all keys that `cache` will hold after this pass, `[batch | 1, key]`.

    Cached keys carry no position of their own, and position ids may skip, so they are remembered on the cache itself:
    a cropped cache forgets the same tokens, and the beams of one prompt share their positions.

    Args:
        cache: any Transformers cache.
        query: positions of the tokens of this pass, `[batch, query]`.
        past_length: how many tokens the cache holds, as the cache reports it.
        slots: capacity of a static cache, None for one that grows.
    """
    rows, new = query.shape
    known = getattr(cache, "pe_positions", None)
    if slots is not None:  # fixed shapes, so that a compiled decoding step is compiled once
        if known is None or known.shape[1] != slots or known.shape[0] != rows:
            known = torch.zeros(rows, slots, dtype=torch.long, device=query.device)
            cache.pe_positions = known
        known.index_copy_(1, torch.arange(new, device=query.device) + past_length, query)
        return known
    if known is None or past_length == 0:
        known = query[:, :0]
    if known.shape[0] != rows:  # the cache was repeated for several continuations of each prompt
        known = known.repeat_interleave(rows // known.shape[0], 0)
    known = torch.cat((known[:, :past_length], query), -1)
    cache.pe_positions = known
    return known
