"""Check the content of the advice: the schemes, the reasons, the commands, and the models that it refuses."""

from __future__ import annotations

import json
import shlex

import pytest
import typer
from transformers import CONFIG_MAPPING

from pe_patch import SCHEMES
from pe_patch.advice import advise
from pe_patch.cli import main as cli
from pe_patch.cli.main import app
from pe_patch.errors import OptionError, PePatchError, UnknownNameError, UnsupportedError
from pe_patch.training.reading import load_recipe

from .advised import ASKED, CONFIGS, advise_on, advised


def scheme(advice, name, which=0):
    return [judgement for judgement in advice.schemes if judgement.scheme == name][which]


@pytest.mark.parametrize("name", ASKED)
def test_the_advice_covers_every_scheme(name):
    advice = advised(name)
    named = {one.scheme for one in advice.schemes} | set(advice.from_the_start) | {advice.case.facts.positions, "mla"}
    assert named == {one for one in SCHEMES if not one.endswith("_2d")}
    for one in advice.schemes:
        if one.obstacle is None:
            reach = one.effective.get("effective_window", "unbounded")
            assert reach == "unbounded" or reach >= advice.case.target


def test_llama2_to_eight_windows():
    llama2 = advised("llama2")
    assert llama2.verdict.startswith("llama-2-7b was trained for 4,096 tokens; 32,768 are 8 times that. 18 of its 64")
    assert llama2.choice.untrained.scheme == "dca"
    assert (llama2.choice.trained.scheme, llama2.choice.trained.options) == ("yarn", {"factor": 8})
    assert scheme(llama2, "dynamic_ntk").untrained == "no"  # eight windows are too far for it
    # the authors' rule: G >= 3 (N - W) / (2 L - 3 W) with W = 1024: 3 x 31744 / 5120 = 18.6
    assert scheme(llama2, "self_extend").effective["group"] == 19
    assert "5,333" in scheme(llama2, "string").obstacle  # 4096 + 4096 // 3 - 128


def test_twice_the_window_is_near_enough_for_dynamic_ntk():
    assert scheme(advise_on("llama-2-7b", 8192), "dynamic_ntk").untrained == "yes"


def test_more_text_to_train_on_changes_the_choice():
    assert advise_on("llama-2-7b", 32768, train_tokens=2 * 10**9).choice.trained.scheme == "ntk"
    few = advise_on("llama-2-7b", 32768, train_tokens=10 * 64 * 32768)
    assert few.choice.trained.scheme == "yarn"
    assert any("phases.0.steps=10 " in (step.command or "") for step in few.steps)


def test_a_factor_reaches_the_target():
    pythia = advised("pythia")
    assert pythia.case.factor == 2.5  # 5000 / 2048 = 2.44, in quarters
    assert any("2.441 windows" in note for note in pythia.notes)
    assert any("32 of the 128 dimensions" in note for note in pythia.notes)


def test_llama31_is_not_scaled_twice():
    llama31 = advised("llama31")
    assert llama31.choice.trained.options == {"factor": 32, "on_existing": "replace"}  # 262,144 / 8192
    assert llama31.choice.untrained.options == {"on_existing": "compose"}
    assert scheme(llama31, "yarn").untrained == "no" and "'llama3'" in scheme(llama31, "yarn").why
    [note] = [note for note in llama31.notes if "on_existing='replace'" in note]
    assert "65,536" in note  # factor 8 of 8192 tokens, from which composing schemes count


@pytest.mark.parametrize(("name", "target"), [("llama-2-7b", 4096), ("llama-3.1-8b", 131072), ("bloom-7b1", 100)])
def test_within_the_window_nothing_is_needed(name, target):
    advice = advise_on(name, target)
    assert advice.verdict.startswith("Nothing is needed")
    assert not advice.schemes and not advice.plans and advice.choice.untrained is None
    assert [shlex.split(step.command)[:2] for step in advice.steps] == [["pe-patch", "evaluate"]]


def test_mistral_must_lift_its_sliding_window():
    mistral = advised("mistral")
    assert mistral.case.facts.sliding == {4096: 32}
    assert "looks back at most 4,096 tokens" in mistral.verdict and "sliding_window" in mistral.verdict
    assert "sliding_window" in mistral.steps[0].purpose
    assert any("trained on 8,192" in note for note in mistral.notes)
    assert mistral.choice.trained.options == {"factor": 4, "original_max_position_embeddings": 8192}
    assert advise_on("mistral-7b-v0.1", 4096).verdict.startswith("Nothing is needed")
    between = advise_on("mistral-7b-v0.1", 8000).verdict
    assert "sliding_window" in between and "needs no scheme" in between


def test_qwen3_follows_its_authors():
    qwen3 = advised("qwen3")
    assert (qwen3.choice.untrained.scheme, qwen3.choice.untrained.options["factor"]) == ("yarn", 4)
    assert any("40,960" in note and "32,768" in note for note in qwen3.notes)
    assert advise_on("qwen3-8b", 262144).choice.untrained.scheme == "dca"  # beyond what they recommend


def test_bloom_extrapolates_but_far_text_fades():
    bloom = advised("bloom")
    assert "subtracts 32" in bloom.verdict  # 8192 x 2^-8
    assert bloom.choice.untrained.options == {}
    slopes = bloom.choice.trained.options["slopes"]
    assert slopes[-1] == 2**-8 / 4 and len(slopes) == 32
    assert bloom.pairs == ()


def test_a_learned_table_ends():
    gpt2 = CONFIG_MAPPING["gpt2"]()
    advice = advise(gpt2, 4096)
    assert "1,024 positions and none beyond" in advice.verdict
    assert advice.choice.untrained.options == {"max_positions": 4096, "extend": "hierarchical"}
    far = advise(CONFIG_MAPPING["opt"](max_position_embeddings=64), 64 * 64 + 1)  # 64 x 64 is all that it reaches
    fits, ends = scheme(far, "learned"), scheme(far, "learned", 1)
    assert fits.options["extend"] == "interpolate" and "ends at 4096" in ends.obstacle


def test_rotating_layers_that_all_slide_beside_layers_without_positions():
    advice = advise(CONFIG_MAPPING["cohere2"](num_hidden_layers=4, max_position_embeddings=8192), 32768)
    assert advice.verdict.startswith("No position has to change")
    assert not advice.schemes


def test_only_the_layers_with_the_largest_base_are_patched():
    advice = advise(CONFIG_MAPPING["gemma3_text"](max_position_embeddings=8192), 16384)
    assert advice.choice.trained.options["layers"] == [5, 11, 17, 23]
    assert any("layers=[5, 11, 17, 23]" in (step.block or "") for step in advice.steps)


def test_a_scheme_that_a_family_cannot_take_says_why():
    advice = advise(CONFIG_MAPPING["stablelm"](), 16384)
    assert "drops keywords" in scheme(advice, "dca").obstacle
    assert advice.choice.untrained.scheme == "yarn"


def commands(advice):
    return [shlex.split(step.command) for step in advice.steps if step.command]


@pytest.mark.parametrize("name", ASKED)
def test_commands_exist_and_take_these_flags(name):
    group = typer.main.get_command(app)
    for words in commands(advised(name)):
        if words[0] != "pe-patch":
            continue
        command = group.commands[words[1]]
        known = {flag for parameter in command.params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("name", ASKED)
def test_the_patch_is_what_inspect_shows(name, tmp_path, capsys, monkeypatch):
    advice = advised(name)
    [words] = [words for words in commands(advice) if words[:2] == ["pe-patch", "inspect"]]
    if name == "mistral":  # do what the first step says
        config = json.loads((CONFIGS / "mistral-7b-v0.1" / "config.json").read_text())
        (tmp_path / words[2]).mkdir()
        (tmp_path / words[2] / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
        monkeypatch.chdir(tmp_path)
    assert cli.main([*words[1:], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["scheme"] == advice.choice.untrained.scheme
    assert shown["effective"]["effective_window"] in ("unbounded", advice.case.target)


@pytest.mark.parametrize("name", ["llama2", "llama31", "mistral", "qwen3", "pythia"])
def test_the_recipe_takes_the_overrides(name):
    advice = advised(name)
    [words] = [words for words in commands(advice) if words[0] == "accelerate"]
    assert words[1:4] == ["launch", "-m", "pe_patch.training"]  # works in any folder, and from a wheel
    recipe = load_recipe(words[4], words[5:])
    assert recipe.dry_run and recipe.phases[0].length == advice.case.target
    assert recipe.scheme.name == "yarn" and recipe.scheme.options == advice.choice.trained.options
    assert (recipe.phases[0].batch, recipe.phases[0].steps, recipe.phases[0].learning_rate) == (64, 400, 2e-5)


@pytest.mark.parametrize("name", ASKED)
def test_the_page_starts_with_the_verdict_and_fits(name):
    advice = advised(name)
    lines = str(advice).splitlines()
    assert advice.verdict.startswith(lines[0].strip()) and len(lines[0]) > 60
    assert max(map(len, lines)) <= 120
    assert not [line for line in lines if line.endswith(("\\ ", " "))]


@pytest.mark.parametrize("name", ASKED)
def test_folded_commands_are_the_commands(name):
    """Paste each command from the page into a shell parser and compare it with the original command."""
    advice = advised(name)
    page = str(advice).replace("\\\n", " ")
    pasted = [shlex.split(line) for line in page.splitlines() if line.startswith(("   pe-patch", "   accelerate"))]
    assert pasted == commands(advice)


def test_the_command_prints_json_or_a_page(capsys):
    words = ["advise", str(CONFIGS / "llama-2-7b"), "--target-length", "32768"]
    assert cli.main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["leaving"] == 18 and data["model"]["parameters"]["total"] == 6_738_415_616
    assert data["choice"]["trained"]["options"] == {"factor": 8}
    assert cli.main(words) == 0
    assert "18 of its 64 rotating pairs" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["advise", "--help"]) == 0
    assert "pe-patch advise meta-llama/Llama-2-7b-hf --target-length 32768" in capsys.readouterr().out


@pytest.mark.parametrize("name", ASKED)
def test_the_data_are_json(name):
    data = advised(name).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False))["target_length"] == data["target_length"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_length": 0}, "target_length must be a whole number of at least 1, got 0"),
        ({"target_length": 8192.5}, "target_length"),
        ({"trained_length": -1}, "trained_length"),
        ({"batch_size": True}, "batch_size"),
        ({"dtype": "int4"}, "dtype must be one of auto, float32, bfloat16, float16"),
    ],
)
def test_invalid_values_are_refused(given, message):
    with pytest.raises(OptionError, match=message):
        advise(str(CONFIGS / "llama-2-7b"), **({"target_length": 8192} | given))


def test_a_target_beyond_all_papers_gets_no_advice():
    advice = advise_on("llama-2-7b", 16 * 2**20)
    assert "No paper goes farther than 512 times" in advice.verdict
    assert not advice.schemes and not advice.steps and "Next" not in str(advice)


def test_a_far_target_requires_training():
    advice = advise_on("llama-2-7b", 131072)  # 32 windows
    assert advice.choice.untrained is None and advice.choice.trained.scheme == "yarn"


def test_unsupported_models_are_refused(tmp_path, capsys):
    with pytest.raises(UnknownNameError, match="'xlnet' has no adapter"):
        advise(CONFIG_MAPPING["xlnet"](), 8192)
    with pytest.raises(UnsupportedError, match="'t5' is not a causal language model"):
        advise(CONFIG_MAPPING["t5"](), 8192)
    with pytest.raises(OptionError, match="a folder, a hub name or a Transformers config"):
        advise(7, 8192)
    config = json.loads((CONFIGS / "llama-2-7b" / "config.json").read_text())
    saved = config | {
        "pe_patch": {"version": 1, "scheme": "dca", "options": {}},
        "rope_scaling": {"rope_type": "pe_patch"},
    }
    for name, content in (("unknown", {"model_type": "nonsense"}), ("patched", saved)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match="no model type 'nonsense'"):
        advise(str(tmp_path / "unknown"), 8192)
    with pytest.raises(PePatchError, match="saved with a patch, 'dca'"):
        advise(str(tmp_path / "patched"), 8192)
    assert cli.main(["advise", str(tmp_path / "nowhere" / "at" / "all"), "--target-length", "8192"]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["advise", str(CONFIGS / "llama-2-7b"), "--target-length", "0"]) == 2


def test_a_window_that_the_config_does_not_state():
    config = CONFIG_MAPPING["bloom"](n_layer=1, hidden_size=64, n_head=4)
    assert advise(config, 8192).case.facts.window == 2048
    assert advise(config, 8192, trained_length=512).case.facts.window == 512
    assert advise_on("llama-2-7b", 8192, trained_length=8192).verdict.startswith("Nothing is needed")


def test_a_server_that_must_load_the_result_decides_what_is_recommended():
    free, served = advised("llama2"), advise_on("llama-2-7b", 32768, export=["vllm", "llamacpp"])
    assert free.choice.untrained.scheme == "dca" and not free.choice.untrained.exports
    assert served.choice.untrained.scheme == served.choice.trained.scheme == "yarn"
    assert {"vllm", "llamacpp"} <= set(served.choice.untrained.exports)
    commands = [step.command for step in served.steps if step.command]
    assert any("pe-patch export" in each and "--target vllm" in each for each in commands)
    assert any(each.startswith("pe-patch extend") and "--for vllm --for llamacpp" in each for each in commands)
    with pytest.raises(UnknownNameError, match=r"vlm.*vllm"):
        advise_on("llama-2-7b", 32768, export=["vlm"])
    bloom = advise_on("bloom-7b1", 8192, export=["vllm"])
    assert bloom.choice.untrained is None and bloom.choice.trained is None
    assert "Without training, no scheme fits this model and can be exported for vllm." in bloom.verdict


def test_exports_are_what_an_export_says():
    from pe_patch import patch_model
    from pe_patch.checkpoints.exporters.export import check_export

    from .models import build

    by_scheme = {each.scheme: set(each.exports) for each in advised("llama2").schemes if each.obstacle is None}
    model = patch_model(build("llama"), "dynamic_ntk")
    for target in ("transformers", "vllm", "sglang", "llamacpp"):
        if target in by_scheme["dynamic_ntk"]:
            check_export(model, target)
        else:
            with pytest.raises(UnsupportedError):
                check_export(model, target)
    assert by_scheme["yarn"] == {"transformers", "vllm", "sglang", "llamacpp"} and not by_scheme["self_extend"]


def test_the_smallest_device_holds_what_is_added_up():
    small = advise_on("llama-2-7b", 8192).training
    for name, size in small.smallest.items():
        needed = small.states[name] + small.activations + small.chunked_logits
        fitting = [each for each in (8, 16, 24, 48, 80) if each * 1e9 >= needed]
        assert size == (fitting[0] if fitting else None)
    # adapters: 2 bytes x 6.7e9 + 16 x trained, and 3.8 GB of activations and logits: above 16 GB
    assert small.smallest["adapters"] == 24 and small.smallest["mixed"] is None
