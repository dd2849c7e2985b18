"""Where every query and every key stands."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import PePatchError


class Positions(NamedTuple):
    """Token positions of one forward pass.

    A NamedTuple of tensors, so that device hooks, gradient checkpointing and compilation carry it through the layers
    as an argument; there is no such thing as "the current positions".
    """

    query: Tensor
    """Position of each query, `[batch | 1, query]`, int64."""
    key: Tensor
    """Position of each key in the cache and in this pass, `[batch | 1, key]`, int64."""
    length: Tensor | int | None = None
    """For each query the number of tokens by which a length-dependent scheme chooses its regime, `[batch | 1, query]`,
    or one for all of a first pass. None where no such scheme is in use."""
    fresh: bool = True
    """Whether the cache was empty before this pass."""
    filled: Tensor | int | None = None
    """How many slots of a static cache hold a token after this pass; None where the cache grows."""
    kept: Tensor | None = None
    """Which of the keys a cache layer has kept (`fit`), `[kept]`; None for all."""
    prepared: tuple[Tensor, ...] = ()
    """What the scheme computed once for all layers (`Scheme.prepare`)."""
    masks: tuple[Any, ...] | None = None
    """The attention mask of each layer, where the one that the layers are handed gets lost on the way (Ulysses)."""

    @property
    def distance(self) -> Tensor:
        """How far each key lies behind each query, `[batch | 1, query, key]`."""
        return self.query[:, :, None] - self.key[:, None, :]

    def fit(self, key_length: int) -> Positions:
        """The same positions for a cache layer that holds fewer keys, a sliding one with the newest, or that has slots
        which no token has reached, which the mask hides."""
        count = self.key.shape[1]
        if key_length == count:
            return self
        index = torch.arange(key_length, device=self.key.device)
        if key_length > count:
            index = index.clamp(max=count - 1)
        elif self.filled is None:
            index = index + (count - key_length)
        else:  # a static layer fills its slots from the left, then rolls
            index = index + (torch.as_tensor(self.filled, device=index.device) - key_length).clamp(min=0)
        return self._replace(key=self.key[:, index], kept=index)


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
        query: positions of the tokens of this pass, `[batch | 1, query]`.
        past_length: how many tokens the cache holds, as the cache reports it.
        slots: capacity of a static cache, None for one that grows.
    """
    rows, new = query.shape
    known = getattr(cache, "pe_positions", None)
    if known is None and past_length > 0:
        raise PePatchError(
            "This cache was filled before the model was patched, so its keys do not fit the scheme; start from an "
            "empty cache."
        )
    if slots is not None:  # fixed shapes, so that a compiled decoding step is compiled once
        if known is None or known.shape != (rows, slots):
            known = torch.zeros(rows, slots, dtype=torch.long, device=query.device)
            cache.pe_positions = known
        known.index_copy_(1, torch.arange(new, device=query.device) + past_length, query)
        return known
    if known is None or past_length == 0:
        known = query[:, :0]
    elif known.shape[0] != rows:
        if max(rows, known.shape[0]) % min(rows, known.shape[0]):
            raise PePatchError(f"A cache of {known.shape[0]} rows cannot be continued with {rows}.")
        if known.shape[0] < rows:  # several continuations of each prompt
            known = known.repeat_interleave(rows // known.shape[0], 0)
        elif rows == 1:  # position ids given before and left to the model now
            query = query.expand(known.shape[0], -1)
        else:
            raise PePatchError(
                f"This cache was filled with {known.shape[0]} rows, and {rows} go on: nothing says which were kept. "
                "Start from an empty cache."
            )
    known = torch.cat((known[:, :past_length], query), -1)
    cache.pe_positions = known
    return known
