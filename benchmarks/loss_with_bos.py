"""Loss with BOS by Transformers alone, and the same loss by `evaluate`: `python -m benchmarks.loss_with_bos FOLDER`.

The three functions below are the reference: they know the texts, the windows and Transformers, and nothing of pe_patch.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def losses(model: Any, ids: list[int], scored: int) -> list[float]:
    """Return the losses in nats of the last `scored` ids, one by one, from Transformers' own labels."""
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens).logits[0, -scored - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits, tokens[0, -scored:], reduction="none").tolist()


def fixed(model: Any, pieces: list[list[int]], start: list[int], length: int, targets: int) -> float:
    """Return the mean loss of the last `targets` tokens of each piece in a window of `length` tokens."""
    return float(
        np.mean([losses(model, start + piece[len(piece) - length + len(start) :], targets) for piece in pieces])
    )


def by_position(model: Any, pieces: list[list[int]], start: list[int], length: int) -> list[float]:
    """Return the mean loss at each position, from the first token that has another one before it."""
    windows = [start + piece[len(piece) - length + len(start) :] for piece in pieces]
    return np.mean([losses(model, ids, length - max(1, len(start))) for ids in windows], axis=0).tolist()


def sliding(model: Any, pieces: list[list[int]], start: list[int], length: int, stride: int) -> float:
    """Return the mean loss of every token once, in windows that move by `stride` and begin with `start`."""
    found = []
    for ids in pieces:
        reached = 0 if start else 1  # tokens whose loss is known; without `start` nothing predicts the first one
        while reached < len(ids):
            end = min(reached + stride, len(ids)) if reached > 1 else length - len(start)
            found += losses(model, start + ids[max(0, end - length + len(start)) : end], end - reached)
            reached = end
    return float(np.mean(found))


def compare(folder: str, lengths: list[int], spots: int, text: str) -> list[dict[str, Any]]:
    """Measure a model with and without BOS, by the functions above and by `evaluate`; return one dict per figure."""
    from pe_patch import evaluate
    from pe_patch.data.text import load_documents
    from pe_patch.evaluation import Corpus, Perplexity

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = load_documents(text, **({"split": "test", "limit": 40} if text == "stdlib" else {}))
    corpus = Corpus.load(tokenizer, documents, needed=max(lengths))
    found = []
    for length in lengths:
        for bos in (None, False):
            whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
            start = whole[: len(whole) - len(plain)] if bos is None else []
            task = Perplexity(targets=64, spots=spots, windows=spots, stride=length // 2, stretch_tokens=2 * length)
            rows = evaluate(
                model, tokenizer, task, length, text=corpus, bos=bos, retrieval=False, progress=False, batch_size=1
            ).rows
            fixed_row, sliding_row, position_row = rows
            cut = {name: corpus.spots(length, step, spots, 0)[0] for name, step in (("fixed", 64), ("position", 128))}
            size = sliding_row.details["stretch"]
            stretches = corpus.spots(size, size, sliding_row.details["stretches"], 0)[0]
            lists = {name: [piece.tolist() for piece in pieces] for name, pieces in cut.items()}
            reference = {
                "fixed": fixed(model, lists["fixed"], start, length, 64),
                "sliding": sliding(model, [ids.tolist() for ids in stretches], start, length, length // 2),
                "by position": float(np.mean(by_position(model, lists["position"], start, length))),
            }
            for name, row in zip(reference, (fixed_row, sliding_row, position_row), strict=True):
                line = {"length": length, "measure": name, "start": tokenizer.convert_ids_to_tokens(start)}
                found.append(line | {"transformers": reference[name], "evaluate": row.score})
    return found


def main() -> None:
    """Print one line of JSON per figure, and fail if two differ by more than 1e-5 nats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a checkpoint")
    parser.add_argument("--length", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--spots", type=int, default=3)
    parser.add_argument("--text", default="stdlib")
    given = parser.parse_args()
    lines = compare(given.folder, given.length, given.spots, given.text)
    for line in lines:
        print(json.dumps(line))
    assert all(abs(line["transformers"] - line["evaluate"]) < 1e-5 for line in lines)


if __name__ == "__main__":
    main()
