"""What RULER's tasks are filled with: running text in sentences, words, numbers and words that do not exist."""

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

from ....errors import PePatchError

DEPTHS = tuple(int(depth) for depth in np.round(np.linspace(0, 100, 40)))
"""The depths, in percent, where RULER cuts running text for a needle."""
OFFICIAL_ESSAYS = "PaulGrahamEssays.json"
"""What RULER's script calls the essays that it downloads; a file of that name and form is taken to be that."""
OFFICIAL_WORDS = "affcd6d45fdf3cc843d585c99c97ad615094e760e6c4756b654bab6c73bc2eca"
"""The SHA-256 of RULER's `english_words.json`, as its repository's pointer to the file has it."""
INVENTED = 1 << 18
"""How many words that do not exist there are."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Splitter:
    """How running text is cut into sentences."""

    name: str
    split: Callable[[str], list[str]]
    official: bool = False


BY_EXPRESSION = Splitter(f"regular expression {_SENTENCE_END.pattern}", lambda text: _SENTENCE_END.split(text))


def find_splitter() -> Splitter:
    """nltk's punkt, RULER's choice, where nltk and its data are on the machine, else a regular expression."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab/english")
    except (ImportError, LookupError):  # neither is a dependency, and nothing is downloaded for an evaluation
        return BY_EXPRESSION
    return Splitter(f"punkt (nltk {version('nltk')})", nltk.sent_tokenize, official=True)


class Essay:
    """Running text as words; a haystack of m units is its first m words, from the start again where it is short."""

    def __init__(self, text: str, name: str, splitter: Splitter, official: bool = False) -> None:
        self.words = re.sub(r"\s+", " ", text).split(" ")
        if not text.strip():
            raise PePatchError(f"The haystack ({name}) holds no words. Give a text.")
        self.name, self.splitter, self.official = name, splitter, official
        self.sha256 = digest(text)
        self._sentences = lru_cache(maxsize=4)(self._split)

    def sentences(self, size: int) -> Sequence[str]:
        """The sentences of the first `size` words, the same whoever asks."""
        return self._sentences(size)

    def _split(self, size: int) -> list[str]:
        repeats = -(-size // len(self.words))
        words = self.words if repeats <= 1 else self.words * repeats
        text = " ".join(words[:size]).strip()
        return self.splitter.split(text) if text else []


@lru_cache(maxsize=2)
def essay_of(texts: tuple[str, ...], name: str) -> Essay:
    """The documents of an evaluation as running text."""
    return Essay("\n".join(texts), name, find_splitter())


@lru_cache(maxsize=2)
def essay_from(path: str) -> Essay:
    """A text file, or RULER's own JSON file of essays, as running text.

    Raises:
        PePatchError: there is no such file, or it holds no text.
    """
    file = Path(path).expanduser()
    text = read(file, "haystack")
    if file.suffix != ".json":
        return Essay(text, file.name, find_splitter())
    content = parse(text, file)
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        raise PePatchError(f"{file}: a haystack in JSON is one object with its text under 'text', as RULER writes it.")
    return Essay(content["text"], file.name, find_splitter(), official=file.name == OFFICIAL_ESSAYS)


def read(file: Path, what: str) -> str:
    """The text of a file that the user names.

    Raises:
        PePatchError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PePatchError(f"The {what} {file.absolute()} cannot be read: {error}. Give the path of a file.") from error


def parse(text: str, file: Path) -> object:
    """JSON of a file that the user names."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PePatchError(f"{file}: not JSON ({error}).") from error


@dataclass(frozen=True)
class Words:
    """The words of a file, and whether it is RULER's own."""

    words: tuple[str, ...]
    name: str
    official: bool


@lru_cache(maxsize=2)
def read_words(path: str) -> Words:
    """The words of a file: JSON with a list, or with a word under each key as RULER's `english_words.json` has them.

    Raises:
        PePatchError: there is no such file, or it has another form.
    """
    file = Path(path).expanduser()
    text = read(file, "word file")
    content = parse(text, file)
    words = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise PePatchError(f"{file}: words in JSON are a list of strings, or an object with a word under each key.")
    return Words(tuple(words), file.name, official=digest(text) == OFFICIAL_WORDS)


def digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """The nouns, adjectives or verbs of the package wonderwords."""
    path = files("wonderwords") / "assets" / f"{kind}list.txt"
    return tuple(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())


class Hyphenated(Sequence[str]):
    """Every first word with every second one, such as "brave-otter": all different ones, sorted, without holding the
    six million of them.

    First words that only differ by what follows a hyphen ("blue", "blue-eyed") are sorted together; all others keep
    their order whatever comes second.
    """

    def __init__(self, first: Iterable[str], second: Iterable[str]) -> None:
        self._second = sorted(set(second))
        clusters: list[list[str]] = []
        for word in sorted(set(first), key=lambda word: word + "-"):
            if clusters and word.startswith(clusters[-1][0] + "-"):
                clusters[-1].append(word)
            else:
                clusters.append([word])
        self._parts = [self._part(cluster) for cluster in clusters]
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        number = range(len(self))[index]
        part = bisect_right(self._ends, number)
        return self._parts[part][number - (self._ends[part - 1] if part else 0)]

    def _part(self, cluster: list[str]) -> Sequence[str]:
        if len(cluster) == 1:
            return _Joined(cluster[0], self._second)
        return sorted({f"{word}-{second}" for word in cluster for second in self._second})


class _Joined(Sequence[str]):
    """One first word with each second one."""

    def __init__(self, first: str, second: list[str]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._second)

    def __getitem__(self, index: Any) -> Any:
        return f"{self._first}-{self._second[index]}"


@cache
def hyphenated() -> Sequence[str]:
    """Every adjective of wonderwords with every noun, sorted."""
    return Hyphenated(word_list("adjective"), word_list("noun"))


@cache
def single() -> tuple[str, ...]:
    """Every noun, adjective and verb, sorted."""
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in word_list(kind)}))


@cache
def invented() -> tuple[str, ...]:
    """Words that do not exist, made of syllables, none of them among the real ones; the same on every machine."""
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    rng, found = random.Random(0), dict.fromkeys(single())
    real = len(found)
    while len(found) < real + INVENTED:
        found["".join(rng.choices(syllables, k=rng.randint(2, 4)))] = None
    return tuple(found)[real:]


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _word(rng: random.Random) -> str:
    return rng.choice(hyphenated())


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


KINDS: dict[str, Callable[[random.Random], str]] = {"numbers": _number, "words": _word, "uuids": _uuid}
"""What keys and values are, each with how one is drawn."""
