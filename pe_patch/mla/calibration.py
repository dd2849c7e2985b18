"""Calibration tokens of a conversion: checking, splitting and sampling them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, quoted

Calibration = str | Iterable[str] | Tensor | Iterable[Tensor] | Iterable[Sequence[int]] | Mapping[str, object]
"""Texts; token ids without padding, `[rows, length]` or rows of any lengths; or what a tokenizer returns."""
Tokenize = Callable[[list[str]], list[list[int]]]
"""A function that returns the token ids of texts."""

KINDS = 'token ids, `[rows, length]` or a list of lists of ints, such as tokenizer(texts)["input_ids"], or texts'


def tokens(
    calibration: Calibration,
    model: nn.Module,
    tokenize: Tokenize,
    *,
    length: int,
    limit: int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Return rows of token ids, int64 on the CPU, each of at most `length` tokens.

    Args:
        calibration: token ids or texts.
        model: the model, whose vocabulary bounds the ids.
        tokenize: returns the ids of texts.
        length: tokens in a row; longer rows are split.
        limit: tokens in all. If there are more, a random selection of rows is cut to exactly this number. None for no
            limit, which keeps the order of the rows.
        seed: random seed of the selection.

    Raises:
        OptionError: the calibration is empty, has another form, or contains ids that the model does not have.
    """
    for name, value in (("length", length), ("limit", limit)):
        if value is not None and (type(value) is not int or value < 1):
            raise OptionError(f"calibration: {name} must be a number of tokens, at least 1; got {quoted(value)}.")
    pieces: list[Tensor] = []
    for row in _checked(_rows(calibration, tokenize), vocabulary_of(model)):
        split = row.split(length)
        pieces.extend(split[:-1] if len(split) > 1 and len(split[-1]) == 1 else split)  # one token has no context
    if limit is None or sum(map(len, pieces)) <= limit:
        return pieces
    taken: list[Tensor] = []
    for index in _order(len(pieces), seed):
        taken.append(pieces[index][:limit])
        limit -= len(taken[-1])
        if limit == 0:
            break
    return taken


def held_out(rows: Sequence[Tensor], share: float, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Split rows into calibration rows and held-out rows to measure the loss on, each in the original order.

    Args:
        rows: rows of token ids.
        share: share of the rows to hold out, in (0, 1); at least one row is held out and one remains.
        seed: random seed of the split.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise OptionError(f"calibration: the share of held-out rows must be between 0 and 1; got {quoted(share)}.")
    if len(rows) < 2:
        raise OptionError(
            f"calibration: {len(rows)} row cannot be split into calibration rows and held-out rows; give at least two "
            "rows, or text for a second one."
        )
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held = set(_order(len(rows), seed)[:count])
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def vocabulary_of(model: Any) -> int:
    """Return the number of rows of the model's input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def _order(count: int, seed: int) -> list[int]:
    """Return a random permutation of `count` indices."""
    return torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()


def _rows(calibration: Any, tokenize: Tokenize) -> list[Any]:
    """Return the rows of a calibration in any supported form, unchecked."""
    if isinstance(calibration, Mapping) and "input_ids" in calibration:  # the output of a tokenizer
        ids, mask = calibration["input_ids"], calibration.get("attention_mask")
        return list(ids) if mask is None else [_unpadded(*pair) for pair in zip(ids, mask, strict=True)]
    if hasattr(calibration, "ndim") and not isinstance(calibration, Tensor):
        calibration = torch.as_tensor(calibration)
    if isinstance(calibration, Iterator):
        calibration = list(calibration)
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2:
            raise OptionError(
                f"calibration: token ids must have the shape [rows, length], not {list(calibration.shape)}."
            )
        return list(calibration)
    texts = [calibration] if isinstance(calibration, str) else calibration
    if isinstance(texts, Mapping) or not isinstance(texts, Sequence):
        raise OptionError(f"calibration must be {KINDS}; got {type(calibration).__name__}.")
    if not any(isinstance(text, str) for text in texts):
        return list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise OptionError(f"calibration: every text must be a non-empty string; number {index} is {quoted(text)}.")
    return tokenize(list(texts))


def _unpadded(ids: Any, mask: Any) -> Tensor:
    """Return the ids that the mask marks as real tokens."""
    return torch.as_tensor(ids, device="cpu")[torch.as_tensor(mask, device="cpu").bool()]


def _checked(rows: list[Any], vocabulary: int) -> Iterator[Tensor]:
    """Yield rows as int64 tensors; raise `OptionError` for the first one that is not a row of valid ids."""
    if not rows:
        raise OptionError(f"calibration is empty; give {KINDS}.")
    for index, row in enumerate(rows):
        try:
            ids = torch.as_tensor(row, device="cpu")
        except (TypeError, ValueError, RuntimeError) as problem:
            raise OptionError(f"calibration must be {KINDS}; row {index} is neither ({problem}).") from None
        if ids.ndim == 1 and not len(ids):
            raise OptionError(f"calibration: row {index} has no tokens; leave it out.")
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise OptionError(
                f"calibration must be {KINDS}; row {index} is a {type(row).__name__} of {ids.dtype}, {list(ids.shape)}."
            )
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= vocabulary:
            raise OptionError(
                f"calibration: row {index} has the id {lowest if lowest < 0 else highest}, and the ids of this model "
                f"are 0 to {vocabulary - 1}. Use its own tokenizer, without padding."
            )
        yield ids.long()
