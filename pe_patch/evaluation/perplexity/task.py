"""The task `perplexity`: which measures there are, and which options belong to which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

from ...errors import OptionError, unknown
from ..bench import Bench, Outcome, Piece
from .compat import COMPAT
from .fixed import FIXED
from .longppl import LONGPPL, Judge
from .measure import Measure
from .position import POSITION
from .sliding import SLIDING

MEASURES: dict[str, Measure] = {"fixed": FIXED, "sliding": SLIDING, "position": POSITION, "longppl": LONGPPL}
USUAL = ("fixed", "sliding", "position")


@dataclass(frozen=True)
class Perplexity:
    """How well the next token is predicted, by one or several measures; loss is in nats per token.

    `measures`, all in nats per token but the last (None: the first three, or none where `compat` is given):
      `fixed`: the same last `targets` tokens of `spots` (64) pieces of text at every length, with all that fits before
      them. Only this one tells "makes use of more context" from "other tokens". `targets` is 128, or half of the
      shortest length where that is less.
      `sliding`: every token of a stretch of text, once, in windows that move by `stride` tokens (256, or half of the
      shortest length where that is less), each token weighing the same; with `bos` every window starts with the
      tokenizer's BOS token. `stretch_tokens` (8192) are scored in all.
      `position`: the loss of every token of `windows` (8) pieces by its position, in buckets that double.
      `longppl`: perplexity on the tokens of the first `length` tokens of `windows` (8) documents that more than
      `short_context` (4096, or half of the shortest length) tokens of context make easier. Which these are says
      `judge`: a folder, (model, tokenizer), or None for the evaluated model. `shared_context` (1024, or a quarter of
      `short_context`) neighbours are predicted from the same short context.

    `compat`: perplexity as others compute it, to be set beside their figures; see `compat.py` for the sources.
      `yarn`, `pose`: windows behind BOS over the stretches of `sliding`; the mean of window means, or of tokens.
      `yarn_truncate`: the first length - 1 tokens of `windows` (8) pieces behind BOS; the mean of the pieces' means.
      `longlora`: all tokens of overlapping windows, over `stretch_tokens` (8192) more than the longest length.
      `evaluate`: the first `documents` (8) documents cut to length - 1 tokens; the mean of their perplexities.
      `lm_eval`: the first `documents` (8) documents in windows that do not overlap; word perplexity.

    An option that none of the measures looks at raises `OptionError`.
    """

    measures: Sequence[str] | str | None = None
    targets: int | None = None
    spots: int | None = None
    stride: int | None = None
    stretch_tokens: int | None = None
    windows: int | None = None
    compat: Sequence[str] | str = ()
    bos: bool | None = None
    documents: int | None = None
    judge: Any = None
    short_context: int | None = None
    shared_context: int | None = None

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "loss on the same last tokens for every length, in a sliding window, and by position"
    paper: ClassVar[str] = "token-weighted sliding window as in the Transformers documentation"
    retrieves: ClassVar[bool] = False
    depends_on_lengths: ClassVar[bool] = True
    """The same tokens are scored at every length: how many, follows from the shortest and the longest."""

    def __post_init__(self) -> None:
        compat = _several(self.compat)
        measures = _several(self.measures) if self.measures is not None else () if compat else USUAL
        for kind, names, known in (
            ("measure of perplexity", measures, MEASURES),
            ("compat mode of perplexity", compat, COMPAT),
        ):
            for name in names:
                if name not in known:
                    raise unknown(kind, name, known)
        if not measures and not compat:
            raise OptionError(f"Give at least one measure: {', '.join(MEASURES)}, or a compat mode.")
        # tuples, since a task is to be hashable
        object.__setattr__(self, "measures", measures)
        object.__setattr__(self, "compat", compat)
        if self.judge is not None:
            object.__setattr__(self, "judge", Judge.of(self.judge))
        self._check_options()

    @property
    def chosen(self) -> dict[str, Measure]:
        """The measures and modes that were asked for, by name."""
        return {
            **{name: MEASURES[name] for name in _several(self.measures or ())},
            **{name: COMPAT[name] for name in _several(self.compat)},
        }

    def pieces(self, bench: Bench, length: int) -> Iterator[Piece]:
        """One piece for each measure."""
        for name, measure in self.chosen.items():
            yield Piece(name, measure.tokens(self, bench, length), partial(self._measure, measure, bench, length))

    def _measure(self, measure: Measure, bench: Bench, length: int) -> Outcome:
        row = measure.row(self, bench, length)
        return Outcome([] if row is None else [row])

    def _check_options(self) -> None:
        seen = frozenset().union(*(measure.options for measure in self.chosen.values()))
        for option in (entry.name for entry in fields(self) if entry.name not in ("measures", "compat")):
            value = getattr(self, option)
            if value is None:
                continue
            if option not in seen:
                users = [name for name, measure in {**MEASURES, **COMPAT}.items() if option in measure.options]
                raise OptionError(
                    f"{option} has no effect on {', '.join(self.chosen)}: it belongs to {', '.join(users)}. "
                    "Leave it out, or ask for one of those."
                )
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise OptionError(f"{option} must be at least 1, got {value}.")


def _several(names: Sequence[str] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
