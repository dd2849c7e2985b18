"""Which tokens a conversion is calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, quoted

Calibration = Tensor | Sequence[Any] | str
"""Token ids, `[rows, length]` or rows of any lengths, without padding; or texts."""
Tokenize = Callable[[list[str]], list[list[int]]]

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
    """Rows of token ids, each int64 `[at most length]` on the CPU.

    Longer rows are cut into pieces. Where there are more than `limit` tokens in all, `seed` chooses which rows are
    taken, up to the limit exactly; else they keep their order. `tokenize` serves where texts are given.
    """
    for name, value in (("length", length), ("limit", limit)):
        if value is not None and (type(value) is not int or value < 1):
            raise OptionError(f"calibration: {name} counts tokens, at least 1; got {quoted(value)}.")
    pieces: list[Tensor] = []
    for row in _checked(_rows(calibration, tokenize), vocabulary_of(model)):
        cut = row.split(length)
        pieces.extend(cut[:-1] if len(cut) > 1 and len(cut[-1]) == 1 else cut)  # one token alone tells nothing
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
    """Rows to calibrate on, and about a `share` of all rows, at least one, to measure the loss on; in their order."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise OptionError(f"calibration: the share of rows held out lies between 0 and 1; got {quoted(share)}.")
    if len(rows) < 2:
        raise OptionError(
            f"calibration: {len(rows)} row cannot be split into rows to calibrate on and rows to measure the loss on; "
            "give at least two rows, or shorter ones."
        )
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held = set(_order(len(rows), seed)[:count])
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def vocabulary_of(model: Any) -> int:
    """How many token ids the model can read."""
    return int(model.get_input_embeddings().weight.shape[0])


def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()


def _rows(calibration: Any, tokenize: Tokenize) -> list[Any]:
    if isinstance(calibration, Mapping) and "input_ids" in calibration:  # what a tokenizer gives
        ids, mask = calibration["input_ids"], calibration.get("attention_mask")
        return list(ids) if mask is None else [_unpadded(*pair) for pair in zip(ids, mask, strict=True)]
    if hasattr(calibration, "ndim") and not isinstance(calibration, Tensor):
        calibration = torch.as_tensor(calibration)
    if isinstance(calibration, Iterator):
        calibration = list(calibration)
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2:
            raise OptionError(f"calibration: token ids are [rows, length], not {list(calibration.shape)}.")
        return list(calibration)
    texts = [calibration] if isinstance(calibration, str) else calibration
    if isinstance(texts, Mapping) or not isinstance(texts, Sequence):
        raise OptionError(f"calibration is {KINDS}; got {type(calibration).__name__}.")
    if not any(isinstance(text, str) for text in texts):
        return list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise OptionError(
                f"calibration: every text is a string with words in it; number {index} is {quoted(text)}."
            )
    return tokenize(list(texts))


def _unpadded(ids: Any, mask: Any) -> Tensor:
    return torch.as_tensor(ids, device="cpu")[torch.as_tensor(mask, device="cpu").bool()]


def _checked(rows: list[Any], vocabulary: int) -> Iterator[Tensor]:
    if not rows:
        raise OptionError(f"calibration is empty; it takes {KINDS}.")
    for index, row in enumerate(rows):
        try:
            ids = torch.as_tensor(row, device="cpu")
        except (TypeError, ValueError, RuntimeError) as problem:
            raise OptionError(f"calibration is {KINDS}; row {index} is neither ({problem}).") from None
        if ids.ndim == 1 and not len(ids):
            raise OptionError(f"calibration: row {index} has no tokens; leave it out.")
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise OptionError(
                f"calibration is {KINDS}; row {index} is a {type(row).__name__} of {ids.dtype}, {list(ids.shape)}."
            )
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= vocabulary:
            raise OptionError(
                f"calibration: row {index} has the id {lowest if lowest < 0 else highest}, and this model reads 0 to "
                f"{vocabulary - 1}; use its own tokenizer, and leave out padding."
            )
        yield ids.long()
