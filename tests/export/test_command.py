"""`pe-patch export`: targets, the tokenizer beside the model, what it prints, and exit codes."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

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
