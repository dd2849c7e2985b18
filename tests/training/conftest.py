"""A folder of text, a tiny model and a plain recipe, for what tests training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pe_patch.training import models
from pe_patch.training.data import Corpus

WORDS = "the a for while return import class if not in of and yield with as pass raise from this that".split()

PLAIN = """
version: 1
output: {output}
model: {{source: {model}}}
data: {{source: {text}}}
progress: false
phases:
  - length: 64
    batch: 4
    steps: 6
    learning_rate: 1.0e-3
    warmup: 2
    mixture: {{text: {{share: 0.5}}, needles: {{share: 0.5, kind: needles, needles: [1, 3]}}}}
"""


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 documents of 5 to 120 words."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for number in range(120):
        words = rng.choice(WORDS, rng.integers(5, 120))
        (folder / f"{number:03d}.txt").write_text(f"{number} " + " ".join(words) + "\n")
    return folder


@pytest.fixture(scope="session")
def model(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama that drops attention out, and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer: Any = models.train_tokenizer([path.read_text() for path in sorted(text.iterdir())], 280)
    models.add_retrieval_tokens(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate fixes the precision for the whole process; here every test is a process of its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised text is kept for the tests alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def recipe_file(tmp_path: Path, text: Path, model: Path) -> Path:
    path = tmp_path / "plain.yaml"
    path.write_text(PLAIN.format(output=tmp_path / "run", model=model, text=text))
    return path


@pytest.fixture
def corpus(text: Path, model: Path) -> tuple[Corpus, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Corpus([path.read_text() for path in sorted(text.iterdir())], tokenizer), tokenizer
