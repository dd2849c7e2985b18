"""Let the untouched SmolLM2 write conversations, as text to train on with itself as the teacher.

    python benchmarks/real/get_conversations.py             # into build/real/text/chat

Writes JSON lines. Each document holds conversations end to end in the model's chat template and is long enough for a
sequence of 2,048 tokens. The questions are made from templates and topics; none is a question of conversations.py.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import MODELS, TEXT

from pe_patch.checkpoints.sources import load

ASKED = (
    "What is {}? Answer in two sentences.", "Explain {} to a child.", "Write a short poem about {}.",
    "Give me three facts about {}.", "Tell me a story about {} in one paragraph.", "Why do people care about {}?",
    "Write a letter to a friend about {}.", "List five words that have to do with {}.",
    "What would you ask an expert on {}?", "How do I say in German that I like {}?",
    "Write a Python comment that mentions {}.", "Give advice to someone who wants to learn about {}.",
)  # fmt: skip
THEN = (
    "Say it in one sentence.", "Make it longer.", "What else should I know?", "Can you give an example?",
    "Now answer more formally.", "Thank you. Summarise what you said.", "Why?", "And who would disagree?",
)  # fmt: skip
TOPICS = (
    "bread", "volcanoes", "chess", "the sea", "tax", "bicycles", "honey", "winter", "a good manager", "glass", "trains",
    "the moon", "jazz", "vaccines", "rivers", "coffee", "friendship", "Python", "maps", "dinosaurs", "photography",
    "the French Revolution", "gravity", "gardens", "sleep", "electricity", "history", "wolves", "a clean kitchen",
    "paper", "marathons", "democracy", "tea", "mathematics", "rain", "old books",
)  # fmt: skip
TOGETHER = 12
"""Conversations in a document."""


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, conversations: list[list[dict[str, str]]], tokens: int) -> list[str]:
    """Return the model's next answer in each conversation, drawn at temperature 0.7."""
    tokenizer.padding_side = "left"
    ids = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=0)
    return tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=288)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--out", type=Path, default=TEXT / "chat")
    arguments = parser.parse_args()
    model, tokenizer = load(str(arguments.models / "smollm2"), "float32", "cpu")
    torch.manual_seed(0)
    rng, started, rendered = np.random.default_rng(0), time.perf_counter(), []
    while len(rendered) < arguments.conversations:
        batch: list[list[dict[str, str]]] = [[] for _ in range(arguments.batch)]
        for turn in range(2):
            for conversation in batch:
                question = str(rng.choice(THEN if turn else ASKED)).format(rng.choice(TOPICS))
                conversation.append({"role": "user", "content": question})
            for conversation, answer in zip(batch, answers(model, tokenizer, batch, arguments.tokens), strict=True):
                conversation.append({"role": "assistant", "content": answer.strip()})
        rendered += [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in batch]
        print(f"{len(rendered)} conversations after {time.perf_counter() - started:.0f} s", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "conversations.jsonl").open("w", encoding="utf-8") as file:
        for first in range(0, len(rendered), TOGETHER):
            file.write(json.dumps({"text": "".join(rendered[first : first + TOGETHER])}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
