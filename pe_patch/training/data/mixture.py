"""Draw the source of each sequence, and summarise the mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .phase import PhaseData

BLOCK = 1 << 14
"""Sequences whose sources are drawn together."""

FEW = 0.5
"""Share of tokens in long documents below which the plan prints a note."""


class SourceDraw:
    """Maps the number of a sequence to its source and to the count of earlier sequences of that source.

    This way each source's rows are read in order, however small its share.
    """

    def __init__(self, shares: np.ndarray, seed: tuple[int, ...]) -> None:
        """`shares` `[sources]` sum to 1."""
        self.shares, self.seed = shares, seed
        self.before = [np.zeros(len(shares), dtype=np.int64)]
        """Number of sequences of each source before each block."""
        self.latest: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, number: int) -> tuple[int, int]:
        if len(self.shares) == 1:
            return 0, number
        block, place = divmod(number, BLOCK)
        chosen = self._block(block)
        source = int(chosen[place])
        return source, int(self._counts_before(block)[source] + np.count_nonzero(chosen[:place] == source))

    def counts(self, total: int) -> list[int]:
        """Return how many of the first `total` sequences belong to each source."""
        if len(self.shares) == 1:
            return [total]
        block, place = divmod(total, BLOCK)
        return (self._counts_before(block) + self._count(self._block(block)[:place])).tolist()

    def _block(self, block: int) -> np.ndarray:
        if self.latest[0] != block:
            rng = np.random.default_rng([*self.seed, BLOCK, block])
            self.latest = block, rng.choice(len(self.shares), size=BLOCK, p=self.shares)
        return self.latest[1]

    def _counts_before(self, block: int) -> np.ndarray:
        while len(self.before) <= block:
            self.before.append(self.before[-1] + self._count(self._block(len(self.before) - 1)))
        return self.before[block]

    def _count(self, chosen: np.ndarray) -> np.ndarray:
        return np.bincount(chosen, minlength=len(self.shares))


class Order:
    """Maps a turn to a row of a source, in a new random order for each epoch."""

    def __init__(self, rows: int, seed: tuple[int, ...]) -> None:
        self.rows, self.seed = rows, seed
        self.epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, turn: int) -> int:
        if self.rows == 1:
            return 0
        epoch, place = divmod(turn, self.rows)
        if epoch not in self.epochs:
            if len(self.epochs) > 1:
                del self.epochs[next(iter(self.epochs))]
            self.epochs[epoch] = np.random.default_rng([*self.seed, self.rows, epoch]).permutation(self.rows)
        return int(self.epochs[epoch][place])


def mix_table(data: PhaseData) -> list[dict[str, Any]]:
    """Return one row for each source of a phase, with its size and its share of the phase.

    `documents` and `tokens` count the documents that pass `min_length`. `long_documents` have at least the phase's
    length, and `long_share` is their share of the tokens. `sequences` and `drawn` count what the phase takes from the
    source, and `times_seen` is how often it sees each token on average. Needles are hidden in the whole sequence, so
    the length of documents does not limit the distances that they train.
    """
    phase, rows = data.phase, []
    counts = data.turns.counts(phase.steps * phase.batch)
    for (name, given), source, share, count in zip(
        phase.mixture.items(), data.sources, data.turns.shares, counts, strict=True
    ):
        lengths = source.lengths
        long = lengths[lengths >= phase.length]
        drawn = round(count * source.trained_tokens)
        rows.append(
            {
                "source": name,
                "kind": given.kind,
                "text": source.corpus.name,
                "documents": len(lengths),
                "tokens": source.tokens,
                "long_documents": len(long),
                "long_share": round(float(long.sum()) / max(1, source.tokens), 3),
                "share": round(float(share), 3),
                "sequences": count,
                "drawn": drawn,
                "times_seen": round(drawn / max(1, source.tokens), 3),
            }
        )
    return rows


def mix_notes(data: PhaseData) -> list[str]:
    """Return notes for sources with few documents as long as the sequences."""
    length, notes = data.phase.length, []
    for row in mix_table(data):
        if row["kind"] == "text" and row["share"] > 0 and row["long_share"] < FEW:
            notes.append(
                f"mixture.{row['source']}: {100 * row['long_share']:.1f} % of its tokens are in documents of at least "
                f"{length:,} tokens. A sequence of shorter documents has no dependencies of that length. "
                f"mixture.{row['source']}.min_length={length} uses only long documents."
            )
    return notes
