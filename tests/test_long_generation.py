"""Long continuations: the measures on texts whose repetition is known, draws, and the task itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pe_patch.compare.demo import BASE
from pe_patch.errors import OptionError
from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.model import EvaluatedModel, Sampling
from pe_patch.evaluation.repetition import WordCounts, distinct_share, longest_repeat, rare_words, words_of
from pe_patch.evaluation.run import evaluate
from pe_patch.evaluation.tasks.long_generation import JUDGED, KEPT, MAIN, LongGeneration

OUTSIDE = "words outside the longest repeated span"


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(BASE).eval(), AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def prompts(demo):
    corpus = Corpus.load(demo[1], "stdlib", 4000)
    return [np.array(corpus.stream[start : start + 24]) for start in (0, 500, 900, 2000)]


@pytest.mark.parametrize(
    ("text", "distinct", "longest"),
    [
        ("a b c a b c", {1: 3 / 6, 2: 3 / 5, 4: 3 / 3}, 3),
        ("a b c d e f", {1: 1, 2: 1, 4: 1}, 0),
        ("x " * 10, {1: 1 / 10, 2: 1 / 9, 4: 1 / 7}, 5),
        ("one two. One two! And then one two.", {1: 6 / 11, 2: 7 / 10}, 3),
        ("word", {1: 1, 2: 0}, 0),
        ("", {1: 0, 4: 0}, 0),
    ],
)
def test_repetition_counted_by_hand(text: str, distinct: dict[int, float], longest: int) -> None:
    words = words_of(text)
    assert {size: distinct_share(words, size) for size in distinct} == pytest.approx(distinct)
    assert longest_repeat(words) == longest


def test_the_longest_repeat_is_the_longest_of_all_pairs_of_spans() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 3, 8):
        words = [str(number) for number in rng.integers(0, size, 40)]
        expected = max(
            length
            for length in range(21)
            for first in range(40 - length + 1)
            for second in range(first + length, 40 - length + 1)
            if words[first : first + length] == words[second : second + length]
        )
        assert longest_repeat(words) == expected


def test_rare_words_counted_by_hand() -> None:
    prompt = "Odysseus met Circe. Circe sang, and the the wind, the wind sang to Odysseus; ab12 ab12"
    texts = [prompt, *(f"the wind {number} and other things" for number in range(1999))]
    counts = WordCounts.of(texts)
    assert counts.size == 2000 and counts.texts["wind"] == 2000 and counts.words["wind"] == 2001
    assert rare_words(words_of(prompt), counts) == {"odysseus", "circe", "sang"}


def test_draws_follow_the_softmax_of_transformers_warpers() -> None:
    torch.manual_seed(0)
    logits, count = torch.randn(6), 20_000
    drawn = torch.zeros(6)
    processors = Sampling(0.7, 0.9, seed=3).processors(range(count), 1)
    taken = processors(torch.zeros(count, 1, dtype=torch.long), logits.repeat(count, 1)).argmax(-1)
    drawn.scatter_add_(0, taken, torch.ones(count))
    probabilities, order = (logits / 0.7).softmax(-1).sort(descending=True)
    kept = probabilities * (probabilities.cumsum(0) - probabilities < 0.9)
    expected = torch.zeros(6).scatter(0, order, kept / kept.sum())
    assert (expected == 0).any() and torch.equal(drawn == 0, expected == 0)
    assert ((drawn / count - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_a_text_is_continued_the_same_way_in_every_batch(demo, prompts) -> None:
    alone, together = (
        EvaluatedModel(*demo, batch_size=size).continuations(prompts, 20, Sampling(1.0, 0.95, 5)) for size in (1, 4)
    )
    assert alone == together and len({*map(tuple, alone)}) == 4 and {*map(len, alone)} == {20}
    other = EvaluatedModel(*demo).continuations(prompts, 20, Sampling(1.0, 0.95, 6))
    assert other != alone


def test_temperature_zero_is_greedy_and_the_end_is_suppressed(demo, prompts) -> None:
    model, tokenizer = demo
    subject = EvaluatedModel(model, tokenizer)
    found = subject.continuations(prompts, 16, Sampling(temperature=0))
    ends = list(subject.end_tokens)
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = torch.tensor(prompt)[None]
        for token in continuation:
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            logits[ends] = -torch.inf
            assert int(logits.argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_the_task_measures_the_model_and_the_real_text(demo, tmp_path: Path) -> None:
    model, tokenizer = demo
    task = LongGeneration(tokens=40, texts=3, judge=(model, tokenizer))
    results = evaluate(
        model,
        tokenizer,
        [task],
        [120, 200],
        text="stdlib",
        beyond_window=True,
        retrieval=False,
        output=tmp_path / "out",
    )
    shown = {row.measure for row in results.rows}
    both = {MAIN, OUTSIDE, JUDGED}
    assert shown - {KEPT, f"{KEPT}, of the real text"} == both | {f"{name}, of the real text" for name in both}
    real = [results.select(length=length, measure=f"{MAIN}, of the real text")[0].score for length in (120, 200)]
    assert real[0] == real[1], "all lengths continue at the same places"
    (row,) = results.select(length=200, measure=MAIN)
    assert row.samples == 3 and row.details["tokens_per_second"] > 0 and row.tokens == 200
    (judged,) = results.select(length=200, measure=f"{JUDGED}, of the real text")
    corpus = Corpus.load(tokenizer, "stdlib", 4 * 200)
    spots, losses = corpus.spots(200, 40, 3, 0)[0], []
    (written,) = results.select(length=200, measure=f"{MAIN}, of the real text")
    expected = [distinct_share(words_of(tokenizer.decode(spot[-40:])), 4) for spot in spots]
    assert written.details["scores"] == pytest.approx(expected)
    for spot in spots:
        with torch.no_grad():
            logits = model(torch.tensor(spot)[None]).logits[0]
        losses.append(float(F.cross_entropy(logits[-41:-1], torch.tensor(spot[-40:]))))
    # Text that is decoded and tokenised again may have other tokens at the ends of the pieces.
    assert judged.score == pytest.approx(sum(losses) / 3, rel=0.1)
    assert judged.samples == pytest.approx(3 * 40, rel=0.1) and not results.select(task="needle")


def test_what_the_task_refuses(demo) -> None:
    for options, said in (
        ({"tokens": 0}, "tokens must be at least 1"), ({"texts": 0}, "texts"), ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"), ({"judge": 5}, "judge must be a folder"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            LongGeneration(**options)
    with pytest.raises(OptionError, match=r"128 tokens leaves 0 .* at least 2064, .* tokens=64"):
        evaluate(*demo, "long_generation", [128], text="stdlib", retrieval=False)
