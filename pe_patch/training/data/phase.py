"""Build the sequences of one phase, by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..recipe import Phase
from . import pose
from .corpus import Corpus
from .mixture import Order, SourceDraw
from .sequences import LEARN_FROM, Item, Text, kind_of
from .store import Corpora


class PhaseData(Dataset[Item]):
    """The sequences of one phase. Sequence `i` does not depend on when or where it is read.

    An item has `input_ids`, `labels` and `position_ids`, each `[length]`. Positions restart at each document. A label
    is `IGNORED` at a document's first token, which cannot be predicted, and in the padding. A sequence, and each
    document in a packed one, begins with the start tokens of the tokenizer, unless the corpus has none. If the sources
    learn from different things, an item also has `learn_from`, the index of its source's in `LEARN_FROM`.

    Args:
        corpora: the result of `load_corpora`, or one corpus for all sources.
        tokenizer: the tokenizer of the model.
        phase: the recipe's phase.
        seed: seeds the draws; one number for each level, such as run and phase.
        boundaries: keep positions within each document.
    """

    def __init__(
        self, corpora: Corpora | Corpus, tokenizer: Any, phase: Phase, *, seed: Sequence[int], boundaries: bool
    ) -> None:
        self.phase, self.seed = phase, tuple(seed)
        if phase.pose is not None:
            pose.check(phase.length, phase.pose.target, phase.pose.chunks)
        self.sources: list[Text] = [
            kind_of(source, phase, boundaries)(
                name,
                source,
                phase,
                corpora if isinstance(corpora, Corpus) else corpora[source.source, source.text_column],
                tokenizer,
            )
            for name, source in phase.mixture.items()
        ]
        chosen = [source.learn_from for source in phase.mixture.values()]
        self.learn_from = [LEARN_FROM.index(each) for each in chosen] if {*chosen} != {"both"} else []
        shares = np.array([source.share for source in phase.mixture.values()])
        self.turns = SourceDraw(shares / shares.sum(), self.seed)
        self.orders = [Order(len(source), self.seed) for source in self.sources]

    def __getitem__(self, number: int) -> Item:
        index, turn = self.turns[number]
        rng = np.random.default_rng([*self.seed, number])
        item = self.sources[index].item(self.orders[index][turn], rng)
        return {**item, "learn_from": np.array(self.learn_from[index])} if self.learn_from else item

    def size(self, number: int) -> int:
        """Return the number of tokens in a sequence, without its padding."""
        index, turn = self.turns[number]
        return self.sources[index].size(self.orders[index][turn])
