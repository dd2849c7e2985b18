"""Positions that skip: the authors' draws, every distance up to the target, and attention that is not cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pe_patch.training import trainer
from pe_patch.training.data import Corpus, PhaseData, mix_table
from pe_patch.training.data.pose import draw_chunks
from pe_patch.training.recipe import Pose, RecipeError, Source

from .cases import phase

TEXT = {"text": Source(share=1)}
NEEDLES = {"needles": Source(share=1, kind="needles", needles=(2, 2))}


def made(corpus: Any, tokenizer: Any, target: int = 256, chunks: int = 2, **options: Any) -> PhaseData:
    of = phase(**{"length": 32, "mixture": TEXT, "pose": Pose(target=target, chunks=chunks), **options})
    return PhaseData(corpus, tokenizer, of, seed=(0, 0), boundaries=True)


def test_two_chunks_are_those_of_the_authors() -> None:
    """dwzhu-pku/PoSE at a3d4ba8, src/train_pose.py, train_preprocess_function_pose after random.seed(0): a window of
    16, a target of 64 and a document of 40 tokens."""
    drawn = draw_chunks(16, 40, 64, 2, random.Random(0).randint)
    assert drawn.tokens.tolist() == [0, 1, 2, 3, 4, 5, 6, 31, 32, 33, 34, 35, 36, 37, 38, 39]
    assert drawn.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 33, 34, 35, 36, 37, 38, 39, 40, 41]
    assert np.flatnonzero(drawn.torn).tolist() == [7]


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_bounds_and_every_distance_up_to_the_target(chunks: int) -> None:
    length, document, target = 16, 50, 64
    rng = np.random.default_rng(0)
    distances, firsts, skips, ends = set(), set(), [], set()
    for _ in range(4000):
        drawn = draw_chunks(length, document, target, chunks, lambda low, high: int(rng.integers(low, high + 1)))
        positions, tokens = drawn.positions, drawn.tokens
        assert positions[0] == tokens[0] == 0 and len(positions) == len(tokens) == length
        assert (np.diff(positions) > 0).all() and positions[-1] < target
        assert (np.diff(tokens) > 0).all() and tokens[-1] < document
        assert np.array_equal(np.flatnonzero(drawn.torn), np.flatnonzero(np.diff(tokens) > 1) + 1)
        assert np.count_nonzero(np.diff(positions) > 1) <= chunks - 1
        distances |= set((positions[:, None] - positions[None])[np.tril_indices(length, -1)].tolist())
        jumps = np.flatnonzero(np.diff(positions) > 1)
        if len(jumps) == chunks - 1:
            firsts.add(int(jumps[0]) + 1)
        skips.append(int(positions[-1]) - (length - 1))
        ends.add(int(tokens[-1]))
    assert distances == set(range(1, target))
    assert firsts == set(range(1, -(-length // chunks) + 1))  # a first chunk has at most its equal part
    assert ends == set(range(min(ends), document)) and min(ends) < length + 2
    if chunks == 2:  # uniform over 0 to target - length: mean and variance
        most = target - length
        assert np.mean(skips) == pytest.approx(most / 2, rel=0.03)
        assert np.var(skips) == pytest.approx(((most + 1) ** 2 - 1) / 12, rel=0.05)


def test_a_sequence_is_one_document_with_text_and_positions_left_out(corpus: tuple[Corpus, Any]) -> None:
    data = made(*corpus)
    texts = [ids.tolist() for ids in corpus[0].documents if len(ids) >= 32]
    assert [row["documents"] for row in mix_table(data)] == [len(texts)] != [len(corpus[0].documents)]
    torn = 0
    for number in range(60):
        item = data[number]
        ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
        cuts = [place for place in range(1, 32) if labels[place] == -100]
        jumps = (np.flatnonzero(np.diff(item["position_ids"]) > 1) + 1).tolist()
        assert labels[0] == -100 and all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        assert len(cuts) < 2 and len(jumps) < 2 and (cuts == jumps or not cuts or not jumps)
        first, second = (ids[: cuts[0]], ids[cuts[0] :]) if cuts else (ids, [])
        assert any(in_order(text, first, second) for text in texts)
        torn += bool(cuts)
    assert torn > 30


def in_order(text: list[int], first: list[int], second: list[int]) -> bool:
    """Whether `first` stands in the text and `second` after it."""
    places = (at for at in range(len(text)) if text[at : at + len(first)] == first)
    after = next(places, len(text)) + len(first)
    return after <= len(text) and any(text[at : at + len(second)] == second for at in range(after, len(text) + 1))


def test_the_whole_of_a_long_document_is_used(corpus: tuple[Corpus, Any]) -> None:
    """In stretches of five windows, the last with what is left of it."""
    ids = np.arange(1000, 1000 + 5 * 32 * 3 + 31, dtype=np.int32)
    long = Corpus(["x"], corpus[1])
    long.stream, long.offsets = ids, np.array([0, len(ids)])
    data = made(long, corpus[1])
    assert len(data.sources[0]) == 3
    seen = {token for number in range(2500) for token in data[number]["input_ids"].tolist()}
    assert seen == set(ids.tolist())
    starts = {int(data[number]["input_ids"][0]) - 1000 for number in range(30)}
    assert starts == {0, 160, 320}
    long.stream, long.offsets = np.append(ids, 0), np.array([0, len(ids) + 1])
    assert len(made(long, corpus[1]).sources[0]) == 4


def test_needles_keep_their_text_and_skip_positions(corpus: tuple[Corpus, Any]) -> None:
    plain = PhaseData(*corpus, phase(length=64, mixture=NEEDLES), seed=(0, 0), boundaries=True)
    data = made(*corpus, length=64, mixture=NEEDLES)
    skipped = 0
    for number in range(40):
        item, same = data[number], plain[number]
        assert np.array_equal(item["input_ids"], same["input_ids"]) and np.array_equal(item["labels"], same["labels"])
        steps = np.diff(item["position_ids"])
        assert item["position_ids"][0] == 0 and item["position_ids"][-1] < 256
        assert (steps > 0).all() and np.count_nonzero(steps > 1) < 2
        skipped += bool((steps > 1).any())
    assert skipped > 30


def test_what_cannot_skip_is_refused(corpus: tuple[Corpus, Any]) -> None:
    with pytest.raises(RecipeError, match=r"pose\.target is 16"):
        made(*corpus, target=16)
    with pytest.raises(RecipeError, match=r"pose\.chunks is 6.*5 chunks"):
        made(*corpus, chunks=6)
    longest = max(map(len, corpus[0].documents))
    with pytest.raises(RecipeError, match=rf"no document of the text has 2,000 tokens.*{longest}.*Lower length"):
        made(*corpus, length=2000, target=4000)


def test_a_skip_cuts_attention_unless_a_mask_of_ones_is_given(corpus: tuple[Corpus, Any], model: Path) -> None:
    """Transformers takes positions that jump for packed documents; the mask tells it that they are not."""
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    data = made(*corpus)
    item = next(item for item in (data[number] for number in range(20)) if (np.diff(item["position_ids"]) > 1).any())
    second = int(np.flatnonzero(np.diff(item["position_ids"]) > 1)[0]) + 1
    batch = {key: torch.from_numpy(value)[None] for key, value in item.items()}
    changed = batch["input_ids"].clone()
    changed[:, :second] = (changed[:, :second] + 1) % 280

    def influence(**how: bool) -> float:
        with torch.no_grad():
            logits = [
                network(**trainer.model_inputs({**batch, "input_ids": ids}, **how)).logits
                for ids in (batch["input_ids"], changed)
            ]
        return float((logits[0] - logits[1])[:, second:].abs().max())

    assert influence(boundaries=True) == 0
    assert influence(boundaries=True, skips=True) > 1e-3
