"""Plant faults in configs and live models.

Transformers shows that each fault is real, the doctor finds it, and it finds nothing after the remedy or in a healthy
model.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pe_patch import ADAPTERS, load_patched, patch_model
from pe_patch.cli import main as cli
from pe_patch.doctor import diagnose, examine
from pe_patch.errors import CheckpointError, OptionError, PePatchError

from .doctor_cases import DROP, FAULTS, GEMMA_LINEAR, HEALTHY, YARN, gemma, llama, made, pictures, plain, settings
from .evaluation_doubles import make_tokenizer
from .families import build


@pytest.fixture
def file(tmp_path):
    def write(content: dict[str, Any], name: str = "config.json"):
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_config_has_no_finding(file, name):
    diagnosis = diagnose(file(HEALTHY[name]))
    assert diagnosis.findings == [] and diagnosis.healthy
    rotates = ADAPTERS[diagnosis.family].rotary is not None
    assert bool(diagnosis.effective) == rotates  # the doctor built and read its rotary module


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_real_found_and_fixed_by_the_remedy(file, name):
    fault = FAULTS[name]
    assert fault.real(fault.config)
    findings = examine(file(fault.config))
    assert {finding.code for finding in findings} == fault.codes
    assert findings[0].severity == fault.severity and fault.says in findings[0].in_effect
    assert fault.remedy in findings[0].remedy and all(f.where and f.claimed and f.remedy for f in findings)
    assert examine(file(fault.cured)) == []


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (settings("bloom", rope_scaling=YARN), "ALiBi"),
        (settings("gpt2", rope_scaling=YARN), "a learned table"),
        (settings("falcon", head_dim=DROP, alibi=True, rope_scaling=YARN), "ALiBi"),
        (settings("gptj", head_dim=DROP, num_key_value_heads=DROP, rotary_dim=8, rope_scaling=YARN), "its own code"),
    ],
)
def test_a_scaling_that_the_family_ignores(file, config, positions):
    ids = torch.arange(1, 40)[None]
    bare = {key: value for key, value in config.items() if key != "rope_scaling"}
    logits = [made(each)(ids).logits for each in (config, bare)]
    assert torch.equal(*logits)
    (finding,) = examine(file(config))
    assert finding.code == "scaling_ignored" and positions in finding.in_effect and "Remove the key" in finding.remedy
    assert examine(file(bare)) == []


def test_scaling_outside_the_text_config_of_a_multimodal_model(file):
    text = gemma({"rope_type": "default", "rope_theta": 1e6})
    config = pictures(text, rope_scaling={"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6})
    assert made(config).config.text_config.rope_parameters["full_attention"]["rope_type"] == "default"
    (finding,) = examine(file(config))
    assert finding.code == "scaling_ignored" and "In text_config write" in finding.remedy
    assert examine(file(pictures(GEMMA_LINEAR))) == []


def test_sliding_layers_hide_a_longer_window(file):
    config = settings("mistral", sliding_window=16, rope_scaling=YARN, num_hidden_layers=1)
    model = made(config)
    ids = torch.arange(1, 65)[None]
    other = ids.clone()
    other[0, 0] = 90
    assert torch.equal(model(ids).logits[0, 32:], model(other).logits[0, 32:])  # tokens farther back have no effect
    (finding,) = examine(file(config))
    assert finding.code == "sliding_window" and finding.severity == "warning" and "16 tokens back" in finding.in_effect
    assert examine(file(config | {"sliding_window": None})) == []


def test_a_window_that_was_not_widened_is_a_note(file):
    (finding,) = examine(file(llama(YARN, max_position_embeddings=64)))
    assert (finding.code, finding.severity) == ("window_not_widened", "note") and "256" in finding.remedy


@pytest.fixture
def checkpoint(tmp_path):
    model = build("llama", max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_healthy_checkpoint_lists_the_checks(checkpoint):
    diagnosis = diagnose(checkpoint)
    assert diagnosis.findings == []
    for part in ("keys of the config", "tokenizer_config.json", "names and types of the weights"):
        assert part in diagnosis.checked
    assert diagnosis.effective["all"]["base"] == 1e4 and diagnosis.effective["all"]["window"] == 256
    assert diagnosis.effective["all"]["wavelengths_in_tokens"][0] == 6.28


def test_files_beside_the_config(checkpoint):
    settings_file, tokenizer_file = checkpoint / "tokenizer_config.json", checkpoint / "tokenizer.json"
    before = {path: path.read_text() for path in (settings_file, tokenizer_file)}
    text = "the cat " * 50
    settings_file.write_text(json.dumps(json.loads(before[settings_file]) | {"model_max_length": 16}))
    assert len(AutoTokenizer.from_pretrained(checkpoint)(text, truncation=True)["input_ids"]) == 16
    (finding,) = examine(checkpoint)
    assert finding.code == "tokenizer_window" and '"model_max_length": 256' in finding.remedy

    settings_file.write_text(before[settings_file])
    cut = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    tokenizer_file.write_text(json.dumps(json.loads(before[tokenizer_file]) | {"truncation": cut}))
    assert len(Tokenizer.from_file(str(tokenizer_file)).encode(text).ids) == 16
    assert len(AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]) > 100
    (finding,) = examine(checkpoint)
    assert finding.where == "tokenizer.json: truncation" and "16" in finding.in_effect

    tokenizer_file.write_text(before[tokenizer_file])
    (checkpoint / "generation_config.json").write_text(json.dumps({"max_length": 1000}))
    (finding,) = examine(checkpoint)
    assert finding.code == "generation_window" and "256" in finding.in_effect
    (checkpoint / "generation_config.json").write_text(json.dumps({"max_length": 256}))
    assert examine(checkpoint) == []


def test_frequencies_stored_in_the_weights(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    for dtype, found in ((torch.float32, []), (torch.bfloat16, ["low_precision"]), (torch.float16, ["low_precision"])):
        rounded = torch.tensor(plain(1e4)).to(dtype)
        stored = weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": rounded}
        save_file(stored, checkpoint / "model.safetensors", metadata={"format": "pt"})
        assert [finding.code for finding in examine(checkpoint)] == found
    kept = AutoModelForCausalLM.from_pretrained(checkpoint).model.rotary_emb.inv_freq
    assert kept.tolist() == pytest.approx(
        plain(1e4), rel=1e-6
    )  # Transformers does not read them, as the finding states
    (finding,) = examine(checkpoint)
    assert finding.severity == "warning" and "float16" in finding.claimed and "does not read" in finding.in_effect
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 64)
    assert [finding.code for finding in examine(checkpoint)] == ["weights_damaged"]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom", "gemma3_text", "deepseek_v3", "phi3", "qwen3"])
def test_a_healthy_live_model_has_no_finding(family):
    assert examine(build(family)) == []


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_config_changed_after_building(key):
    model = build("llama", max_position_embeddings=256)
    ids = torch.arange(1, 65)[None]
    before = model(ids).logits
    setattr(model.config, key, YARN | {"rope_theta": 5e5})
    assert torch.equal(model(ids).logits, before)
    findings = examine(model)
    assert {finding.code for finding in findings} == {"scaling_ignored", "theta_lost"}
    assert "plain RoPE with base 10000" in findings[0].in_effect and "patch_model(model, 'yarn'" in findings[0].remedy
    assert examine(AutoModelForCausalLM.from_config(model.config)) == []


def test_frequencies_cast_to_half_precision(tmp_path):
    model = build("llama").to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    (finding,) = examine(model)
    assert (finding.code, finding.severity) == ("low_precision", "error") and "bfloat16" in finding.in_effect
    model.save_pretrained(tmp_path)
    assert examine(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)) == []  # the remedy
    assert examine(patch_model(model, "rope")) == []  # the other one


def test_a_long_sequence_leaves_a_length_dependent_model_healthy():
    model = build(
        "llama", max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    before = model.model.rotary_emb.inv_freq.clone()
    model(torch.arange(1, 65)[None])
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    assert examine(model) == []


PATCHES = [
    ("llama", "yarn", {"factor": 4}), ("llama", "self_extend", {"group": 4, "window": 16}), ("llama", "alibi", {}),
    ("gpt_neox", "dynamic_ntk", {"factor": 2}), ("bloom", "rope", {}), ("deepseek_v3", "linear", {"factor": 2}),
    ("llama", "mla", {"kv_rank": 32, "calibration": torch.arange(1, 65).repeat(8, 1)}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "scheme", "options"), PATCHES)
def test_a_patched_model_is_healthy_live_and_saved_and_loaded(tmp_path, family, scheme, options):
    model = patch_model(build(family), scheme, **options)
    assert examine(model) == []
    model.save_pretrained(tmp_path)
    diagnosis = diagnose(tmp_path)
    assert diagnosis.findings == [] and any("record" in part for part in diagnosis.checked)
    assert examine(load_patched(tmp_path)) == []


def test_a_module_replaced_under_a_patch_is_found():
    model = patch_model(build("llama"), "yarn", factor=4)
    native_module = build("llama").model.rotary_emb
    patched_module, model.model.rotary_emb = model.model.rotary_emb, native_module
    (finding,) = examine(model)
    assert finding.code == "patch_overwritten" and finding.where == "model.rotary_emb"
    assert "LlamaRotaryEmbedding" in finding.in_effect
    model.model.rotary_emb = patched_module
    assert examine(model) == []
    model.config.pe_patch = model.config.pe_patch | {"options": {"factor": 8}}
    assert [finding.where for finding in examine(model)] == ["config.pe_patch"]


def test_a_record_without_a_patch_in_the_live_model(tmp_path):
    patch_model(build("llama"), "yarn", factor=4).save_pretrained(tmp_path)
    (finding,) = examine(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert finding.code == "record_faulty" and "load_patched" in finding.remedy


def spoil(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["pe_patch"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "self_extnd"}, "Did you mean 'self_extend'?"),
        ({"version": 99}, "versions up to 1"),
        ({"options": {"factr": 4}}, "Did you mean 'factor'?"),
        ({"options": {"factor": 0.5}}, "at least 1"),
    ],
)
def test_a_faulty_record(tmp_path, changes, message):
    patch_model(build("llama"), "yarn", factor=4).save_pretrained(tmp_path)
    spoil(tmp_path, **changes)
    with pytest.raises(PePatchError):
        load_patched(tmp_path)
    (finding,) = examine(tmp_path)
    assert finding.code == "record_faulty" and message in finding.in_effect and finding.severity == "error"


def test_a_record_that_disagrees_with_the_rope_parameters(tmp_path):
    patch_model(build("llama"), "yarn", factor=4).save_pretrained(tmp_path)
    spoil(tmp_path, options={"factor": 4, "attention_factor": 2.0})
    assert load_patched(tmp_path).model.rotary_emb.attention_scaling == 2.0
    plainly = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb.attention_scaling
    assert plainly == pytest.approx(0.1 * math.log(4) + 1)
    (finding,) = examine(tmp_path)
    assert finding.code == "record_disagrees" and "cos and sin times 1.1386" in finding.in_effect


@pytest.fixture
def run(capsys):
    def call(*words):
        code = cli.main(["doctor", *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def test_the_command_line(run, file, tmp_path):
    code, out, _ = run(file(llama(YARN)))
    assert code == 0 and "No fault found" in out and "rotary_emb" in out and "base 500000" in out
    code, out, _ = run(file(llama(YARN | {"beta_fst": 8})))
    assert code == 1 and "unknown_key" in out and '"beta_fast": 8' in out and "1 error in" in out
    code, out, _ = run(file(llama(YARN | {"mscale": 0.5})), "--json")
    diagnosis = json.loads(out)
    assert code == 0 and diagnosis["healthy"] and diagnosis["findings"][0]["severity"] == "warning"
    assert diagnosis["effective"]["all"]["attention_factor"] == pytest.approx(0.1 * math.log(4) + 1)
    code, _, err = run(tmp_path / "nothing")
    assert code == 2 and "no folder or file" in err
    assert run()[0] == 2 and run(file(llama()), "--jsn")[0] == 2
    assert "Example:" in run("--help")[1]


def test_files_that_are_not_a_config(file, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        examine(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds list"):
        examine(tmp_path / "list.json")
    with pytest.raises(OptionError, match="no folder or file"):
        examine("./not/there")
    (finding,) = examine(file(settings("llamma")))
    assert finding.code == "does_not_load" and "Did you mean 'llama'?" in finding.in_effect
    (finding,) = examine(file(settings("my_llama", auto_map={"AutoModel": "code.MyLlama"})))
    assert (finding.code, finding.severity) == ("not_examined", "note")
