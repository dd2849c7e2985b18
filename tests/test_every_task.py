"""Test every retrieval task at every length with three models.

A model that reads the whole prompt gets the full score, a model without answers gets none, and a model with half of the
prompt gets less than the full score.
"""

import numpy as np
import pytest
from transformers import AutoTokenizer

from pe_patch.compare.demo import BASE
from pe_patch.data.text import load_documents
from pe_patch.errors import PePatchError
from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.model import EvaluatedModel
from pe_patch.evaluation.run import evaluate
from pe_patch.evaluation.tasks import TASKS
from pe_patch.evaluation.tasks.code import CODE
from pe_patch.evaluation.tasks.key_value import KEY_VALUE
from pe_patch.evaluation.tasks.ruler import RULER

from .evaluation_doubles import DoubleConfig, Mute, _Double, make_tokenizer

TAIL = 16
"""Tokens that are compared first."""


class Reader(_Double):
    """A model that knows the right answer, and gives it only if the ids that it gets contain the answer.

    It reads only the last `config.sees` ids, as a pipeline that truncates would leave them.
    """

    def __init__(self, config, tokenizer, score):
        super().__init__(config)
        self.tokenizer, self.score, self.asked = tokenizer, score, []

    def knows(self, questions):
        """Set the next questions, each with the tokens of an answer that scores 1."""
        self.asked = [(question, self.answer(question)) for question in questions]

    def answer(self, question):
        for text in (question.references[0], *(joint.join(question.references) for joint in (", ", " ", ""))):
            for written in (text, f" {text}", f"\n{text}", f"{text})"):
                ids = self.tokenizer(written, add_special_tokens=False)["input_ids"]
                if len(ids) <= question.budget and self.score(written, question.references) == 1.0:
                    return ids
        raise AssertionError(f"no answer of {question.budget} tokens is right: {question.references}")

    def next_token(self, ids):
        ids = ids[-self.config.sees :]
        for question, answer in self.asked:
            prompt = question.prompt.tolist()
            for given in range(len(answer) + 1):
                if ids[-TAIL:] != (prompt[-TAIL:] + answer[:given])[-TAIL:]:
                    continue  # most questions differ there already
                whole = prompt + answer[:given]
                size = min(len(ids), len(whole))
                if ids[-size:] == whole[-size:]:
                    read = self.tokenizer.decode(ids[-size : len(ids) - given])
                    text = read.replace(self.tokenizer.decode(question.without_context), "")
                    found = all(reference.lower() in text.lower() for reference in needed(question, self.score))
                    return answer[given] if found and given < len(answer) else self.tokenizer.eos_token_id
        return self.tokenizer.eos_token_id


def needed(question, score):
    """Return the references that an answer must contain: the first one if any of them counts, else all."""
    return question.references[:1] if score(question.references[0], question.references) == 1.0 else question.references


def reader(tokenizer, task, sees=10**9):
    config = DoubleConfig(vocab_size=len(tokenizer), max_position_embeddings=1 << 20, num_hidden_layers=1, sees=sees)
    return Reader(config, tokenizer, task.score).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return Corpus.load(tokenizer, load_documents("stdlib", split="test", limit=12), needed=40_000)


LENGTHS = {"english": (1500, 6000), "own": (1500, 6000), "tokens": (256, 700)}
CASES: list[tuple[str, dict]] = [
    *((name, {"wording": "english"}) for name in ("needle", "passkey", "needle_single", "needle_multi_key")),
    *((name, {"wording": "english"}) for name in ("needle_multi_value", "needle_multi_query")),
    *((name, {"wording": "tokens"}) for name in ("needle", "passkey", "needle_single", "needle_multi_query")),
    *((name, {"wording": "own"}) for name in RULER if name not in ("qa_1", "qa_2")),
    *((name, {"wording": "tokens"}) for name in ("niah_single_1", "niah_multikey_1", "niah_multiquery")),
    *((name, {}) for name in (*KEY_VALUE, *CODE)),
]


SCATTERED = {"cwe", "fwe", "qa_local_1"}
"""Tasks whose answers, or similar words, occur all over the text, so that half of it may suffice."""


def measured(model, tokenizer, name, options, corpus, monkeypatch, **more):
    real = EvaluatedModel.answers

    def tells(self, questions):
        if isinstance(model, Reader):
            model.knows(questions)
        return real(self, questions)

    monkeypatch.setattr(EvaluatedModel, "answers", tells)
    lengths = LENGTHS["tokens" if options.get("wording") == "tokens" else "english"]
    settings = {"samples": 3, "depths": (0.0, 0.5, 1.0), "control_length": lengths[0], "batch_size": 2} | more
    return evaluate(
        model, tokenizer, name, lengths, text=corpus, task_options=options, progress=False, retrieval=False, **settings
    )


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_reader_gets_the_full_score_and_a_silent_model_none(tokenizer, corpus, name, options, monkeypatch):
    task = TASKS[name](**options)
    results = measured(reader(tokenizer, task), tokenizer, name, options, corpus, monkeypatch)
    assert {(row.score, row.control, row.length >= row.tokens - 1) for row in results.rows} == {(1.0, 1.0, True)}
    assert {row.length for row in results.rows} == set(LENGTHS[options.get("wording", "english")])
    config = DoubleConfig(vocab_size=len(tokenizer), max_position_embeddings=1 << 20, num_hidden_layers=1, sees=10**9)
    silent = measured(Mute(config).eval(), tokenizer, name, options, corpus, monkeypatch)
    assert {(row.score, row.control) for row in silent.rows} == {(0.0, 0.0)}


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in SCATTERED], ids=str)
def test_a_reader_of_half_the_prompt_gets_less(tokenizer, corpus, name, options, monkeypatch):
    task = TASKS[name](**options)
    cut = reader(tokenizer, task, sees=LENGTHS[options.get("wording", "english")][0] // 2)
    results = measured(cut, tokenizer, name, options, corpus, monkeypatch)
    assert min(row.score for row in results.rows) < 1.0


def test_a_window_too_small_is_an_error(tokenizer, corpus, monkeypatch):
    """Test one task: the check runs before any task sees the model."""
    name, options = CASES[0]
    model = reader(tokenizer, TASKS[name](**options))
    model.config.max_position_embeddings = 128
    with pytest.raises(PePatchError, match="beyond the model's window of 128"):
        measured(model, tokenizer, name, options, corpus, monkeypatch)


def test_a_truncating_tokenizer_is_an_error(corpus):
    cutting = make_tokenizer()
    inner = cutting._encode_plus

    def cuts(*args, **kwargs):
        found = inner(*args, **kwargs)
        return found if len(np.shape(found["input_ids"])) > 1 else type(found)({"input_ids": found["input_ids"][:500]})

    cutting._encode_plus = cuts
    with pytest.raises(PePatchError, match="The tokenizer cut a document"):
        evaluate(
            reader(cutting, TASKS["needle"]()), cutting, "needle", [256], text=corpus.texts, progress=False, samples=2
        )
