"""Run a model with a cache, without a cache, and on a padded batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import compat
from ...patching.targets import unwrap


class Difference(NamedTuple):
    """The largest difference between two results, relative to the largest expected value if that exceeds 1."""

    size: float
    where: str


def largest(differences: Iterable[Difference]) -> Difference:
    """Return the largest of several differences."""
    return max(differences, key=lambda difference: difference.size)


def difference(actual: Tensor, expected: Tensor, where: str) -> Difference:
    """Compare logits of the same shape; a NaN on one side counts as an infinite difference."""
    if actual.shape != expected.shape:
        raise ValueError(f"logits {where} have the shape {list(actual.shape)}, expected {list(expected.shape)}")
    actual, expected = actual.float(), expected.float()
    size = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))
    return Difference(size if size == size else float("inf"), where)


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
    """Return the logits `[rows, tokens, vocabulary]` of one pass without a cache."""
    positions = _positions(position_ids, 0, ids.shape[1])
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits


def _positions(position_ids: Tensor | None, start: int, stop: int) -> dict[str, Tensor]:
    return {} if position_ids is None else {"position_ids": position_ids[:, start:stop]}


def last_logits(model: Any, ids: Tensor, ends: Iterable[int]) -> dict[int, Tensor]:
    """Return the last logits `[rows, vocabulary]` of a pass over the first n tokens, for each n in `ends`."""
    return {end: logits(model, ids[:, :end])[:, -1] for end in dict.fromkeys(ends)}


@torch.no_grad()
def cached_logits(
    model: Any, ids: Tensor, sizes: Iterable[int], mask: Tensor | None = None, position_ids: Tensor | None = None
) -> dict[int, Tensor]:
    """Read a sequence into one cache in several passes.

    Args:
        model: the model.
        ids: the sequence `[rows, tokens]`.
        sizes: the number of tokens in each pass.
        mask: the attention mask `[rows, tokens]`.
        position_ids: the position ids `[rows, tokens]`.

    Returns:
        The last logits `[rows, vocabulary]` of each pass, by the number of tokens read so far.
    """
    last: dict[int, Tensor] = {}
    cache, start = None, 0
    for size in sizes:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        inputs = compat.cache_keyword(unwrap(model), cache) | _positions(position_ids, start, stop)
        output = model(input_ids=ids[:, start:stop], attention_mask=seen, use_cache=True, **inputs)
        cache, start = compat.cache_of(output), stop
        if cache is None:
            raise ValueError("the model returns no cache although use_cache=True")
        last[stop] = output.logits[:, -1]
    return last


@torch.no_grad()
def greedy(model: Any, ids: Tensor, count: int, *, use_cache: bool) -> tuple[list[int], list[Tensor]]:
    """Generate `count` tokens greedily; return them with the logits `[vocabulary]` of each."""
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return generated.sequences[0, ids.shape[1] :].tolist(), [step[0] for step in generated.logits]
