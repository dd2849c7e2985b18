"""Test that InfiniteBench scores answers as its authors do, and its generated tasks at any length."""

import importlib.util
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from pe_patch.errors import OptionError, PePatchError, UnknownNameError
from pe_patch.evaluation.tasks.infinitebench import (
    GROUPS,
    INFINITEBENCH,
    CallChain,
    ListFind,
    NoiseDigits,
    NoisePasskey,
    scoring,
)
from pe_patch.evaluation.tasks.infinitebench.table import DATA_SETS

from .bench_doubles import CHAT, make_bench
from .evaluation_doubles import make_tokenizer

AUTHORS = json.loads((Path(__file__).parent / "data" / "benchmark_scores.json").read_text(encoding="utf-8"))
"""Scores of the authors' code for answers that we wrote (github.com/OpenBMB/InfiniteBench, commit 88b3daa)."""


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def folder():
    (package,) = importlib.util.find_spec("lm_eval").submodule_search_locations
    return Path(package) / "tasks" / "infinitebench"


@pytest.fixture(scope="module")
def lm_eval():
    spec = importlib.util.spec_from_file_location("lm_eval_infinitebench_utils", folder() / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The published data sets


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_scores_equal_the_authors_scores(name):
    cases = [case[1:] for case in AUTHORS["infinite"] if case[0] == name]
    assert {score > 0 for *_, score in cases} == {True, False}
    for given, right, score in cases:
        assert DATA_SETS[name].metric(given, right) == pytest.approx(score, abs=1e-12), (given, right)


def test_lm_eval_gives_the_same_scores(lm_eval):
    """Compare where lm-eval follows the authors; it scores choices and names differently."""
    draw = random.Random(0)
    pieces = ["42", "-42", "4.2", "ab-1", "x", ".", ":", '"', "\n", "{", "}", "'", "?", "`", "0"]
    above = 0
    for _ in range(2000):
        given = draw.choice(["", " "]).join(draw.choices(pieces, k=draw.randint(0, 6)))
        pairs = [
            (scoring.first_integer(given, ["42"]), lm_eval.process_results_int_match({"answer": ["42"]}, [given])),
            (scoring.word_given(given, ["ab-1"]), lm_eval.process_results_kv({"answer": ["ab-1"]}, [given])),
            (scoring.last_integer(given, ["-42"]), lm_eval.process_results_code_run({"answer": ["-42"]}, [given])),
            (scoring.first_number(given, ["4.2"]), lm_eval.process_results_math({"answer": ["4.2"]}, [given])),
        ]
        for ours, theirs in pairs:
            assert ours == theirs["score"], given
            above += ours
    assert above > 400


ROW = {"context": "CONTEXT {x}", "input": "INPUT?", "answer": ["two"], "options": ["one", "two", "three", "four"]}
INPUTS = {"code_run": "Tell what func_7(-3) gives.", "math_find": "The second largest number of the list is: "}


@pytest.mark.parametrize("name", sorted(DATA_SETS.keys() - {"math_calc"}))
def test_the_official_wording_and_budget_equal_lm_evals(name, lm_eval):
    class Names(yaml.SafeLoader):
        pass

    Names.add_constructor("!function", lambda loader, node: getattr(lm_eval, node.value.partition(".")[2]))
    file = folder() / f"infinitebench_{DATA_SETS[name].official}.yaml"
    theirs = yaml.load(file.read_text(encoding="utf-8"), Names)
    row = ROW | {"input": INPUTS.get(name, "INPUT?")}
    body = theirs["doc_to_text"]
    if isinstance(body, str):
        body = body.replace("{{context}}", row["context"]).replace("{{input}}", row["input"])
    else:
        body = body(row)
    task = INFINITEBENCH[f"infinitebench_{name}"](wording="official")
    assert task.prompt(row) == (theirs.get("description", "") + body, "")
    assert task.budget == theirs["generation_kwargs"]["max_gen_toks"]
    assert task.label() == "InfiniteBench"


def test_our_wording_contains_all_columns_of_a_row():
    for name, data_set in DATA_SETS.items():
        row = ROW | {"input": INPUTS.get(name, "INPUT?")}
        text, _ = INFINITEBENCH[f"infinitebench_{name}"](wording="own").prompt(row)
        assert "CONTEXT {x}" in text
        if data_set.choices:
            assert all(f"{letter}. {option}\n" in text for letter, option in zip("ABCD", row["options"], strict=True))
    assert (
        "func_7(-3)"
        in INFINITEBENCH["infinitebench_code_run"](wording="own").prompt(ROW | {"input": INPUTS["code_run"]})[0]
    )
    found = INFINITEBENCH["infinitebench_math_find"](wording="own").prompt(ROW | {"input": INPUTS["math_find"]})[0]
    assert "Find the second largest number in it" in found
    with pytest.raises(PePatchError, match=r"'INPUT\?' is not from InfiniteBench"):
        INFINITEBENCH["infinitebench_code_run"](wording="own").prompt(ROW)


@pytest.mark.parametrize(
    ("name", "answer", "right"),
    [
        ("passkey", "12345", ("12345",)),
        ("code_run", [4], ("4",)),
        ("math_find", [44.0], ("44.0",)),
        ("math_calc", [[79, 59, 73]], ("79", "59", "73")),
        ("math_calc", [79, 59], ("79", "59")),
        ("longbook_choice_eng", ["three"], ("three", "C")),
        ("code_debug", "one", ("one", "A")),
        ("code_debug", ["one", "A"], ("one", "A")),
    ],
)
def test_right_answers_are_read_in_every_format(name, answer, right):
    assert INFINITEBENCH[f"infinitebench_{name}"]().references(ROW | {"answer": answer}) == right


def test_a_row_becomes_a_question_with_a_score(tmp_path, tokenizer):
    row = ROW | {"id": 0, "context": "def one(): pass\n" * 20}
    (tmp_path / "code_debug.jsonl").write_text(json.dumps(row) + "\n")
    task = INFINITEBENCH["infinitebench_code_debug"](source=str(tmp_path), wording="own")
    assert task.prompt(row)[1] == "The answer is:"
    assert task.score(" B. two", ("two", "B")) == task.score(" two", ("two", "B")) == 1
    assert task.score(" A. one", ("two", "B")) == 0
    (piece,) = task.work_units(make_bench(tokenizer, answer=lambda question: " B"), 2000)
    (found,) = piece.measure().rows
    assert (found.score, found.samples, found.details["stamps"]["label"]) == (
        1,
        1,
        "InfiniteBench's data in other words",
    )
    with pytest.raises(PePatchError, match="'five' is not among the row's options"):
        task.references(row | {"answer": ["five"]})


def test_unknown_wordings_are_errors():
    with pytest.raises(UnknownNameError, match="There are: official, own"):
        INFINITEBENCH["infinitebench_passkey"](wording="english")
    with pytest.raises(PePatchError, match="lm-eval has no wording of math_calc"):
        INFINITEBENCH["infinitebench_math_calc"](wording="official")


# The generated cousins

CASES = [NoisePasskey, NoiseDigits, ListFind, CallChain]


def test_no_generated_task_has_a_published_name():
    assert len(GROUPS["infinitebench"]) == 12 and set(GROUPS["infinitebench_offline"]) == {task.name for task in CASES}
    assert all(name.startswith("infinitebench_") for name in GROUPS["infinitebench"])


@pytest.mark.parametrize("task", CASES, ids=lambda task: task.name)
@pytest.mark.parametrize(("length", "chat"), [(500, False), (2500, False), (2500, True)])
def test_prompts_fill_but_never_exceed_the_length(task, length, chat):
    tokenizer = make_tokenizer(chat_template=CHAT) if chat else make_tokenizer()
    bench = make_bench(tokenizer, depths=[0.0, 0.7], chat=chat)
    unit = 150 if task is not CallChain else 4 * 60  # a line of noise, or one function for each layer
    for depth in bench.depths if task.by_depth else [None]:
        questions = task().questions(bench, length, depth)
        assert len(questions) == (3 if task.by_depth else 6)
        for question in questions:
            assert length - unit <= len(question.prompt) + question.budget - 1 <= length
            assert len(tokenizer(" " + question.references[0])["input_ids"]) <= question.budget
            assert task().score(f" {question.references[0]}. And 7.", question.references) == 1
            assert task().score("none", question.references) == 0


@pytest.mark.parametrize("task", CASES, ids=lambda task: task.name)
def test_questions_depend_only_on_the_seed(task, tokenizer):
    def asked(seed):
        return [each.prompt.tolist() for each in task().questions(make_bench(tokenizer, seed=seed), 900, 0.5)]

    assert asked(0) == asked(0) != asked(1)


@pytest.mark.parametrize(("task", "digits"), [(NoisePasskey, 5), (NoiseDigits, 10)])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_digits_occur_once_in_the_noise_at_their_depth(task, digits, depth, tokenizer):
    bench = make_bench(tokenizer)
    for question, shorter in zip(
        task().questions(bench, 4000, depth), task().questions(bench, 4000, depth, within=900), strict=True
    ):
        text, (answer,) = tokenizer.decode(question.prompt), question.references
        assert re.fullmatch(f"[0-9]{{{digits}}}", answer) and shorter.references == question.references
        *noise, _, _, _ = text.split("\n")
        (place,) = [index for index, line in enumerate(noise) if answer in line]
        assert set(noise[:place] + noise[place + 1 :]) == {noise[0 if place else 1]}
        assert question.depth == place / (len(noise) - 1) and abs(question.depth - depth) < 0.02
        assert answer not in tokenizer.decode(question.without_context)
    if task is NoiseDigits:
        assert sum(one == other for one, other in pairwise(answer)) >= 5


@pytest.mark.parametrize("place", [None, "largest", "third largest", "smallest", "second smallest"])
def test_the_answer_has_the_requested_rank(place, tokenizer):
    seen = set()
    for question in ListFind(place=place).questions(make_bench(tokenizer, samples=12), 2500, None):
        text = tokenizer.decode(question.prompt)
        numbers = [int(number) for number in re.search(r"list of numbers:\n\n([\d, ]+)\n", text).group(1).split(", ")]
        wanted = re.search(r"Which is the ([a-z ]+) number", text).group(1)
        ordered = sorted(set(numbers), reverse="largest" in wanted)
        rank = {"second": 1, "third": 2}.get(wanted.split()[0], 0)
        assert question.references == (str(ordered[rank]),)
        seen.add(wanted)
    assert seen == {place} if place else len(seen) > 3


@pytest.mark.parametrize("layers", [2, 4, 7])
def test_the_value_is_what_python_computes_through_all_layers(layers, tokenizer):
    for question in CallChain(layers=layers).questions(make_bench(tokenizer), 2500, None):
        text = tokenizer.decode(question.prompt)
        code, call = re.fullmatch(r"(.*)\nWhat does (.+) return\? .*", text, re.S).groups()
        calls: list[str] = []
        names = {"__calls__": calls}
        # every function tells that it was called
        exec(re.sub(r"(def (step_\d+)\(x\):\n)", r"\1    __calls__.append('\2')\n", code), names)
        assert str(eval(call, names)) == question.references[0]
        assert len(calls) == layers == len(set(calls))
        assert code.count("def ") > 4 * layers


def test_invalid_options_and_lengths_are_errors(tokenizer):
    with pytest.raises(UnknownNameError, match="Did you mean 'smallest'"):
        ListFind(place="smalest")
    with pytest.raises(OptionError, match="at least 2; got 1"):
        CallChain(layers=1)
    with pytest.raises(PePatchError, match="A question of 'noise_passkey' takes at least"):
        NoisePasskey().questions(make_bench(tokenizer), 40, 0.5)
