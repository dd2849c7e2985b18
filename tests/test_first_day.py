"""Test first contacts: lengths such as `32k`, flags in errors, `generate --chat`, warnings with a remedy."""

import json
import logging
import math
import re
import time

import pytest
import torch
from transformers import AutoTokenizer

from pe_patch import SCHEMES, YaRN, describe, evaluate, patch_model
from pe_patch.advice.candidates import CANDIDATES
from pe_patch.checkpoints import generation, sources
from pe_patch.cli import main as cli
from pe_patch.cli import output
from pe_patch.cli.catalogue import catalogue
from pe_patch.cli.main import main
from pe_patch.cli.options import parse_length
from pe_patch.cli.wording import for_command_line
from pe_patch.compare import compare
from pe_patch.compare.compared_scheme import ComparedScheme
from pe_patch.compare.comparison import Comparison
from pe_patch.compare.demo import BASE
from pe_patch.compare.page import verdict
from pe_patch.compare.run import _lines, _progress_lines
from pe_patch.compare.settings import Folder, Settings, write_json
from pe_patch.errors import OptionError, PePatchError
from pe_patch.evaluation.model import EvaluatedModel
from pe_patch.evaluation.progress import Progress
from pe_patch.evaluation.results import Results
from pe_patch.mla.conversion import tokens_needed

from .models import build, logits, tokens

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<assistant>"


@pytest.mark.parametrize(
    ("word", "tokens"),
    [("32768", 32768), ("32k", 32768), ("128K", 131072), ("1M", 1048576), ("1.5k", 1536), ("32_768", 32768),
     ("1.0001k", None), ("k", None), ("-1k", None), ("3e4", None), ("32kb", None)],
)  # fmt: skip
def test_lengths_in_k(word, tokens):
    assert parse_length(word) == tokens


def test_commands_take_lengths_in_k(run):
    code, out, _ = run("inspect", BASE, "--scheme", "yarn", "--target-length", "2k", "--json")
    assert code == 0 and json.loads(out)["effective"]["effective_window"] == 2048
    assert cli.spread("evaluate --length 1k 2k M".split()) == "evaluate --length 1k --length 2k M".split()
    code, _, err = run("advise", BASE, "--target-length", "2x")
    assert code == 2 and "32k" in err


@pytest.mark.parametrize(("short", "full"), [("bf16", "bfloat16"), ("FP16", "float16"), ("fp32", "float32")])
def test_short_names_of_dtypes(short, full):
    assert sources.full_dtype(short) == full
    with pytest.raises(OptionError, match=r"got 'floaty'\."):
        sources.full_dtype("floaty")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", BASE, "--prompt-file", "missing.txt"], "--prompt-file missing.txt cannot be read"),
        (["generate", BASE, "--prompt", "a", "--device", "nonsense"], "'nonsense' cannot be used here"),
        (["generate", BASE, "--prompt", "a", "--chat"], "--chat needs a tokenizer with a chat template"),
        (["generate", BASE, "--prompt", "a", "--system", "b"], "add --chat"),
        (["generate", BASE, "--prompt", "a", "--seed", "1"], "no effect without sampling. Example: --temperature 0.7"),
        (["generate", BASE, "--prompt", "a", "--temperature", "0", "--top-k", "5"], "--temperature 0 always takes"),
        (["inspect", BASE, "--scheme", "yarn"], "for example --factor 4"),
        (["inspect", BASE, "--scheme", "yarn", "--factor", 4, "--target-length", 999], "give one"),
        (["inspect", BASE, "--scheme", "dca", "--target-length", 999], "has no factor"),
        (["inspect", BASE, "--scheme", "yarn", "--target-length", 200], "within the trained window of 256"),
        (["inspect", BASE, "--scheme", "yarn", "--factor", 4, "--on-existing", "x"], "got --on-existing x"),
        (["list", "-q", "-v"], "-q and -v exclude each other"),
    ],
)
def test_errors_name_flags(run, words, message):
    code, _, err = run(*words)
    assert code == 2 and message in err and "_existing=" not in err


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("evaluate", "pass beyond_window=True to", "pass --beyond-window to"),
        ("evaluate", "(retrieval=False leaves it out)", "(--no-retrieval leaves it out)"),
        ("evaluate", "wording='own' is ours", "--task-option wording=own is ours"),
        ("inspect", "unpatch_model(model) first, or on_existing='replace'.", "load the original model, or give "
         "--on-existing replace."),
        ("inspect", "give original_max_position_embeddings=<tokens>.", "give --option "
         "original_max_position_embeddings=<tokens>."),
        ("advise", "give trained_length=<tokens>.", "give --trained-length <tokens>."),
        ("evaluate", "or --overwrite (overwrite=True in Python) to", "or --overwrite to"),
        ("inspect", "'rerope' got window=9, and", "'rerope' got window=9, and"),
        ("inspect", "carries yarn(factor=4, beta_fast=3)", "carries yarn(factor=4, beta_fast=3)"),
        ("train", "steps=3 and dry_run=true", "steps=3 and dry_run=true"),
    ],
)  # fmt: skip
def test_python_arguments_become_flags(command, message, expected):
    assert for_command_line(message, command) == expected


def test_verbose_and_quiet(run, caplog):
    for flag, logged in (("", (True, False)), ("-v", (True, True)), ("--quiet", (False, False))):
        caplog.clear()
        code, out, _ = run("inspect", BASE, "--scheme", "yarn", "--factor", 4, *[flag] * bool(flag))
        assert code == 0 and "yarn" in out
        assert ("changes every text" in caplog.text, "trained window: 256 tokens (max" in caplog.text) == logged


@pytest.mark.parametrize("flag", ["-v", "-q"])
def test_the_command_line_leaves_logging_as_it_was(run, flag):
    """A program may call `main`; a test that runs after `-q` must still see warnings."""

    def state():
        loggers = [logging.getLogger(name) for name in ("", "pe_patch", "bitsandbytes")]
        return [(logger.level, list(logger.handlers)) for logger in loggers], output.is_quiet()

    before = state()
    assert run("inspect", BASE, "--scheme", "yarn", "--factor", 4, flag)[0] == 0
    assert run("list", "nothing", flag)[0] == 2
    assert state() == before


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The demo's model with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    model, tokenizer = sources.load(str(BASE), "float32", "cpu")
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_chat_sends_the_template(run, chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "def f("}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(expected) == "<system>s<user>def f(<assistant>"
    assert generation.encode(tokenizer, "def f(", chat=True, system="s").tolist() == [expected]
    words = ["generate", chat_model, "--prompt", "def f(", "--chat", "--max-new-tokens", 6]
    code, streamed, _ = run(*words)
    found = json.loads(run(*words, "--json")[1])
    assert code == 0 and streamed == f"{found['text']}\n" and found["new_tokens"] == 6
    assert run(*words, "--stream")[:2] == run(*words, "--no-stream")[:2] == (0, streamed)


def test_a_model_that_ends_at_once_is_no_success(run, chat_model, monkeypatch):
    monkeypatch.setattr(generation, "continue_ids", lambda *_, **__: generation.Generated("", 1))
    code, _, err = run("generate", chat_model, "--prompt", "a")
    assert code == 1 and "ended after 1 tokens" in err and "add --chat" in err
    code, _, err = run("generate", chat_model, "--prompt", "a", "--chat", "-q")
    assert code == 1 and "add --chat" not in err and "another prompt" in err


def test_sampling_is_that_of_generate():
    model, tokenizer = sources.load(str(BASE), "float32", "cpu")
    ids = generation.encode(tokenizer, "def f(")
    drawn = generation.continue_ids(model, tokenizer, ids, 8, generation.Sampling(0.8, 0.9, 20, 7))
    torch.manual_seed(7)
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **settings)
    assert drawn.text == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("scheme", "target", "factor"), [("yarn", 2048, 32), (YaRN, 2000, 31.25), ("linear", 65, 65 / 64)]
)
def test_a_target_length_is_a_factor(scheme, target, factor):
    model = build("llama", max_position_embeddings=64)
    patch_model(model, scheme, target_length=target)
    described = describe(model).to_dict()
    assert described["options"]["factor"] == pytest.approx(factor, rel=1e-12)
    assert described["effective"]["effective_window"] == target
    same = build("llama", max_position_embeddings=64)
    patch_model(same, scheme, factor=factor)
    ids = tokens(1, 40)
    torch.testing.assert_close(logits(model, ids), logits(same, ids), rtol=0, atol=0)


STATIC = [("yarn", {"factor": 4}), ("linear", {"factor": 4}), ("llama3", {"factor": 4}), ("ntk", {"factor": 4}),
          ("ntk_by_parts", {"factor": 4}), ("rope", {"theta": 500.0}), ("resonance", {})]  # fmt: skip
UNCHANGED = [("yarn", {"factor": "auto"}), ("dynamic_ntk", {}), ("dynamic_yarn", {}), ("dca", {}), ("rope", {}),
             ("self_extend", {"factor": 4}), ("yarn", {"factor": 1})]  # fmt: skip


@pytest.mark.parametrize(("scheme", "options"), STATIC + UNCHANGED)
def test_a_scheme_that_changes_short_texts_says_so(scheme, options, caplog):
    model = build("llama").eval()
    ids = tokens(1, 8)
    native = logits(model, ids)
    with caplog.at_level(logging.WARNING, logger="pe_patch"):
        patch_model(model, scheme, **options)
    changed = not torch.equal(logits(model, ids), native)
    assert changed == ((scheme, options) in STATIC) == ("changes every text" in caplog.text)


def test_a_capped_scheme_that_never_scales_says_so(caplog):
    model, ids = build("llama"), tokens(1, 100)
    native = logits(model, ids)
    with caplog.at_level(logging.WARNING, logger="pe_patch"):
        patch_model(model, "dynamic_yarn", factor=1)
    assert "so no logit changes" in caplog.text and torch.equal(logits(model, ids), native)


def test_list_and_advice_agree_and_options_are_listed(run):
    entries = {entry["name"]: entry for entry in catalogue()["schemes"]}
    for candidate in CANDIDATES["rope"]:
        assert entries[candidate.scheme]["works untrained"] == candidate.untrained
    for name, scheme in SCHEMES.items():
        assert {option["name"] for option in entries[name]["options"]} == scheme.option_names()
    yarn = {option["name"]: option for option in entries["yarn"]["options"]}
    assert yarn["factor"] == {"name": "factor", "type": 'float | "auto"', "required": True, "default": None}
    assert yarn["beta_fast"]["default"] == 32 and yarn["truncate"]["type"] == "bool"
    out = run("list", "schemes")[1]
    assert "beta_fast" in out and "Mapping[str" in out


def test_custom_code_is_refused_without_a_question(run, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    config = {"model_type": "secret", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    for words in (["advise", tmp_path, "--target-length", "4k"], ["inspect", tmp_path], ["generate", tmp_path,
                  "--prompt", "a"], ["selftest", tmp_path]):  # fmt: skip
        code, _, err = run(*words)
        assert code == 1 and "custom code" in err and "ran" not in err.split()


def test_evaluate_refuses_paths_and_swapped_arguments():
    model, tokenizer = sources.load(str(BASE), "float32", "cpu")
    for arguments, name in (
        ((str(BASE), tokenizer), "model"),
        ((model, ["needle"]), "tokenizer"),
        ((model, "x"), "tok"),
    ):
        with pytest.raises(OptionError, match=f"{name}.* must be a loaded"):
            evaluate(*arguments, ["needle"])


def settings(folder, **changes):
    text = folder / "text"
    text.mkdir(exist_ok=True)
    (text / "a.txt").write_text(changes.pop("content", "first"))
    return Settings(str(folder / "model"), (ComparedScheme("as it is"),), (64,), text=str(text), **changes)


def test_a_comparison_does_not_mix_two_models_or_two_texts(tmp_path):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"\0" * 64 + b"\1")
    folder = Folder(tmp_path / "out")
    folder.claim(settings(tmp_path))
    folder.claim(settings(tmp_path))
    with pytest.raises(PePatchError, match="another text_files"):
        folder.claim(settings(tmp_path, content="other"))
    weights.write_bytes(b"\0" * 64 + b"\2")
    with pytest.raises(PePatchError, match="another model_files"):
        folder.claim(settings(tmp_path))


def test_names_of_folders_are_short_and_differ():
    long = [ComparedScheme(f"longrope (long_factor={[1.0 + each] * 64})") for each in (0.5, 0.25)]
    assert len({each.folder for each in long}) == 2 and all(len(each.folder) <= 120 for each in long)
    assert ComparedScheme("self_extend (group=8, window=64)").folder == "self_extend_group=8_window=64"


def test_json_without_nan_and_lines_with_other_separators(tmp_path):
    write_json(tmp_path / "a.json", {"score": math.nan, "rows": [1.5, math.inf], "name": "x"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"score": None, "rows": [1.5, None], "name": "x"}
    entry = {"answers": ["one\u2028two\u0085three\x0c"]}
    (tmp_path / "journal.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n" + '{"cut', encoding="utf-8")
    assert _lines(tmp_path / "journal.jsonl") == [entry]


def test_an_estimate_comes_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pe_patch.compare.run.carry_out", lambda settings, *_, **__: settings)
    compare(BASE, ["yarn"], factor=4, output=tmp_path / "out", samples=3, tasks=["needle"])
    # three questions at four lengths, of which the first is the control's, by two models
    told = capsys.readouterr().err
    assert f"About {2 * 3 * 256 * (1 + 2 + 4 + 8):,} tokens" in told and "instead of" not in told
    monkeypatch.setattr("pe_patch.compare.run.LONG", 0.0)
    compare(BASE, ["yarn"], factor=4, output=tmp_path / "out", samples=30, tasks=["needle"])
    assert f"With 20 samples instead of 30: {2 * 20 * 256 * 15:,} tokens, about" in capsys.readouterr().err


def test_one_long_pass_shows_progress_layer_by_layer(capsys):
    model = build("llama")
    layers, ids = model.model.layers, torch.ones(1, 50, dtype=torch.long)
    progress = Progress("model", 100, "plan", True)
    seen = []
    reading = layers[-1].register_forward_pre_hook(lambda *_: seen.append(progress.status()))
    with progress, progress.following(layers):
        progress.describe("needle at 50")
        model(ids)
        assert "50 of about 100 tokens (50 %)" in progress.status()
        progress.advance(50)
        assert "50 of about 100 tokens (50 %)" in progress.status(), "a pass counts once"
        progress.advance(60)
        assert "the last measures are still to come" in progress.status() and "left" not in progress.status()
    reading.remove()
    before_the_last = 50 * (len(layers) - 1) // len(layers)
    assert f"{before_the_last} of about 100 tokens" in seen[0] and "tokens/s, about" in seen[0]
    assert not any(layer._forward_hooks for layer in layers)
    assert EvaluatedModel(model, None).layers == list(layers)


def test_a_prompt_is_an_argument_or_an_option(capsys, monkeypatch):
    words = ["generate", str(BASE), "--max-new-tokens", "9", "--json"]
    answers = []
    for given in (["import os"], ["--prompt", "import os"]):
        assert main([*words, *given]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main([*words, "import os", "--prompt", "import"]) == 2
    assert "TEXT and --prompt exclude each other" in capsys.readouterr().err


def test_a_comparison_prints_lines_while_one_scheme_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pe_patch.evaluation.progress.SECONDS_PER_LINE", 0.05)
    compared, folder = settings(tmp_path), Folder(tmp_path / "out")
    with _progress_lines(compared, folder) as tick:
        tick(["as it is"])
        write_json(folder.of(compared.contenders[0]) / "before/progress.json", {"tokens": 300, "share": 0.25})
        time.sleep(0.5)  # as in one long process, which ticks once
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("0% finished") and first.endswith("left; running: as it is")
    found = re.fullmatch(r"25% finished in \d s, ([\d,]+) tokens/s read, about \d+ s left; running: as it is", last)
    assert found and 300 / 5 < int(found[1].replace(",", "")) <= 300 / 0.1


def test_a_verdict_does_not_compare_equal_percentages(tmp_path, monkeypatch):
    comparison = Comparison(settings(tmp_path), Results(), {})

    def line(scheme, share):
        return {"scheme": scheme, "why": None, "retrieval": {64: share}, "loss_change": 0.0}

    for other, expected in ((0.804, "as it is and yarn answer 80% of the questions."), (0.9, ", as it is 80%")):
        monkeypatch.setattr(Comparison, "table", lambda self, other=other: [line("as it is", 0.8), line("yarn", other)])
        assert expected in verdict(comparison) and verdict(comparison).count("80%") == 1


def test_calibration_tokens_by_the_width_of_the_cache():
    assert tokens_needed(2 * 128) == 8192 and tokens_needed(2 * 2048) == 65536
