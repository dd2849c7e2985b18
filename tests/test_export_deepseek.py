"""A conversion as DeepSeek's own class: what Transformers alone loads computes the same logits; what cannot be one says
why, and nothing is written."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
)
from transformers import LlamaForCausalLM as Llama
from transformers import Qwen2ForCausalLM as Qwen2

from pe_patch import UnsupportedError, export, patch_model
from pe_patch.patching.api import find_patch

from .families import build as native
from .models import build, cached_logits, error, logits, tokens

SEEN = tokens(8, 24, seed=5)
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 32, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
SMALL = {"kv_rank": 20, "rope_dim": 8, "calibration": SEEN, "latent_norm": True}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
MODELS = {
    "grouped": lambda: build("llama"),
    "multi-head": lambda: build("llama", num_key_value_heads=4),
    "one key": lambda: build("llama", num_key_value_heads=1),
    "tied": lambda: build("llama", tie_word_embeddings=True),
    "norms": lambda: build("llama", rms_norm_eps=1e-3),
    "theta": lambda: build("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "scaled": lambda: build("llama", rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}),
    "llama3": lambda: build("llama", rope_parameters=LLAMA3),
    "mistral": lambda: build("mistral", sliding_window=None),
}
CASES = [
    *((name, {}) for name in MODELS),
    *(("grouped", {"method": "svd", "rope_dim": width}) for width in (2, 4, 8, 16)),
    *(("grouped", {"rope_dim": width}) for width in (2, 4, 16)),
    ("multi-head", {"method": "svd", "kv_rank": 40}),
    ("grouped", {"factor": 4.0}),
    ("grouped", {"factor": 4.0, "rope_dim": 16}),
    ("mistral", {"over": {"rope_type": "linear", "factor": 2.0}}),
    ("grouped", {"method": "init"}),
]


def converted(name, **options):
    model = MODELS[name]()
    torch.manual_seed(3)
    options = {**SMALL, **options}
    if options.get("method") == "init":
        options.pop("calibration")
    return patch_model(model, "mla", **options)


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{one[0]} {one[1]}"[:60] for one in CASES])
def test_transformers_alone_computes_the_same(name, options, tmp_path):
    model, ids = converted(name, **options), tokens(2, 30)
    expected = logits(model, ids)
    export(model, tmp_path / "out", "deepseek")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded) is DeepseekV3ForCausalLM and find_patch(loaded) is None
    assert error(logits(loaded, ids), expected) < 1e-5
    prompt = ids[:1, :12]
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(loaded.generate(prompt, **settings), model.generate(prompt, **settings))
    patch_model(loaded, "mla")
    assert error(logits(loaded, ids), expected) < 1e-5
    assert error(cached_logits(loaded, ids, 20), expected) < 1e-5


def test_in_bfloat16(tmp_path):
    model, ids = converted("grouped"), tokens(2, 30)
    expected = logits(model, ids)
    export(model.to(torch.bfloat16), tmp_path / "out", "deepseek")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.bfloat16 and error(logits(loaded, ids).float(), expected) < 0.1


def small(model, **options):
    return patch_model(model.eval(), "mla", **{**SMALL, **options})


def biased():
    torch.manual_seed(0)
    return Llama(LlamaConfig(**SIZES, attention_bias=True))


def feed_forward_biased():
    torch.manual_seed(0)
    return Llama(LlamaConfig(**SIZES, mlp_bias=True))


def qwen2():
    torch.manual_seed(0)
    return Qwen2(Qwen2Config(**SIZES))


def lora():
    from peft import LoraConfig, get_peft_model

    model = converted("grouped")
    get_peft_model(model, LoraConfig(target_modules=["kv_a_proj_with_mqa"], task_type="CAUSAL_LM"))
    return model


REFUSED = {
    "without a norm": (lambda: small(build("llama"), latent_norm=False), "convert with latent_norm=True"),
    "a key for each head": (lambda: small(build("llama"), method="mha2mla"), "'mha2mla' keeps a rotary key for each"),
    "some layers": (lambda: small(build("llama"), layers=[0]), "only some of its layers are converted"),
    "window": (lambda: small(build("mistral")), "it has a sliding window"),
    "another family": (lambda: small(build("gpt_neox"), rope_dim=4), "its family is gpt_neox"),
    "norms of heads": (lambda: small(build("qwen3")), "its family is qwen3"),
    "no head": (lambda: small(build("llama").model), "it has no language-model head"),
    "biases": (lambda: small(biased()), "its projections have biases"),
    "biases of queries": (lambda: small(qwen2()), "its projections have biases"),
    "biases elsewhere": (lambda: small(feed_forward_biased()), "its feed-forward layers have biases"),
    "adapters": (lora, "wrapped"),
    "many frequencies": (lambda: small(build("llama"), rope_dim=32), "its frequencies differ from those of DeepSeek"),
    "YaRN of the model": (
        lambda: small(build("llama", rope_parameters=YARN)),
        "its config's scaling multiplies cos and sin",
    ),
    "another scheme": (lambda: patch_model(build("llama"), "yarn", factor=2.0), "it has no converted latents"),
    "native": (lambda: patch_model(native("deepseek_v3"), "mla"), "it has no converted latents"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_one_says_why(case, tmp_path):
    make, why = REFUSED[case]
    model = make()
    with pytest.raises(UnsupportedError, match=f"(?s)cannot be exported as DeepseekV3ForCausalLM: .*{why}"):
        export(model, tmp_path / "out", "deepseek")
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_is_no_config_of_its_family(tmp_path):
    for options in ({}, {"factor": 2.0}):
        with pytest.raises(UnsupportedError, match="cannot express 'mla'"):
            export(converted("grouped", **options), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("options", [{}, {"factor": 2.0}, {"over": {"rope_type": "linear", "factor": 2.0}}])
def test_a_native_model_loads_plainly(family, options, tmp_path):
    model, ids = patch_model(native(family), "mla", **options), tokens(2, 30)
    expected = logits(model, ids)
    export(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded) is type(model) and find_patch(loaded) is None
    assert error(logits(loaded, ids), expected) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert error(logits(plain, ids), expected) < 1e-5


def test_a_window_that_no_layer_uses(tmp_path):
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, sliding_window=None)
    model, ids = small(MistralForCausalLM(config)), tokens(2, 40)
    export(model, tmp_path / "out", "deepseek")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert error(logits(loaded, ids), logits(model, ids)) < 1e-5
