"""Test RULER's tasks: the hidden facts, the questions and the scores."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import nltk
import numpy as np
import pytest

from pe_patch.evaluation.tasks.ruler import RULER
from pe_patch.evaluation.tasks.ruler.scoring import postprocess, string_match_all, string_match_part
from tests import ruler_cases
from tests.bench_doubles import make_bench
from tests.ruler_cases import TEXTS, ask, prompts

SCORES = json.loads((Path(__file__).parent / "data" / "ruler_scores.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return ruler_cases.make_tokenizer()


@pytest.fixture
def bench(tokenizer):
    return make_bench(tokenizer, texts=TEXTS, samples=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ruler_cases.write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(autouse=True)
def no_data_of_nltk(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])


# Scores


@pytest.mark.parametrize("rule, judge", [("all", string_match_all), ("part", string_match_part)])
def test_scores_equal_those_of_nvidias_functions(rule, judge):
    found = [judge(postprocess(row["prediction"]), row["references"]) for row in SCORES["rows"]]
    assert [round(100 * score, 2) for score in found] == [row[rule] for row in SCORES["rows"]]
    assert round(sum(found) / len(found) * 100, 2) == SCORES["mean"][rule]


def test_one_of_several_right_answers_suffices():
    answers = ("Paris", "the city of Paris", "Paris, France")
    assert RULER["qa_local_1"]().score(" It is PARIS.", answers) == 1.0
    assert RULER["vt"]().score(" It is PARIS.", answers) == pytest.approx(1 / 3)


# What is hidden


ALL = "Of the {} kept under the name (.+?), one is (\\S+)\\."
NEEDLES = {  # needles, different keys, references: RULER's table of tasks; None is "as many as fit"
    "niah_single_1": (1, 1, 1),
    "niah_single_2": (1, 1, 1),
    "niah_single_3": (1, 1, 1),
    "niah_multikey_1": (4, 4, 1),
    "niah_multikey_2": (None, None, 1),
    "niah_multikey_3": (None, None, 1),
    "niah_multivalue": (4, 1, 4),
    "niah_multiquery": (4, 4, 4),
}


@pytest.mark.parametrize("length", [4096, 16384, 65536])
@pytest.mark.parametrize("name", NEEDLES)
def test_needles(name, length, bench, files):
    bench.samples = 1
    (question,), (text,) = prompts(name, bench, length, files, exact_fit=length > 5000)
    kind = "uuids" if name in ("niah_single_3", "niah_multikey_3") else "numbers"
    context, _, query = text.rpartition("\nIn this text, which")
    found = re.findall(ALL.format(kind), context)
    needles, keys, references = NEEDLES[name]
    assert len(question.references) == references
    if needles is None:
        lines = context.split("\n")[1:]
        assert len(found) == len(lines) > length / 90
    else:
        assert (len(found), len({key for key, _ in found})) == (needles, keys)
    by_key: dict[str, list[str]] = {}
    for key, value in found:
        by_key.setdefault(key, []).append(value)
    asked = [key for key in by_key if re.search(rf"\b{re.escape(key)}\b", query)]
    assert sorted(value for key in asked for value in by_key[key]) == sorted(question.references)
    for key, value in found:
        if kind == "uuids":
            assert uuid.UUID(value).version == 4
        else:
            assert re.fullmatch(r"[1-9]\d{6}", value)
            assert "-" in key


@pytest.mark.parametrize("length", [4096, 16384, 65536])
def test_a_chain_has_four_hops_and_an_example_before_it(length, bench, files):
    bench.samples = 1
    (question,), (text,) = prompts("vt", bench, length, files, exact_fit=length > 5000)
    example, context = text.split("In the text below variables are set")[1:]
    for part, letters, names in ((example, 3, example.split()[-5:]), (context, 5, list(question.references))):
        chain = re.findall(rf"^LET ([A-Z]{{{letters}}}) = (\w+)", part, re.MULTILINE)
        assert [name for name, _ in chain] == names
        assert [source for _, source in chain[1:]] == names[:-1]
        assert re.fullmatch(r"\d{5}", chain[0][1])
        assert f"have the value {chain[0][1]}: " in part


@pytest.mark.parametrize("length, often, seldom", [(2048, 6, 1), (4096, 30, 3), (16384, 30, 3), (65536, 30, 3)])
def test_ten_words_are_common(length, often, seldom, bench, files):
    bench.samples = 1
    (question,), (text,) = prompts("cwe", bench, length, files, exact_fit=length > 5000)
    counts = Counter(re.findall(r"\d+\. (\S+)", text.split("\nQuestion")[1].partition("come up most.\n")[2]))
    assert Counter(counts.values()) == {often: 10, seldom: len(counts) - 10}
    assert {word for word, count in counts.items() if count == often} == set(question.references)
    example, solution = text.split("\nThe words of")[0].split("\nQuestion")
    counts = Counter(re.findall(r"\d+\. (\S+)", example.partition("come up most.\n")[2]))
    assert Counter(counts.values()) == ({3: 10, 1: 10} if length < 4096 else {10: 10, 3: 30})
    assert set(re.findall(r"\d+\. (\S+)", solution)) == {word for word, _ in counts.most_common(10)}


@pytest.mark.parametrize("length", [4096, 16384, 65536])
def test_code_words_follow_zipfs_law(length, bench, files):
    bench.samples = 1
    (question,), (text,) = prompts("fwe", bench, length, files, exact_fit=length > 5000)
    counts = Counter(text.partition("come up most. ")[2].partition("\nQuestion")[0].split())
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[:4] == ["...", *question.references]
    top = counts["..."]
    for rank in (2, 3, 4):
        assert counts[ranked[rank - 1]] == pytest.approx(top / rank**2, abs=1)
    assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])
    assert top / sum(counts.values()) == pytest.approx(6 / np.pi**2, rel=0.06)


@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_the_documents_with_the_answer_are_shown(name, length, bench, files):
    bench.samples = 3
    questions, written = prompts(name, bench, length, files)
    content: Any = ruler_cases.squad()["data"] if name == "qa_1" else ruler_cases.hotpotqa()
    if name == "qa_1":
        asked = [
            (entry["question"], [answer["text"] for answer in entry["answers"]], [paragraph["context"]])
            for article in content
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
            if not entry["is_impossible"]
        ]
    else:
        asked = [
            (entry["question"], [entry["answer"]], [f"{title}\n{''.join(parts)}" for title, parts in entry["context"]])
            for entry in content
        ]
    for question, text, (query, answers, gold) in zip(questions, written, asked, strict=False):
        assert f"Question: {query} Answer:" in text
        assert list(question.references) == answers
        assert all(document in text for document in gold)


def test_documents_answer_the_questions_about_pythons_source(bench, files):
    bench.samples = 4
    _, written = prompts("qa_local_1", bench, 4096, files)
    questions = ask("qa_local_1", bench, 4096)
    for question, text in zip(questions, written, strict=False):
        name = re.search(r"In which module is (\w+) defined\?", text)
        assert name
        (module,) = question.references
        assert re.search(rf"Module {re.escape(module)}\n(class|def) {name[1]}\b", text)
        assert importable(module, name[1])


def test_two_hop_questions_ask_for_the_base_class(bench, files):
    bench.samples = 4
    questions, written = prompts("qa_local_2", bench, 4096, files)
    for question, text in zip(questions, written, strict=False):
        name = re.search(r"The class (\w+) derives from another class", text)
        assert name
        base = re.search(rf"\nclass {name[1]}\((\w+)\)", text)
        assert base
        (module,) = question.references
        assert re.search(rf"Module {re.escape(module)}\nclass {base[1]}\b", text)


def importable(module: str, name: str) -> bool:
    """Find the name in the module's source with Python's parser."""
    import importlib.util

    found = importlib.util.find_spec(module)
    assert found and found.origin
    return (
        re.search(rf"^(class|def) {name}\b", Path(found.origin).read_text(encoding="utf-8"), re.MULTILINE) is not None
    )
