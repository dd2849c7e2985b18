"""Test questions for one value of a JSON object: whole pairs up to the length, and the pair at its depth."""

import json
import re
import uuid

import pytest

from pe_patch.errors import PePatchError
from pe_patch.evaluation.tasks.filling import largest_fit
from pe_patch.evaluation.tasks.key_value import KeyValue

from .bench_doubles import CHAT, make_bench
from .evaluation_doubles import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def read(tokenizer, question):
    """Return the object, the key in the question and the text of a question."""
    text = tokenizer.decode(question.prompt)
    held, asked = re.search(r"\{.*\}", text, re.S), re.search(r'One of its keys is "([^"]+)"', text)
    return json.loads(held.group()), asked.group(1), text


@pytest.mark.parametrize("length", [256, 700, 3000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chat", [False, True])
def test_the_object_is_whole_and_fills_the_length(length, depth, chat):
    tokenizer = make_tokenizer(chat_template=CHAT) if chat else make_tokenizer()
    length += 100  # this tokenizer spends a token on every character of an identifier
    bench = make_bench(tokenizer, depths=[depth], chat=chat)
    questions = KeyValue().questions(bench, length, depth)
    assert len(questions) == bench.samples
    for question in questions:
        pairs, key, text = read(tokenizer, question)
        (value,) = question.references
        assert pairs[key] == value and text.count(value) == 1
        assert all(str(uuid.UUID(each)) == each for pair in pairs.items() for each in pair)
        assert list(pairs).index(key) == round(depth * (len(pairs) - 1))
        # one pair more, of which there is one for every 2 * 36 + 6 characters, would be too long
        size = len(question.prompt) + question.budget - 1
        pair = len(tokenizer(f'"{key}": "{value}",\n')["input_ids"])
        assert length - pair - 8 <= size <= length
        assert len(tokenizer(f' "{value}"')["input_ids"]) <= question.budget


def test_the_reported_depth_is_that_of_the_pair(tokenizer):
    (question, *_) = KeyValue().questions(make_bench(tokenizer), 4000, 0.4)
    pairs, key, _ = read(tokenizer, question)
    assert question.depth == list(pairs).index(key) / (len(pairs) - 1)


def test_the_control_asks_for_the_same_pairs_in_a_smaller_object(tokenizer):
    bench = make_bench(tokenizer)
    whole, small = (KeyValue().questions(bench, 3000, 0.5, within=within) for within in (None, 800))
    for one, other in zip(whole, small, strict=True):
        (many, key, _), (few, same, _) = read(tokenizer, one), read(tokenizer, other)
        assert key == same and one.references == other.references
        assert set(few.items()) < set(many.items())
        assert len(other.prompt) + other.budget - 1 <= 800


def test_a_question_without_the_object_does_not_contain_the_value(tokenizer):
    for question in KeyValue().questions(make_bench(tokenizer), 800, 1.0):
        text = tokenizer.decode(question.without_context)
        assert read(tokenizer, question)[1] in text and question.references[0] not in text


def test_questions_depend_only_on_the_seed(tokenizer):
    def values(seed, depth):
        questions = KeyValue().questions(make_bench(tokenizer, seed=seed), 900, depth)
        return [question.references[0] for question in questions]

    assert values(0, 0.5) == values(0, 0.5)
    assert len({*values(0, 0.5), *values(1, 0.5), *values(0, 1.0)}) == 6


def test_the_answer_may_have_other_words_around_it():
    value = "c49aa54f-3dca-42dd-88d7-486c0c08122a"
    assert KeyValue().score(f' "{value}".', (value,)) == 1
    assert KeyValue().score(value[:-1], (value,)) == 0


def test_too_small_a_length_is_an_error(tokenizer):
    with pytest.raises(
        PePatchError, match=r"An object of one pair takes at least \d+ tokens .* Ask for a greater length"
    ):
        KeyValue().questions(make_bench(tokenizer), 120, 0.5)


@pytest.mark.parametrize("room", [10, 11, 999, 1000, 1001, 54_321])
@pytest.mark.parametrize(("first", "each"), [(3, 7), (10, 1), (0, 0.3), (9, 250)])
def test_the_largest_number_of_units_that_fits(room, first, each):
    """Compare with trying every number of units."""

    def size(units):
        return first + int(each * units)

    expected = max(units for units in range(200_000) if size(units) <= room)
    calls = []
    found = largest_fit(lambda units: calls.append(units) or size(units), room, 0, "it")
    assert found == expected and len(calls) < 40
