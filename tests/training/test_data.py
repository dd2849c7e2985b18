"""What a phase is made of: sources by share, each gone through in order, and the same sequence at each number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pe_patch.training.data import Corpus, PhaseData, first_tokens, micro_batches, mix_notes, mix_table, mixture
from pe_patch.training.recipe import Phase, RecipeError, Source

from .cases import phase


def texts(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.iterdir())]


def made(corpus: Any, tokenizer: Any, of: Phase, seed: tuple[int, ...] = (0, 0), boundaries: bool = True) -> PhaseData:
    return PhaseData(corpus, tokenizer, of, seed=seed, boundaries=boundaries)


def documents_of(item: dict[str, np.ndarray]) -> list[tuple[int, ...]]:
    """The pieces of documents in a packed sequence, without its padding."""
    ids, starts = item["input_ids"], np.flatnonzero(item["position_ids"] == 0)
    pieces = [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return [tuple(piece.tolist()) for piece in pieces if piece.any()]  # 0 is the padding


# Needles


def test_needles_are_asked_for_and_only_what_can_be_known_is_a_target(corpus: tuple[Corpus, Any]) -> None:
    vocabulary = corpus[1].get_vocab()
    keys = {vocabulary[f"<k{index}>"] for index in range(64)}
    sources = {"needles": Source(share=1, kind="needles", needles=(3, 3))}
    data = made(*corpus, phase(mixture=sources))
    orders = set()
    for number in range(30):
        row = data[number]
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        hidden = {ids[place]: ids[place + 1] for place in range(58) if ids[place] in keys}
        assert len(ids) == 64 and len(hidden) == 3
        assert [hidden[key] for key in ids[58::2]] == ids[59::2] == labels[59::2]
        assert not keys & set(labels)
        orders.add(tuple(list(hidden).index(key) for key in ids[58::2]))
    assert len(orders) > 3  # asked for in another order each time
    sources["needles"].targets = "answers"
    assert sum(label != -100 for label in data[0]["labels"]) == 3


# Order


def test_order_is_a_function_of_seed_and_step_alone(corpus: tuple[Corpus, Any]) -> None:
    sources = {"text": Source(share=0.5), "needles": Source(share=0.5, kind="needles", needles=(1, 3))}

    def batches(seed: int = 0, first_step: int = 0, rank: int = 0, world: int = 1, **more: Any) -> list[torch.Tensor]:
        data = made(*corpus, phase(mixture=sources, **more), seed=(seed, 0))
        steps = micro_batches(data, first_step=first_step, rank=rank, world=world)
        return [torch.cat([batch["input_ids"] for batch in step]) for step in steps]

    whole = batches()
    assert len(whole) == 6 and all(torch.equal(a, b) for a, b in zip(whole[4:], batches(first_step=4), strict=True))
    assert not torch.equal(whole[0], batches(seed=1)[0])
    for one, first, second in zip(whole, batches(rank=0, world=2), batches(rank=1, world=2), strict=True):
        assert sorted(one.tolist()) == sorted(first.tolist() + second.tolist())
    with pytest.raises(RecipeError, match="multiple of 3"):
        batches(world=3)


def test_a_number_is_the_same_sequence_whatever_was_asked_for_before(
    corpus: tuple[Corpus, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "BLOCK", 32)
    sources = {"text": Source(share=3), "needles": Source(share=1, kind="needles"), "more": Source(share=1)}
    straight, jumping = (made(*corpus, phase(mixture=sources)) for _ in range(2))
    items = [straight[number] for number in range(200)]
    for number in [199, 0, *np.random.default_rng(0).permutation(200)[:60].tolist()]:
        assert all(np.array_equal(items[number][key], value) for key, value in jumping[number].items())


def test_an_epoch_has_every_row_once(corpus: tuple[Corpus, Any]) -> None:
    data = made(*corpus, phase(), boundaries=False)
    stream = corpus[0].stream
    count = len(stream) // 64
    epochs = [np.sort([data[epoch * count + row]["input_ids"] for row in range(count)], 0) for epoch in (0, 1)]
    rows = np.sort(stream[: count * 64].reshape(-1, 64), 0)
    assert np.array_equal(epochs[0], rows) and np.array_equal(epochs[1], rows)
    assert not np.array_equal(data[0]["input_ids"], data[count]["input_ids"])


def test_each_source_of_a_mixture_is_gone_through_in_epochs_of_its_own(corpus: tuple[Corpus, Any]) -> None:
    """However small its share: no document comes a third time before all came twice."""
    sources = {"long": Source(share=0.2, min_length=120), "needles": Source(share=0.8, kind="needles")}
    data = made(*corpus, phase(mixture=sources))
    long = {tuple(ids.tolist()) for ids in corpus[0].documents if len(ids) >= 120}
    pieces = Counter(piece for ids in long for piece in (ids[at : at + 64] for at in range(0, len(ids), 64)))
    seen: Counter[tuple[int, ...]] = Counter()
    drawn = 0
    for number in range(4000):
        if data.turns[number][0] == 0:
            drawn += 1
            seen.update(documents_of(data[number]))
            if drawn == 2 * len(data.sources[0]):
                break
    assert seen == Counter({piece: 2 * times for piece, times in pieces.items()})


def test_the_first_tokens_are_those_of_the_first_sequences(corpus: tuple[Corpus, Any]) -> None:
    data = made(*corpus, phase())
    rows = first_tokens(data, 200)
    assert sum(map(len, rows)) == 200
    for number, row in enumerate(rows):
        assert row == data[number]["input_ids"][: len(row)].tolist() and 0 not in row


# Mixture


def test_sequences_come_from_their_sources_by_share(text: Path, corpus: tuple[Corpus, Any]) -> None:
    tokenizer = corpus[1]
    first, second = Corpus(texts(text)[:60], tokenizer), Corpus(texts(text)[60:], tokenizer)
    sources = {"a": Source(share=3), "b": Source(share=1, source="other", text_column="body")}
    data = made({(None, None): first, ("other", "body"): second}, tokenizer, phase(mixture=sources, length=512))
    own = [{tuple(ids.tolist()) for ids in each.documents} for each in (first, second)]
    counts = [0, 0]
    for number in range(2000):
        source = data.turns[number][0]
        counts[source] += 1
        if number < 100:
            assert set(documents_of(data[number])) <= own[source]
    assert abs(counts[0] - 1500) < 4 * (2000 * 0.75 * 0.25) ** 0.5


def test_only_documents_of_the_least_length_are_taken(corpus: tuple[Corpus, Any]) -> None:
    long = {tuple(ids.tolist()) for ids in corpus[0].documents if len(ids) >= 100}
    assert 0 < len(long) < 100
    data = made(*corpus, phase(length=512, mixture={"long": Source(share=1, min_length=100)}))
    rows = len(data.sources[0])
    packed = Counter(piece for number in range(rows) for piece in documents_of(data[number]))
    assert packed == Counter(long)
    joined = made(*corpus, phase(length=512, mixture={"long": Source(share=1, min_length=100)}), boundaries=False)
    stream = [token for ids in corpus[0].documents if len(ids) >= 100 for token in ids.tolist()]
    rows = [stream[at : at + 512] for at in range(0, len(stream) - 511, 512)]
    assert sorted(joined[number]["input_ids"].tolist() for number in range(len(rows))) == sorted(rows)


def test_a_mix_says_what_is_drawn_and_how_often_it_is_seen(corpus: tuple[Corpus, Any]) -> None:
    lengths = [len(ids) for ids in corpus[0].documents]
    sources = {
        "all": Source(share=0.5), "long": Source(share=0.25, min_length=100),
        "needles": Source(share=0.25, kind="needles", needles=(1, 2)),
    }  # fmt: skip
    data = made(*corpus, phase(length=128, steps=50, mixture=sources))
    rows = {row["source"]: row for row in mix_table(data)}
    drawn = Counter(data.turns[number][0] for number in range(200))
    assert [row["sequences"] for row in rows.values()] == [drawn[0], drawn[1], drawn[2]]
    assert [row["share"] for row in rows.values()] == [0.5, 0.25, 0.25]
    long = [length for length in lengths if length >= 128]
    assert (rows["all"]["documents"], rows["all"]["tokens"]) == (len(lengths), sum(lengths))
    assert rows["all"]["long_documents"] == len(long)
    assert rows["all"]["long_share"] == pytest.approx(sum(long) / sum(lengths), abs=1e-3)
    assert rows["long"]["tokens"] == sum(length for length in lengths if length >= 100)
    # What the sequences really hold, against what was foretold from whole epochs.
    for index, row in enumerate(rows.values()):
        held = sum(
            int(sum(map(len, documents_of(data[number])))) if row["kind"] == "text" else 128
            for number in range(200) if data.turns[number][0] == index
        )  # fmt: skip
        assert row["drawn"] == pytest.approx(held, rel=0.03)
        assert row["times_seen"] == pytest.approx(row["drawn"] / row["tokens"], abs=1e-3)
    most = sorted(lengths)[-9]
    (note,) = mix_notes(made(*corpus, phase(length=most)))
    share = sum(length for length in lengths if length >= most) / sum(lengths)
    assert 0 < share < 0.5 and f"{100 * share:.1f} %" in note and f"min_length={most}" in note
    assert mix_notes(made(*corpus, phase(length=32))) == []


def test_what_cannot_be_drawn_is_refused_with_what_there_is(corpus: tuple[Corpus, Any]) -> None:
    lengths = [len(ids) for ids in corpus[0].documents]
    with pytest.raises(RecipeError) as caught:
        made(*corpus, phase(mixture={"long": Source(share=1, min_length=5000)}))
    for said in ("mixture.long", "5,000", f"{max(lengths):,}", f"{sum(lengths):,}", "min_length"):
        assert said in str(caught.value)
    with pytest.raises(RecipeError, match=r"mixture\.n\.min_length"):
        made(*corpus, phase(mixture={"n": Source(share=1, kind="needles", min_length=9)}))
    with pytest.raises(RecipeError, match=rf"{sum(lengths):,} tokens, fewer than one sequence of 100,000"):
        made(*corpus, phase(length=100_000), boundaries=False)
