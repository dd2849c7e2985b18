"""Transformers' own model with the numbers that a server gets has the logits of the patched model."""

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForSequenceClassification,
)

from pe_patch import UnsupportedError, export, load_patched, patch_model
from pe_patch.checkpoints.servers.positions import FAMILIES, ServedPositions, positions_of, served_positions
from pe_patch.checkpoints.servers.vllm_plugin import SERVED_KEY, _reads_differently, served_config
from pe_patch.patching.api import find_patch
from pe_patch.schemes.bias import ALiBi

from . import models
from .models import CASES, applies, case, logits, tokens

SERVED = {
    "rope", "linear", "pi", "ntk", "ntk_by_parts", "yarn", "llama3", "proportional", "p_rope", "clipped_rope",
    "resonance", "nope", "drope", "alibi", "rope_alibi",
}  # fmt: skip
ROTATIONS = (
    "ntk_by_parts",
    "yarn",
    "proportional",
    "clipped_rope",
    "resonance",
    "dynamic_ntk expected",
    "longrope pinned",
)
FIXED = {"dynamic_ntk expected": ("dynamic_ntk", {"factor": 4.0, "expected_length": 128})}


def gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=models.VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=128, max_position_embeddings=models.WINDOW, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"], initializer_range=0.2, pad_token_id=0,
        query_pre_attn_scalar=16,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def build(family: str):
    return gemma() if family == "gemma3_text" else models.build(family)


def scheme_of(name: str):
    return FIXED[name] if name in FIXED else case("llama", name)


def reloaded(model, folder: Path, server: str = "a server"):
    """Return the native config and the positions, from the saved checkpoint and through JSON."""
    model.save_pretrained(folder)
    native, positions = served_positions(AutoConfig.from_pretrained(folder), server)
    return native, ServedPositions.from_dict(json.loads(json.dumps(positions.to_dict())))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("name", ROTATIONS)
def test_transformers_own_model_with_these_frequencies(family, name, tmp_path):
    model, ids = build(family), tokens(2, 100)
    scheme, options = scheme_of(name)
    patch_model(model, scheme, **options)
    served = positions_of(find_patch(model), "a server")
    assert set(served.by_layer.values()) == {0} and len(served.distinct) == 1 and list(served.by_layer) == [0, 1]
    own = build(family)
    rotation = own.model.rotary_emb
    rotation.inv_freq = torch.tensor(served.distinct[0].inv_freq)
    rotation.original_inv_freq, rotation.attention_scaling = rotation.inv_freq, served.distinct[0].factor
    expected = logits(own, ids)
    assert torch.equal(logits(model, ids), expected)
    assert not torch.equal(expected, logits(build(family), ids))
    assert served.longest == (128 if name in FIXED else None)


def test_layers_and_layer_types(tmp_path):
    model = gemma()
    patch_model(model, "ntk_by_parts", factor=4, layers=[1])
    native, served = reloaded(model, tmp_path)
    assert list(served.by_layer) == [1] and native.max_position_embeddings == 128 and not served.longest
    own = gemma()
    own.model.rotary_emb.full_attention_inv_freq = torch.tensor(served.distinct[0].inv_freq)
    assert torch.equal(logits(model, tokens(1, 100)), logits(own, tokens(1, 100)))

    model = gemma()
    patch_model(model, "resonance", over={"rope_type": "yarn", "factor": 4}, layers=[0, 1])
    _, served = reloaded(model, tmp_path / "both")
    assert served.by_layer == {0: 0, 1: 1}  # local and global layers have their own base
    again = load_patched(tmp_path / "both")
    assert torch.equal(logits(again, tokens(1, 100)), logits(model, tokens(1, 100)))
    own = gemma()
    for kind, positions in zip(("sliding_attention", "full_attention"), served.distinct, strict=True):
        setattr(own.model.rotary_emb, f"{kind}_inv_freq", torch.tensor(positions.inv_freq))
        setattr(own.model.rotary_emb, f"{kind}_attention_scaling", positions.factor)
    assert torch.equal(logits(model, tokens(1, 100)), logits(own, tokens(1, 100)))


def test_slopes_are_the_papers(tmp_path):
    model = models.build("llama")
    patch_model(model, "alibi", layers=[1])
    _, served = reloaded(model, tmp_path)
    assert list(served.by_layer) == [1] and served.distinct[0].inv_freq is None
    assert served.distinct[0].slopes == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    model = models.build("llama")
    patch_model(model, "rope_alibi", slope_scale=0.5)
    (positions,) = positions_of(find_patch(model), "a server").distinct
    assert positions.slopes == [2.0**-3, 2.0**-5, 2.0**-7, 2.0**-9] and positions.inv_freq is not None


def test_no_positions_and_a_scale(tmp_path):
    model = models.build("llama")
    patch_model(model, "drope", softmax_scale=1.25)
    native, served = reloaded(model, tmp_path)
    assert served.distinct[0].score_scale == 1.25 and served.distinct[0].inv_freq is None
    assert native.architectures == ["LlamaForCausalLM"] and native.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("name", sorted({name.split(" ")[0] for name in CASES if applies("llama", name)}))
def test_every_scheme_is_served_or_refused_by_name(name):
    model = models.build("llama")
    scheme, options = case("llama", name)
    patch_model(model, scheme, **options)
    patch = find_patch(model)
    static = not patch.scheme.length_dependent
    if patch.scheme.name in SERVED and static:
        assert positions_of(patch, "vLLM").scheme == patch.scheme.name
    elif patch.scheme.name == "longrope" and static:
        assert positions_of(patch, "vLLM").longest is None
    else:
        with pytest.raises(UnsupportedError, match=f"vLLM cannot serve '{patch.scheme.name}' on llama: .+[.]$"):
            positions_of(patch, "vLLM")


@pytest.mark.parametrize(
    ("scheme", "options", "reason"),
    [
        ("dynamic_ntk", {"factor": 4}, r"caches rotated keys.*Give expected_length="),
        ("yarn", {"factor": "auto"}, r"caches rotated keys.*trained window of 32 tokens"),
        ("lm_infinite", {}, r"first tokens stay attended"),
        ("self_extend", {"factor": 4}, r"second position for far queries"),
        ("t5", {}, r"neither a rotation"),
        ("softmax_scaling", {}, r"scores depend on the position"),
    ],
)
def test_refusals_say_why(scheme, options, reason):
    model = models.build("llama")
    patch_model(model, scheme, **options)
    with pytest.raises(UnsupportedError, match=reason):
        positions_of(find_patch(model), "vLLM")


def test_other_families_are_refused():
    model = models.build("gpt_neox")
    patch_model(model, "ntk_by_parts", factor=4)
    with pytest.raises(UnsupportedError, match="on gpt_neox: the plugin serves llama, mistral, qwen2"):
        positions_of(find_patch(model), "vLLM")


def test_the_entry_point_imports_no_vllm():
    """vLLM loads the entry point in every process; this module must load where vLLM is missing, too."""
    import tomllib

    root = Path(__file__).parents[1]
    groups = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = groups["vllm.general_plugins"]["pe_patch"].partition(":")
    tree = ast.parse((root / (module.replace(".", "/") + ".py")).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    loose = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in loose if "vllm" in (getattr(node, "module", "") or "")]
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3", "gemma3_text"} and SERVED_KEY != "pe_patch"


def test_plain_transformers_refuses_the_checkpoint_and_says_what_to_do(tmp_path):
    """A server without the plugin reads the config as Transformers does."""
    from .test_structure import run

    model = models.build("llama")
    patch_model(model, "ntk_by_parts", factor=4)
    model.save_pretrained(tmp_path)
    code = f"""
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    print("import pe_patch" in str(error), "pe_patch[vllm]" in str(error))
"""
    assert run(code) == "True True"
    assert torch.equal(logits(load_patched(tmp_path), tokens(1, 50)), logits(model, tokens(1, 50)))
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tokens(1, 50)), logits(model, tokens(1, 50))
    )


def test_the_export_for_the_plugin(tmp_path):
    model = models.build("llama")
    patch_model(model, "ntk_by_parts", factor=4)
    with pytest.raises(UnsupportedError, match="use target='vllm-plugin'"):
        export(model, tmp_path / "out", target="vllm")
    export(model, tmp_path / "out", target="vllm-plugin")
    serving = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert serving["commands"] == [["vllm", "serve", str(tmp_path / "out"), "--max-model-len", "128"]]
    assert "pip install 'pe_patch[vllm]'" in (tmp_path / "out" / "SERVE.md").read_text()
    assert torch.equal(logits(load_patched(tmp_path / "out"), tokens(1, 50)), logits(model, tokens(1, 50)))


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("yarn", {"factor": 4}, "needs no plugin. Use target='vllm'"),
        ("self_extend", {"factor": 4}, "second position for far queries"),
    ],
)
def test_what_the_plugin_does_not_export(scheme, options, message, tmp_path):
    model = models.build("llama")
    patch_model(model, scheme, **options)
    with pytest.raises(UnsupportedError, match=message):
        export(model, tmp_path / "out", target="vllm-plugin")
    assert not (tmp_path / "out").exists()


def test_a_fixed_length_is_the_window_of_the_export(tmp_path):
    model = models.build("llama")
    patch_model(model, "dynamic_ntk", factor=2, expected_length=96)
    export(model, tmp_path, target="vllm-plugin")
    assert json.loads((tmp_path / "serve.json").read_text())["window"] == 96


def scaled_by_two(**options):
    scaled = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    model = models.build("llama", rope_parameters=scaled, max_position_embeddings=64)
    options = {"factor": 4, "on_existing": "replace", "original_max_position_embeddings": 32, **options}
    patch_model(model, "ntk_by_parts", **options)
    return model


def test_a_scaling_that_no_layer_keeps_does_not_lengthen_the_server(tmp_path):
    scaled_by_two().save_pretrained(tmp_path)
    config = served_config(AutoConfig.from_pretrained(tmp_path))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert config.max_position_embeddings == 128 and config.architectures == ["PePatchLlamaForCausalLM"]
    assert getattr(config, SERVED_KEY)["rope_parameters"] == config.rope_parameters


def test_a_scaling_that_layers_keep_is_refused(tmp_path):
    scaled_by_two(layers=[1]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"the others keep the family's own scaling, 'linear'.*Patch all layers"):
        served_config(AutoConfig.from_pretrained(tmp_path))


def test_another_head_is_refused(tmp_path):
    model = LlamaForSequenceClassification(models.build("llama").config)
    patch_model(model, "ntk_by_parts", factor=4)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="on LlamaForSequenceClassification: the plugin serves LlamaForCausalLM"):
        served_config(AutoConfig.from_pretrained(tmp_path))


def test_a_users_subclass_is_refused():
    class Steeper(ALiBi):
        name = "steeper"

    model = models.build("llama")
    patch_model(model, Steeper)
    with pytest.raises(UnsupportedError, match="its class Steeper is not one of pe_patch's"):
        positions_of(find_patch(model), "vLLM")


@pytest.mark.parametrize(
    ("values", "differs"),
    [
        ({"rope_parameters": {"rope_type": "proportional"}}, False),
        ({"pe_patch": {}, "rope_parameters": {"rope_type": "proportional"}}, True),
        ({"pe_patch": {}, "rope_parameters": {"rope_type": "yarn"}}, False),
        ({"pe_patch": {}, "rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, True),
        (
            {"pe_patch": {"native": {"config": "text"}}, "text": {"rope_parameters": {"rope_type": "dynamic"}}},
            True,
        ),
    ],
)
def test_checkpoints_that_vllm_reads_differently(values, differs):
    assert _reads_differently(values) == differs


def test_the_export_is_refused_without_the_plugin_where_vllm_would_ignore_the_factor(tmp_path):
    model = models.build("llama")
    patch_model(model, "proportional", partial_rotary_factor=0.5, factor=2)
    export(model, tmp_path, target="vllm-plugin")
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"].startswith("pe_patch (import pe_patch")
    assert torch.equal(logits(load_patched(tmp_path), tokens(1, 50)), logits(model, tokens(1, 50)))
    native, served = served_positions(AutoConfig.from_pretrained(tmp_path), "vLLM")
    assert (
        native.architectures == ["LlamaForCausalLM"]
        and served.distinct == positions_of(find_patch(model), "vLLM").distinct
    )
