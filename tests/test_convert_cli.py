"""`pe-patch convert`: measurements, saved files, refusals, and the table and picture of a sweep."""

import argparse
import inspect
import json
import logging
import re
import sys

import pytest
import torch

from pe_patch import load_patched
from pe_patch.cli import main as cli
from pe_patch.cli.output import FirstOnly
from pe_patch.compare.demo import BASE
from pe_patch.convert import command, measure
from pe_patch.errors import OptionError

from .evaluation_doubles import make_text, make_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "source.py"
    path.write_text(inspect.getsource(argparse))
    return path


@pytest.fixture
def run(capsys, text):
    """The command on the demo's model with little text: exit code, and what it printed."""

    def call(*words, model=BASE):
        small = ["--calibration", text, "--calibration-tokens", 1024, "--length", 64]
        code = cli.main([str(word) for word in ["convert", model, "--to", "mla", *small, *words]])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture
def loaded(monkeypatch):
    """The model that the command loads, and converts in place."""
    kept = []

    def load(*arguments):
        kept.append(real(*arguments))
        return kept[-1]

    real = command.load
    monkeypatch.setattr(command, "load", load)
    return kept


@torch.inference_mode()
def logits(model):
    return model(input_ids=torch.arange(5, 37)[None]).logits


def test_a_converted_model_is_measured_and_saved(run, loaded, tmp_path):
    folder = tmp_path / "deep" / "converted"
    code, out, err = run("--cache-ratio", "1/4", "--samples", 10, "--out", folder, "--json")
    assert code == 0, err
    found = json.loads(out)
    before, after = found["before"], found["after"]
    assert (before["cached_numbers_per_token_and_layer"], after["cached_numbers_per_token_and_layer"]) == (256, 64)
    assert (before["cached_bytes_per_token"], after["cached_bytes_per_token"]) == (2048, 512)
    assert after["loss"] > before["loss"] and after["loss_change"] == pytest.approx(after["loss"] / before["loss"] - 1)
    assert before["questions"] == after["questions"] == 10 and before["retrieval"] > after["retrieval"]
    assert after["kv_rank"] + after["rope_dim"] == 64 and found["method"] == "transmla"
    assert "held-out" in found["text"] and before["loss_measured_on"] == after["loss_measured_on"]
    model, _ = loaded[0]
    again = load_patched(folder).eval()
    assert torch.equal(logits(again), logits(model))
    assert (folder / "tokenizer.json").is_file() and [folder] == list(folder.parent.iterdir())
    original = sum(weight.numel() for weight in command.load(str(BASE))[0].parameters())
    assert sum(weight.numel() for weight in again.parameters()) < 1.1 * original  # the old weights are not in it


@pytest.mark.parametrize("size", [("--kv-rank", 24, "--rope-dim", 16), ("--max-loss", 1.0, "--rope-dim", 16)])
def test_the_table_says_what_changed_and_on_what(run, size):
    code, out, err = run("--method", "svd", "--samples", 5, *size)
    assert code == 0, err
    for expected in (
        "Converted with svd",
        "bytes per token",
        "2,048",
        "loss, nats",
        "questions answered",
        "held-out",
        "Calibrated on 1,0",
    ):
        assert expected in out
    assert "saved" not in out.lower()
    # without a terminal: the plan, an estimate after the first batch, and the end
    plan, *lines = [line for line in err.splitlines() if line.startswith("convert: ")]
    assert re.search(r"to read: about [\d,]+ tokens, in 2 measurements at 64 tokens and 1 x 1,0\d\d tokens of", plan)
    assert "1 of 3, measuring the original model" in lines[0] and re.search(r"[\d,]+ tokens/s, about .* left", lines[0])
    total = int(plan.split("about ")[1].split()[0].replace(",", ""))
    read = int(re.search(r"finished, ([\d,]+) tokens", lines[-1]).group(1).replace(",", ""))
    assert 0.9 * total <= read <= 1.5 * total  # the plan leaves out the targets without context


@pytest.mark.parametrize(("tokens", "warned"), [(1024, True), (8192, False)])
def test_too_few_calibration_tokens_are_named_before_anything_is_measured(run, caplog, monkeypatch, tokens, warned):
    logged = []

    def convert(model, material, options, report):
        logged.append(caplog.text)
        raise OptionError("stop")

    monkeypatch.setattr(command, "convert_model", convert)
    run("--cache-ratio", "1/4", "--calibration-tokens", tokens)
    # 32 for each of the 2 x 4 x 32 numbers that a layer of this model caches for a token
    assert ("1,024 calibration tokens are few: give at least 8,192" in logged[0]) == warned


def test_the_terminal_shows_a_repeated_warning_once(capsys):
    handler, logger = logging.StreamHandler(sys.stderr), logging.Logger("sweep")
    handler.addFilter(FirstOnly())
    logger.addHandler(handler)
    for count in (3, 3, 4):
        logger.warning("%d tokens are few", count)
    assert capsys.readouterr().err.splitlines() == ["3 tokens are few", "4 tokens are few"]


def test_options_of_the_scheme_reach_it(run):
    code, out, _ = run(
        "--kv-rank", 8, "--method", "mha2mla", "--rope-dim", 8, "--option", "svd=split", "--no-retrieval", "--json"
    )
    after = json.loads(out)["after"]
    assert code == 0 and after["cached_numbers_per_token_and_layer"] == 2 * 8 + 4 * 8 and after["retrieval"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "one of --kv-rank N"),
        (("--kv-rank", 8, "--max-loss", 0.1), "--kv-rank and --max-loss exclude each other"),
        (("--kv-rank", 9999), "got --kv-rank 9999"),
        (("--cache-ratio", "an eighth"), "such as 1/8"),
        (("--cache-ratio", "1/4", "1/8"), "--sweep to compare several"),
        (("--method", "transmlo", "--kv-rank", 8), "Did you mean 'transmla'"),
        (("--kv-rank", 8, "--option", "rope_dim=8"), "--rope-dim"),
        (("--kv-rank", 8, "--option", "balance=2"), "balance"),
        (("--sweep", "--kv-rank", 8), "--cache-ratio"),
        (("--sweep", "--out", "x"), "saves no model"),
        (("--sweep", "--cache-ratio", "1/512"), "larger cache_ratio"),
    ],
)
def test_wrong_usage_exits_with_two(run, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert code == 2 and message in err and not out
    assert not list(tmp_path.iterdir())


def test_a_target_must_be_known(capsys):
    assert cli.main(["convert", str(BASE), "--to", "mlb", "--kv-rank", "8"]) == 2
    assert "Did you mean 'mla'" in capsys.readouterr().err
    assert cli.main(["convert", str(BASE), "--kv-rank", "8"]) == 2


def test_the_help_has_an_example(capsys):
    assert cli.main(["convert", "--help"]) == 0
    assert "--to mla --cache-ratio 1/4 --out" in capsys.readouterr().out


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path, monkeypatch):
    (tmp_path / "note").write_text("mine")
    monkeypatch.setattr(command, "load", None)  # it is refused before any model is loaded
    code, _, err = run("--kv-rank", 8, "--out", tmp_path)
    assert code == 1 and "not an empty folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_nothing_is_left_of_a_save_that_fails(run, loaded, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    code, _, err = run("--kv-rank", 8, "--out", tmp_path / "converted")
    assert code == 1 and "the disk is full" in err
    assert not list(tmp_path.iterdir())


def test_quantised_models_are_refused(run, monkeypatch):
    tokenizer = make_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.config.quantization_config = {"quant_method": "gptq"}
    monkeypatch.setattr(command, "load", lambda *_: (model, tokenizer))
    code, _, err = run("--kv-rank", 8)
    assert code == 1 and "load the model unquantised" in err


def test_text_of_which_nothing_is_held_out(run, tmp_path):
    for name in ("a", "b"):  # by the hashes of their names both are for training
        (tmp_path / f"{name}.txt").write_text("a few words " * 400)
    code, _, err = run("--kv-rank", 8, "--calibration", tmp_path)
    assert code == 1 and "--text" in err


def test_a_sweep_writes_a_table_and_a_picture(run, loaded, tmp_path):
    words = ("--method", "mha2mla", "transmla", "--cache-ratio", "1/4", "1/32", "--samples", 5, "--output", tmp_path)
    code, out, err = run("--sweep", *words)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert [(row["method"], row.get("asked_ratio")) for row in rows] == [
        ("original", None), ("mha2mla", 1 / 4), ("mha2mla", 1 / 32), ("transmla", 1 / 4), ("transmla", 1 / 32),
    ]  # fmt: skip
    original, quarter, without = rows[0], rows[1], rows[2]
    assert original["cached_bytes_per_token"] == 4 * quarter["cached_bytes_per_token"] == 2048
    assert rows[3]["cached_bytes_per_token"] == quarter["cached_bytes_per_token"]
    assert rows[4]["cached_bytes_per_token"] == 64
    # 4 heads x 2 dims are all that 8 numbers hold
    assert "loss" not in without and "rotary key takes 8. Use a larger cache_ratio" in without["note"]
    assert original["questions"] == 5 and 0 <= quarter["retrieval"] <= 1
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["length"] == 64 and "1,024 tokens" in config["calibration"]
    for expected in ("retrieval", "1/32", "larger", "Wrote sweep.jsonl"):
        assert expected in out
    model, _ = loaded[0]
    assert not hasattr(model.config, "pe_patch")


def test_the_cache_is_counted_on_the_cache_itself():
    model = tiny_llama(64)
    config = model.config
    of_layer = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    size = measure.cache_size(model.to(torch.bfloat16))
    assert size.numbers_per_layer == of_layer and size.layers == config.num_hidden_layers
    assert size.bytes == 2 * of_layer * config.num_hidden_layers


def test_calibration_rows_are_as_many_and_as_long_as_asked():
    tokenizer, documents = make_tokenizer(), [make_text(60, seed) for seed in range(3)]
    rows = measure.calibration_rows(tokenizer, documents, tokens=200, length=32)
    assert sum(map(len, rows)) == 200 and max(map(len, rows)) == 32
    everything = measure.calibration_rows(tokenizer, documents, tokens=10**9, length=32)
    assert sum(map(len, everything)) >= sum(len(tokenizer(one)["input_ids"]) for one in documents) - len(documents)
    assert min(map(len, everything)) > 1


@pytest.mark.parametrize(("word", "value"), [("1/8", 0.125), ("0.25", 0.25), (" 1/2 ", 0.5)])
def test_shares_are_fractions(word, value):
    assert measure.share(word) == value and measure.share(measure.share_name(value)) == value
    with pytest.raises(OptionError, match="1/8"):
        measure.share("1/0")
