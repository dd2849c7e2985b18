"""The material of RULER's tasks: running text in sentences, words, numbers and invented words."""

from __future__ import annotations

import hashlib
import json
import random
import re
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ....compat import require_extra
from ....errors import PePatchError

DEPTHS = tuple(int(depth) for depth in np.round(np.linspace(0, 100, 40)))
"""The depths in percent at which RULER inserts a needle into running text."""
OFFICIAL_ESSAYS = "PaulGrahamEssays.json"
"""The file name of the essays that RULER's script downloads; a file with this name counts as RULER's essays."""
OFFICIAL_WORDS = "affcd6d45fdf3cc843d585c99c97ad615094e760e6c4756b654bab6c73bc2eca"
"""The SHA-256 of RULER's `english_words.json`, from the pointer to the file in its repository."""
INVENTED = 1 << 18
"""The number of invented words."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Splitter:
    """A function that splits running text into sentences."""

    name: str
    split: Callable[[str], list[str]]
    official: bool = False
    """True if RULER uses this splitter."""


BY_EXPRESSION = Splitter(f"regular expression {_SENTENCE_END.pattern}", lambda text: _SENTENCE_END.split(text))


def find_splitter() -> Splitter:
    """Return nltk's punkt, which RULER uses, if nltk and its data are installed, else a regular expression."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab/english")
    except (ImportError, LookupError):  # neither is a dependency, and an evaluation downloads nothing
        return BY_EXPRESSION
    return Splitter(f"punkt (nltk {version('nltk')})", nltk.sent_tokenize, official=True)


class Essay:
    """Running text as words; a haystack of m units is its first m words, repeated if the text is short."""

    def __init__(self, text: str, name: str, splitter: Splitter, official: bool = False) -> None:
        self.words = re.sub(r"\s+", " ", text).split(" ")
        if not text.strip():
            raise PePatchError(f"The haystack ({name}) has no words. Give a text.")
        self.name, self.splitter, self.official = name, splitter, official
        self.sha256 = digest(text)
        self._sentences = lru_cache(maxsize=4)(self._split)

    def sentences(self, size: int) -> Sequence[str]:
        """Return the sentences of the first `size` words."""
        return self._sentences(size)

    def _split(self, size: int) -> list[str]:
        repeats = -(-size // len(self.words))
        words = self.words if repeats <= 1 else self.words * repeats
        text = " ".join(words[:size]).strip()
        return self.splitter.split(text) if text else []


@lru_cache(maxsize=2)
def essay_of(texts: tuple[str, ...], name: str) -> Essay:
    """Join the documents of an evaluation to running text."""
    return Essay("\n".join(texts), name, find_splitter())


@lru_cache(maxsize=2)
def essay_from(path: str) -> Essay:
    """Read a text file, or RULER's JSON file of essays, as running text.

    Raises:
        PePatchError: if the file cannot be read, or has no text.
    """
    file = Path(path).expanduser()
    text = read(file, "haystack")
    if file.suffix != ".json":
        return Essay(text, file.name, find_splitter())
    content = parse(text, file)
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        raise PePatchError(f"{file}: a JSON haystack must be an object with its text under 'text', as RULER writes it.")
    return Essay(content["text"], file.name, find_splitter(), official=file.name == OFFICIAL_ESSAYS)


def read(file: Path, name: str) -> str:
    """Read a file of the user; `name` describes it in the error.

    Raises:
        PePatchError: if the file cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PePatchError(f"The {name} {file.absolute()} cannot be read: {error}. Give the path of a file.") from error


def file_digest(path: str) -> str:
    """Return the SHA-256 of a file of the user, or an empty string if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError:
        return ""


def parse(text: str, file: Path) -> object:
    """Parse the JSON text of a file; raise `PePatchError` if it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PePatchError(f"{file}: not JSON ({error}).") from error


@dataclass(frozen=True)
class Words:
    """The words of a file."""

    words: tuple[str, ...]
    name: str
    official: bool
    """True if this is RULER's file."""


@lru_cache(maxsize=2)
def read_words(path: str) -> Words:
    """Read a JSON file of words: a list, or an object with a word under each key such as RULER's `english_words.json`.

    Raises:
        PePatchError: if the file cannot be read, or has another format.
    """
    file = Path(path).expanduser()
    text = read(file, "word file")
    content = parse(text, file)
    words = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise PePatchError(f"{file}: JSON words must be a list of strings, or an object with a word under each key.")
    return Words(tuple(words), file.name, official=digest(text) == OFFICIAL_WORDS)


def digest(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """Return the nouns, adjectives or verbs of the package wonderwords."""
    require_extra("eval")
    path = files("wonderwords") / "assets" / f"{kind}list.txt"
    return tuple(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())


class Hyphenated(Sequence[str]):
    """A sorted sequence of all different pairs of words such as "brave-otter", computed on access.

    There are six million pairs, so the sequence does not store them. First words that differ only by a suffix after a
    hyphen ("blue", "blue-eyed") need sorting together with their second words. All others keep their order.
    """

    def __init__(self, first: Iterable[str], second: Iterable[str]) -> None:
        self._second = sorted(set(second))
        clusters: list[list[str]] = []
        for word in sorted(set(first), key=lambda word: word + "-"):
            if clusters and word.startswith(clusters[-1][0] + "-"):
                clusters[-1].append(word)
            else:
                clusters.append([word])
        self._segments = [self._pairs(cluster) for cluster in clusters]
        self._ends = list(accumulate(map(len, self._segments)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        number = range(len(self))[index]
        segment = bisect_right(self._ends, number)
        return self._segments[segment][number - (self._ends[segment - 1] if segment else 0)]

    def _pairs(self, cluster: list[str]) -> Sequence[str]:
        if len(cluster) == 1:
            return _PairsOfWord(cluster[0], self._second)
        return sorted({f"{word}-{second}" for word in cluster for second in self._second})


class _PairsOfWord(Sequence[str]):
    """The pairs of one first word with each second word."""

    def __init__(self, first: str, second: list[str]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._second)

    def __getitem__(self, index: Any) -> Any:
        return f"{self._first}-{self._second[index]}"


@cache
def hyphenated() -> Sequence[str]:
    """Return the pairs of every adjective and every noun of wonderwords, sorted."""
    return Hyphenated(word_list("adjective"), word_list("noun"))


@cache
def wonderwords() -> tuple[str, ...]:
    """Return every noun, adjective and verb of wonderwords, sorted."""
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in word_list(kind)}))


@cache
def invented() -> tuple[str, ...]:
    """Return words made of random syllables, none of them in wonderwords; the same on every machine."""
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    rng, words = random.Random(0), dict.fromkeys(wonderwords())
    real = len(words)
    while len(words) < real + INVENTED:
        words["".join(rng.choices(syllables, k=rng.randint(2, 4)))] = None
    return tuple(words)[real:]


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _word(rng: random.Random) -> str:
    return rng.choice(hyphenated())


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


KINDS: dict[str, Callable[[random.Random], str]] = {"numbers": _number, "words": _word, "uuids": _uuid}
"""The kinds of keys and values, with the function that draws one."""
