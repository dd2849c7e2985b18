"""The errors of this library, and helpers that format their messages."""

from __future__ import annotations

import logging
import math
import signal
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, MappingProxyType
from typing import Any

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the order in which the characters around them are shown."""
CATEGORIES = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Control characters, lone surrogates, and the separators of lines and paragraphs."""


def printable(value: Any, keep: str = "\n\t") -> str:
    r"""Return the text of `value` with control characters and direction marks escaped, as in `\x1b` or `\u2028`.

    What comes from a file goes through here before it is shown: a terminal would obey the escape sequences in it.

    Args:
        keep: control characters that stay as they are.
    """
    return escape(str(value), lambda character: character.encode("unicode_escape").decode("ascii"), keep)


def finite(value: Any) -> Any:
    """Return a value for JSON, with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def quoted(value: Any) -> str:
    """Return the `repr` of a user's value for an error, in 80 characters at most."""
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4,300 digits, or an object whose own repr fails
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def escape(text: str, write: Callable[[str], str], keep: str = "\n\t") -> str:
    """Return the text with each character that acts on a terminal replaced by what `write` makes of it."""
    if text.isprintable():
        return text
    return "".join(each if each in keep or not _acts(each) else write(each) for each in text)


def _acts(character: str) -> bool:
    return character in BIDI or unicodedata.category(character) in CATEGORIES


class PrintableFilter(logging.Filter):
    """Escape the messages of a logger, which may quote files."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if (escaped := printable(message)) != message:
            record.msg, record.args = escaped, ()
        return True


@contextmanager
def silence_log_warnings() -> Iterator[None]:
    """Log only the errors of this library inside the context, as where a scheme need not be trained yet."""
    logger = logging.getLogger("pe_patch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class PePatchError(Exception):
    """Root of everything this library raises on purpose. Its message is safe to print."""

    def __str__(self) -> str:
        return printable(super().__str__())


class TerminationSignal(BaseException):
    """Raised where SIGTERM arrives. It is not an `Exception`, so that ordinary handlers do not catch it."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `TerminationSignal` if SIGTERM arrives within the block."""
    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers only there
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TerminationSignal

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class UnknownNameError(PePatchError, ValueError):
    """A scheme, family, task or target that does not exist."""


class OptionError(PePatchError, TypeError):
    """An option that is unknown or missing, or options that exclude each other."""


class OptionValueError(OptionError, ValueError):
    """A value that an option cannot take."""


class NoEffectError(PePatchError, RuntimeError):
    """A requested effect did not reach a module."""


class AlreadyPatchedError(PePatchError, RuntimeError):
    """The model has a patch or a scaling already, and the call did not say how to handle it."""


class UnsupportedError(PePatchError, NotImplementedError):
    """A pair of scheme and model, or scheme and backend, that cannot work."""


class BeyondWindowError(PePatchError, ValueError):
    """A sequence is longer than the window the model is patched for."""


class CacheError(PePatchError, ValueError):
    """A cache whose keys do not fit the model's scheme, or whose positions are lost."""


class CheckpointError(PePatchError, OSError):
    """A folder that is not a checkpoint, or a checkpoint that does not hold what it claims."""


class OutputError(PePatchError, FileExistsError):
    """A folder that may not be written to: an input, one that holds something else, or one that cannot be created."""


class MissingPackageError(PePatchError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""


class MismatchError(PePatchError, ValueError):
    """An adapter that was trained under another scheme than that of the model."""


SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        # schemes
        "rotary": "rope", "rotaryembedding": "rope", "rotarypositionembedding": "rope", "default": "rope",
        "positioninterpolation": "linear", "positionalinterpolation": "linear", "interpolation": "linear",
        "linearscaling": "linear", "linearinterpolation": "linear",
        "ntkaware": "ntk", "ntkawarescaling": "ntk", "ntkscaling": "ntk", "dynamicntkscaling": "dynamic_ntk",
        "dynamicntkaware": "dynamic_ntk", "ntkparts": "ntk_by_parts",
        "su": "longrope", "llama31": "llama3", "llama32": "llama3", "llama33": "llama3",
        "sinusoid": "sinusoidal", "sincos": "sinusoidal", "learnedabsolute": "learned", "absolutelearned": "learned",
        "none": "nope", "nopositions": "nope", "nopositionalencoding": "nope",
        "linearbias": "alibi", "attentionwithlinearbiases": "alibi", "t5bias": "t5", "t5relativebias": "t5",
        "relativebias": "t5", "xl": "transformer_xl", "selfattentionwithrelativepositions": "shaw",
        "grouped": "self_extend", "dualchunk": "dca", "dualchunkattention": "dca", "chunkllama": "dca",
        "lambdaattention": "lm_infinite", "streamingllm": "lm_infinite",
        "transmla": "mla", "mha2mla": "mla", "multiheadlatentattention": "mla", "latentattention": "mla",
        "resonancerope": "resonance", "resonanceyarn": "resonance", "partialrope": "proportional",
        # options
        "scale": "factor", "scaling": "factor", "scalingfactor": "factor", "ropefactor": "factor",
        "base": "theta", "ropetheta": "theta", "ropebase": "theta", "rotarybase": "theta",
        "originallength": "original_max_position_embeddings",
        "trainedlength": "original_max_position_embeddings", "originalwindow": "original_max_position_embeddings",
        "groupsize": "group", "groupsize1": "group", "windowsize": "window", "neighborsize": "window",
        "sinktokens": "sinks", "attentionsinks": "sinks", "rank": "kv_rank", "kvlorarank": "kv_rank",
        "buckets": "num_buckets", "longmscale": "attention_factor",
        # targets and backends
        "flashattention": "flash", "flashattention2": "flash", "fa2": "flash", "flexattention": "flex",
        "gguf": "llamacpp", "hf": "transformers", "huggingface": "transformers",
    }
)  # fmt: skip
"""Names of this library by other names of the field, reduced to letters and digits."""

DETAILS: Mapping[str, str] = MappingProxyType(
    {
        "transmla": " with method='transmla'",
        "mha2mla": " with method='mha2mla'",
        "resonanceyarn": " with over='yarn'",
        "streamingllm": " with sinks=4",
    }
)
"""Options that belong to some of these names."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'yarn'?"` for the most likely meaning of `name` among `choices`, or an empty string.

    Letter case and separators do not matter. Other names of the field come first, then choices that begin with the
    name, then misspellings, which must keep the first letter and the digits.
    """
    choices = sorted({str(choice) for choice in choices})
    found = _meant(str(name), choices)
    if not found:
        return ""
    detail = DETAILS.get(_letters(str(name)), "") if found == [SYNONYMS.get(_letters(str(name)))] else ""
    return f" Did you mean {' or '.join(repr(choice) for choice in found)}{detail}?"


def _meant(name: str, choices: list[str]) -> list[str]:
    given = _letters(name)
    same = [choice for choice in choices if _letters(choice) == given]
    if same or not given:
        return same[:1]
    if SYNONYMS.get(given) in choices:
        return [SYNONYMS[given]]
    begun = [choice for choice in choices if choice.lower().startswith(f"{name.lower()}_")]
    if 0 < len(begun) <= 3:
        return begun
    near = sorted((_edits(given, _letters(choice)), choice) for choice in choices if _alike(given, _letters(choice)))
    return [choice for edits, choice in near if edits <= _allowed(given)][:1]


def _letters(name: str) -> str:
    """Return the letters and digits of a name in lower case."""
    return "".join(character for character in name.lower() if character.isalnum())


def _alike(given: str, choice: str) -> bool:
    """Return whether a name may be a misspelling of a choice: same first letter, and same digits if it has any."""
    digits = [[character for character in name if character.isdigit()] for name in (given, choice)]
    return given[:1] == choice[:1] and (not digits[0] or digits[0] == digits[1])


def _allowed(name: str) -> int:
    """Return how many letters may be wrong in a name of this length."""
    return 0 if len(name) < 3 else 1 if len(name) < 6 else 2


def _edits(one: str, other: str) -> int:
    """Return the number of insertions, deletions, changes and swaps of neighbours that turn one word into another."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        earlier, before, row = before, row, [i]
        for j, right in enumerate(other, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right)))
            if i > 1 and j > 1 and left == other[j - 2] and one[i - 2] == right:
                row[j] = min(row[j], earlier[j - 2] + 1)
    return row[-1]


def unknown(kind: str, name: str, choices: Iterable[str]) -> UnknownNameError:
    """Return the error for an unknown name, with the nearest name and all choices."""
    choices = sorted(choices)
    return UnknownNameError(f"Unknown {kind} {quoted(name)}.{nearest(name, choices)} There are: {', '.join(choices)}.")
