"""Packed documents are trained as if each stood alone: every token once, no attention across, the same gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import pe_patch
from pe_patch.training import trainer
from pe_patch.training.data import Corpus, PhaseData, pack

from .cases import phase


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_token_once_and_cuts_no_document_that_fits(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 200, 150).tolist()
    rows = pack(lengths, 64)
    seen = [(document, place) for row in rows for document, start, stop in row for place in range(start, stop)]
    assert sorted(seen) == [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    assert all(sum(stop - start for _, start, stop in row) <= 64 for row in rows)
    pieces = [document for row in rows for document, _, _ in row]
    assert all(pieces.count(document) == math.ceil(length / 64) for document, length in enumerate(lengths))
    assert len(rows) <= 1.1 * math.ceil(sum(lengths) / 64)


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_best_fit_decreasing(seed: int) -> None:
    """Against the rule itself, one piece at a time: the largest first, each where it leaves the least room."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 90))
    lengths = rng.integers(seed % 2, rng.integers(2, 200), 120).tolist()
    rows = [[(number, at * capacity, (at + 1) * capacity)] for number, n in enumerate(lengths)
            for at in range(n // capacity)]  # fmt: skip
    room = [0] * len(rows)
    rests = [(n % capacity, number) for number, n in enumerate(lengths) if n % capacity]
    for size, number in sorted(rests, key=lambda rest: (-rest[0], rest[1])):
        fitting = [(left, row) for row, left in enumerate(room) if left >= size]
        if not fitting:
            rows, room = [*rows, []], [*room, capacity]
            fitting = [(capacity, len(rows) - 1)]
        row = min(fitting)[1]
        rows[row].append((number, lengths[number] - size, lengths[number]))
        room[row] -= size
    assert [[tuple(piece) for piece in row.tolist()] for row in pack(lengths, capacity)] == rows


def test_a_packed_row(corpus: tuple[Corpus, Any]) -> None:
    data = PhaseData(*corpus, phase(), seed=(0,), boundaries=True)
    several = [row for row in (data[number] for number in range(40)) if (row["position_ids"] == 0).sum() > 2]
    assert several
    for row in several:
        starts = row["position_ids"] == 0
        assert (row["labels"][starts] == -100).all()
        is_target = row["labels"] != -100
        assert (row["labels"][is_target] == row["input_ids"][is_target]).all()
        assert (np.diff(row["position_ids"])[~starts[1:]] == 1).all()
        assert not (is_target & (row["input_ids"] == 0)).any()  # 0 is the padding


@pytest.mark.parametrize("scheme", [None, "yarn", "alibi"])
def test_documents_in_a_row_do_not_see_each_other(corpus: tuple[Corpus, Any], model: Path, scheme: str | None) -> None:
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    if scheme is not None:
        options: dict[str, Any] = {"factor": 4} if scheme == "yarn" else {}
        pe_patch.patch_model(network, scheme, **options)
    data = PhaseData(*corpus, phase(), seed=(0,), boundaries=True)
    row = next(
        row for row in (data[number] for number in range(40)) if 8 < (row["position_ids"][1:] == 0).argmax() < 50
    )
    second = int((row["position_ids"][1:] == 0).argmax()) + 1
    batch = {key: torch.from_numpy(value)[None] for key, value in row.items()}
    changed = batch["input_ids"].clone()
    changed[:, :second] = (changed[:, :second] + 1) % 280

    def logits(ids: torch.Tensor, boundaries: bool) -> torch.Tensor:
        inputs = trainer.model_inputs({**batch, "input_ids": ids}, boundaries=boundaries)
        with torch.no_grad():
            return network(**inputs).logits[:, second:]

    apart = logits(batch["input_ids"], True)
    assert torch.equal(apart, logits(changed, True))
    assert (logits(batch["input_ids"], False) - logits(changed, False)).abs().max() > 1e-3
    stop = second + int(np.append(row["position_ids"][second + 1 :] == 0, True).argmax()) + 1
    with torch.no_grad():
        alone = network(batch["input_ids"][:, second:stop]).logits
    torch.testing.assert_close(apart[:, : stop - second], alone, rtol=0, atol=1e-5)


SCHEMES: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4},
    "alibi": {},
    "t5": {},
    "self_extend": {"group": 4, "window": 8},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_training_is_training_on_separate_documents(
    corpus: tuple[Corpus, Any], model: Path, scheme: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Loss and every gradient of a packed batch, against the documents one by one, of which no positions are given."""
    network: Any = AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.0)
    pe_patch.patch_model(network, scheme, **SCHEMES[scheme])
    with torch.no_grad():  # as far from its start as a trained model: sharp attention, learned biases that are not zero
        generator = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    network.to(dtype).train()
    data = PhaseData(*corpus, phase(length=256), seed=(0,), boundaries=True)
    items = [item for item in (data[number] for number in range(40)) if (item["position_ids"] == 0).sum() > 2][:3]
    assert len(items) == 3
    batch = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}
    targets = int((batch["labels"] != -100).sum())

    logits = network(**trainer.model_inputs(batch, boundaries=True)).logits
    packed = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / targets
    packed.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad()

    alone = torch.zeros((), dtype=dtype)
    for item in items:
        starts = np.flatnonzero(item["position_ids"] == 0)
        for start, stop in zip(starts, [*starts[1:], len(item["input_ids"])], strict=True):
            ids = torch.from_numpy(item["input_ids"][start:stop])[None]
            labels = torch.from_numpy(item["labels"][start:stop])[None]
            if (labels != -100).any():
                found = network(input_ids=ids, use_cache=False).logits[0, :-1]
                loss = F.cross_entropy(found, labels[0, 1:], reduction="sum") / targets
                loss.backward()
                alone += loss.detach()

    assert float(packed.detach()) == pytest.approx(float(alone), rel=tolerance)
    scale = max(float(parameter.grad.abs().max()) for parameter in network.parameters() if parameter.grad is not None)
    moved = 0
    for name, parameter in network.named_parameters():
        ours, theirs = gradients[name], parameter.grad
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs is not None:
            assert float((ours - theirs).abs().max()) <= tolerance, name
            moved += bool(theirs.abs().max() > 1e-4 * scale)
    assert moved > 15
