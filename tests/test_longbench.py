# ruff: noqa: RUF001 - Chinese marks
"""Test that LongBench scores answers as its authors do, and that its official wording is theirs."""

import hashlib
import importlib.util
import json
import random
import sys
import types
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import yaml

from pe_patch.errors import PePatchError
from pe_patch.evaluation.tasks.longbench import GROUPS, LONGBENCH, scoring
from pe_patch.evaluation.tasks.longbench.table import DATA_SETS

AUTHORS = json.loads((Path(__file__).parent / "data" / "benchmark_scores.json").read_text(encoding="utf-8"))
"""Scores of the authors' code for answers that we wrote (github.com/THUDM/LongBench, commit 2e00731)."""


# The metrics


@pytest.mark.parametrize("metric", sorted({name for name, *_ in AUTHORS["first"]}))
def test_scores_equal_the_authors_scores(metric):
    cases = [case[1:] for case in AUTHORS["first"] if case[0] == metric]
    assert {0 < score < 1 or score == 1 for *_, score in cases} == {True, False}
    for given, right, score in cases:
        assert getattr(scoring, metric)(given, right) == pytest.approx(score, abs=1e-12), (given, right)


def test_class_scores_equal_the_authors_scores():
    for given, right, order, score in AUTHORS["class_right"]:
        classes = [AUTHORS["classes"][index] for index in order]
        assert scoring.class_right(given, right, classes) == score, (given, right, classes)


@pytest.fixture(scope="module")
def lm_eval():
    """Load lm-eval's metrics; they import fuzzywuzzy, whose ratio is difflib's in whole percents."""
    fuzz = types.SimpleNamespace(ratio=lambda a, b: round(100 * SequenceMatcher(None, a, b).ratio()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fuzzywuzzy", types.SimpleNamespace(fuzz=fuzz))
        spec = importlib.util.spec_from_file_location("lm_eval_longbench_metrics", folder() / "metrics.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def folder():
    (package,) = importlib.util.find_spec("lm_eval").submodule_search_locations
    return Path(package) / "tasks" / "longbench"


PIECES = (
    "the|a|An|cat|Cat's|dog.|...|3|12|Paragraph 3|段落4|答案|北京|，|—|Numeric|Numeric value|Other|\n|“x”|ß|\t|«".split(
        "|"
    )
)


def test_lm_eval_gives_the_same_scores(lm_eval):
    """Compare all metrics but line similarity, for which lm-eval skips empty lines and the authors do not."""
    draw = random.Random(0)
    classes = ["Numeric", "Numeric value", "Other", "cat", "Cat"]
    above = 0
    for _ in range(400):
        given, right = (draw.choice([" ", ""]).join(draw.choices(PIECES, k=draw.randint(0, 7))) for _ in range(2))
        number, name = draw.choice("34"), draw.choice(classes)
        pairs = [
            (scoring.answer_f1(given, right), lm_eval.qa_f1_score(given, right)),
            (scoring.answer_f1_chinese(given, right), lm_eval.qa_f1_zh_score(given, right)),
            (scoring.rouge(given, right), lm_eval.rouge_score(given, right)),
            (scoring.rouge_chinese(given, right), lm_eval.rouge_zh_score(given, right)),
            (scoring.numbers_right(given, number), lm_eval.count_score(given, number)),
            (
                scoring.paragraph_right(given, f"Paragraph {number}"),
                lm_eval.retrieval_score(given, f"Paragraph {number}"),
            ),
            (scoring.class_right(given, name, classes), lm_eval.classification_score(given, name, all_classes=classes)),
        ]
        for ours, theirs in pairs:
            assert ours == pytest.approx(theirs, abs=1e-12), (given, right)
            above += theirs > 0
    assert above > 300


def test_the_first_line_of_code_is_the_one_that_counts():
    # 2 * 9 characters in common / (10 + 10): "return a+b" and "return a-b"
    assert scoring.line_similarity("\n# a note\nreturn a+b\nreturn a-b", "return a-b") == 0.9
    assert scoring.line_similarity("x = 1\nreturn a-b", "return a-b") < 0.5
    assert scoring.line_similarity("# a note\n\nreturn a-b", "return a-b") == 0  # the empty line after the note counts


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(PePatchError, match=r"'rouge', which is not installed. Run: pip install 'pe_patch\[eval\]'"):
        scoring.rouge("a", "a")


# The table


@pytest.mark.parametrize("name", sorted({*GROUPS["longbench"], *GROUPS["longbench_e"]}))
def test_budgets_and_stops_equal_lm_evals(name):
    class Names(yaml.SafeLoader):
        pass

    Names.add_constructor("!function", lambda loader, node: node.value)
    task = LONGBENCH[name]
    theirs = yaml.load((folder() / f"{task.data_name}.yaml").read_text(encoding="utf-8"), Names)
    assert theirs["dataset_name"] == task.data_name
    assert theirs["generation_kwargs"]["max_gen_toks"] == task.budget
    assert theirs["generation_kwargs"]["until"] == (["\n"] if task.data_set.one_line else [])
    metric = {
        "answer_f1": "qa_f1", "answer_f1_chinese": "qa_f1_zh", "rouge": "rouge", "rouge_chinese": "rouge_zh",
        "class_right": "classification", "numbers_right": "count", "paragraph_right": "retrieval",
        "paragraph_right_chinese": "retrieval_zh", "line_similarity": "code_sim",
    }[task.data_set.metric.function.__name__]  # fmt: skip
    assert theirs["process_results"] == f"metrics.get_{metric}_with_score"


def test_all_data_sets_of_the_authors_exist():
    assert len(GROUPS["longbench"]) == 21 and len(GROUPS["longbench_e"]) == 13
    assert {LONGBENCH[name].data_name for name in [*GROUPS["longbench"], *GROUPS["longbench_e"], "longbench2"]} == {
        path.stem for path in folder().glob("*.yaml")
    } - {path.stem for path in folder().glob("_*.yaml")} | {"LongBench-v2"}
    # those for which their pred.py does without a chat template
    bare = {name for name, data_set in DATA_SETS.items() if not data_set.chat}
    assert bare == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_the_official_wording_is_the_authors_to_the_character(name):
    """Compare with hashes of the authors' prompts; lm-eval's copy has lost white space in some."""
    text, lead = LONGBENCH[f"longbench_{name}"](wording="official").prompt(
        {"context": "CONTEXT {x}\n", "input": "INPUT?"}
    )
    assert lead == "" and hashlib.sha256(text.encode()).hexdigest()[:16] == AUTHORS["prompts"][name]
    own, _ = LONGBENCH[f"longbench_{name}"](wording="own").prompt({"context": "CONTEXT {x}\n", "input": "INPUT?"})
    assert own != text and "CONTEXT {x}\n" in own
