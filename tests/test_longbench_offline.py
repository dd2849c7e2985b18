"""Test the LongBench variants without data, paragraph counting and next lines, at any length."""

import ast
import re

import pytest
from transformers import AutoTokenizer

from pe_patch.compare.demo import BASE
from pe_patch.data.text import load_documents
from pe_patch.errors import OptionError, PePatchError
from pe_patch.evaluation.tasks.longbench import GROUPS, LONGBENCH, NextLine, ParagraphCount

from .bench_doubles import make_bench


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def texts():
    return load_documents("stdlib", split="test", limit=16)


@pytest.mark.parametrize("task", [ParagraphCount, NextLine], ids=lambda task: task.name)
@pytest.mark.parametrize("length", [900, 4000])
def test_prompts_fill_the_length_and_depend_only_on_the_seed(task, length, tokenizer, texts):
    def asked(seed):
        questions = task().questions(make_bench(tokenizer, texts=texts, seed=seed), length, None)
        sizes = [len(question.prompt) + question.budget - 1 for question in questions]
        assert len(sizes) == 6 and length * 0.8 < min(sizes) and max(sizes) <= length
        for question in questions:
            assert len(tokenizer(question.references[0])["input_ids"]) <= question.budget
        return [question.prompt.tolist() for question in questions]

    assert asked(0) == asked(0) != asked(1)


@pytest.mark.parametrize("repeated", [0.0, 0.4, 0.9])
def test_the_answer_is_the_number_of_different_paragraphs(repeated, tokenizer, texts):
    documented = {
        " ".join(text.split())
        for file in texts
        for node in ast.walk(ast.parse(file))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and (text := ast.get_docstring(node))
    }
    found, all_of_them = 0, 0
    for question in ParagraphCount(repeated=repeated).questions(make_bench(tokenizer, texts=texts), 3000, None):
        text = tokenizer.decode(question.prompt)
        paragraphs = re.findall(r"^Paragraph (\d+): (.+)$", text, re.M)
        assert [int(number) for number, _ in paragraphs] == list(range(1, len(paragraphs) + 1))
        different = {paragraph for _, paragraph in paragraphs}
        assert question.references == (str(len(different)),)
        assert all(any(document.startswith(each) for document in documented) for each in different)
        assert "Paragraph 1" not in tokenizer.decode(question.without_context)
        found, all_of_them = found + len(different), all_of_them + len(paragraphs)
    # the share of repetitions, within three standard deviations of its mean
    assert abs(1 - found / all_of_them - repeated) <= 3 * (repeated * (1 - repeated) / all_of_them) ** 0.5 + 0.01


def test_the_next_line_is_the_one_that_follows_in_the_file(tokenizer, texts):
    for question in NextLine().questions(make_bench(tokenizer, texts=texts), 3000, None):
        text, (line,) = tokenizer.decode(question.prompt), question.references
        shown = text.split("code.\n\n", 1)[1]
        bare = tokenizer.decode(question.without_context).split("code.\n\n", 1)[1]
        assert shown.endswith(bare) and len(shown) > len(bare)
        assert any(f"{bare}{line}\n" in each.replace("\r\n", "\n") for each in texts)
        ast.parse(shown[: -len(bare)])  # nothing but whole statements before the one that is begun
        assert NextLine().score(f"{line}\nand more", question.references) == 1


def test_the_control_asks_for_the_same_lines(tokenizer, texts):
    bench = make_bench(tokenizer, texts=texts)
    whole, small = (NextLine().questions(bench, 3000, None, within=within) for within in (None, 900))
    assert [each.references for each in whole] == [each.references for each in small]
    assert max(len(each.prompt) + each.budget - 1 for each in small) <= 900


def test_one_of_several_numbers_counts_as_a_share():
    assert ParagraphCount().score("12", ("12",)) == 1
    assert ParagraphCount().score("12 of 20", ("12",)) == 0.5
    assert ParagraphCount().score("twelve", ("12",)) == 0


def test_invalid_options_and_texts_are_errors(tokenizer, texts):
    with pytest.raises(OptionError, match=r"from 0 to below 1; got 1\.0"):
        ParagraphCount(repeated=1.0)
    with pytest.raises(PePatchError, match=r"only [0-9]+ different docstrings"):
        ParagraphCount(repeated=0.0).questions(make_bench(tokenizer, texts=texts[:2]), 9000, None)
    with pytest.raises(PePatchError, match="only 0 suitable lines of Python"):
        NextLine().questions(make_bench(tokenizer), 900, None)
    with pytest.raises(PePatchError, match="Ask for a greater length"):
        NextLine().questions(make_bench(tokenizer, texts=texts), 60, None)


def test_the_names_differ_from_longbenchs():
    assert set(GROUPS["longbench_offline"]) == {"paragraph_count", "next_line"} <= LONGBENCH.keys()
    assert not set(GROUPS["longbench_offline"]) & {name for name in LONGBENCH if name.startswith("longbench")}
