"""The textbook picture on a model that trains in a minute: who reads beyond the window, and who does not.

A Llama of 123,200 parameters learns to look keys up within 128 tokens. Only the order of the schemes is asserted, with
the margins that three seeds left.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pe_patch import evaluate, patched
from pe_patch.evaluation.tasks import Needle
from pe_patch.training.recipe import Data, Model, Optimizer, Phase, Recipe, Scheme, Source
from pe_patch.training.recipe import Tokenizer as TokenizerSettings
from pe_patch.training.run import train

pytestmark = pytest.mark.thorough

WINDOW, FACTOR, NOISE, KEYS = 128, 8, 128, 64
PAIRS = {"share": 1.0, "kind": "needles", "targets": "answers"}


def make_tokenizer(folder: Path) -> None:
    """128 words of noise, then 64 keys and 64 values, one token each."""
    words = [f"n{i}" for i in range(NOISE)] + [f"<k{i}>" for i in range(KEYS)] + [f"<v{i}>" for i in range(KEYS)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="n0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.add_tokens(words[NOISE:])
    wrapped.save_pretrained(folder)


def make_noise(folder: Path) -> None:
    folder.mkdir()
    words = np.random.default_rng(0).integers(0, NOISE, (4, 20_000))
    for number, row in enumerate(words):
        (folder / f"{number}.txt").write_text(" ".join(f"n{word}" for word in row))


def settings(folder: Path, **changes) -> Recipe:
    base = {
        "tokenizer": TokenizerSettings(source=str(folder / "tokenizer")),
        "data": Data(source=str(folder / "noise")),
        "optimizer": Optimizer(betas=(0.9, 0.98)),
        "progress": False,
    }
    return Recipe(**{**base, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_tokenizer(folder / "tokenizer")
    make_noise(folder / "noise")
    return folder


@pytest.fixture(scope="module")
def small_model(folder):
    """Trained by the recipes' own code: lengths from 8 to 128, then facts in noise."""
    grow = [
        Phase(
            length=length, batch=2048 // length, steps=1500, until_accuracy=0.95, learning_rate=1e-3,
            schedule="constant", warmup=50 if length == 8 else 0, vocabulary=(NOISE, NOISE + 2 * KEYS),
            mixture={"pairs": Source(needles=(2, max(2, length // 4)), **PAIRS)},
        )
        for length in (8, 16, 32, 64, 128)
    ]  # fmt: skip
    noise = Phase(
        length=WINDOW, batch=16, steps=100, learning_rate=1e-3, schedule="warmup_stable_decay", warmup=0, decay=1.0,
        floor=0.1, mixture={"facts": Source(needles=(1, 16), **PAIRS)},
    )  # fmt: skip
    config = {
        "model_type": "llama", "vocab_size": NOISE + 2 * KEYS, "hidden_size": 64, "intermediate_size": 192,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": WINDOW,
        "initializer_range": 0.02, "tie_word_embeddings": True,
    }  # fmt: skip
    recipe = settings(folder, output=str(folder / "base"), model=Model(config=config), phases=[*grow, noise])
    model = train(recipe)
    assert sum(p.numel() for p in model.parameters()) == 123_200
    return model.eval()


@pytest.fixture(scope="module")
def retrieval(small_model, folder):
    """Share of 128 questions answered, for a scheme (None is the model itself) at a length."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    known: dict = {}

    def measure(scheme, length, model=small_model):
        key = (scheme, length, id(model))
        if key not in known:
            results = evaluate(
                model, tokenizer, tasks=[Needle(needles=8)], lengths=[length], samples=128, text=str(folder / "noise"),
                depths=[0.0, 0.25, 0.5, 0.75], beyond_window=True, progress=False,
            )  # fmt: skip
            known[key] = float(np.mean([row.score for row in results.rows if row.task == "needle"]))
        return known[key]

    def under(scheme, length):
        if scheme is None:
            return measure(None, length)
        with patched(small_model, scheme, factor=FACTOR):
            return measure(scheme, length)

    under.plain = measure
    return under


def test_the_model_learned_its_window(retrieval):
    assert retrieval(None, WINDOW) >= 0.95


def test_without_a_scheme_it_cannot_read_far(retrieval):
    assert retrieval(None, FACTOR * WINDOW) <= 0.55


def test_yarn_reads_far_without_training(retrieval):
    far = FACTOR * WINDOW
    assert retrieval("yarn", far) >= 0.80
    assert retrieval("yarn", far) >= retrieval(None, far) + 0.35


def test_ntk_reads_twice_the_window(retrieval):
    assert retrieval("ntk", 2 * WINDOW) >= 0.95


def test_interpolation_alone_hurts_within_the_window(retrieval):
    """Dividing every frequency by eight leaves heads of 16 dimensions little to tell neighbours by."""
    assert retrieval("linear", WINDOW) <= retrieval("yarn", WINDOW) - 0.05


def test_twenty_steps_finish_yarn(small_model, retrieval, folder):
    start = folder / "start"
    small_model.save_pretrained(start)
    phase = Phase(
        length=FACTOR * WINDOW, batch=2, steps=20, learning_rate=5e-4, schedule="constant", warmup=5,
        mixture={"facts": Source(needles=(1, 16), **PAIRS)},
    )  # fmt: skip
    recipe = settings(
        folder, output=str(folder / "tuned"), model=Model(source=str(start)), phases=[phase],
        scheme=Scheme(name="yarn", options={"factor": FACTOR}),
    )  # fmt: skip
    tuned = train(copy.deepcopy(recipe)).eval()
    assert retrieval.plain("tuned", FACTOR * WINDOW, tuned) >= 0.90
    with torch.no_grad():
        assert torch.isfinite(tuned(torch.zeros(1, 8, dtype=torch.long)).logits).all()
