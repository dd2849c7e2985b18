"""Test how far RULER's tasks fill a window, and their questions in a shorter text and without context."""

from __future__ import annotations

import random
from typing import Any

import nltk
import numpy as np
import pytest

from pe_patch.evaluation.tasks.ruler import RULER, RULER_GROUPS, THIRTEEN
from pe_patch.evaluation.tasks.ruler.wording import OWN
from tests import ruler_cases
from tests.bench_doubles import CHAT, make_bench
from tests.ruler_cases import TEXTS, ask, prompts, record


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


# How full a window is


def test_rulers_search_leaves_much_of_a_short_window_empty_and_exact_fit_does_not(bench):
    bench.samples = 6
    sizes = [len(question.prompt) + 128 for question in ask("niah_multivalue", bench, 2048)]
    assert min(sizes) < 0.7 * 2048  # 500 words less where one token too many was drawn
    for name in ("niah_single_2", "niah_multivalue", "niah_multiquery"):
        for question in ask(name, bench, 2048, exact_fit=True):
            assert 2048 - 6 <= len(question.prompt) + question.budget <= 2048


@pytest.mark.parametrize("name", RULER_GROUPS["ruler_local"])
@pytest.mark.parametrize("length", [2500, 5000])
def test_one_more_unit_would_not_fit(name, length, bench):
    def tokens(text: str, prefix: str) -> int:
        return len(bench.model.tokenizer(text + prefix, add_special_tokens=False)["input_ids"])

    generator = RULER[name]().make(bench, tokens, length, OWN).generator
    for index in range(2):
        start = generator.draws.state()
        sample = generator.fit(index)
        after = generator.draws.state()
        generator.draws.restore(start)
        assert generator.draw(sample.size, index) == sample
        generator.draws.restore(start)
        longer = generator.draw(sample.size + 1, index)
        generator.draws.restore(after)
        assert generator.measure(sample) + generator.budget <= length
        assert generator.measure(longer) + generator.budget > length


def test_a_short_text_is_repeated(tokenizer):
    bench = make_bench(tokenizer, texts=("One stone was found. " * 3,), samples=1)
    (question,), (text,) = prompts("niah_single_2", bench, 4096, {}, exact_fit=True)
    assert text.count("One stone was found.") > 100
    assert len(question.prompt) > 3900


# The same again


@pytest.mark.parametrize("name", THIRTEEN)
def test_questions_depend_on_the_seed(name, tokenizer, files):
    def ids(seed: int) -> list[Any]:
        bench = make_bench(tokenizer, texts=TEXTS, samples=1, seed=seed)
        seen = record(bench)
        questions = ask(name, bench, 2400, files)
        return [seen, [question.references for question in questions]]

    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    assert ids(3) == ids(3)
    assert ids(3)[0] != ids(4)[0]
    assert random.getstate() == state and np.random.get_state()[1].tolist() == numpy_state


@pytest.mark.parametrize("exact_fit", [False, True])
@pytest.mark.parametrize("name", RULER_GROUPS["ruler_local"])
def test_a_control_asks_the_same_questions_in_a_shorter_text(name, exact_fit, tokenizer):
    def make() -> tuple[Any, list[str]]:
        bench = make_bench(tokenizer, texts=TEXTS, samples=2)
        return bench, record(bench)

    task = RULER[name](exact_fit=exact_fit)
    bench, seen = make()
    alone = task.questions(bench, 6000)
    texts = seen[::2]
    other, again = make()
    control = task.questions(other, 6000, within=3000)  # before the questions themselves
    del again[:]
    later = task.questions(other, 6000)
    assert again[::2] == texts
    assert (
        [each.references for each in control]
        == [each.references for each in alone]
        == [each.references for each in later]
    )
    for short, long in zip(control, alone, strict=True):
        assert 1500 < len(short.prompt) + short.budget <= 3000 < len(long.prompt)


def test_a_control_asks_for_the_same_keys(bench):
    bench.samples = 8
    task = RULER["niah_multikey_1"](wording="own")
    seen = record(bench)
    task.questions(bench, 5000)
    long = [text.rpartition("\nIn this text")[2] for text in seen[::2]]
    del seen[:]
    task.questions(bench, 5000, within=2000)
    assert [text.rpartition("\nIn this text")[2] for text in seen[::2]] == long


@pytest.mark.parametrize("name", THIRTEEN)
def test_a_question_without_context_has_no_text(name, bench, files):
    seen = record(bench)
    for question in ask(name, bench, 4096, files):
        assert question.without_context is not None
        assert len(question.without_context) < 0.5 * len(question.prompt)
    for whole, bare in zip(seen[::2], seen[1::2], strict=True):
        assert whole.splitlines()[-1] == bare.splitlines()[-1]  # the same question


# Around a prompt


def test_the_length_includes_the_chat_template_and_the_answer_prefix_follows_it():
    tokenizer = ruler_cases.make_tokenizer()
    tokenizer.chat_template = CHAT
    bench = make_bench(tokenizer, texts=TEXTS, samples=2, chat=True)
    plain = make_bench(tokenizer, texts=TEXTS, samples=2)
    for name in ("niah_single_1", "niah_multivalue", "vt", "cwe", "fwe", "qa_local_1"):
        for question in ask(name, bench, 3000):
            assert len(question.prompt) + question.budget <= 3000
    one, other = (ask("niah_single_1", each, 3000, exact_fit=True)[0] for each in (bench, plain))
    assert one.references == other.references
    frame = bench.template
    assert len(bench.encode(frame.head + frame.tail)) > 3
