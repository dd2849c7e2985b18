"""Compare every draw of RULER's tasks with NVIDIA's scripts: trials, answers, places and whole prompts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pe_patch.evaluation.tasks.ruler import THIRTEEN
from pe_patch.evaluation.tasks.ruler.documents import DocumentQuestions, load
from pe_patch.evaluation.tasks.ruler.material import BY_EXPRESSION, Essay
from pe_patch.evaluation.tasks.ruler.niah import SHAPES, Niah
from pe_patch.evaluation.tasks.ruler.official import official
from pe_patch.evaluation.tasks.ruler.tracking import Tracking, _Chains
from pe_patch.evaluation.tasks.ruler.words import CommonWords, FrequentWords
from tests import ruler_cases

GOLDENS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "ruler_goldens.json").read_text())["cases"]


@pytest.fixture(scope="module")
def tokenizer():
    return ruler_cases.make_tokenizer()


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return ruler_cases.write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def essay():
    return Essay(ruler_cases.essay(), "a text", BY_EXPRESSION)


def make(task: str, tokens, length: int, seed: int, essay: Essay, questions: dict[str, str]):
    words = official()
    if task in SHAPES:
        return Niah(tokens, length, seed, SHAPES[task], words, essay)
    if task.startswith("qa"):
        source: Any = "squad" if task == "qa_1" else "hotpotqa"
        return DocumentQuestions(tokens, length, seed, words, load(questions[source], source))
    return {"vt": Tracking, "cwe": CommonWords, "fwe": FrequentWords}[task](tokens, length, seed, words)


DRAWN_BY: dict[str, Any] = {
    "vt": _Chains,
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "qa_1": DocumentQuestions,
    "qa_2": DocumentQuestions,
}
DRAWN_BY |= dict.fromkeys(SHAPES, Niah)
"""The class whose `draw` makes the draws of one call in NVIDIA's scripts."""


def test_every_task_has_goldens():
    assert {case["task"] for case in GOLDENS} == set(THIRTEEN)


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: f"{case['task']}-{case['length']}-{case['seed']}")
def test_every_draw_equals_that_of_nvidias_script(case, tokenizer, essay, questions, monkeypatch):
    def tokens(text: str, prefix: str) -> int:
        return len(tokenizer(text + prefix, add_special_tokens=False)["input_ids"])

    trials: list[int] = []
    kind = DRAWN_BY[case["task"]]
    draw = kind.draw

    def spy(self, size: int, *rest: Any) -> Any:
        trials.append(size)
        return draw(self, size, *rest)

    monkeypatch.setattr(kind, "draw", spy)
    generator = make(case["task"], tokens, case["length"], case["seed"], essay, questions)
    samples = list(generator.samples(len(case["samples"])))
    for sample, golden in zip(samples, case["samples"], strict=True):
        (prompt,) = sample.prompts
        text = prompt.text + prompt.answer_prefix
        assert list(prompt.references) == golden["answers"]
        assert [text.find(answer) for answer in prompt.references] == golden["at"]
        assert tokens(prompt.text, prompt.answer_prefix) == golden["tokens"]
        assert hashlib.sha256(text.encode()).hexdigest() == golden["prompt_sha256"]
    if case["task"] == "fwe":  # one call of the script makes several trials and tells the last one's size
        assert [sample.size for sample in samples] == case["trials"][1:]
    else:
        assert trials == case["trials"]
