"""Every training row begins as the tokenizer begins a text, and still trains each token of the documents once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import pe_patch
from pe_patch.training import trainer
from pe_patch.training.data import Corpus, PhaseData, first_tokens, pack
from pe_patch.training.recipe import Pose, RecipeError, Source

from .cases import phase
from .test_data import texts

IGNORED = -100


@pytest.fixture
def tokenizer(model: Path) -> Any:
    """Return a tokenizer that begins every text with a BOS token, as those of Llama and Gemma do."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = "<k1>"
    tokenizer.add_bos_token = True
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id is not None
    return tokenizer


def build(text: Path, tokenizer: Any, *, bos: bool = True, boundaries: bool = True, **options: Any) -> PhaseData:
    corpus = Corpus(texts(text), tokenizer, bos=bos)
    return PhaseData(corpus, tokenizer, phase(**options), seed=(0, 0), boundaries=boundaries)


def bare(text: Path, tokenizer: Any) -> list[list[int]]:
    """Return the tokenizer's ids of each document, without BOS and with EOS."""
    return [[*tokenizer(each, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for each in texts(text)]


def pieces_of(item: dict[str, np.ndarray], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ids and labels of the documents in a row, without its padding."""
    starts = [int(at) for at in np.flatnonzero(item["position_ids"] == 0) if at < size]
    stops = [*starts[1:], size]
    return [(item["input_ids"][a:b], item["labels"][a:b]) for a, b in zip(starts, stops, strict=True)]


@pytest.mark.parametrize("bos", [True, False])
def test_every_document_in_a_packed_row_begins_with_bos(text: Path, tokenizer: Any, bos: bool) -> None:
    data, mark = build(text, tokenizer, bos=bos), tokenizer.bos_token_id
    content: Counter[tuple[int, ...]] = Counter()
    targets = 0
    for number in range(len(data.sources[0])):
        item = data[number]
        size = data.size(number)
        assert (item["labels"][size:] == IGNORED).all() and len(item["input_ids"]) == 64
        targets += int((item["labels"] != IGNORED).sum())
        for ids, labels in pieces_of(item, size):
            assert (ids[0] == mark) == bos and mark not in ids[1:]
            assert labels[0] == IGNORED and (labels[2:] == ids[2:]).all()
            content[tuple(ids[1 if bos else 0 :].tolist())] += 1
    documents = bare(text, tokenizer)
    # A row holds 64 tokens with BOS, so a document of n tokens is cut every 63.
    room = 63 if bos else 64
    assert content == Counter(tuple(ids[at : at + room]) for ids in documents for at in range(0, len(ids), room))
    # The first token of a document follows BOS. The first token of a later piece follows a token that is not shown.
    cuts = sum(-(-len(ids) // room) for ids in documents)
    assert targets == sum(map(len, documents)) - (cuts - len(documents) if bos else cuts)


@pytest.mark.parametrize("bos", [True, False])
def test_contiguous_rows_begin_with_bos(text: Path, tokenizer: Any, bos: bool) -> None:
    data, mark = build(text, tokenizer, bos=bos, boundaries=False), tokenizer.bos_token_id
    stream = [token for ids in bare(text, tokenizer) for token in ([mark, *ids] if bos else ids)]
    source = data.sources[0]
    stride = 63 if bos else 64
    assert len(source) == (len(stream) - bos) // stride
    for row in range(len(source)):
        item = source.item(row, np.random.default_rng(0))
        ids, labels = item["input_ids"].tolist(), item["labels"]
        begin = row * stride
        at_document = begin == 0 or stream[begin] == mark
        if not bos or at_document:
            assert ids == stream[begin : begin + 64] and labels[0] == IGNORED and (labels[1:] == ids[1:]).all()
        else:
            assert ids == [mark, *stream[begin : begin + 63]]
            assert (labels[:2] == IGNORED).all() and (labels[2:] == ids[2:]).all()
        assert (ids[0] == mark) == bos


def test_a_contiguous_row_at_the_start_of_a_document_has_one_bos(tokenizer: Any) -> None:
    corpus = Corpus(["a"] * 10, tokenizer)  # rows of BOS, a, EOS, so that every third row begins with a document
    data = PhaseData(corpus, tokenizer, phase(length=5), seed=(0,), boundaries=False).sources[0]
    rows = [data.item(row, np.random.default_rng(0)) for row in range(len(data))]
    one, eos, mark = (tokenizer(each, add_special_tokens=False)["input_ids"][0] for each in ("a", "<eos>", "<k1>"))
    assert rows[0]["input_ids"].tolist() == [mark, one, eos, mark, one]
    assert rows[1]["input_ids"].tolist() == [mark, one, eos, mark, one]
    assert rows[1]["labels"].tolist() == [IGNORED, IGNORED, eos, mark, one]
    assert rows[3]["input_ids"].tolist() == [mark, one, eos, mark, one] and rows[3]["labels"][1] == one
    counted = Counter(int(each) for row in rows for each in row["labels"] if each != IGNORED)
    assert counted[eos] == 7  # at 2, 5, 11, 14, 17, 23 and 26; those at 8 and 20 begin a row


@pytest.mark.parametrize("bos", [True, False])
def test_a_pose_row_begins_with_bos_at_position_zero(text: Path, tokenizer: Any, bos: bool) -> None:
    corpus = Corpus([" ".join(texts(text))], tokenizer, bos=bos)
    data = PhaseData(corpus, tokenizer, phase(pose=Pose(target=256)), seed=(0,), boundaries=True)
    mark, source, document = tokenizer.bos_token_id, data.sources[0], corpus.stream
    assert len(source) > 5
    for row in range(len(source)):
        item = source.item(row, np.random.default_rng(row))
        ids, labels, positions = item["input_ids"], item["labels"], item["position_ids"]
        assert len(ids) == 64 and (ids[0] == mark) == bos and mark not in ids[1:]
        assert positions[0] == 0 and (np.diff(positions) > 0).all() and positions[-1] < 256
        hidden = int(bos and row > 0)  # the first stretch begins with the document and its own BOS
        assert (labels[: 1 + hidden] == IGNORED).all()
        first = ids[hidden]
        assert first == document[row * 5 * 64]  # chunks of a stretch begin at its first token


@pytest.mark.parametrize("bos", [True, False])
def test_needles_begin_with_bos(text: Path, tokenizer: Any, bos: bool) -> None:
    data = build(text, tokenizer, bos=bos, mixture={"n": Source(share=1, kind="needles", needles=(1, 2))})
    assert all((data[number]["input_ids"][0] == tokenizer.bos_token_id) == bos for number in range(5))


def test_packed_rows_with_bos_train_as_separate_documents_do(text: Path, tokenizer: Any, model: Path) -> None:
    """Loss of a packed batch, against each piece alone after a BOS, in float64."""
    network: Any = AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.0).double().eval()
    pe_patch.patch_model(network, "yarn", factor=4)
    data = build(text, tokenizer)
    numbers = [number for number in range(60) if (data[number]["position_ids"] == 0).sum() > 2][:3]
    batch = {key: torch.from_numpy(np.stack([data[number][key] for number in numbers])) for key in data[0]}
    with torch.no_grad():
        logits = network(**trainer.model_inputs(batch, boundaries=True)).logits
        packed = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        alone = 0.0
        for number in numbers:
            for ids, labels in pieces_of(data[number], data.size(number)):
                found = network(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1]
                if (labels[1:] != IGNORED).any():
                    alone += float(F.cross_entropy(found, torch.from_numpy(labels[1:]), reduction="sum"))
    assert float(packed) == pytest.approx(alone, rel=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_packing_leaves_room_for_what_is_added_to_a_continued_piece(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity, start = int(rng.integers(4, 60)), int(rng.integers(0, 3))
    lengths = rng.integers(0, 4 * capacity, 80)
    rows = pack(lengths, capacity, start)
    covered: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        assert sum(stop - begin + start * (begin > 0) for _, begin, stop in row) <= capacity
        for document, begin, stop in row.tolist():
            covered.setdefault(document, []).append((begin, stop))
    for document, length in enumerate(lengths):
        spans = sorted(covered.get(document, []))
        assert [begin for begin, _ in spans] == [0, *(stop for _, stop in spans)][: len(spans)]
        assert (spans[-1][1] if spans else 0) == length
        if length <= capacity:
            assert len(spans) <= 1  # a document that fits is not cut


# Documents of one token


def test_first_tokens_of_one_token_documents_are_those_tokens(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    corpus = Corpus(["a"] * 30 + ["for this"], tokenizer)
    corpus.stream = np.concatenate([ids[:1] for ids in corpus.documents[:30]] + [corpus.documents[30]])
    corpus.offsets = np.array([*range(31), len(corpus.stream)])
    data = PhaseData(corpus, tokenizer, phase(length=8, batch=1), seed=(0,), boundaries=True)
    rows = first_tokens(data, 25)
    letter = tokenizer("a")["input_ids"][0]
    assert sum(map(len, rows)) == 25 and all(row for row in rows)
    assert Counter(token for row in rows for token in row)[letter] >= 20


def test_documents_of_one_token_alone_give_nothing_to_train(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None
    with pytest.raises(RecipeError, match="has two tokens"):
        PhaseData(Corpus(["a"] * 9, tokenizer), tokenizer, phase(), seed=(0,), boundaries=True)


# Control tokens in the text


def test_control_tokens_in_the_text_are_text_unless_the_recipe_says_otherwise(tokenizer: Any) -> None:
    end = tokenizer.eos_token
    documents = [f"the {end} end", "a plain one", f"two {end}{end}"]
    plain, parsed = (Corpus(documents, tokenizer, split_special_tokens=split) for split in (True, False))
    for corpus, split in ((plain, True), (parsed, False)):
        expected = [[*tokenizer(each, split_special_tokens=split)["input_ids"]] for each in documents]
        found = [ids.tolist() for ids in corpus.documents]
        assert found == [
            [*ids, *([tokenizer.eos_token_id] if ids[-1] != tokenizer.eos_token_id else [])] for ids in expected
        ]
        assert corpus.control_tokens == {end: 2}
    assert sum(ids.tolist().count(tokenizer.eos_token_id) for ids in plain.documents) == 3
    assert sum(ids.tolist().count(tokenizer.eos_token_id) for ids in parsed.documents) == 5
    assert "read as plain text; data.split_special_tokens=false" in plain.notes()[0]
    assert "read as control tokens; data.split_special_tokens=true" in parsed.notes()[0]
