"""The wording of RULER's tasks: ours in English, and single tokens for the vocabulary of the demo model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....errors import OptionError
from ...retrieval import wording_for
from ..official import default_wording


@dataclass(frozen=True)
class QuestionTemplate:
    """A prompt with `{context}` and a question, and the beginning of the answer.

    Both may use the fields of their task, with RULER's names: `query`, `type_needle_v`, `num_v` and `num_cw`.
    """

    template: str
    answer_prefix: str

    def fill(self, **fields: Any) -> tuple[str, str]:
        """Return the prompt and the beginning of the answer with these fields."""
        return self.template.format(**fields), self.answer_prefix.format(**fields)


@dataclass(frozen=True)
class Wording:
    """The sentences and question templates of all tasks."""

    name: str
    needle: str
    """A fact, with `{type_needle_v}` (in the plural), `{key}` and `{value}`."""
    noise: str
    one_value: QuestionTemplate
    all_values: QuestionTemplate
    variables: QuestionTemplate
    assignment: str
    """The first assignment of a chain, with two `{}`: the variable and its value."""
    link: str
    """A further assignment of a chain, with two `{}`: the variable and the variable before it."""
    common_words: QuestionTemplate
    frequent_words: QuestionTemplate
    answer_from_documents: QuestionTemplate
    document: str
    """A document, with `{i}` and `{document}`."""


OWN = Wording(
    name="own",
    needle="Of the {type_needle_v} kept under the name {key}, one is {value}.",
    noise="Rain fell on the roof. A cart went by. The lamp stayed lit. Nobody spoke. Then it was morning.",
    one_value=QuestionTemplate(
        "In the text below one {type_needle_v} is kept under a name that you will be asked for. Read and remember it.\n"
        "{context}\nIn this text, which {type_needle_v} is kept under the name {query}?",
        " In the text, the {type_needle_v} kept under the name {query} is",
    ),
    all_values=QuestionTemplate(
        "In the text below {type_needle_v} are kept under names that you will be asked for. Read and remember them.\n"
        "{context}\nIn this text, which {type_needle_v} are kept under the name {query}?",
        " In the text, the {type_needle_v} kept under the name {query} are",
    ),
    variables=QuestionTemplate(
        "In the text below variables are set, some of them to the value of another one. Keep track of who has which "
        "value.\n\n{context}\nQuestion: Which variables have the value {query} at the end of this text?",
        " Answer: At the end of the text, these {num_v} variables have the value {query}: ",
    ),
    assignment="LET {} = {}",
    link="LET {} = {} ",
    common_words=QuestionTemplate(
        "The words of the numbered list below do not all come up equally often. Remember the ones that come up most.\n"
        "{context}\nQuestion: Which {num_cw} words come up most often in this list?",
        " Answer: The {num_cw} words that come up most often in the list are:",
    ),
    frequent_words=QuestionTemplate(
        "The text below is written in code words. Count how often each of them comes up and find the three that come "
        "up most. {context}\nQuestion: Leaving out the dots '...', which three code words come up most often in this "
        "text? Give the words alone.",
        " Answer: The three code words that come up most often in the text are:",
    ),
    answer_from_documents=QuestionTemplate(
        "Answer a question with the help of the documents below. Give the answer alone.\n\n{context}\n\nAnswer the "
        "question with the help of the documents above. Give the answer alone.\n\nQuestion: {query}",
        " Answer:",
    ),
    document="[{i}]\n{document}",
)

TOKENS = "tokens"
"""The wording whose keys and values are single tokens and whose question is a key, for models without English."""
OFFICIAL = "official"
"""RULER's wording, read from the installed lm-eval."""
NAMES = (OFFICIAL, OWN.name, TOKENS)


def choose(wanted: str | None, tokenizer: Any, task: str, with_tokens: tuple[str, ...]) -> str:
    """Return the name of the wording for a task.

    Args:
        wanted: the wording to use. None takes single tokens if the vocabulary has the demo's, else the official
            wording, or ours where lm-eval is not installed.
        tokenizer: the tokenizer of the model.
        task: the name of the task.
        with_tokens: the tasks that support single tokens.

    Raises:
        OptionError: if the wording is single tokens and the task does not support them, or the vocabulary lacks them.
    """
    has_tokens = wording_for(tokenizer).name == TOKENS
    name = wanted or (TOKENS if has_tokens else default_wording())
    if name != TOKENS:
        return name
    if task not in with_tokens:
        reason = "" if wanted else ", the default for a vocabulary with key and value tokens"
        raise OptionError(
            f"this task has no wording {TOKENS!r}{reason}; these have: {', '.join(with_tokens)}. "
            f"Use one of them, or give wording={OWN.name!r}."
        )
    if not has_tokens:
        raise OptionError(
            f"wording={TOKENS!r} needs the tokens <k0> to <k63> and <v0> to <v63>, which this tokenizer does not have. "
            f"Give wording={OWN.name!r} or {OFFICIAL!r}."
        )
    return name
