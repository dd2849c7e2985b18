"""Check that a model still answers short questions as it did without a scheme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.generation import encode, new_ids

QUESTIONS = (
    "What is the capital of France?",
    "Name three kinds of fruit.",
    "How many days are in a week?",
    "Write one sentence about the sea.",
    "How do I say thank you in Spanish?",
    "Why is the sky blue? Answer in one sentence.",
    "Give me a word that rhymes with cat.",
    "Who wrote Romeo and Juliet?",
)
ANSWER = 32
"""Most tokens of an answer."""


@dataclass(frozen=True)
class ShortAnswer:
    """A question and the answer of the model without a scheme, as token ids [tokens]."""

    prompt: Tensor
    answer: Tensor


def short_answers(model: Any, tokenizer: Any) -> list[ShortAnswer]:
    """Return the model's greedy answers to `QUESTIONS`, in its chat template if it has one."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    prompts = [encode(tokenizer, question, chat=chat) for question in QUESTIONS]
    return [ShortAnswer(ids[0], new_ids(model, tokenizer, ids, ANSWER).cpu()) for ids in prompts]


@torch.inference_mode()
def share_kept(model: Any, given: Sequence[ShortAnswer]) -> float:
    """Return the share of the answers' tokens that are still the most probable ones after the tokens before them."""
    kept = []
    for each in given:
        ids = torch.cat([each.prompt, each.answer])[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(each.answer) + 1).logits[0, :-1]
        kept.append(logits.argmax(-1).cpu() == each.answer)
    return float(torch.cat(kept).double().mean())
