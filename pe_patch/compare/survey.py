"""Compare schemes in one small model that is trained from scratch under each on the same text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..evaluation.perplexity import Perplexity
from ..evaluation.tasks import Needle
from .compared_scheme import ComparedScheme
from .settings import Settings, Training

RECIPE = Path(__file__).with_name("survey.yaml")
WINDOW, TEXT_TOKENS = 128, 512
"""Window in tokens, and vocabulary size without the keys and values of the questions."""
LATENT = {"method": "init", "kv_rank": 24, "rope_dim": 8}
"""Options of multi-head latent attention with fresh weights: a quarter of the cache of four heads of 16."""

SCHEMES = (
    ComparedScheme("rope"),  # the unpatched model
    ComparedScheme("nope", "nope"),
    ComparedScheme("sinusoidal", "sinusoidal"),
    ComparedScheme("learned", "learned"),
    ComparedScheme("shaw", "shaw"),
    ComparedScheme("transformer_xl", "transformer_xl"),
    ComparedScheme("t5", "t5"),
    ComparedScheme("alibi", "alibi"),
    ComparedScheme("rope_alibi", "rope_alibi"),
    ComparedScheme("mla", "mla", LATENT),
)
NOTES = (
    "Every scheme starts from the same weights and sees the same tokens in the same order, at the same learning rate. "
    "No scheme was tuned.",
    "`learned` has a vector for each position of the window and none beyond.",
    "Keys and values are single special tokens, which makes questions clearer than in words.",
    "The loss is on the same last tokens at every length: a flat line shows no harm, not a benefit.",
)


def survey(output: Path, *, seed: int = 0, quick: bool = False) -> Settings:
    """Return the survey's settings, and build its untrained model and tokenizer in `output/start` if missing.

    Args:
        output: the output folder.
        seed: random seed of model, questions and training.
        quick: train each phase for two steps and ask few questions, to test that everything runs.
    """
    start = output.resolve() / "start"
    if not (start / "model.safetensors").exists():
        make_start(start, seed, documents=20 if quick else None)
    overrides = [f"phases.{phase}.{key}={value}" for phase in range(6) for key, value in (("steps", 2), ("warmup", 1))]
    overrides.append("data.limit=20")
    settings = Settings(
        model=str(start),
        contenders=SCHEMES,
        lengths=tuple(WINDOW * factor for factor in (1, 2, 4, 8)),
        tasks=(Needle(), Perplexity(measures=("fixed",), targets=64, spots=128)),
        samples=200,
        seed=seed,
        training=Training(RECIPE, tuple(overrides) if quick else (), from_scratch=True),
        dtype="float32",
        device="cpu",
        window=WINDOW,
    )
    if not quick:
        return settings
    return replace(
        settings, tasks=(Needle(), Perplexity(measures=("fixed",), targets=64, spots=2)), samples=5, rounds=1
    )


def make_start(folder: Path, seed: int, documents: int | None = None) -> None:
    """Save a Llama with fresh weights, and a tokenizer trained on the survey's text or its first documents."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..data.text import load_documents
    from ..training.models import add_retrieval_tokens, train_tokenizer

    tokenizer: Any = train_tokenizer(load_documents("stdlib", split="train", limit=documents), TEXT_TOKENS)
    add_retrieval_tokens(tokenizer)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=WINDOW, initializer_range=0.02, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last, because `survey` looks for the model
