"""The words around what RULER's tasks hide and ask: ours in English, and single tokens for the demo's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....errors import OptionError
from ...retrieval import wording_for


@dataclass(frozen=True)
class Asking:
    """A text with `{context}` and what is asked of it, and the beginning of the answer. It may use any of the fields
    that its task gives: RULER's names are `query`, `type_needle_v`, `num_v` and `num_cw`."""

    template: str
    answer_prefix: str

    def fill(self, **fields: Any) -> tuple[str, str]:
        """(text, beginning of the answer)."""
        return self.template.format(**fields), self.answer_prefix.format(**fields)


@dataclass(frozen=True)
class Wording:
    """What the tasks say. `needle` has `{type_needle_v}` (the plural), `{key}` and `{value}`; `assignment` and `link`
    have two places each, a variable's name and what it is set to; `document` has `{i}` and `{document}`."""

    name: str
    needle: str
    noise: str
    one_value: Asking
    all_values: Asking
    variables: Asking
    assignment: str
    link: str
    common_words: Asking
    frequent_words: Asking
    answer_from_documents: Asking
    document: str


ENGLISH = Wording(
    name="english",
    needle="Of the {type_needle_v} kept under the name {key}, one is {value}.",
    noise="Rain fell on the roof. A cart went by. The lamp stayed lit. Nobody spoke. Then it was morning.",
    one_value=Asking(
        "In the text below one {type_needle_v} is kept under a name that you will be asked for. Read and remember it.\n"
        "{context}\nIn this text, which {type_needle_v} is kept under the name {query}?",
        " In the text, the {type_needle_v} kept under the name {query} is",
    ),
    all_values=Asking(
        "In the text below {type_needle_v} are kept under names that you will be asked for. Read and remember them.\n"
        "{context}\nIn this text, which {type_needle_v} are kept under the name {query}?",
        " In the text, the {type_needle_v} kept under the name {query} are",
    ),
    variables=Asking(
        "In the text below variables are set, some of them to the value of another one. Keep track of who has which "
        "value.\n\n{context}\nQuestion: Which variables have the value {query} at the end of this text?",
        " Answer: At the end of the text, these {num_v} variables have the value {query}: ",
    ),
    assignment="LET {} = {}",
    link="LET {} = {} ",
    common_words=Asking(
        "The words of the numbered list below do not all come up equally often. Remember the ones that come up most.\n"
        "{context}\nQuestion: Which {num_cw} words come up most often in this list?",
        " Answer: The {num_cw} words that come up most often in the list are:",
    ),
    frequent_words=Asking(
        "The text below is written in code words. Count how often each of them comes up and find the three that come "
        "up most. {context}\nQuestion: Leaving out the dots '...', which three code words come up most often in this "
        "text? Give the words alone.",
        " Answer: The three code words that come up most often in the text are:",
    ),
    answer_from_documents=Asking(
        "Answer a question with the help of the documents below. Give the answer alone.\n\n{context}\n\nAnswer the "
        "question with the help of the documents above. Give the answer alone.\n\nQuestion: {query}",
        " Answer:",
    ),
    document="[{i}]\n{document}",
)

TOKENS = "tokens"
"""Keys and values are single tokens of the vocabulary, a question is a key: for models that know no English."""
OFFICIAL = "official"
"""RULER's own words, read from the installed lm-eval."""
NAMES = (ENGLISH.name, OFFICIAL, TOKENS)


def choose(wanted: str | None, tokenizer: Any, task: str, with_tokens: tuple[str, ...]) -> str:
    """The name of the wording for a task: the one asked for, or the one that fits the vocabulary.

    Raises:
        OptionError: the task is not among those that single tokens can ask, or the vocabulary has no such tokens.
    """
    has_tokens = wording_for(tokenizer).name == TOKENS
    name = wanted or (TOKENS if has_tokens else ENGLISH.name)
    if name != TOKENS:
        return name
    if task not in with_tokens:
        why = "" if wanted else ", which a vocabulary with key and value tokens calls for"
        raise OptionError(
            f"this task has no wording {TOKENS!r}{why}; these have: {', '.join(with_tokens)}. "
            f"Ask for one of them, or give wording={ENGLISH.name!r}."
        )
    if not has_tokens:
        raise OptionError(
            f"wording={TOKENS!r} needs the tokens <k0> to <k63> and <v0> to <v63>, which this tokenizer does not have. "
            f"Give wording={ENGLISH.name!r} or {OFFICIAL!r}."
        )
    return name
