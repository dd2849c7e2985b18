"""Facts hidden in a text: no truncation, the right places, and the exact length."""

import subprocess
import sys

import numpy as np
import pytest

from pe_patch.errors import PePatchError
from pe_patch.evaluation.retrieval import WORDINGS, make_sample, wording_for

from .evaluation_doubles import make_text, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return np.array(tokenizer(make_text())["input_ids"])


def occurrences(ids, part):
    return [i for i in range(len(ids) - len(part) + 1) if list(ids[i : i + len(part)]) == list(part)]


@pytest.mark.parametrize("wording", ["english", "tokens"])
@pytest.mark.parametrize("length", [700, 701, 1999])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("needles", [1, 5])
def test_prompt_and_answer_fill_the_length_exactly(tokenizer, haystack, wording, length, depth, needles):
    sample = make_sample(
        tokenizer,
        haystack,
        WORDINGS[wording],
        length=length,
        needles=needles,
        depth=depth,
        rng=np.random.default_rng(length),
    )
    assert len(sample.input_ids) + len(sample.answer_ids) == length
    assert tokenizer.decode(sample.answer_ids).strip() == sample.answer
    assert abs(sample.depth - depth) < (0.05 if wording == "english" else 0.002)
    # without the inserted tokens, one unbroken piece of the haystack remains
    rest = sample.input_ids[~sample.is_needle]
    assert not sample.is_answer.any()
    assert len(occurrences(haystack, rest)) >= 1


def test_every_needle_is_complete_and_the_question_ends_the_prompt(tokenizer, haystack):
    sample = make_sample(
        tokenizer, haystack, WORDINGS["english"], length=900, needles=3, depth=0.5, rng=np.random.default_rng(3)
    )
    text = tokenizer.decode(sample.input_ids)
    notes = [line for line in text.splitlines() if line.startswith("A note on lockers:")]
    assert len(notes) == 3
    assert all(note.endswith(".") and note.split()[-1][:-1].isdigit() for note in notes)
    question = text.splitlines()[-1]
    key = question.split(" the ", 1)[1].split(" locker?")[0]
    assert question.endswith("opens with the code")
    assert f"A note on lockers: the {key} locker opens with the code {sample.answer}." in notes


def test_english_needles_have_their_own_lines(tokenizer, haystack):
    lines = set(make_text().splitlines())
    for seed in range(20):
        sample = make_sample(
            tokenizer, haystack, WORDINGS["english"], length=600, needles=2, rng=np.random.default_rng(seed)
        )
        body = tokenizer.decode(sample.input_ids).split("Keep the codes in mind.\n\n")[1].split("\n\nWhich code")[0]
        rest = [line for line in body.splitlines() if line and not line.startswith("A note on lockers:")]
        # the piece may begin and end within a line, but no needle may split one
        assert set(rest[1:-1]) <= lines


def test_the_same_seed_asks_the_same_question_at_every_length(tokenizer, haystack):
    def facts(length):
        sample = make_sample(
            tokenizer, haystack, WORDINGS["tokens"], length=length, needles=8, rng=np.random.default_rng(5)
        )
        spliced = sample.input_ids[sample.is_needle]
        return sample.answer, int(spliced[-1]), {tuple(pair) for pair in spliced[:-1].reshape(-1, 2)}

    assert facts(64) == facts(256) == facts(1500)


def test_a_training_sequence_marks_its_answers(tokenizer, haystack):
    rng = np.random.default_rng(1)
    sample = make_sample(
        tokenizer, haystack, WORDINGS["tokens"], length=100, needles=6, queries=4, rng=rng, answer_in_sequence=True
    )
    ids = sample.input_ids
    assert len(ids) == 100 and sample.is_answer.sum() == 4 and sample.is_needle.sum() == 6 * 2 + 4
    assert sample.is_answer.dtype == sample.is_needle.dtype == bool
    assert sample.is_answer[-8:].tolist() == [False, True] * 4
    for at in np.flatnonzero(sample.is_answer):
        # the pair (key, answer) occurs twice: in the needle and in its question
        assert len(occurrences(ids, ids[at - 1 : at + 1])) == 2


def test_a_prompt_can_ask_for_any_of_its_facts(tokenizer, haystack):
    samples = [
        make_sample(
            tokenizer, haystack, WORDINGS["english"], length=900, needles=3, depth=[0.0, 0.5, 1.0], asked=asked,
            rng=np.random.default_rng(1),
        )
        for asked in range(3)
    ]  # fmt: skip
    texts = [tokenizer.decode(sample.input_ids) for sample in samples]
    for asked, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        key = text.split("Which code opens the ")[1].split(" locker")[0]
        assert text.count(f"the {key} locker opens with the code {sample.answer}") == 1
        assert sample.depth == pytest.approx(asked / 2, abs=0.05)
    assert len({text.split("Which code")[0] for text in texts}) == 1
    assert len({sample.answer for sample in samples}) == 3


def test_the_shortest_training_sequence_has_two_pairs_and_two_questions(tokenizer):
    rng = np.random.default_rng(0)
    sample = make_sample(
        tokenizer, [], WORDINGS["tokens"], length=8, needles=2, queries=2, rng=rng, answer_in_sequence=True
    )
    assert sample.input_ids[:4].tolist() == sample.input_ids[4:].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 10}, "too few"),
        ({"length": 100_000}, "Give a longer text"),
        ({"depth": 1.2}, "depth"),
        ({"depth": [0.5, -0.1]}, "depth"),
        ({"depth": [0.1] * 9}, "9 depths need as many needles"),
        ({"asked": 8}, "asked"),
        ({"needles": 65}, "64 keys"),
        ({"queries": 2}, "answer_in_sequence"),
        ({"queries": 0}, "queries"),
    ],
)
def test_impossible_samples_raise(tokenizer, haystack, change, message):
    arguments = {"length": 200, "needles": 8, **change}
    with pytest.raises(PePatchError, match=message):
        make_sample(tokenizer, haystack, WORDINGS["tokens"], rng=np.random.default_rng(0), **arguments)


def test_a_start_token_is_kept_if_the_tokenizer_has_one(haystack):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="<k0>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<k0> $A", special_tokens=[("<k0>", tokenizer.convert_tokens_to_ids("<k0>"))]
    )
    sample = make_sample(tokenizer, haystack, WORDINGS["english"], length=300, rng=np.random.default_rng(0))
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert len(sample.input_ids) + len(sample.answer_ids) == 300


def test_the_wording_follows_the_vocabulary(tokenizer):
    assert wording_for(tokenizer).name == "tokens"


def test_making_samples_imports_no_heavy_library():
    code = (
        "import sys, pe_patch.evaluation.retrieval;"
        "print([m for m in ('datasets', 'evaluate', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
