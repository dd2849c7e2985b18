"""Test the wordings of RULER's tasks, the names of results, and refusals."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import nltk
import pytest
from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

from pe_patch.errors import OptionError, PePatchError, UnknownNameError
from pe_patch.evaluation.tasks import find_tasks
from pe_patch.evaluation.tasks.ruler import RULER, RULER_GROUPS, THIRTEEN, material, official
from pe_patch.evaluation.tasks.ruler.material import Hyphenated
from tests import ruler_cases
from tests.bench_doubles import make_bench
from tests.evaluation_doubles import make_tokenizer as make_token_tokenizer
from tests.ruler_cases import TEXTS, ask, prompts


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


# Words and names


def test_only_the_official_material_gives_a_result_the_name_ruler(tokenizer, tmp_path, files):
    essays = tmp_path / material.OFFICIAL_ESSAYS
    essays.write_text(json.dumps({"text": TEXTS[0]}), encoding="utf-8")
    bench = make_bench(tokenizer, texts=TEXTS, samples=1, tokenizer_hash="abc")

    def stamps(name: str, **options: Any) -> Any:
        return ask(name, bench, 4096, files, **options)[0].stamps

    for name in ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"):
        assert (stamps(name, wording="official")["benchmark"], stamps(name)["benchmark"]) == ("RULER", "after RULER")
        assert stamps(name)["substitutes"] == ["wording own"]
        assert stamps(name, wording="official", exact_fit=True)["substitutes"] == ["sizes that fill the window"]
    own = stamps("niah_single_2", wording="official")
    assert own["benchmark"] == "after RULER"
    assert own["substitutes"] == ["haystack given documents", f"splitter {material.BY_EXPRESSION.name}"]
    named = stamps("niah_single_2", wording="official", haystack=str(essays))
    assert named["substitutes"] == [f"splitter {material.BY_EXPRESSION.name}"]
    assert stamps("qa_1", wording="official")["substitutes"] == ["questions of squad.json"]
    assert stamps("qa_local_1", wording="official")["substitutes"][0].startswith("questions of qa_local_1")
    assert set(named) >= {"haystack", "wording", "splitter", "words", "generator"}
    assert named["haystack_sha256"] == hashlib.sha256(TEXTS[0].encode()).hexdigest()
    assert named["tokenizer_hash"] == "abc"


def test_nltk_splits_sentences_if_its_data_is_installed(tmp_path, monkeypatch):
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    trainer = PunktTrainer()
    trainer.train("Mr. Stone met Mr. Lamp. They saw Mr. Door. Then Mr. River came. It was late. " * 20, finalize=True)
    text = "It was Mr. Stone. He saw Mr. Lamp."
    assert material.find_splitter().split(text) == ["It was Mr.", "Stone.", "He saw Mr.", "Lamp."]
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    save_punkt_params(trainer.get_params(), str(folder))
    splitter = material.find_splitter()
    assert splitter.name.startswith("punkt") and splitter.official
    assert splitter.split(text) == ["It was Mr. Stone.", "He saw Mr. Lamp."]


def test_the_official_wording_needs_lm_eval(monkeypatch, bench):
    official.official.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PePatchError, match=re.escape("pip install 'pe_patch[eval]'")):
        list(RULER["vt"](wording="official").work_units(bench, 2048))


def test_another_version_of_lm_eval_is_named(monkeypatch, tmp_path):
    official.official.cache_clear()
    for name in ("niah_utils", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils", "prepare_niah"):
        (tmp_path / "ruler").mkdir(exist_ok=True)
        (tmp_path / "ruler" / f"{name}.py").write_text("TEMPLATES = {}\n", encoding="utf-8")
    monkeypatch.setattr(official, "lm_eval_tasks", lambda: tmp_path)
    with pytest.raises(PePatchError, match="Cannot find RULER's wording in the installed lm-eval"):
        official.official()


def test_pairs_of_words_are_sorted_without_storing_them():
    first = ["blue", "blue-eyed", "blue", "blu", "blue-eyed-odd", "bluer", "a", "zoo", "blue eyed"]
    second = ["ax", "eyed-cat", "cat", "eyed-odd-dog", "ice cream", "cat", "f", "zebra"]
    assert list(Hyphenated(first, second)) == sorted({f"{one}-{two}" for one in first for two in second})


def test_words_beyond_wonderwords_are_substitutes(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(material, "word_list", lambda kind: tuple(f"{kind}{number}" for number in range(12)))
    material.wonderwords.cache_clear()
    material.invented.cache_clear()
    monkeypatch.setattr(material, "INVENTED", 6000)
    try:
        bench = make_bench(tokenizer, texts=TEXTS, samples=1)
        for length, beyond in ((1024, False), (3000, True)):
            (question,) = ask("cwe", bench, length, wording="official")
            assert (question.stamps["substitutes"] == ["words that do not exist"]) is beyond
        path = tmp_path / "english_words.json"
        path.write_text(json.dumps({str(number): f"given{number}" for number in range(6000)}), encoding="utf-8")
        (question,) = ask("cwe", bench, 3000, wording="official", words=str(path))
        assert question.stamps["substitutes"] == ["words of english_words.json"]
        monkeypatch.setattr(material, "OFFICIAL_WORDS", hashlib.sha256(path.read_bytes()).hexdigest())
        material.read_words.cache_clear()
        (question,) = ask("cwe", bench, 3000, wording="official", words=str(path))
        assert question.stamps["benchmark"] == "RULER"
        assert all(word.startswith("given") for word in question.references)
    finally:
        material.wonderwords.cache_clear()
        material.invented.cache_clear()


# Single tokens


TOKEN_TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multiquery")


@pytest.mark.parametrize("length", [256, 1000])
@pytest.mark.parametrize("name", TOKEN_TASKS)
def test_a_vocabulary_with_single_tokens_gives_questions_of_tokens(name, length):
    bench = make_bench(make_token_tokenizer(), texts=TEXTS, samples=8)
    questions, written = prompts(name, bench, length)
    assert questions[0].stamps["wording"] == "tokens"
    for question, text in zip(questions, written, strict=True):
        context, key = text[: text.rindex("<k")], text[text.rindex("<k") :]
        pairs = re.findall(r"(<k\d+>)(<v\d+>)", context)
        assert {value for found, value in pairs if found == key} == set(question.references)
        assert sum(found == key for found, _ in pairs) == 1  # a needle, and no second one
        assert len(set(pairs)) == len({found for found, _ in pairs})  # every key has one value
        assert question.budget == 1 and len(question.prompt) <= length
        assert question.without_context.tolist() == bench.encode(key).tolist()
        expected = {"niah_single_1": 1, "niah_single_2": 1, "niah_multikey_2": len(pairs)}.get(name, 4)
        assert len(pairs) == expected
    assert len(pairs) > length / 8 or name != "niah_multikey_2"
    if name == "niah_multiquery":
        contexts = [text[: text.rindex("<k")] for text in written]
        assert len(set(contexts)) == 2 and contexts[:4] == contexts[:1] * 4
        assert len({text[text.rindex("<k") :] for text in written[:4]}) == 4
        assert [question.group for question in questions] == [0] * 4 + [1] * 4  # about one text, so not independent
    else:
        assert all(question.group is None for question in questions)


def test_a_task_without_single_tokens_names_those_with_them():
    bench = make_bench(make_token_tokenizer(), texts=TEXTS)
    for name in set(RULER) - set(TOKEN_TASKS):
        with pytest.raises(OptionError, match=rf"^{name}: this task has no wording 'tokens'.*{', '.join(TOKEN_TASKS)}"):
            list(RULER[name]().work_units(bench, 1024))
    assert RULER["fwe"](wording="english").questions(bench, 1024)


# What is refused


def test_names_and_options(bench):
    with pytest.raises(UnknownNameError, match="Did you mean 'official'"):
        RULER["vt"](wording="offical")
    with pytest.raises(OptionError, match="needs the tokens <k0>"):
        list(RULER["niah_single_1"](wording="tokens").work_units(bench, 1024))
    with pytest.raises(TypeError, match="haystack"):
        RULER["niah_single_1"](haystack="essays.txt")
    assert [task.name for task in find_tasks(["ruler"])] == list(THIRTEEN[:-2])
    assert [task.name for task in find_tasks(["ruler_full"], {"squad": "a", "hotpotqa": "b"})] == list(THIRTEEN)
    assert len(find_tasks(["ruler_local"], {"haystack": "a", "exact_fit": True})) == 13


@pytest.mark.parametrize("name", RULER_GROUPS["ruler_local"])
def test_a_length_too_small_is_an_error_with_a_remedy(name, bench):
    with pytest.raises(PePatchError, match=rf"^{name}: .*too few.*Ask for"):
        ask(name, bench, 150)


def test_the_length_in_the_error_suffices(bench):
    with pytest.raises(PePatchError) as caught:
        ask("niah_single_1", bench, 150)
    needed = re.search(r"takes (\d+)\.", str(caught.value))
    assert needed
    bench.samples = 1
    assert ask("niah_single_1", bench, int(needed[1]) + 4)  # another key may have a token or two more


@pytest.mark.parametrize("name, options", [("niah_single_1", {"exact_fit": True}), ("fwe", {})])
def test_a_tokenizer_that_does_not_count_is_refused(name, options, bench):
    class Blind(type(bench.model.tokenizer)):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = super().__call__(*args, **kwargs)
            found["input_ids"] = found["input_ids"][:3]
            return found

    blind = ruler_cases.make_tokenizer()
    blind.__class__ = Blind
    bench.model.tokenizer = blind
    with pytest.raises(PePatchError, match="does not count them"):
        ask(name, bench, 1024, **options)


def test_files_in_a_wrong_format_are_errors(bench, tmp_path):
    for name, instead in (("qa_1", "qa_local_1"), ("qa_2", "qa_local_2")):
        with pytest.raises(OptionError, match=f"do not come with the library.*{instead}"):
            list(RULER[name]().work_units(bench, 1024))
    with pytest.raises(PePatchError, match=r"qa_1: The question file .*missing\.json cannot be read"):
        list(RULER["qa_1"](squad=str(tmp_path / "missing.json")).work_units(bench, 1024))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(ruler_cases.hotpotqa()), encoding="utf-8")
    with pytest.raises(PePatchError, match=r"qa_1: .*other\.json is not in the format of SQuAD 2\.0"):
        list(RULER["qa_1"](squad=str(other)).work_units(bench, 1024))
    other.write_text("{", encoding="utf-8")
    with pytest.raises(PePatchError, match="not JSON"):
        list(RULER["qa_2"](hotpotqa=str(other)).work_units(bench, 1024))
    with pytest.raises(PePatchError, match=r"niah_single_2: The haystack .*cannot be read"):
        ask("niah_single_2", bench, 1024, haystack=str(tmp_path / "none.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n", encoding="utf-8")
    with pytest.raises(PePatchError, match="has no words"):
        ask("niah_single_2", bench, 1024, haystack=str(empty))


def test_more_samples_than_questions_are_an_error(bench, files):
    bench.samples = 13
    with pytest.raises(PePatchError, match=r"hotpotqa\.json has only 12 questions"):
        ask("qa_2", bench, 4096, files)


def test_a_truncating_tokenizer_is_refused(bench):
    class Cutting(type(bench.model.tokenizer)):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = super().__call__(*args, **kwargs)
            found["input_ids"] = found["input_ids"][:1000]
            return found

    cutting = ruler_cases.make_tokenizer()
    cutting.__class__ = Cutting
    bench.model.tokenizer = cutting
    for exact_fit in (False, True):
        with pytest.raises(PePatchError, match="The tokenizer cut a document"):
            ask("niah_single_1", bench, 2048, exact_fit=exact_fit)
