"""LongPPL: key tokens, their spans in another tokenizer, and the score, by hand and in plain torch."""

import logging
import math

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pe_patch.errors import PePatchError
from pe_patch.evaluation import longppl
from pe_patch.evaluation.model import EvaluatedModel
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.run import evaluate

from .evaluation_doubles import make_tokenizer, tiny_llama
from .test_perplexity import TEXT, losses_of, measure


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<eos>")


@pytest.fixture(scope="module")
def llama(tokenizer):
    return tiny_llama(len(tokenizer)).double()


def test_key_tokens_by_hand():
    short = np.array([4.0, 5.0, 5.0, 1.0, 9.0, 3.9, 3.0])
    whole = np.array([1.9, 2.0, 2.1, 0.5, 0.1, 1.95, 1.0])
    # helped by 2.1; loss not below 2, twice; not helped; helped by 8.9; by 1.95 only; by 2 and no more
    assert longppl.is_key_token(short, whole).tolist() == [True, False, False, False, True, False, False]


class Counting(EvaluatedModel):
    """A model whose loss of a token is the number of tokens before it."""

    def losses(self, sequences, targets):
        return np.array([[len(ids) - targets + i for i in range(targets)] for ids in sequences], dtype=float)


def test_neighbours_share_a_short_context():
    counted = longppl.short_context_losses(Counting(None, None), np.arange(9), short_context=4, shared_context=2)
    assert counted.tolist() == [4, 5, 4, 5, 4]
    assert longppl.short_context_losses(Counting(None, None), np.arange(12), 4, 5).tolist() == [4, 5, 6, 7, 8, 4, 5, 6]


def test_touching_spans_are_merged():
    assert longppl.merge_spans([(0, 3), (3, 5), (6, 7), (6, 7), (9, 9)]) == [(0, 5), (6, 7), (9, 9)]
    assert longppl.merge_spans([]) == []


def split_by(pattern):
    """Make a tokenizer with a token per match and per piece between two matches."""
    text = "red river runs red"
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    vocabulary = dict.fromkeys(piece for piece, _ in splitter.pre_tokenize_str(text))
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate([*vocabulary, "?"])}, unk_token="?"))
    backend.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def test_key_tokens_are_mapped_by_their_characters():
    text = "red river runs red"
    #       0  3 4   9 10 14
    _, words = longppl._encode_with_offsets(split_by(" "), text)
    _, letters = longppl._encode_with_offsets(split_by("."), text)
    assert words == [(0, 3), (3, 4), (4, 9), (9, 10), (10, 14), (14, 15), (15, 18)] and len(letters) == 18
    # a judge of words: "river" and the space behind it
    places = longppl.merge_spans([words[2], words[3]])
    assert places == [(4, 10)]
    assert np.flatnonzero(longppl.inside_spans(letters, places)).tolist() == [4, 5, 6, 7, 8, 9]
    # a judge of letters that lacks the last one of "river", and has all of the last "red"
    places = longppl.merge_spans([letters[i] for i in (4, 5, 6, 7, 15, 16, 17)])
    assert np.flatnonzero(longppl.inside_spans(words, places)).tolist() == [6]
    assert not longppl.inside_spans(words, []).any()


class Remembering(EvaluatedModel):
    """A model that predicts "river" and the last "red" well only if it has read the first token of the text."""

    def losses(self, sequences, targets):
        start, helped = self.tokenizer("runs red river")["input_ids"][0], {11, 12, 16}
        rows = []
        for ids in sequences:
            known = ids[0] == start
            places = range(int(ids[-1]) - targets + 1, int(ids[-1]) + 1)
            rows.append([(0.5 if known else 3.0) if place in helped else 1.0 for place in places])
        return np.array(rows)


def test_the_judges_key_tokens_by_hand(monkeypatch):
    # Tokens are numbered, so that a stand-in for the judge knows where it is; 11, 12 and 16 need the first token.
    numbered = [(3 * i, 3 * i + 2) for i in range(20)]
    monkeypatch.setattr(longppl, "_encode_with_offsets", lambda *_: (np.arange(20), numbered))
    judge = Remembering(tiny_llama(20), None)
    monkeypatch.setattr(judge, "tokenizer", lambda text: {"input_ids": [0]})
    places, count = longppl.key_token_spans(judge, "", short_context=4, shared_context=2)
    assert (places, count) == ([(33, 35), (36, 38), (48, 50)], 3)
    # with a short context that reaches back to the first token nothing is helped
    assert longppl.key_token_spans(judge, "", short_context=4, shared_context=20) == ([], 0)
    assert longppl.key_token_spans(judge, "", short_context=20, shared_context=2) == ([], 0)


def test_a_text_beyond_the_judges_window_raises(tokenizer):
    judge = EvaluatedModel(tiny_llama(len(tokenizer), window=32), tokenizer)
    with pytest.raises(PePatchError, match="beyond its window of 32"):
        longppl.key_token_spans(judge, TEXT[0], 8, 4)


def whole_longppl(model, tokenizer, judge, judges_tokenizer, texts, context, shared):
    """Compute LongPPL in plain torch, with a forward pass per short context and a mask of characters."""
    scored = []
    for text in texts:
        given = judges_tokenizer(text, return_offsets_mapping=True)
        ids, whole = given["input_ids"], losses_of(judge, given["input_ids"])
        marked = np.zeros(len(text), dtype=bool)
        for target in range(context, len(ids)):
            start = (target - context) // shared * shared
            short = losses_of(judge, ids[start : target + 1])[-1]
            if short - whole[target - 1] > longppl.MIN_GAIN and whole[target - 1] < longppl.MAX_LOSS:
                marked[slice(*given["offset_mapping"][target])] = True
        given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        losses = losses_of(model, given["input_ids"])
        scored += [
            losses[i - 1] for i, place in enumerate(given["offset_mapping"]) if i and marked[slice(*place)].all()
        ]
    return math.exp(np.mean(scored)), len(scored)


@pytest.mark.parametrize("own", [True, False])
def test_longppl_equals_plain_torch(llama, tokenizer, monkeypatch, own):
    # Random weights never gain 2 nats from context, so the thresholds are lower here.
    monkeypatch.setattr(longppl, "MIN_GAIN", 0.05)
    monkeypatch.setattr(longppl, "MAX_LOSS", 6.0)
    letters = PreTrainedTokenizerFast(tokenizer_object=split_letters(), unk_token="?")
    judge = (llama, tokenizer) if own else (tiny_llama(len(letters), window=400, seed=3).double(), letters)
    options = {} if own else {"judge": judge}
    (row,) = measure(llama, tokenizer, 64, measures="longppl", short_context=16, shared_context=4, windows=2, **options)
    chosen = np.random.default_rng([0, 64]).permutation(3)[:2]
    texts = []
    for index in chosen:
        places = tokenizer(TEXT[index], return_offsets_mapping=True)["offset_mapping"]
        texts.append(TEXT[index][: places[63][1]])
    expected, count = whole_longppl(llama, tokenizer, *judge, texts, 16, 4)
    assert row.score == pytest.approx(expected, rel=1e-6)
    assert row.samples == row.details["key_tokens"] == count and 0 < count < row.details["scored_tokens"] == 126
    assert (row.details["judge"] == "the evaluated model") == own
    assert row.low < row.score < row.high and row.control == row.score
    assert f"{count} key tokens" in row.measured_on


def test_the_control_scores_the_same_tokens_within_a_shorter_window(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(longppl, "MIN_GAIN", 0.05)
    monkeypatch.setattr(longppl, "MAX_LOSS", 6.0)
    task = Perplexity(measures="longppl", short_context=8, shared_context=4, windows=1)
    options = {"text": TEXT[:1], "progress": False, "retrieval": False}
    (row,) = evaluate(llama, tokenizer, task, 64, control_length=32, **options).rows
    ids = tokenizer(TEXT[0])["input_ids"][:64]
    whole, scored = losses_of(llama, ids), []
    for target in range(8, 64):
        start = (target - 8) // 4 * 4
        if losses_of(llama, ids[start : target + 1])[-1] - whole[target - 1] > 0.05 and whole[target - 1] < 6.0:
            end = max(32, 32 + 4 * math.ceil((target - 31) / 4))  # the window of 32 that reaches it, moved by fours
            scored.append(losses_of(llama, ids[end - 32 : target + 1])[-1])
    assert row.samples == len(scored) > 5 and row.control_length == 32
    assert row.control == pytest.approx(math.exp(np.mean(scored)), rel=1e-6) != row.score


def split_letters():
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz \n?")}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return backend


def test_longppl_without_key_tokens_has_no_row(llama, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "pe_patch"):
        assert measure(llama, tokenizer, 64, measures="longppl") == []
    assert "no token" in caplog.text


def test_the_name_of_the_judge_changes_with_its_weights(tokenizer):
    names = [repr(Perplexity(measures="longppl", judge=(tiny_llama(448, seed=seed), tokenizer))) for seed in (0, 1, 0)]
    assert names[0] == names[2] != names[1]
