"""vLLM with the plugin computes what the patched model computes. `make test-vllm` runs these in vLLM's environment."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import pe_patch
from pe_patch.checkpoints.servers import vllm_plugin
from pe_patch.errors import CheckpointError, UnsupportedError

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` has an environment with it")
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

WINDOW, VOCABULARY = 64, 256
CONFIGS = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
}  # fmt: skip
PROMPT = torch.randint(3, VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(3))
ANSWER = 16
CASES = {
    "llama ntk_by_parts": ("llama", "ntk_by_parts", {"factor": 4}),
    "llama proportional": ("llama", "proportional", {"partial_rotary_factor": 0.5, "factor": 4}),
    "llama clipped_rope": ("llama", "clipped_rope", {"dims": 4, "over": {"rope_type": "yarn", "factor": 4}}),
    "llama dynamic_ntk": ("llama", "dynamic_ntk", {"factor": 4, "expected_length": 256}),
    "llama longrope": (
        "llama",
        "longrope",
        {
            "long_factor": [1 + pair / 4 for pair in range(16)],
            "factor": 4,
            "expected_length": 256,
        },
    ),
    "llama alibi": ("llama", "alibi", {}),
    "llama rope_alibi": ("llama", "rope_alibi", {"over": {"rope_type": "yarn", "factor": 4}}),
    "llama drope": ("llama", "drope", {"softmax_scale": 1.2}),
    "llama layers": ("llama", "yarn", {"factor": 4, "layers": [1]}),
    "mistral nope layers": ("mistral", "nope", {"layers": [1]}),
    "qwen2 resonance": ("qwen2", "resonance", {"over": {"rope_type": "yarn", "factor": 4}}),
    "qwen2 alibi": ("qwen2", "alibi", {}),
    "qwen3 ntk_by_parts": ("qwen3", "ntk_by_parts", {"factor": 4}),
    "gemma3 global layers": ("gemma3", "yarn", {"factor": 4, "layers": [1]}),
    "gemma3 alibi": ("gemma3", "alibi", {"layers": [0, 1]}),
}


def build(family):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=128, max_position_embeddings=WINDOW, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    if family == "gemma3":
        sizes |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    if family == "mistral":
        sizes["sliding_window"] = None
    return AutoModelForCausalLM.from_config(CONFIGS[family](**sizes), dtype=torch.float32).eval()


def save(folder, family, scheme=None, options=None):
    model = build(family)
    if scheme is not None:
        pe_patch.patch_model(model, scheme, **(options or {}))
    model.save_pretrained(folder)
    return model


def serve(folder, **options):
    """Return the log-probabilities of the prompt's tokens, and a greedy answer, by vLLM."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    arguments = {"max_model_len": 256, "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    arguments["hf_overrides"] = {"max_position_embeddings": 256}
    server = vllm.LLM(str(folder), **(arguments | options))
    try:
        greedy = vllm.SamplingParams(
            max_tokens=ANSWER, temperature=0, prompt_logprobs=0, ignore_eos=True, detokenize=False
        )
        (reply,) = server.generate([{"prompt_token_ids": PROMPT[0].tolist()}], greedy)
        scores = [next(iter(each.values())).logprob for each in reply.prompt_logprobs[1:]]
        return torch.tensor(scores), list(reply.outputs[0].token_ids)
    finally:
        del server
        gc.collect()
        cleanup_dist_env_and_memory()


@torch.inference_mode()
def compute(model):
    """Return the same by Transformers."""
    scores = model(PROMPT).logits[0, :-1].log_softmax(-1).gather(1, PROMPT[0, 1:, None])[:, 0]
    answer = model.generate(PROMPT, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)
    return scores, answer[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("label", CASES)
def test_served_as_patched(label, tmp_path):
    family, scheme, options = CASES[label]
    expected, answer = compute(save(tmp_path, family, scheme, options))
    unpatched, _ = compute(build(family))
    assert float((unpatched - expected).abs().max()) > 0.1  # the scheme can be seen
    scores, served = serve(tmp_path)
    assert float((scores - expected).abs().max()) < 2e-4
    assert served == answer


def test_compiled_code_is_not_shared_by_two_schemes(tmp_path):
    for scheme, options in (("ntk_by_parts", {"factor": 4}), ("alibi", {})):
        expected, answer = compute(save(tmp_path / scheme, "llama", scheme, options))
        scores, served = serve(tmp_path / scheme, enforce_eager=False)
        assert float((scores - expected).abs().max()) < 2e-4 and served == answer


def test_other_models_are_untouched(tmp_path):
    save(tmp_path / "native", "llama")
    save(tmp_path / "patched", "llama", "alibi")
    before, patched, after = [serve(tmp_path / name)[0] for name in ("native", "patched", "native")]
    assert torch.equal(before, after) and not torch.equal(before, patched)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.vllm.test_plugin import serve\n"
        f"print('SCORES', serve({str(tmp_path / 'native')!r})[0].tolist())"
    )
    environment = os.environ | {"VLLM_PLUGINS": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("SCORES")]
    assert torch.equal(torch.tensor(json.loads(line.removeprefix("SCORES"))), before)


def test_without_the_plugin_vllm_refuses_the_checkpoint(tmp_path):
    save(tmp_path, "llama", "ntk_by_parts", {"factor": 4})
    code = f"import vllm; vllm.LLM({str(tmp_path)!r}, skip_tokenizer_init=True)"
    environment = os.environ | {"VLLM_PLUGINS": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode and "for vLLM: pip install 'pe_patch[vllm]'" in run.stderr


@pytest.mark.parametrize(
    ("scheme", "options", "changes", "message"),
    [
        ("self_extend", {"factor": 4}, {}, "vLLM cannot serve 'self_extend' on llama: its keys have a second position"),
        ("dynamic_ntk", {"factor": 4}, {}, "Give expected_length="),
        ("longrope", {"long_factor": [2.0] * 16, "factor": 4}, {}, "Give expected_length="),
        (
            "ntk_by_parts",
            {"factor": 4},
            {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}},
            "Leave rope_parameters out",
        ),
        (
            "ntk_by_parts",
            {"factor": 4},
            {"hf_overrides": {"architectures": ["LlamaForCausalLM"]}},
            "Remove architectures from --hf-overrides",
        ),
    ],
)
def test_refusals(scheme, options, changes, message, tmp_path):
    save(tmp_path, "llama", scheme, options)
    with pytest.raises(UnsupportedError, match=message):
        serve(tmp_path, **changes)


def test_a_server_longer_than_a_table_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    save(tmp_path, "llama", "nope", {"layers": [1]})
    with pytest.raises(UnsupportedError, match="layer 0 keeps its family's rotation, whose table has 64 positions"):
        serve(tmp_path, hf_overrides={})


def test_a_server_longer_than_the_regime_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    save(tmp_path, "llama", "dynamic_ntk", {"factor": 4, "expected_length": 128})
    with pytest.raises(UnsupportedError, match=r"--max-model-len is 256\. Use --max-model-len 128"):
        serve(tmp_path, hf_overrides={})


def test_other_versions_are_refused(tmp_path, monkeypatch):
    save(tmp_path, "llama", "ntk_by_parts", {"factor": 4})
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(UnsupportedError, match=r"was tried on vLLM 0.31 and 0.32, and this is 0.99.0"):
        serve(tmp_path)
    monkeypatch.setenv(vllm_plugin.OVERRIDE, "1")
    serve(tmp_path)


def test_a_newer_record_is_refused(tmp_path):
    save(tmp_path, "llama", "ntk_by_parts", {"factor": 4})
    values = json.loads((tmp_path / "config.json").read_text())
    values["pe_patch"]["version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"newer pe_patch \(record version 99.*upgrade pe_patch"):
        serve(tmp_path)
