"""Exports for other tools against files written by hand from each tool's own format (tests/data/export/README.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pe_patch import PePatchError, UnsupportedError, export, patch_model
from pe_patch.patching.api import find_patch

from ..families import VOCABULARY, build

DATA = Path(__file__).parent.parent / "data" / "export"
GOLDEN = {target: json.loads((DATA / f"{target}.json").read_text())["cases"] for target in
          ("transformers4", "vllm", "sglang", "llamacpp")}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [(target, case) for target, cases in GOLDEN.items() for case in cases]


def named(value: Any) -> str | None:
    return f"{value['family']}-{value['scheme']}" if isinstance(value, dict) and "family" in value else None


WINDOW = 4096
SERVERS = ("vllm", "sglang", "llamacpp")
IDS = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))


def patched(family: str, scheme: str, options: dict[str, Any], **settings: Any) -> Any:
    trained = {"original_max_position_embeddings": WINDOW} if family == "phi3" else {}
    model = build(family, max_position_embeddings=WINDOW, **trained, **settings)
    return patch_model(model, scheme, **options)


def same(found: Any, expected: Any) -> bool:
    """Equal, with numbers to 1e-6 and lists and dicts entry by entry; more keys on our side are a difference."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, str) and ":" in expected and isinstance(found, str):  # key=float:value
        name, _, value = expected.rpartition(":")
        return found.rpartition(":")[0] == name and float(found.rpartition(":")[2]) == pytest.approx(float(value))
    if isinstance(expected, str | None):
        return found == expected
    return type(found) in (int, float, bool) and found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("target", "case"), CASES, ids=named)
def test_the_files_are_those_written_by_hand(target, case, tmp_path):
    model = patched(case["family"], case["scheme"], case["options"])
    out = export(model, tmp_path / "out", target)
    config = json.loads((out / "config.json").read_text())
    for key, expected in case["config"].items():
        assert same(config[key], expected), (key, config[key], expected)
    assert type(config["max_position_embeddings"]) is int
    assert config["architectures"] == [type(model).__name__] and "pe_patch" not in config
    assert (out / "generation_config.json").is_file() and (out / "model.safetensors").is_file()
    assert ("rope_parameters" in config) == (target != "transformers4")
    if "serve" not in case:
        assert not (out / "serve.json").exists()
        return
    found, expected = json.loads((out / "serve.json").read_text()), dict(case["serve"])
    wanted = expected.pop("original", None)
    given = found.pop("original", None)
    assert (wanted is None) == (given is None)
    for word, want in zip(given or [], wanted or [], strict=True):
        assert same(json.loads(word) if isinstance(want, dict) else word, want)
    expected["commands"] = [[w.replace("FOLDER", str(out)) for w in line] for line in expected["commands"]]
    for key, want in expected.items():
        assert same(found[key], want), (key, found[key], want)
    assert str(out) in (out / "SERVE.md").read_text()


@pytest.mark.parametrize(("target", "case"), [one for one in CASES if "inv_freq" in one[1]], ids=named)
def test_the_tool_turns_by_the_same_frequencies(target, case):
    """The numbers are what the tool's own rotary code gives for the file written by hand."""
    patch = find_patch(patched(case["family"], case["scheme"], case["options"]))
    assert patch is not None
    scheme: Any = patch.scheme
    several = "lengths" in case
    expected = zip(case["inv_freq"], case["attention_factor"], strict=True) if several else [
        (case["inv_freq"], case["attention_factor"])
    ]  # fmt: skip
    for length, (inv_freq, factor) in zip(case.get("lengths", [scheme.regime_start]), expected, strict=True):
        ours, ours_factor = scheme.frequencies(max(length, scheme.regime_start))
        # tables in float32, of which arctan2 gave the frequencies back
        assert torch.allclose(ours.double(), torch.tensor(inv_freq).double(), rtol=2e-6, atol=1e-9)
        assert ours_factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(
    ("target", "case"),
    [one for one in CASES if one[0] != "transformers4" or one[1]["family"] == "llama"],
    ids=named,
)
def test_transformers_reads_it_with_the_same_logits(target, case, tmp_path):
    """The servers' files are v5's with keys it ignores, and v5 still reads v4's."""
    model = patched(case["family"], case["scheme"], case["options"], attention="eager")
    out = export(model, tmp_path / "out", target)
    plain = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-5)


REFUSED = [
    *((target, "llama", scheme, options, why) for target in (*SERVERS, "transformers4") for scheme, options, why in (
        ("alibi", {}, "can only express a rotation"),
        ("self_extend", {"group": 4, "window": 1024}, "can only express a rotation|group attention"),
        ("yarn", {"factor": "auto"}, "depend on the sequence length"),
        ("dynamic_yarn", {}, "depend on the sequence length"),
        ("yarn", {"factor": 4, "layers": [0]}, "some of the layers"),
        ("alibi", {"keep_native": True}, "native positions"),
        ("resonance", {}, "no rope_type"),
    )),
    *((target, "llama", "dynamic_ntk", {"factor": 2}, why) for target, why in (
        ("vllm", "uses one base.*Use 'ntk'"), ("sglang", "uses one base.*Use 'ntk'"), ("llamacpp", "not dynamic"),
    )),
    *((target, "llama", "longrope", {"long_factor": [2.0] * 8, "factor": 4}, why) for target, why in (
        ("vllm", "expected_length"), ("sglang", "expected_length"), ("llamacpp", "not longrope"),
    )),
    ("llamacpp", "phi3", "longrope", {"long_factor": [2.0] * 8, "factor": 4}, "expected_length"),
    ("vllm", "llama", "proportional", {"partial_rotary_factor": 0.5, "factor": 2}, "ignores the factor"),
    ("sglang", "llama", "proportional", {"partial_rotary_factor": 0.5}, "whole head"),
    ("transformers4", "llama", "proportional", {"partial_rotary_factor": 0.5}, "no rope_type 'proportional'"),
    ("llamacpp", "llama", "yarn", {"factor": 4, "truncate": False}, "rounds"),
    ("llamacpp", "qwen2", "llama3", {"factor": 4}, "default, linear, yarn"),
    ("llamacpp", "gpt_neox", "yarn", {"factor": 4}, "converter"),
    ("sglang", "gpt_neox", "yarn", {"factor": 4}, "no class of this family"),
    ("sglang", "mixtral", "yarn", {"factor": 4}, "no class of this family"),
    ("vllm", "cohere", "longrope", {"long_factor": [2.0] * 8, "expected_length": 8192}, "neighbouring"),
    ("vllm", "bloom", "alibi", {}, "can only express a rotation"),
    ("vllm", "gemma3_text", "linear", {"factor": 4, "layers": [3]}, "by type"),
    ("transformers4", "nemotron", "linear", {"factor": 4}, "do not read rope_scaling"),
    ("transformers4", "olmo2", "yarn", {"factor": 4}, "accepts linear, dynamic, not yarn"),
    ("transformers4", "phi3", "longrope", {"long_factor": [2.0] * 8, "factor": 4, "attention_factor": 1.5}, "windows"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "family", "scheme", "options", "why"), REFUSED)
def test_what_a_tool_cannot_do_is_refused_with_the_reason(target, family, scheme, options, why, tmp_path):
    model = patched(family, scheme, options)
    with pytest.raises(UnsupportedError, match=f"cannot express '{scheme}' on {family}: .*(?:{why})"):
        export(model, tmp_path / "out", target)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_name_lists_the_targets(tmp_path):
    with pytest.raises(ValueError, match=r"Did you mean 'llamacpp'\? There are: deepseek, llamacpp, sglang"):
        export(patched("llama", "yarn", {"factor": 4}), tmp_path / "out", "llama.cpp")
    with pytest.raises(PePatchError, match="no patch"):
        export(build("llama"), tmp_path / "out", "vllm")
    assert list(tmp_path.iterdir()) == []


def test_an_attention_factor_below_one_is_exact_for_sglang(tmp_path):
    """SGLang takes (0.1 m ln s + 1) / (0.1 m' ln s + 1); the files must give back a factor below 1."""
    out = export(patched("llama", "yarn", {"factor": 4, "attention_factor": 0.9}), tmp_path / "out", "sglang")
    found = json.loads((out / "config.json").read_text())["rope_parameters"]
    quotient = [0.1 * found[key] * math.log(4) + 1 for key in ("mscale", "mscale_all_dim")]
    assert quotient[0] / quotient[1] == pytest.approx(0.9, rel=1e-12)


def test_the_config_says_which_class_and_dtype(tmp_path):
    model = patched("llama", "yarn", {"factor": 4}).to(torch.bfloat16)
    for target in ("transformers", *SERVERS):
        config = AutoConfig.from_pretrained(export(model, tmp_path / target, target))
        assert config.architectures == ["LlamaForCausalLM"] and config.dtype == torch.bfloat16
    config = json.loads((export(model, tmp_path / "v4", "transformers4") / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config
