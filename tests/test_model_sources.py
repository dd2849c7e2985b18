"""Every command takes a model as a folder, as an adapter on its base, and as a GGUF file."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import pe_patch
from pe_patch.checkpoints import sources
from pe_patch.checkpoints.load import build_empty, load_adapted, load_model, load_tokenizer
from pe_patch.cli.main import main
from pe_patch.data.packaged import DEMO_MODEL
from pe_patch.doctor import diagnose
from pe_patch.errors import CheckpointError, OutputError, UnsupportedError

from .evaluation_doubles import make_text, make_tokenizer, tiny_llama
from .gguf_files import write_gguf

IDS = torch.arange(48)[None] % 40 + 5
MEASURED = ["--task", "perplexity", "--length", "32", "--samples", "2", "--no-retrieval"]
TEXT = "the quick brown fox jumps over the lazy dog"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def assert_merged(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that logits differ by no more than float32 rounds when it adds an adapter to the weights."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(800))
    return path


def adapter(base: str | Path, folder: Path, scheme: str | None) -> torch.Tensor:
    """Save an adapter with random weights on the base, and return its logits before it is saved."""
    model = load_model(base)
    if scheme is not None:
        pe_patch.patch_model(model, scheme, factor=2)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    wrapped.save_pretrained(folder)
    return logits(wrapped)


@pytest.fixture(scope="module", params=[None, "yarn"])
def adapted(request: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, torch.Tensor]:
    folder = tmp_path_factory.mktemp("adapter")
    expected = adapter(base, folder, request.param)
    return folder, request.param, expected


def test_an_adapter_loads_merged_with_the_tokenizer_of_its_base(adapted: Any, base: Path) -> None:
    folder, _, expected = adapted
    model, tokenizer = sources.load(str(folder), "auto", "cpu")
    assert torch.equal(logits(load_adapted(folder)), expected)
    assert_merged(logits(model), expected)
    assert (logits(load_model(base)) - expected).abs().max() > 1e-2
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]


def test_every_command_takes_an_adapter(
    adapted: Any, base: Path, text: Path, tmp_path: Path, run: Any, caplog: Any
) -> None:
    folder, scheme, _ = adapted
    given = [] if scheme else ["--scheme", "yarn", "--factor", "2"]
    for command in (
        ["evaluate", folder, *MEASURED, "--text", text],
        ["inspect", folder, *given],
        ["generate", folder, "--prompt", TEXT, "--max-new-tokens", "2"],
        ["export", folder, tmp_path / "out", *given],
        ["doctor", folder],
    ):
        code, out, err = run(*map(str, command))
        assert code == 0, (command, out, err)
        if command[0] in ("evaluate", "generate", "export"):
            assert f"Merged the adapter {folder} into its base {base} in memory." in caplog.messages
        caplog.clear()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    patched = load_model(folder)
    if not scheme:
        pe_patch.patch_model(patched, "yarn", factor=2)
    assert_merged(logits(plain), logits(patched))
    code, out, err = run("advise", str(folder), "--target-length", "128", "--trained-length", "64")
    assert (code, "needs an unpatched model" in err) == ((1, True) if scheme else (0, False)), err


def test_an_adapter_on_an_adapter_keeps_both(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "first", "yarn")
    model = load_model(tmp_path / "first")
    assert model.name_or_path == str(tmp_path / "first")
    expected = adapter(tmp_path / "first", tmp_path / "second", None)
    assert torch.equal(logits(load_adapted(tmp_path / "second")), expected)
    assert_merged(logits(load_model(tmp_path / "second")), expected)
    assert (logits(model) - expected).abs().max() > 1e-2


def test_the_base_of_an_adapter_is_never_overwritten(adapted: Any, base: Path, run: Any) -> None:
    before = (base / "model.safetensors").read_bytes()
    folder, scheme, _ = adapted
    given = [] if scheme else ["--scheme", "yarn", "--factor", "2"]
    code, _, err = run("export", str(folder), str(base), "--overwrite", *given)
    assert code == 1 and "which is an input" in err
    assert (base / "model.safetensors").read_bytes() == before


def test_an_adapter_that_cannot_be_merged_says_so(base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        load_model(tmp_path / "prompt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.gguf", "file .*nothing.gguf does not exist"),
        ("weights.bin", "weights.bin is a file; give a folder, a GGUF file"),
        ("several", "Give the file instead of the folder: .*several/a.gguf .2 GGUF files"),
        ("with_config", "Give the file instead of the folder: .*with_config/a.gguf$"),
    ],
)
def test_paths_that_are_no_model_are_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"0")
    for folder, files in (("several", ("a.gguf", "b.gguf")), ("with_config", ("a.gguf", "config.json"))):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        sources.load(str(tmp_path / name))


def test_demo_is_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = sources.load("demo")
    assert model.config.name_or_path == str(DEMO_MODEL) and len(tokenizer) == model.config.vocab_size
    (tmp_path / "demo").mkdir()
    with pytest.raises(CheckpointError, match=r"Type \./demo for the folder"):
        sources.load("demo")


# GGUF files


def source_model() -> Any:
    model = tiny_llama(len(make_tokenizer()), window=128)
    model.config.head_dim = 8
    return model


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", source_model(), make_tokenizer())


def test_a_float_file_gives_the_models_own_logits(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = source_model()
    file = write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), quantise=False)
    loaded = load_model(file)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.dequantised is None and loaded.config.max_position_embeddings == 128


def test_a_quantised_file_is_an_ordinary_float_model(gguf: Path, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, dequantize, quantize

    kind, original, loaded = GGMLQuantizationType.Q8_0, source_model(), load_model(gguf)
    for name, weight in original.named_parameters():
        stored = weight.data.numpy()
        expected = dequantize(quantize(stored, kind), kind) if stored.ndim == 2 and stored.shape[1] == 32 else stored
        assert torch.equal(loaded.get_parameter(name).data, torch.from_numpy(expected)), name
    assert loaded.dequantised == "Q8_0" and loaded.name_or_path == str(gguf)
    pe_patch.patch_model(loaded.train(), "yarn", factor=2)
    assert all(weight.requires_grad for weight in loaded.parameters())
    loaded.save_pretrained(tmp_path / "patched")
    assert "quantization_config" not in json.loads((tmp_path / "patched/config.json").read_text())
    assert torch.equal(logits(pe_patch.load_patched(tmp_path / "patched")), logits(loaded))


def test_the_tokenizer_of_a_file_reads_text_as_the_original(gguf: Path) -> None:
    loaded = load_tokenizer(gguf)
    assert loaded(TEXT)["input_ids"] == make_tokenizer()(TEXT)["input_ids"]
    assert loaded.name_or_path == str(gguf)


def test_every_command_takes_a_gguf_file(gguf: Path, text: Path, tmp_path: Path, run: Any, caplog: Any) -> None:
    before = gguf.read_bytes()
    scheme = ["--scheme", "yarn", "--factor", "2"]
    for command in (
        ["evaluate", gguf, *MEASURED, "--text", text, "--output", tmp_path / "scores"],
        ["inspect", gguf, *scheme],
        ["advise", gguf, "--target-length", "256"],
        ["doctor", gguf],
        ["generate", gguf, "--prompt", TEXT, "--max-new-tokens", "2"],
        ["export", gguf, tmp_path / "out", *scheme],
        ["convert", gguf, "--to", "mla", "--kv-rank", "16", "--calibration", text, "--text", text, "--length", "96",
         "--calibration-tokens", "192", "--out", tmp_path / "mla"],
    ):  # fmt: skip
        code, out, err = run(*map(str, command))
        assert code == 0, (command, out, err)
        if command[0] == "inspect":
            assert "dequantised from Q8_0" in out
        if command[0] in ("evaluate", "export", "convert"):
            assert f"The weights of {gguf} were quantised (Q8_0); here they are floats." in caplog.messages
        caplog.clear()
    assert "dequantised from Q8_0" in (tmp_path / "scores/index.html").read_text()
    assert gguf.read_bytes() == before
    assert pe_patch.describe(load_model(tmp_path / "mla")).scheme == "mla"


def test_no_command_writes_onto_a_gguf_file(gguf: Path, run: Any) -> None:
    before = gguf.read_bytes()
    for output in (gguf, gguf.parent):
        code, _, err = run("export", str(gguf), str(output), "--scheme", "yarn", "--factor", "2", "--overwrite")
        assert code == 1 and ("is a file; give a folder" in err or "which is an input" in err), err
    with pytest.raises(OutputError):
        pe_patch.export(pe_patch.patch_model(load_model(gguf), "yarn", factor=2), gguf.parent, overwrite=True)
    assert gguf.read_bytes() == before


def test_an_adapter_on_a_gguf_file_loads(gguf: Path, tmp_path: Path) -> None:
    expected = adapter(gguf, tmp_path / "adapter", "yarn")
    assert torch.equal(logits(load_adapted(tmp_path / "adapter")), expected)
    assert_merged(logits(load_model(tmp_path / "adapter")), expected)
    assert load_tokenizer(tmp_path / "adapter").name_or_path == str(gguf)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"rope.freq_base": 500000.0}, {"rope_type": "default", "rope_theta": 500000.0}),
        ({"rope.freq_base": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
             "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0,
             "rope.scaling.attn_factor": 0.5},
            {"rope_type": "yarn", "beta_fast": 16.0, "beta_slow": 2.0,
             "attention_factor": 0.5 * (1 + 0.1 * math.log(4))},
        ),
    ],
)  # fmt: skip
def test_the_rotation_of_a_file_reaches_the_config(facts: Any, expected: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "model.gguf", source_model(), make_tokenizer(), facts)
    parameters = build_empty(file).config.rope_parameters
    assert {key: parameters[key] for key in expected} == expected
    assert load_model(file).config.rope_parameters == parameters


def test_llama_3s_scaling_is_read_from_its_factors(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(64) / 64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(make_tokenizer()), hidden_size=128, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, head_dim=128, max_position_embeddings=131072,
            rope_parameters={**rope},
        )
    )  # fmt: skip
    factors = {"rope_freqs.weight": plain / frequencies}
    file = write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), tensors=factors, quantise=False)
    loaded = load_model(file)
    assert loaded.config.rope_parameters == rope
    assert torch.equal(logits(loaded), logits(model))
    other = write_gguf(
        tmp_path / "other.gguf", model, make_tokenizer(), tensors={"rope_freqs.weight": torch.linspace(1, 8, 64)}
    )
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        build_empty(other)


def test_longropes_factors_are_read_from_their_tensors(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    long, short = [1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 1.5, 2.0]
    tensors = {"rope_factors_long.weight": torch.tensor(long), "rope_factors_short.weight": torch.tensor(short)}
    facts = {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.25}
    model = source_model()
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), facts, tensors, quantise=False))
    assert loaded.config.rope_parameters == {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": long, "short_factor": short,
        "original_max_position_embeddings": 32, "attention_factor": 1.25,
    }  # fmt: skip
    model.config.rope_parameters = dict(loaded.config.rope_parameters)
    expected = type(model)(model.config)
    expected.load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ({}, None),
        ({"rope.scaling.factor": None}, "rope.scaling.factor is missing"),
        (
            {"rope.scaling.type": None, "rope.scaling.factor": None},
            "rope.scaling.factor is missing, llama.rope.scaling.type is missing",
        ),
        ({"rope.scaling.original_context_length": 64}, "original_context_length is 64"),
    ],
)
def test_the_doctor_finds_what_a_converter_dropped(tmp_path: Path, lost: dict[str, Any], message: str | None) -> None:
    """An old converter of llama.cpp reports success and writes no scaling."""
    pytest.importorskip("gguf")
    model = source_model()
    window = model.config.max_position_embeddings
    facts = {
        "context_length": 4 * window, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": window, "rope.scaling.yarn_attn_factor": 0.1 * math.log(4) + 1,
        "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
    }  # fmt: skip
    pe_patch.patch_model(model, "yarn", factor=4.0)
    folder = pe_patch.export(model, tmp_path / "out", target="llamacpp", tokenizer=make_tokenizer())
    commands = json.loads((folder / "serve.json").read_text())["commands"]
    file = write_gguf(folder / "model.gguf", pe_patch.unpatch_model(model), make_tokenizer(), {**facts, **lost})
    assert ["pe-patch", "doctor", str(file)] in commands
    diagnosis = diagnose(file)
    found = [finding for finding in diagnosis.findings if finding.code == "not_converted"]
    assert "the keys that the export beside the file announces" in diagnosis.checked
    assert diagnosis.healthy == (message is None) == (found == [])
    if message is not None:
        assert message in found[0].in_effect


def test_the_halves_of_another_family_stay(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(make_tokenizer()), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=128, max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), quantise=False))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("facts", "tensors", "kind", "message"),
    [
        ({"architecture": "no_such_family"}, {}, UnsupportedError, "cannot read .*no_such_family"),
        ({"context_length": None}, {}, CheckpointError, "names no window"),
        ({"split.count": 3}, {}, UnsupportedError, "one of 3 parts.*llama-gguf-split --merge"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, {}, UnsupportedError, "'longrope'"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, {}, UnsupportedError, "yarn_log_multiplier=0.1"),
        ({}, {"blk.1.ffn_up.weight": None}, CheckpointError, "lacks 'model.layers.1.mlp.up_proj.weight'"),
        ({}, {"blk.0.attn_q.bias": torch.ones(32)}, UnsupportedError, "32 of its .* weights"),
    ],
)
def test_a_file_of_which_a_part_would_be_lost_is_refused(
    facts: Any, tensors: Any, kind: type, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "model.gguf", source_model(), make_tokenizer(), facts, tensors)
    with pytest.raises(kind, match=message):
        load_model(file)


def test_a_damaged_file_is_refused(gguf: Path, tmp_path: Path) -> None:
    content, file = gguf.read_bytes(), tmp_path / "model.gguf"
    for size in [0, 3, 4, 10, 24, *range(100, len(content), len(content) // 40), len(content) - 64]:
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"damaged or incomplete|is incomplete|not a GGUF file"):
            build_empty(file)
    file.write_bytes(b"JUNK" + content[4:])
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        build_empty(file)
    file.write_bytes(content[:16] + b"\xff" * 8 + content[24:])  # 2^64 - 1 keys
    with pytest.raises(CheckpointError, match="damaged"):
        build_empty(file)


def test_a_recipe_trains_a_gguf_file(gguf: Path, tmp_path: Path, run: Any) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(make_text(60, number))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\noutput: {tmp_path / 'run'}\nmodel: {{source: {gguf}}}\n"
        "scheme: {name: yarn, options: {factor: 2}}\n"
        "lora: {rank: 2, targets: [q_proj], embeddings: false, norms: false, merge: false}\n"
        f"data: {{source: {texts}}}\n"
        "phases: [{length: 32, batch: 2, steps: 2, warmup: 0, learning_rate: 1.0e-2, mixture: {full: {share: 1.0}}}]\n"
        "evaluation: {every: null, tasks: [perplexity], lengths: [32]}\n"
    )
    code, out, err = run("train", str(recipe))
    assert code == 0, (out, err)
    loaded = load_model(tmp_path / "run/model")
    assert pe_patch.describe(loaded).scheme == "yarn"
    assert json.loads((tmp_path / "run/model/adapter_config.json").read_text())["base_model_name_or_path"] == str(gguf)
    code, out, err = run("train", str(recipe), f"output={tmp_path / 'again'}", "model.quantization=nf4")
    assert code == 1 and "quantised" in err + out, err


DEEP = '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("name", "command", "said"),
    [
        ("config.json", ["inspect"], "Cannot read a model from {folder}"),
        ("config.json", ["doctor"], "{folder}/config.json cannot be read as JSON"),
        ("config.json", ["advise", "--target-length", "1k"], "Cannot read a model from {folder}"),
        ("tokenizer_config.json", ["generate", "--prompt", "a"], "A JSON file of {folder} is nested too deep"),
        ("generation_config.json", ["generate", "--prompt", "a"], "{folder}"),
        ("adapter_config.json", ["generate", "--prompt", "a"], "{folder}"),
    ],
)
def test_a_file_that_is_nested_too_deep_is_named(
    name: str, command: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    (folder / name).write_text(DEEP)
    verb, *options = command
    assert main([verb, str(folder), *options]) == 1
    found = capsys.readouterr().err
    assert said.format(folder=folder) in found and "Traceback" not in found and "RecursionError" not in found
