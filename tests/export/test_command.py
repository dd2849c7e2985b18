"""`pe-patch export`: targets, the tokenizer beside the model, what it prints, and exit codes."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from pe_patch import export, patch_model

from ..evaluation_doubles import make_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 64
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


COMMANDS = {
    "transformers": [],
    "transformers4": [],
    "vllm": ["vllm serve OUT --max-model-len 256"],
    "sglang": ["python -m sglang.launch_server --model-path OUT --context-length 256"],
    "llamacpp": [
        "python convert_hf_to_gguf.py OUT --outfile OUT/model.gguf",
        "pe-patch doctor OUT/model.gguf",
        "llama-server -c 256 -m OUT/model.gguf",
    ],
}


@pytest.mark.parametrize("scheme", ["yarn", "linear"])
@pytest.mark.parametrize("target", COMMANDS)
def test_the_folder_has_the_new_window_and_the_command_is_printed(run, checkpoint, tmp_path, target, scheme):
    out = tmp_path / "out"
    words = ["export", checkpoint, out, "--scheme", scheme, "--factor", 4, "--target", target]
    code, printed, _ = run(*words)
    expected = [line.replace("OUT", str(out)) for line in COMMANDS[target]]
    assert code == 0 and all(f"  {line}\n" in printed for line in expected)
    code, printed, _ = run(*words, "--json")
    found = json.loads(printed)
    assert code == 0 and found == {"path": str(out), "target": target, "commands": expected}
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 256 == AutoTokenizer.from_pretrained(out).model_max_length
    if target == "transformers4":  # 4.x knows no class TokenizersBackend
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (out / "generation_config.json").is_file()


@pytest.mark.parametrize("target", COMMANDS)
def test_what_cannot_be_said_ends_with_1_and_the_reason(run, checkpoint, tmp_path, target):
    code, _, err = run("export", checkpoint, tmp_path / "out", "--scheme", "alibi", "--target", target)
    assert code == 1 and "cannot express 'alibi' on llama" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_target_is_wrong_usage(run, tmp_path):
    code, _, err = run("export", "no-such-model", tmp_path / "out", "--target", "llama.cpp")
    assert code == 2 and "Did you mean 'llamacpp'" in err and "sglang" in err


def test_nothing_of_an_earlier_target_stays(run, checkpoint, tmp_path):
    words = ["export", checkpoint, tmp_path / "out", "--scheme"]
    assert run(*words, "yarn", "--factor", 4, "--target", "vllm")[0] == 0
    code, printed, _ = run(*words, "dynamic_ntk", "--factor", 2, "--json")
    assert code == 0 and json.loads(printed)["commands"] == []
    assert not (tmp_path / "out" / "serve.json").exists() and not (tmp_path / "out" / "SERVE.md").exists()
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 128  # though the config of this type holds the trained 64


def test_python_exports_the_tokenizer_of_the_source(checkpoint, tmp_path):
    model = patch_model(AutoModelForCausalLM.from_pretrained(checkpoint), "yarn", factor=4)
    source = AutoTokenizer.from_pretrained(checkpoint)
    text = "the door of the river runs <k3><v7>"
    for name, given in (("copied", {}), ("given", {"tokenizer": source})):
        found = AutoTokenizer.from_pretrained(export(model, tmp_path / name, "vllm", **given))
        assert found(text)["input_ids"] == source(text)["input_ids"]
        assert found.model_max_length == 256 and source.model_max_length == 64
        record = json.loads((tmp_path / name / "pe_patch_export.json").read_text())
        assert "tokenizer.json" in record["files"]


def test_an_export_without_a_tokenizer_says_so(tmp_path, caplog):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    built = Qwen2ForCausalLM(Qwen2Config(**small, intermediate_size=16, vocab_size=32, max_position_embeddings=32))
    built.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    # Transformers builds a Qwen2 tokenizer without vocabulary for such a folder.
    for model, reason in ((loaded, f"'{tmp_path / 'model'}' has no tokenizer"), (built, "not loaded from anywhere")):
        patch_model(model, "linear", factor=2)
        caplog.clear()
        out = export(model, tmp_path / "out")
        assert "No tokenizer is exported: " in caplog.text and reason in caplog.text
        assert "tokenizer=tokenizer" in caplog.text and not list(out.glob("tokenizer*"))
