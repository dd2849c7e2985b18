"""Pack documents into rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np


class Rows(Sequence[np.ndarray]):
    """Packed rows; each is an int64 array `[pieces, 3]` of document, start and stop."""

    def __init__(self, pieces: np.ndarray, row_of: np.ndarray, count: int) -> None:
        """Take `pieces` `[n, 3]`, in their order within rows, and the row of each, `[n]`."""
        order = np.argsort(row_of, kind="stable")
        self.pieces = pieces[order]
        self.offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=count))])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        start, stop = self.offsets[range(len(self))[number] :][:2]
        return self.pieces[start:stop]


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, start: int = 0) -> Rows:
    """Pack documents into rows by best-fit decreasing, and cut a document only if it exceeds a row.

    A document of more than `capacity` tokens fills whole rows, and its rest is packed like another document. Among rows
    with the same free space, the earliest is used.

    Args:
        lengths: tokens in each document, `[documents]`.
        capacity: tokens in a row.
        start: tokens that are added before a piece that continues a document.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    # The first row of a document holds `capacity` of its tokens, and each further row `capacity - start`.
    times = np.where(sizes >= capacity, 1 + (sizes - capacity) // (capacity - start), 0)
    filled = np.where(times > 0, capacity + (times - 1) * (capacity - start), 0)
    whole = _whole_rows(times, capacity, start)
    rest = sizes - filled
    packed = np.where((times > 0) & (rest > 0), rest + start, rest)
    # Sort by decreasing size; documents of one size keep their order.
    order = np.argsort(-packed, kind="stable")[: np.count_nonzero(packed)]
    rows = _best_fit(packed[order], capacity) + len(whole)
    pieces = np.concatenate([whole, np.stack([order, filled[order], sizes[order]], axis=1)])
    row_of = np.concatenate([np.arange(len(whole)), rows])
    return Rows(pieces, row_of, int(row_of.max()) + 1 if len(row_of) else 0)


def _whole_rows(times: np.ndarray, capacity: int, start: int) -> np.ndarray:
    """Return the pieces `[n, 3]` that fill a row alone, for the number of such rows of each document."""
    document = np.repeat(np.arange(len(times)), times)
    number = np.arange(len(document)) - np.repeat(np.cumsum(times) - times, times)
    stop = capacity + number * (capacity - start)
    return np.stack([document, np.where(number > 0, stop - capacity + start, 0), stop], axis=1)


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row `[n]` of each piece, for sizes `[n]` in decreasing order, with the least free space left.

    Pieces of one size are placed together. A row that was just filled is the fullest that may still hold the next
    piece, so it takes as many of them as fit before the next row.
    """
    rows = np.empty(len(sizes), dtype=np.int64)
    free: dict[int, list[np.ndarray]] = {}  # rows by their free space
    rooms: list[int] = []  # the keys of `free`, sorted
    opened = at = 0

    def keep(room: int, some: np.ndarray) -> None:
        if room and len(some):
            if room not in free:
                insort(rooms, room)
            free.setdefault(room, []).append(some)

    bounds = np.append(np.flatnonzero(np.diff(sizes, prepend=capacity + 1)), len(sizes)).tolist()
    for size, stop in zip(sizes[bounds[:-1]].tolist(), bounds[1:], strict=True):
        while at < stop:
            index = bisect_left(rooms, size)
            if index < len(rooms):
                room = rooms.pop(index)
                open_rows = np.sort(np.concatenate(free.pop(room)))
            else:
                room = capacity
                open_rows = np.arange(opened, opened + -(-(stop - at) // (capacity // size)))
                opened += len(open_rows)
            fit = room // size
            full, more = divmod(stop - at, fit)
            full = min(full, len(open_rows))
            rows[at : at + full * fit] = np.repeat(open_rows[:full], fit)
            at += full * fit
            keep(room - fit * size, open_rows[:full])
            if full < len(open_rows):
                more = more if at < stop else 0
                rows[at : at + more] = open_rows[full]
                at += more
                keep(room - more * size, open_rows[full : full + 1])
                keep(room, open_rows[full + 1 :])
    return rows
