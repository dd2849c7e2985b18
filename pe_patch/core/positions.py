"""Token positions of one forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NoEffectError
from .encoded_keys import EncodedPass


class Positions(NamedTuple):
    """Token positions of one forward pass.

    A NamedTuple of tensors, which device hooks, gradient checkpointing and compilation pass through the layers as an
    argument. No module stores positions.
    """

    query: Tensor
    """Position of each query, `[batch | 1, query]`, int64."""
    key: Tensor
    """Position of each key in the cache and in this pass, `[batch | 1, key]`, int64."""
    length: Tensor | int | None = None
    """Sequence length that selects the frequencies of a length-dependent scheme. For each query, `[batch | 1, query]`,
    or one number for a whole first pass. None for other schemes."""
    fresh: bool = True
    """True if the cache was empty before this pass."""
    filled: Tensor | int | None = None
    """Number of slots of a static cache that hold a token after this pass; None for a growing cache."""
    cached: bool = False
    """True if this pass reads from or writes to a cache."""
    kept: Tensor | None = None
    """Indices of the keys that a cache layer kept (`fit`), `[kept]`; None for all."""
    prepared: tuple[Tensor, ...] = ()
    """Result of `Scheme.prepare`, computed once for all layers."""
    encoded: EncodedPass | None = None
    """Encoded keys of the cache that this pass may reuse; None if it encodes all keys."""
    masks: tuple[object, ...] | None = None
    """Attention mask of each layer, under Ulysses, which drops the masks that layers get."""

    @property
    def distance(self) -> Tensor:
        """Return query position - key position, `[batch | 1, query, key]`."""
        return self.query[:, :, None] - self.key[:, None, :]

    def fit(self, key_length: int) -> Positions:
        """Return the positions for a cache layer with another number of keys.

        A sliding layer holds only the newest keys. A static layer has empty slots, which the mask hides.
        """
        count = self.key.shape[1]
        if key_length == count:
            return self
        if key_length > count and not self.cached:
            raise NoEffectError(
                f"An attention got {key_length} keys in a pass over {count} tokens without a cache: Transformers "
                "handed it a cache that the patched model did not see, so positions would be wrong. Run "
                "`pe-patch selftest`."
            )
        index = torch.arange(key_length, device=self.key.device)
        if key_length > count:
            index = index.clamp(max=count - 1)
        elif self.filled is None:
            index = index + (count - key_length)
        else:  # a static layer fills its slots from the left, then rolls
            index = index + (torch.as_tensor(self.filled, device=index.device) - key_length).clamp(min=0)
        return self._replace(key=self.key[:, index], kept=index)


def positions_from_mask(mask: Tensor) -> Tensor:
    """Return the rank of each token among the real ones of its row, `[batch, length]`; padding gets zero."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def positions_skipping_gaps(mask: Tensor) -> Tensor:
    """Return positions that skip masked tokens behind the first real one of a row, `[batch, length]`.

    Padding on the left counts, so that a row without a hole gets 0, 1, 2 ..., the positions that Transformers
    would assign.
    """
    real = mask.long().cumsum(-1)
    holes = ((mask == 0) & (real > 0)).long().cumsum(-1)
    return torch.arange(mask.shape[-1], device=mask.device) - holes


def slot_mask_is_wrong(mask: Tensor, past_length: int, window: int | None, chunk: int | None) -> bool:
    """Return whether a mask built from cache slots differs from one built from positions.

    Transformers builds the masks of sliding and chunked layers from cache slots. They agree with positions unless
    masked tokens between real ones lie within the window of a later token, or move a token into another chunk.

    Args:
        mask: 1 for real tokens, `[batch, length]`.
        past_length: tokens in the cache; only the later ones are queries.
        window: keys that a sliding layer sees, in tokens; None without such layers.
        chunk: length of a chunk of a chunked layer, in tokens; None without such layers.
    """
    real = mask.long().cumsum(-1)
    queries = (mask != 0) & (torch.arange(mask.shape[1], device=mask.device) >= past_length)
    if window is not None and mask.shape[1] > window:
        before = real[:, :-window]  # real tokens in the slots that a query at `slot + window` no longer sees
        lost = (before > 0) & (real[:, window:] - before < window)
        if bool((lost & queries[:, window:]).any()):
            return True
    if chunk is not None and mask.shape[1] > chunk:
        slots = torch.arange(mask.shape[1], device=mask.device) - (real == 0).sum(-1, keepdim=True)
        return bool(((slots // chunk != (real - 1) // chunk) & (mask != 0)).any())
    return False


def document_lengths(positions: Tensor) -> Tensor:
    """Return the length of each token's document, `[batch, length]`.

    Documents packed into one row restart their position ids, so a document begins wherever the next position is not
    the successor of the one before; its length is the last position in it plus one (skipped ids count as read).
    """
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    document = starts.cumsum(-1) - 1
    last = torch.zeros_like(positions).scatter_reduce(1, document, positions, reduce="amax", include_self=True)
    return last.gather(1, document) + 1
