"""The task `perplexity`: its measures, and which options belong to which measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

from ..errors import OptionError, unknown
from .context import EvaluationContext, Outcome, WorkUnit
from .longppl import Judge, LongPPL
from .model import Work
from .perplexity_compat import COMPAT
from .perplexity_measures import FixedTargets, LossByPosition, Measure, SlidingWindow

MEASURES: dict[str, type[Measure]] = {
    "fixed": FixedTargets,
    "sliding": SlidingWindow,
    "position": LossByPosition,
    "longppl": LongPPL,
}
DEFAULT_MEASURES = ("fixed", "sliding", "position")


@dataclass(frozen=True)
class Perplexity:
    """Loss or perplexity of the next token, by one or several measures.

    An option that no chosen measure uses raises `OptionError`. With fewer than 32 `samples`, the evaluation reads less
    text: the defaults of `spots`, `windows`, `documents` and, but for `longlora`, `stretch_tokens` shrink in
    proportion.
    """

    measures: Sequence[str] | str | None = None
    """Measures to run. None runs the first three, or none if `compat` is given. All but the last score in nats per
    token.

    `fixed`: the same last `targets` tokens of `spots` pieces of text at every length, with as much text before them as
    fits. Only this measure separates the effect of more context from the effect of other target tokens.
    `sliding`: every token of some stretches of text once, in windows that move by `stride` tokens.
    `position`: every token of `windows` pieces by its position, in buckets that double.
    `longppl`: perplexity of the key tokens among the first `length` tokens of `windows` documents. Key tokens are those
    that `judge` predicts better with the whole context than with `short_context` tokens.
    """
    targets: int | None = None
    """For `fixed`: target tokens of each piece. None is 128, or half the shortest length if that is less."""
    spots: int | None = None
    """For `fixed`: pieces of text. None is 64."""
    stride: int | None = None
    """For sliding windows: tokens between two windows. None is 256, or half the shortest length if that is less."""
    stretch_tokens: int | None = None
    """For sliding windows: tokens to score in total. None is 8192."""
    windows: int | None = None
    """For `position`, `longppl` and `yarn_truncate`: pieces of text. None is 8."""
    compat: Sequence[str] | str = ()
    """Perplexity as other projects compute it, for comparison with their figures. `perplexity_compat.py` has the
    sources.

    `yarn`, `pose`: windows behind BOS over the stretches of `sliding`; the mean of window means, or of tokens.
    `yarn_truncate`: the first length - 1 tokens of `windows` pieces behind BOS; the mean of the pieces' means.
    `longlora`: all tokens of overlapping windows, over `stretch_tokens` more tokens than the longest length.
    `evaluate`: the first `documents` documents, cut to length - 1 tokens; the mean of their perplexities.
    `lm_eval`: the first `documents` documents in windows that do not overlap; word perplexity.
    """
    bos: bool | None = None
    """For `fixed`, `sliding`, `position` and `longppl`: start every window with BOS. None takes the `bos` of the
    evaluation, which by default does as the tokenizer does. Compat modes do as their reference does."""
    documents: int | None = None
    """For `evaluate` and `lm_eval`: number of documents. None is 8."""
    judge: Any = None
    """For `longppl`: a folder, or (model, tokenizer). None is the evaluated model."""
    short_context: int | None = None
    """For `longppl`: tokens of short context. None is 4096, or half the shortest length if that is less."""
    shared_context: int | None = None
    """For `longppl`: tokens that share one short context. None is 1024, or a quarter of `short_context` if less."""

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "loss on the same last tokens for every length, in a sliding window, and by position"
    paper: ClassVar[str] = "token-weighted sliding window as in the Transformers documentation"
    retrieves: ClassVar[bool] = False
    depends_on_lengths: ClassVar[bool] = True
    """The shortest and the longest length determine the scored tokens, so that they are the same at every length."""

    def __post_init__(self) -> None:
        compat = _as_tuple(self.compat)
        measures = _as_tuple(self.measures) if self.measures is not None else () if compat else DEFAULT_MEASURES
        for kind, names, known in (
            ("measure of perplexity", measures, MEASURES),
            ("compat mode of perplexity", compat, COMPAT),
        ):
            for name in names:
                if name not in known:
                    raise unknown(kind, name, known)
        if not measures and not compat:
            raise OptionError(f"Give at least one measure: {', '.join(MEASURES)}, or a compat mode.")
        # tuples, because a task must be hashable
        object.__setattr__(self, "measures", measures)
        object.__setattr__(self, "compat", compat)
        if self.judge is not None:
            object.__setattr__(self, "judge", Judge.of(self.judge))
        self._check_options()

    @property
    def chosen(self) -> dict[str, Measure]:
        """The requested measures and compat modes by name, with their options."""
        return {name: self._make(kind) for name, kind in self._chosen_types().items()}

    def work_units(self, context: EvaluationContext, length: int) -> Iterator[WorkUnit]:
        """Yield one unit per measure."""
        for name, measure in self.chosen.items():
            tokens = measure.tokens(context, length)
            work = Work(windows=-(-tokens // length), tokens=tokens)
            yield WorkUnit(name, work, partial(self._measure, measure, context, length))

    def _measure(self, measure: Measure, context: EvaluationContext, length: int) -> Outcome:
        row = measure.row(context, length, partial(context.key, self))
        return Outcome([] if row is None else [row])

    def _chosen_types(self) -> dict[str, type[Measure]]:
        return {
            **{name: MEASURES[name] for name in _as_tuple(self.measures or ())},
            **{name: COMPAT[name] for name in _as_tuple(self.compat)},
        }

    def _make(self, kind: type[Measure]) -> Measure:
        return kind(**{option: getattr(self, option) for option in _options(kind)})

    def _check_options(self) -> None:
        chosen = self._chosen_types()
        used = {option for kind in chosen.values() for option in _options(kind)}
        for option in (entry.name for entry in fields(self) if entry.name not in ("measures", "compat")):
            value = getattr(self, option)
            if value is None:
                continue
            if option not in used:
                users = [name for name, kind in {**MEASURES, **COMPAT}.items() if option in _options(kind)]
                raise OptionError(
                    f"{option} has no effect on {', '.join(chosen)}: it belongs to {', '.join(users)}. "
                    "Leave it out, or choose one of those."
                )
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise OptionError(f"{option} must be at least 1, got {value}.")


def _options(measure: Any) -> list[str]:
    return [entry.name for entry in fields(measure)]


def _as_tuple(names: Sequence[str] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
