"""Hold three conversations with a model before and after training, in its chat template.

    python benchmarks/real/conversations.py untouched=build/real/models/smollm2 trained=runs/smollm2_yarn_32k/model

Answers are greedy. Each conversation has two questions; the second refers to the first. This shows whether training on
plain text and hidden facts has kept the model's manners; it is not a score.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import RESULTS, TITLES, machine, read, write

from pe_patch.checkpoints.sources import load

CONVERSATIONS = (
    ("What is a prime number? Answer in one sentence.", "Name three of them."),
    ("Write a polite mail that moves Monday's meeting to Tuesday.", "Make it half as long."),
    ("Translate into French: Good morning, my friends.", "And now into Spanish."),
)
TOKENS = 96


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


def markdown(content: dict[str, Any]) -> str:
    """Return each conversation with the answers of all models."""
    lines = ["# Three conversations, before and after", ""]
    lines += [
        f"{TITLES['smollm2']}, float32, greedy answers of at most {TOKENS} tokens, the model's chat template.",
        "",
    ]
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
        content["models"][label] = {"answers": answers, "machine": machine(), "seconds": time.perf_counter() - started}
        write("conversations", content)
    (RESULTS / "conversations.md").write_text(markdown(content), encoding="utf-8")


if __name__ == "__main__":
    main()
