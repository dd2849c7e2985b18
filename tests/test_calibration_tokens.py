"""Calibration as token ids: what is taken, how it is cut and drawn, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch

from pe_patch.errors import OptionError
from pe_patch.mla.calibration import held_out
from pe_patch.mla.calibration_text import tokens

from . import models
from .test_latent_calibration import rows_of

IDS = [list(range(3, 23)), [5, 6, 7], list(range(30, 47))]


def test_tokens_of_ids():
    model = models.build("llama")
    found = tokens(IDS, model, length=8)
    assert [row.tolist() for row in found] == [
        [*range(3, 11)], [*range(11, 19)], [*range(19, 23)], [5, 6, 7], [*range(30, 38)], [*range(38, 46)]
    ]  # fmt: skip
    assert all(row.dtype == torch.int64 for row in found)
    whole = torch.tensor(IDS[2]).repeat(3, 1)
    for kind in (whole, whole.int(), whole.tolist(), list(whole), [row.numpy() for row in whole]):
        assert [row.tolist() for row in tokens(kind, model, length=100)] == whole.tolist()


def test_tokens_are_drawn_by_the_seed():
    model, rows = models.build("llama"), rows_of((10,) * 20)

    def draw(**options):
        return [row.tolist() for row in tokens(rows, model, length=10, **options)]

    everything = draw()
    assert draw(limit=200) == draw(limit=300, seed=3) == everything
    taken = draw(limit=55)
    assert draw(limit=55) == taken and draw(limit=55, seed=1) != taken
    assert [len(row) for row in taken] == [10] * 5 + [5]
    assert all(row in everything for row in taken[:-1])


def test_held_out_rows():
    rows = rows_of((10,) * 20)
    kept, held = held_out(rows, 0.2)
    assert len(held) == 4 and len(kept) == 16
    assert {id(row) for row in kept + held} == {id(row) for row in rows}
    again = held_out(rows, 0.2)
    assert all(one is other for one, other in zip(kept + held, again[0] + again[1], strict=True))
    assert (
        [len(part) for part in held_out(rows[:2], 0.01)] == [len(part) for part in held_out(rows[:2], 0.99)] == [1, 1]
    )
    with pytest.raises(OptionError, match="at least two rows"):
        held_out(rows[:1], 0.2)
    for share in (0, 1, -0.1, "a", True):
        with pytest.raises(OptionError, match="between 0 and 1"):
            held_out(rows, share)


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ([], "is empty"),
        (torch.zeros(0, 4, dtype=torch.long), "is empty"),
        (torch.zeros(2, 0, dtype=torch.long), "row 0 has no tokens"),
        ([[1, 2], []], "row 1 has no tokens"),
        ("", "number 0 is ''"),
        (["words", " \n"], "number 1 is"),
        (["words", [1, 2]], "number 1 is [1, 2]"),
        ([[1, 2], [3, 97]], "row 1 has the id 97, and the ids of this model are 0 to 96"),
        ([[1, -100]], "the id -100"),
        ([1, 2, 3], "row 0 is a int"),
        (torch.arange(4), "[rows, length], not [4]"),
        ([[1.5, 2.0]], "torch.float32"),
        ([[True, False]], "torch.bool"),
        ([[[1, 2]]], "[1, 2]"),
        ([[1, "a"]], "row 0 is neither"),
        ([None], "row 0 is neither"),
        ({"words": [[1, 2]]}, "got dict"),
        (7, "got int"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_calibration(calibration, said):
    with pytest.raises(OptionError, match=re.escape(said)):
        tokens(calibration, models.build("llama"), length=8)


@pytest.mark.parametrize("options", [{"length": 0}, {"length": 8, "limit": 0}, {"length": 8.0}, {"length": True}])
def test_sizes_are_counts(options):
    with pytest.raises(OptionError, match="at least 1"):
        tokens(IDS, models.build("llama"), **options)


def test_texts_need_the_tokenizer_of_the_model(tmp_path):
    model = models.build("llama")
    for name in ("", str(tmp_path)):
        model.name_or_path = name
        with pytest.raises(OptionError, match=r'give token ids instead of texts: tokenizer\(texts\)\["input_ids"\]'):
            tokens("some words", model, length=8)


def test_texts_as_tokens(tmp_path):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = "the quick brown fox jumps over a lazy dog".split()
    inner = Tokenizer(kinds.WordLevel({word: 3 + number for number, word in enumerate(words)}, unk_token="the"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="the").save_pretrained(tmp_path)
    model = models.build("llama")
    model.name_or_path = str(tmp_path)
    assert [row.tolist() for row in tokens("the quick brown fox", model, length=3)] == [[3, 4, 5]]
    assert [row.tolist() for row in tokens(["lazy dog", "a fox"], model, length=3)] == [[10, 11], [9, 6]]
