"""A long text tokenised in pieces has the tokens that one call gives it, in a fraction of the memory."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from pe_patch.data import tokens
from pe_patch.data.text import load_documents
from pe_patch.data.tokens import leading_text, special_ids, text_ids

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@cache
def code() -> str:
    return "\n".join(load_documents("stdlib", split="test"))[:400_000]


@cache
def build(kind: str) -> Any:
    """Return a tokenizer of the kind of a well-known family, trained on the text."""
    special = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]"]
    if kind == "unigram":  # T5, Gemma's first
        inner = Tokenizer(kinds.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "wordpiece":  # BERT
        inner = Tokenizer(kinds.WordPiece(unk_token="<unk>"))
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    else:
        inner = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=kind == "llama"))
        alphabet = [] if kind == "llama" else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        if kind == "llama":  # SentencePiece BPE: no split into words, and a prefix before the text
            inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        elif kind == "gpt4":
            split = pre_tokenizers.Split(Regex(GPT4), "isolated")
            inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
        else:
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "roberta")
            inner.post_processor = processors.ByteLevel(trim_offsets=kind == "roberta")
            inner.decoder = decoders.ByteLevel()
    sample = code()[:30_000] if kind != "llama" else "\n".join(line[:200] for line in code()[:8_000].split("\n"))
    lines = sample.splitlines(keepends=True) if kind == "llama" else [sample]
    inner.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TEXTS = {
    "code": lambda: code(),
    "no newlines": lambda: code().replace("\n", " ")[:60_000],
    "blank lines": lambda: code()[:20_000].replace("\n", "\n\n \n"),
    "Chinese": lambda: "长文本的分词必须与一次调用完全相同。否则损失不同。" * 800,
    "emoji": lambda: "🙂👩‍👩‍👧 né à l'été " * 1500,
    "one word": lambda: "a" * 9_000 + " " + code()[:9_000],
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["gpt2", "roberta", "gpt4", "llama", "unigram", "wordpiece"])
def test_pieces_give_the_tokens_of_one_call(kind: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, whole = build(kind), TEXTS[text]()
    if kind == "llama":
        whole = whole[:60_000]
    expected = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    calls: list[int] = []
    inner = tokens._call
    monkeypatch.setattr(tokens, "_call", lambda by, part, **more: (calls.append(len(part)), inner(by, part, **more))[1])
    monkeypatch.setattr(tokens, "PIECE", 5_000)
    monkeypatch.setattr(tokens, "OVERLAP", 400)
    assert text_ids(tokenizer, whole).tolist() == expected
    if text in ("code", "no newlines", "blank lines"):
        assert max(calls) <= 10_000 and len(calls) > 3


def test_the_beginning_of_a_text_has_enough_tokens_and_no_cut_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 4_000)
    tokenizer, text = build("gpt2"), code()
    for count in (1_000, 5_000, 20_000):
        head = leading_text(tokenizer, text, count)
        ids = tokenizer(head)["input_ids"]
        assert text.startswith(head) and count <= len(ids) < 2 * count + 4_000
        assert ids == tokenizer(text)["input_ids"][: len(ids)]
    assert leading_text(tokenizer, text, 10**9) == text and leading_text(tokenizer, "short", 1) == "short"


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("$A", [], []),
        ("<s> $A", [1], []),
        ("$A </s>", [], [2]),
        ("[CLS] $A [SEP]", [3], [4]),
        ("<s> [CLS] $A", [1, 3], []),
    ],
)
def test_special_ids_are_those_of_the_template(template: str, before: list[int], after: list[int]) -> None:
    names = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]"]
    inner = Tokenizer.from_str(build("gpt2").backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(n, i) for i, n in enumerate(names)]
    )
    assert special_ids(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")) == (before, after)


PEAK = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from pe_patch.data.packaged import DEMO_MODEL
from pe_patch.evaluation.corpus import Corpus
from pe_patch.training.data import open_store
tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
open_store(sys.argv[1], tokenizer, split=None, cache=sys.argv[2])
Corpus.load(tokenizer, sys.argv[1], 1024)
print(peak() - before)
"""


@pytest.mark.slow
def test_a_book_of_six_megabytes_takes_less_than_four_hundred(tmp_path: Path) -> None:
    """In one call the tokeniser needs about 150 bytes for each character: 900 MB."""
    (tmp_path / "book.txt").write_text((code() * 20)[:6_000_000])
    command = [sys.executable, "-c", PEAK, str(tmp_path / "book.txt"), str(tmp_path / "cache")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 400, found.stdout


def test_ids_are_integers_of_one_kind() -> None:
    assert text_ids(build("gpt2"), "").dtype == text_ids(build("gpt2"), "a b").dtype == np.int64
