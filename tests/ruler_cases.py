"""A tokenizer, a text and question files for the tests of RULER's tasks, the same on every machine."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pe_patch.evaluation.tasks.ruler import RULER

WORDS = (
    "stone river lamp door seven bright cold under over small quickly runs walks falls a the of and then but "
    "however remember weather twenty-one it's afternoon"
).split()


def make_tokenizer() -> Any:
    """Return a tokenizer with tokens of up to four letters and a leading space, or one digit; all ids are equal."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s\d]{1,4}|\d|\s"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")


def sentence(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=rng.randint(4, 15))
    return " ".join(words).capitalize() + rng.choice(".....!?")


@cache
def essay(sentences: int = 330) -> str:
    """Return about three thousand words, so that a haystack of 8192 tokens repeats them."""
    rng = random.Random(5)
    return "".join(sentence(rng) + rng.choice([" ", " ", "\n", "\n\n"]) for _ in range(sentences))


def paragraph(rng: random.Random) -> str:
    return " ".join(sentence(rng) for _ in range(rng.randint(4, 9)))


def squad() -> dict[str, Any]:
    """Return data in the format of SQuAD 2.0: articles of paragraphs with questions, some of them without an answer."""
    rng = random.Random(6)
    articles = []
    for _ in range(14):
        paragraphs = []
        for _ in range(rng.randint(2, 16)):
            text = paragraph(rng)
            asked = [
                {
                    "question": sentence(rng).rstrip(".!?") + "?",
                    "is_impossible": rng.random() < 0.4,
                    "answers": [{"text": word} for word in rng.sample(text.split(), rng.randint(1, 3))],
                }
                for _ in range(2)
            ]
            paragraphs.append({"context": text, "qas": asked})
        articles.append({"paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def hotpotqa() -> list[dict[str, Any]]:
    """Return data in the format of HotpotQA's distractor setting: each question has ten paragraphs."""
    rng = random.Random(7)
    return [
        {
            "question": sentence(rng).rstrip(".!?") + "?",
            "answer": rng.choice(WORDS),
            "context": [
                [f"Title {number}.{place}", [sentence(rng) + " " for _ in range(rng.randint(1, 4))]]
                for place in range(10)
            ],
        }
        for number in range(12)
    ]


def write_questions(folder: Path) -> dict[str, str]:
    """Write both files, and return their paths by option."""
    for name, content in (("squad", squad()), ("hotpotqa", hotpotqa())):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return {name: str(folder / f"{name}.json") for name in ("squad", "hotpotqa")}


TEXTS = (essay(),)


def record(bench: Any) -> list[str]:
    """Record the texts of the bench's prompts: each question with its context, then without it."""
    seen: list[str] = []
    real = bench.prompt

    def prompt(text: str, answer_prefix: str = "") -> Any:
        seen.append(text + answer_prefix)
        return real(text, answer_prefix)

    bench.prompt = prompt
    return seen


def ask(name: str, bench: Any, length: int, files: dict[str, str] | None = None, **options: Any) -> list[Any]:
    """Return the questions of a task, in our words unless others are given; `files` come from `write_questions`."""
    if "<k0>" not in bench.model.tokenizer.get_vocab():
        options.setdefault("wording", "own")
    of_file = {"qa_1": "squad", "qa_2": "hotpotqa"}.get(name)
    if files and of_file:
        options[of_file] = files[of_file]
    return RULER[name](**options).questions(bench, length)


def prompts(
    name: str, bench: Any, length: int, files: dict[str, str] | None = None, **options: Any
) -> tuple[list[Any], list[str]]:
    """Return the questions of a task with their texts."""
    seen = record(bench)
    return ask(name, bench, length, files, **options), seen[::2]
