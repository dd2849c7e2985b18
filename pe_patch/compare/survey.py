"""The classical comparison: one small model, trained from scratch under each scheme on the same text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..evaluation.perplexity import Perplexity
from ..evaluation.tasks import Needle
from .contender import Contender
from .settings import Settings, Training

RECIPE = Path(__file__).with_name("survey.yaml")
WINDOW, TEXT_TOKENS = 128, 512
"""Tokens of the window; tokens of the vocabulary beside the keys and values of the questions."""
LATENT = {"method": "init", "kv_rank": 24, "rope_dim": 8}
"""Multi-head latent attention from fresh weights: a quarter of the cache of four heads of 16."""

SCHEMES = (
    Contender("rope"),  # the model as it is
    Contender("nope", "nope"),
    Contender("sinusoidal", "sinusoidal"),
    Contender("learned", "learned"),
    Contender("shaw", "shaw"),
    Contender("transformer_xl", "transformer_xl"),
    Contender("t5", "t5"),
    Contender("alibi", "alibi"),
    Contender("rope_alibi", "rope_alibi"),
    Contender("mla", "mla", LATENT),
)
NOTES = (
    "Every scheme starts from the same weights and sees the same tokens in the same order, at the same learning rate; "
    "nothing was tuned for one of them.",
    "`learned` has a vector for each position of the window and none beyond it.",
    "Keys and values are single tokens of their own, so a question is harder to misread than one in words.",
    "The loss is of the same last tokens at every length: a flat line shows harm avoided, not benefit gained.",
)


def survey(output: Path, *, seed: int = 0, quick: bool = False) -> Settings:
    """The survey's settings; its untrained model and tokenizer are made in `output/start` if they are not there yet.

    `quick` trains every phase for two steps and asks a few questions: it shows that everything runs, and no more.
    """
    start = output.resolve() / "start"
    if not (start / "model.safetensors").exists():
        make_start(start, seed, documents=20 if quick else None)
    overrides = [f"phases.{phase}.{key}={value}" for phase in range(6) for key, value in (("steps", 2), ("warmup", 1))]
    overrides.append("data.limit=20")
    found = Settings(
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
        return found
    return replace(found, tasks=(Needle(), Perplexity(measures=("fixed",), targets=64, spots=2)), samples=5, rounds=1)


def make_start(folder: Path, seed: int, documents: int | None = None) -> None:
    """A Llama with fresh weights and its tokenizer, trained on (so many documents of) the survey's training text."""
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
    model.save_pretrained(folder)  # last: what is looked for is the model
