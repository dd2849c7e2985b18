"""Check that vLLM with pe_patch's plugin computes what the patched model computes, within the window and beyond it.

    python benchmarks/real/serve_plugin.py smollm2 --python path/to/vllm/bin/python
    python benchmarks/real/serve_plugin.py gemma3 --python path/to/vllm/bin/python --cases "ntk_by_parts, global layers"
    python benchmarks/real/serve_plugin.py smollm2 --draw

For each case: patch the model, save it with save_pretrained, start vLLM's server on that folder, and compare the
log-probabilities of the tokens of an English text of 2,000 tokens, and 20 greedy answers. Some prompts are longer than
the trained window. vLLM's environment must have pe_patch installed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import MODELS, RESULTS, TEXT, TITLES, machine, read, write
from serve import VLLM, Answer, compare, make_prompts, post

from pe_patch import describe, patch_model
from pe_patch.checkpoints.sources import load

ANSWER, TEXT_TOKENS, SHORT = 64, 2_000, 1_000
"""Tokens of an answer, of the text, and of what the short prompts share."""
SHORT_WINDOW = 8_192
"""Longest length that is served without long prompts, in tokens."""
YARN: dict[str, Any] = {"over": {"rope_type": "yarn", "factor": 4.0}}
LONG = np.geomspace(1, 4, 32).tolist()
Case = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """The cases of a model, and its prompts."""

    window: int
    """The longest length that is served, in tokens."""
    beyond: int
    """Number of first tokens that the long prompts share; more than the trained window."""
    short_prompts: int
    long_prompts: int
    cases: dict[str, Case]


def layers(step: int, first: int, count: int) -> dict[str, Any]:
    """Return the option for every `step`-th layer."""
    return {"layers": list(range(first, count, step))}


GLOBAL = layers(6, 5, 18)
PLANS = {
    "smollm2": Plan(
        16_384, 8_400, 15, 5,
        {
            "ntk_by_parts": ("ntk_by_parts", {"factor": 4.0}),
            "proportional": ("proportional", {"partial_rotary_factor": 0.75, "factor": 2.0}),
            "clipped_rope over yarn": ("clipped_rope", YARN),
            "resonance over yarn": ("resonance", YARN),
            "longrope, two lists, expected_length": (
                "longrope", {"factor": 4.0, "long_factor": LONG, "expected_length": 16_384},
            ),
            "dynamic_ntk, expected_length": ("dynamic_ntk", {"factor": 2.0, "expected_length": 16_384}),
            "yarn, every second layer": ("yarn", {"factor": 4.0, **layers(2, 0, 30)}),
            "nope, every fourth layer": ("nope", layers(4, 3, 30)),
            "drope, scores x 1.1": ("drope", {"softmax_scale": 1.1}),
            "alibi": ("alibi", {}),
            "rope_alibi over yarn": ("rope_alibi", {"slope_scale": 0.01, **YARN}),
        },
    ),
    "gemma3": Plan(
        40_960, 33_000, 20, 1,
        {
            "ntk_by_parts, global layers": ("ntk_by_parts", {"factor": 4.0, **GLOBAL}),
            "resonance over yarn, global layers": ("resonance", {**YARN, **GLOBAL}),
            "dynamic_ntk, expected_length, global layers": (
                "dynamic_ntk", {"factor": 2.0, "expected_length": 65_536, **GLOBAL},
            ),
            "nope, global layers": ("nope", GLOBAL),
            "alibi, global layers": ("alibi", GLOBAL),
        },
    ),
}  # fmt: skip


class Plugin(VLLM):
    """vLLM's server on a folder that `save_pretrained` wrote."""

    name, target = "vLLM with the plugin", "vllm-plugin"
    window = 0

    def command(self, folder: Path, port: int) -> tuple[list[str], dict[str, str]]:
        self.written = json.loads((folder / "config.json").read_text())["model_type"]
        options = ["--dtype", "float32", "--max-model-len", str(self.window), "--enforce-eager"]
        options += ["--hf-overrides", json.dumps({"max_position_embeddings": self.window}), "--enable-prefix-caching"]
        place = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "exported"]
        command = [self.arguments.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        return [*command, *options, *place], {"VLLM_CPU_KVCACHE_SPACE": "4"}

    def complete_all(self, address: str, prompts: list[list[int]], count: int) -> list[Answer]:
        """Continue prompts greedily: the first alone, so that its prefix is cached, the others side by side."""
        first = self.complete(address, prompts[0], count)
        with ThreadPoolExecutor(8) as pool:
            return [first, *pool.map(lambda prompt: self.complete(address, prompt, count), prompts[1:])]

    def read_text(self, address: str, text: list[int]) -> torch.Tensor:
        """Return the log-probability of each token of a text after the first."""
        body = {"model": "exported", "prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        scores = post(f"{address}/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return torch.tensor(
            [each[str(token)]["logprob"] for each, token in zip(scores[1:], text[1:], strict=True)], dtype=torch.float64
        )


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    plan, stored = PLANS[arguments.model], "serve_plugin"
    content = read(stored)
    model_path = str(arguments.models / arguments.model)
    server = Plugin(arguments)
    for label in [] if arguments.draw else arguments.cases or plan.cases:
        started = time.perf_counter()
        server.window = SHORT_WINDOW if arguments.long_prompts == 0 else plan.window
        scheme, options = plan.cases[label]
        key = f"{arguments.model}: {label}: {server.version()}"
        if key in content:
            continue
        model, tokenizer = load(model_path, "float32", "cpu")
        text = make_prompts(tokenizer, arguments.text, 1, TEXT_TOKENS)[0][:TEXT_TOKENS]
        before = read_text(model, text)
        short = make_prompts(tokenizer, arguments.text, plan.short_prompts, SHORT)
        count = plan.long_prompts if arguments.long_prompts is None else arguments.long_prompts
        long = make_prompts(tokenizer, arguments.text, count, plan.beyond)
        patch_model(model, scheme, **options)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            with server.started(Path(folder)) as address:
                theirs = server.read_text(address, text)
                answers = server.complete_all(address, short, ANSWER)
                beyond = server.complete_all(address, long, ANSWER) if long else []
        ours = read_text(model, text)
        content = read(stored)
        content[key] = {
            "text_tokens": len(text),
            "text_difference": float((ours - theirs).abs().max()),
            "effect_of_scheme": float((ours - before).abs().max()),
            "within": compare(model, short, answers, SHORT),
            "beyond": compare(model, long, beyond, plan.beyond) if long else None,
            "scheme": describe(model).effective | {"name": scheme}, "layers": options.get("layers"),
            "server": server.version(), "machine": machine(), "dtype": "float32 (model and server)",
            "model": TITLES[arguments.model], "minutes": round((time.perf_counter() - started) / 60, 1),
        }  # fmt: skip
        write(stored, content)
        print(f"{key}: {row(content[key])}", flush=True)
    (RESULTS / f"{stored}.md").write_text(markdown(content), encoding="utf-8")


@torch.inference_mode()
def read_text(model: Any, text: list[int]) -> torch.Tensor:
    """Return the log-probability of each token of a text after the first."""
    logits = model(torch.tensor([text])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]


def row(entry: dict[str, Any]) -> str:
    """Return the cells of an entry."""
    cells = []
    for name in ("within", "beyond"):
        if (found := entry[name]) is None:
            cells.append("-")
            continue
        ties = f", {found['near_ties']} near ties" if found["near_ties"] else ""
        cells.append(f"{found['equal']} of {found['prompts']}{ties} ({found['prompt_tokens']:,} tokens)")
    return f"{entry['text_difference']:.1e} | {entry['effect_of_scheme']:.1f} | {' | '.join(cells)}"


def markdown(content: dict[str, Any]) -> str:
    """Return the results as a table."""
    lines = [
        "# vLLM with the plugin against the patched model",
        "",
        f"float32, CPU. Text: the largest difference between the server's and the model's log-probability of a token, "
        f"in {TEXT_TOKENS:,} tokens of English (nats); beside it the largest difference that the scheme makes to the "
        f"unpatched model. Answers: greedy, {ANSWER} tokens each; equal if the patched model's most probable token is "
        "the server's at every position. Prompts beyond the window are longer than the model was trained on. 4-bit "
        "weights, dequantised; none was trained with its scheme, so equality says nothing about quality.",
        "",
        "| model | scheme | server | text | the scheme's effect | equal answers within | beyond the window |",
        "| --- | --- | --- | ---: | ---: | --- | --- |",
    ]
    for key, entry in content.items():
        model, label, _ = key.split(": ", 2)
        lines.append(f"| {model} | {label} | {entry['server']} | {row(entry)} |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(PLANS))
    parser.add_argument("--python", help="the Python of vLLM's environment, with pe_patch installed")
    parser.add_argument("--cases", nargs="+", help="some of the cases")
    parser.add_argument("--long-prompts", type=int, help="0 leaves out what is longer than the window")
    parser.add_argument("--draw", action="store_true", help="write the table from the stored results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--text", type=Path, default=TEXT)
    arguments = parser.parse_args()
    if not arguments.python and not arguments.draw:
        parser.error("Give --python.")
    if unknown := [label for label in arguments.cases or () if label not in PLANS[arguments.model].cases]:
        parser.error(f"No such case: {unknown[0]}. Cases: {', '.join(PLANS[arguments.model].cases)}.")
    return arguments


if __name__ == "__main__":
    main()
