"""Test questions about real code: one definition, a unique answer, and whole statements."""

import ast
import inspect
import re

import pytest
from transformers import AutoTokenizer

from pe_patch.compare.demo import BASE
from pe_patch.data.text import load_documents
from pe_patch.errors import PePatchError
from pe_patch.evaluation.tasks.code import CodeParameters
from pe_patch.evaluation.tasks.code_blocks import read_code

from .bench_doubles import make_bench


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def texts():
    return load_documents("stdlib", split="test", limit=16)


def code_of(tokenizer, question):
    """Return the code in a prompt and the name of the function in the question."""
    text = tokenizer.decode(question.prompt)
    asked = re.search(r"How does the definition of the function (\w+) begin", text)
    return text[: asked.start()].removeprefix("Source code in Python:\n\n"), asked.group(1)


@pytest.mark.parametrize("length", [1200, 6000])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_one_definition_one_answer_and_whole_statements(tokenizer, texts, length, depth):
    bench = make_bench(tokenizer, texts=texts, depths=[depth])
    files = {ast.dump(node) for text in texts for node in ast.parse(text).body}
    questions = CodeParameters().questions(bench, length, depth)
    assert len({question.references for question in questions}) == len(questions) == bench.samples
    for question in questions:
        code, name = code_of(tokenizer, question)
        tree = ast.parse(code)
        assert {ast.dump(node) for node in tree.body} <= files
        (asked,) = [node for node in ast.walk(tree) if getattr(node, "name", None) == name]
        assert isinstance(asked, ast.FunctionDef)
        (answer,) = question.references
        (again,) = ast.parse(f"def asked({answer}): pass").body
        assert isinstance(again, ast.FunctionDef) and ast.dump(again.args) == ast.dump(asked.args)
        assert code.count(f"({answer})") == 1 and answer not in tokenizer.decode(question.without_context)
        before = len(tokenizer(code[: code.index(f"def {name}(")])["input_ids"])
        after = len(tokenizer(code[code.index(ast.get_source_segment(code, asked)[-20:]) :])["input_ids"])
        assert abs(before / (before + after) - depth) < (0.2 if length == 1200 else 0.05)
        assert abs(question.depth - depth) < 0.1
        assert tokenizer.decode(question.prompt).endswith(f"def {name}(")
        assert length * 0.9 < len(question.prompt) + question.budget - 1 <= length
        assert len(tokenizer(answer + "):")["input_ids"]) <= question.budget


def test_the_control_asks_for_the_same_functions(tokenizer, texts):
    bench = make_bench(tokenizer, texts=texts)
    whole, small = (CodeParameters().questions(bench, 5000, 0.5, within=within) for within in (None, 1500))
    assert [each.references for each in whole] == [each.references for each in small]
    assert max(len(each.prompt) + each.budget - 1 for each in small) <= 1500


def test_questions_depend_only_on_the_seed(tokenizer, texts):
    def asked(seed):
        questions = CodeParameters().questions(make_bench(tokenizer, texts=texts, seed=seed), 2000, 0.5)
        return [question.prompt.tolist() for question in questions]

    assert asked(0) == asked(0) != asked(1)


def test_too_few_functions_repeat_among_other_text(tokenizer, texts):
    questions = CodeParameters().questions(make_bench(tokenizer, texts=texts[:12], samples=150), 1500, 0.5)
    different = {question.references for question in questions}
    assert len(questions) == 50 > len(different)
    assert {question.stamps["different_functions"] for question in questions} == {len(different)}
    assert len({question.prompt.tobytes() for question in questions}) > 40


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("path, mode=0o777, *, dir_fd=None):\n    pass", 1),
        ("path,mode=0o777,\n    *, dir_fd = None)", 1),
        ("path, mode=0o777, *, dir_fd=None", 0),
        ("path, mode=0o777)", 0),
        ("path, mode=0o77, *, dir_fd=None)", 0),
        ("", 0),
    ],
)
def test_only_white_space_may_differ(given, right):
    assert CodeParameters().score(given, ("path, mode=0o777, *, dir_fd=None",)) == right


def test_only_functions_with_one_definition_and_unique_parameters_are_used():
    one = inspect.cleandoc('''
        import os
        # A note on the first.
        @cached(size=(1, 2))
        def first(path, mode=(1, ")"), *rest):
            """first(path) gives nothing."""
        def twice(path, mode, other): pass
        class Kind:
            def twice(self, path, mode): pass
        async def later(path, mode, other): pass
        def few(path): pass
        def generic(
            path, mode, other
        ): pass
    ''')
    code = read_code((one, "Prose, not code.", "def second(name, value=None): return first(name, value=None)"))
    asked = {block.name: block.parameters for block in code.blocks if block.parameters}
    assert asked == {"first": 'path, mode=(1, ")"), *rest', "second": "name, value=None"}
    first, second = (next(block for block in code.blocks if block.name == name) for name in asked)
    assert code.has_unique_parameters(first) and not code.has_unique_parameters(second)
    assert first.text.startswith("# A note on the first.\n@cached")
    assert (first.document, second.document) == (0, 2)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (60, r"takes \d+ tokens without any text around it"),
        (400_000, "too little Python code"),
    ],
)
def test_unsuitable_lengths_are_errors(tokenizer, texts, length, message):
    with pytest.raises(PePatchError, match=message):
        CodeParameters().questions(make_bench(tokenizer, texts=texts[:12]), length, 0.5)


def test_text_without_code_is_an_error(tokenizer):
    with pytest.raises(PePatchError, match="has no function in Python"):
        CodeParameters().questions(make_bench(tokenizer), 1000, 0.5)
