"""Measure what each rotary scheme costs a real model on short text when nothing is trained.

    python benchmarks/untrained.py --model path/to/SmolLM2-135M-Instruct --name "SmolLM2 135M Instruct"
    python benchmarks/untrained.py --model path/to/gemma-3-270m --name "Gemma 3 270M" --windows 2

The text is far shorter than the trained window, so the best possible result is a change of zero. Every scheme reads the
same tokens. The text comes with Python: the documentation in `pydoc_data.topics` (English) and held-out files of the
standard library (code). A model whose layers rotate by different bases is patched in its full-attention layers only.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, machine

from pe_patch import patched
from pe_patch.data.text import load_documents

FACTORS = (2.0, 4.0)
STATIC: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "ntk": ("ntk", {}),
    "ntk_by_parts": ("ntk_by_parts", {}),
    "yarn": ("yarn", {}),
    "yarn, attention_factor=1": ("yarn", {"attention_factor": 1.0}),
    "llama3": ("llama3", {}),
}
"""Label, scheme and options of what scales every sequence, measured at each factor."""
OVER = {"over": {"rope_type": "yarn", "factor": 4.0}}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "resonance over yarn, x4": ("resonance", OVER),
    "clipped_rope over yarn, x4": ("clipped_rope", OVER),
    "yarn, factor=auto": ("yarn", {"factor": "auto"}),
    "dynamic_ntk, x4": ("dynamic_ntk", {"factor": 4.0}),
    "dynamic_yarn, x4": ("dynamic_yarn", {"factor": 4.0}),
    "self_extend, x4": ("self_extend", {"factor": 4.0}),
    "dca": ("dca", {}),
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    texts = windows(tokenizer, arguments.length, arguments.windows, arguments.seed)
    file = RESULTS / "untrained.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    setting = {
        "machine": machine(), "dtype": arguments.dtype, "length": arguments.length, "seed": arguments.seed,
        "bos": bool(start_of(tokenizer)),
        "trained_window": model.config.max_position_embeddings,
        "tokens_scored": {name: len(rows) * (arguments.length - 1) for name, rows in texts.items()},
    }  # fmt: skip
    entry = content.get(arguments.name, {})
    if {key: value for key, value in entry.items() if key in setting and key != "machine"} != {
        key: value for key, value in setting.items() if key != "machine"
    }:
        entry = {"losses": {}}
    content[arguments.name] = entry = {**setting, "losses": entry["losses"]}
    layers = _full_attention(model.config)
    for label, scheme, options in cases():
        if label in entry["losses"]:
            continue
        started = time.perf_counter()
        entry["losses"][label] = {name: loss(model, rows, scheme, options, layers) for name, rows in texts.items()}
        print(f"{label}: {entry['losses'][label]} ({time.perf_counter() - started:.0f} s)", flush=True)
        file.write_text(json.dumps(content, indent=2) + "\n")
    (RESULTS / "untrained.md").write_text(markdown(content))


def cases() -> list[tuple[str, str | None, dict[str, Any]]]:
    """Return label, scheme and options of every measurement, the unpatched model first."""
    static = [
        (f"{label}, x{factor:g}", scheme, {"factor": factor, **options})
        for label, (scheme, options) in STATIC.items()
        for factor in FACTORS
    ]
    return [("unpatched", None, {}), *static, *((label, *case) for label, case in OTHERS.items())]


def windows(tokenizer: Any, length: int, count: int, seed: int) -> dict[str, list[list[int]]]:
    """Return `count` windows of `length` tokens of each text, with a BOS token where the tokenizer sets one."""
    from pydoc_data.topics import topics

    sources = {"English": "\n\n".join(topics[name] for name in sorted(topics))}
    sources["code"] = "\n\n".join(load_documents("stdlib", split="test")[:40])
    rows, start = {}, start_of(tokenizer)
    for name, text in sources.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        places = np.random.default_rng(seed).choice(len(ids) // length - 1, size=count, replace=False)
        rows[name] = [start + ids[place * length : (place + 1) * length - len(start)] for place in sorted(places)]
    return rows


def start_of(tokenizer: Any) -> list[int]:
    """Return the BOS token as a list, or an empty list if the tokenizer does not put it in front of a text."""
    first = tokenizer("text")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


@torch.inference_mode()
def loss(model: Any, rows: list[list[int]], scheme: str | None, options: dict[str, Any], layers: Any) -> float:
    """Return the mean loss in nats per token over all rows."""
    ids = torch.tensor(rows)
    with nullcontext() if scheme is None else patched(model, scheme, layers=layers, **options):
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def _full_attention(config: Any) -> list[int] | None:
    kinds = getattr(config, "layer_types", None) or []
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    return full if 0 < len(full) < len(kinds) else None


def markdown(content: dict[str, Any]) -> str:
    """Return one table for each model: the change of the loss against the unpatched model, in percent."""
    lines = ["# What each scheme costs on short text, untrained", ""]
    lines += ["Change of the loss against the unpatched model. `python benchmarks/untrained.py` makes this page.", ""]
    for name, entry in content.items():
        base, names = entry["losses"]["unpatched"], list(entry["tokens_scored"])
        counts = ", ".join(f"{count:,} tokens of {text}" for text, count in entry["tokens_scored"].items())
        host = entry["machine"]
        lines += [
            f"## {name}", "",
            f"{counts}, in windows of {entry['length']:,}; trained window {entry['trained_window']:,}; BOS "
            f"{'set' if entry['bos'] else 'not set'}, as in the tokenizer. {entry['dtype']}, {host['cpu']} "
            f"({host['threads']} threads), torch {host['torch']}, transformers {host['transformers']}.", "",
            "| scheme | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names),
            "| unpatched, nats per token | " + " | ".join(f"{base[text]:.4f}" for text in names) + " |",
        ]  # fmt: skip
        for label, losses in entry["losses"].items():
            if label != "unpatched":
                changes = " | ".join(f"{losses[text] / base[text] - 1:+.2%}" for text in names)
                lines.append(f"| {label} | {changes} |")
        lines.append("")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="Folder of the model.")
    parser.add_argument("--name", required=True, help="Name of the model in the results.")
    parser.add_argument("--length", type=int, default=512, help="Tokens in a window.")
    parser.add_argument("--windows", type=int, default=2, help="Windows of each text.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
