"""Hold three conversations with a model before and after training, in its chat template.

    python benchmarks/real/conversations.py untouched=build/real/models/smollm2 trained=runs/smollm2_yarn_32k/model

Answers are greedy. Each conversation has two questions; the second refers to the first. Three conversations are no
score, so each model also answers 48 single questions, and their repetition is counted. The questions come from the
templates and topics of get_conversations.py: training may have seen the untouched model's answers to some of them.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from common import RESULTS, TITLES, machine, read, write
from get_conversations import ASKED, TOPICS

from pe_patch.checkpoints.sources import load
from pe_patch.evaluation.repetition import distinct_share, longest_repeat, words_of

CONVERSATIONS = (
    ("What is a prime number? Answer in one sentence.", "Name three of them."),
    ("Write a polite mail that moves Monday's meeting to Tuesday.", "Make it half as long."),
    ("Translate into French: Good morning, my friends.", "And now into Spanish."),
)
TOKENS = 96
QUESTIONS, TOGETHER = 48, 24
REPEATS = 0.5
"""Share of different 4-grams below which an answer repeats itself."""


@torch.inference_mode()
def converse(model: Any, tokenizer: Any, questions: tuple[str, ...]) -> list[str]:
    """Return the answers to a conversation's questions."""
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer.strip()})
    return [message["content"] for message in messages if message["role"] == "assistant"]


@torch.inference_mode()
def repetition(model: Any, tokenizer: Any) -> dict[str, float]:
    """Return how much the answers to single questions repeat themselves."""
    rng = np.random.default_rng(99)
    questions = [str(rng.choice(ASKED)).format(rng.choice(TOPICS)) for _ in range(QUESTIONS)]
    tokenizer.padding_side, answers = "left", []
    for start in range(0, QUESTIONS, TOGETHER):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + TOGETHER]]
        ids = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    words = [words_of(answer) for answer in answers]
    distinct = [distinct_share(each, 4) if len(each) > 8 else 1.0 for each in words]
    return {
        "distinct_4": float(np.mean(distinct)),
        "repeat": float(np.mean([share < REPEATS for share in distinct])),
        "longest_repeat": float(np.mean([longest_repeat(each) / max(1, len(each)) for each in words])),
        "words": float(np.mean([len(each) for each in words])),
    }


def markdown(content: dict[str, Any]) -> str:
    """Return each conversation with the answers of all models."""
    lines = ["# Three conversations, before and after", ""]
    lines += [
        f"{TITLES['smollm2']}, float32, greedy answers of at most {TOKENS} tokens, the model's chat template.",
        "",
    ]
    lines += [
        f"## {QUESTIONS} single questions",
        "",
        "| model | different 4-grams | answers that repeat themselves | longest repeated span | words |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for label, found in content["models"].items():
        each = found["repetition"]
        lines.append(
            f"| {label} | {each['distinct_4']:.2f} | {each['repeat']:.0%} | {each['longest_repeat']:.0%} of the "
            f"answer | {each['words']:.0f} |"
        )
    lines.append("")
    for number, questions in enumerate(CONVERSATIONS):
        lines += [f"## {questions[0]}", ""]
        for turn, question in enumerate(questions):
            if turn:
                lines += [f"**Then:** {question}", ""]
            for label, found in content["models"].items():
                answer = found["answers"][number][turn].replace("\n", "\n> ")
                lines += [f"{label}:", "", f"> {answer}", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="LABEL=FOLDER")
    content = read("conversations") or {"models": {}}
    for each in parser.parse_args().models:
        label, folder = each.rsplit("=", 1)
        model, tokenizer = load(folder, "float32", "cpu")
        started = time.perf_counter()
        answers = [converse(model, tokenizer, questions) for questions in CONVERSATIONS]
        seconds, repeats = time.perf_counter() - started, repetition(model, tokenizer)
        content["models"][label] = {
            "answers": answers, "repetition": repeats, "machine": machine(), "seconds": seconds,
        }  # fmt: skip
        write("conversations", content)
    (RESULTS / "conversations.md").write_text(markdown(content), encoding="utf-8")


if __name__ == "__main__":
    main()
