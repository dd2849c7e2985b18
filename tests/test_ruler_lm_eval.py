"""RULER's prompts in official words equal those of lm-eval's own functions, character by character, in eleven tasks.

Both draw from the same random state at the same size. lm-eval's copy differs from NVIDIA's scripts in three slips. The
comparison names and undoes them: `vt` joins its lines by spaces instead of line ends and writes "assgined", and `cwe`
has no space before the answer of its worked example.
"""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from pe_patch.evaluation.tasks import GROUPS, find_tasks
from pe_patch.evaluation.tasks.official import default_wording
from pe_patch.evaluation.tasks.ruler import THIRTEEN
from pe_patch.evaluation.tasks.ruler.material import BY_EXPRESSION, Essay
from pe_patch.evaluation.tasks.ruler.niah import SHAPES, Niah
from pe_patch.evaluation.tasks.ruler.official import official
from pe_patch.evaluation.tasks.ruler.tracking import _Chains
from pe_patch.evaluation.tasks.ruler.words import CommonWords, FrequentWords
from tests import ruler_cases
from tests.bench_doubles import make_bench

SEED, LENGTH = 42, 4096
"""lm-eval shuffles needles and words with the seed 42."""


@pytest.fixture(scope="module")
def utils():
    import nltk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_: False)
        from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils
    # the splitter's data is a download
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_niah, "cached_sent_tokenize", BY_EXPRESSION.split)
        yield {"niah": niah_utils, "prepare": prepare_niah, "vt": vt_utils, "cwe": cwe_utils, "fwe": fwe_utils}


@pytest.fixture(scope="module")
def tokenizer():
    return ruler_cases.make_tokenizer()


@pytest.fixture(scope="module")
def essay():
    return Essay(ruler_cases.essay(), "a text", BY_EXPRESSION)


@pytest.fixture
def tokens(tokenizer):
    return lambda text, prefix: len(tokenizer(text + prefix, add_special_tokens=False)["input_ids"])


@pytest.fixture(autouse=True)
def seeded():
    before = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])


def ours(generator: Any, size: int) -> tuple[str, list[str]]:
    (prompt,) = generator.draw(size, 0).prompts
    return prompt.text + prompt.answer_prefix, list(prompt.references)


@pytest.mark.parametrize("size", [40, 200])
@pytest.mark.parametrize("name", SHAPES)
def test_needles(name, size, utils, tokens, essay):
    shape = SHAPES[name]
    kind = {"noise": "repeat"}.get(shape.haystack, shape.haystack)
    haystack = list(essay.words) if kind == "essay" else utils["prepare"].get_haystack(kind)
    text, answers, query = utils["prepare"].generate_input_output(
        size, haystack, type_haystack=kind, num_needle_k=max(shape.keys, shape.queries), type_needle_k=shape.key_kind,
        num_needle_v=shape.values, type_needle_v=shape.value_kind, template=utils["niah"].TEMPLATE,
        num_needle_q=shape.queries, random_seed=SEED,
    )  # fmt: skip
    value, verb = (shape.value_kind[:-1], "is") if shape.queries * shape.values == 1 else (shape.value_kind, "are")
    # the beginning of the answer, which lm-eval puts after the question and a space
    prefix = f"The special magic {value} for {query} mentioned in the provided text {verb}"
    generator = Niah(tokens, LENGTH, SEED, shape, official(), essay)
    assert ours(generator, size) == (f"{text} {prefix}", answers)


def test_variables(utils, tokens):
    text, names = utils["vt"].generate_input_output(60, num_chains=1, num_hops=4)
    assert ".\n The" in text and "assgined" in text
    text = text.replace(".\n ", ".\n").replace("again.\n\nQuestion", "again.\nQuestion").replace("assgined", "assigned")
    text = re.sub(r"(VAR \w{5} = (?:\d{5}|VAR \w{5} )) (?=The |VAR )", r"\1\n", text)
    assert ours(_Chains(tokens, LENGTH, SEED, official()), 60) == (text, names)


@pytest.mark.parametrize("length", [2048, 4096])
def test_common_words(length, utils, tokens, monkeypatch):
    class Fresh:
        """NVIDIA's script shuffles with a new generator each time, lm-eval with one that goes on."""

        def shuffle(self, words: list[str]) -> None:
            random.Random(SEED).shuffle(words)

    monkeypatch.setattr(utils["cwe"], "RNG", Fresh())
    example, text, words = utils["cwe"].generate_input_output(100, length)
    answer = "that appear most often in the list are:"
    assert f"{answer}1. " in example
    example = example.replace(f"{answer}1. ", f"{answer} 1. ")
    assert ours(CommonWords(tokens, length, SEED, official()), 100) == (f"{example}\n{text}", words)


def test_frequent_words(utils, tokens, tokenizer):
    generator = FrequentWords(tokens, LENGTH, SEED, official())
    text, words, size = utils["fwe"].generate_input_output(
        LENGTH, tokenizer, num_words=500, vocab_size=generator.kinds, incremental=generator.step
    )
    assert size == 500 and ours(generator, 500) == (text, words)


# The default


def test_the_group_has_the_eleven_tasks_that_need_no_files():
    assert GROUPS["ruler"] == THIRTEEN[:11] and GROUPS["ruler_full"] == THIRTEEN
    assert len(GROUPS["ruler"]) == 11 and not {"qa_1", "qa_2"} & set(GROUPS["ruler"])


def test_the_official_words_are_the_default(tokenizer):
    bench = make_bench(tokenizer, texts=ruler_cases.TEXTS, samples=1)
    for task in find_tasks(["ruler"]):
        (question,) = task.questions(bench, 4096)
        assert question.stamps["wording"] == official().name
        assert not [substitute for substitute in question.stamps["substitutes"] if substitute.startswith("wording")]
    (question,) = find_tasks(["vt"], {"wording": "own"})[0].questions(bench, 4096)
    assert (question.stamps["wording"], question.stamps["benchmark"]) == ("own", "after RULER")
    for name in ("longbench_hotpotqa", "infinitebench_passkey"):
        assert find_tasks([name])[0].wording == "official"
    assert find_tasks(["infinitebench_math_calc"])[0].wording == "own"
    assert find_tasks(["longbench2"])[0].wording == "own"


def test_without_lm_eval_our_words_are_the_default_and_said_so(tokenizer, monkeypatch, caplog):
    default_wording.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    try:
        bench = make_bench(tokenizer, texts=ruler_cases.TEXTS, samples=1)
        (question,) = find_tasks(["vt"])[0].questions(bench, 4096)
        assert question.stamps["wording"] == "own" and question.stamps["benchmark"] == "after RULER"
        assert find_tasks(["longbench_hotpotqa"])[0].label() == "LongBench's data in other words"
        assert "pip install 'pe_patch[eval]'" in caplog.text
    finally:
        default_wording.cache_clear()


def test_results_in_other_words_are_measured_again(tokenizer, monkeypatch):
    """The option is unset in both, but what it means is not the same."""
    (task,) = find_tasks(["vt"])
    first = make_bench(tokenizer, texts=ruler_cases.TEXTS).key(task, "x")
    assert first == make_bench(tokenizer, texts=ruler_cases.TEXTS).key(task, "x")
    default_wording.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    try:
        assert first != make_bench(tokenizer, texts=ruler_cases.TEXTS).key(task, "x")
    finally:
        default_wording.cache_clear()
