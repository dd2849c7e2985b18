"""Conversions that cannot be: each says why, and leaves the model as it was, bit for bit; and bounds that are kept."""

from __future__ import annotations

import argparse
import copy
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from pe_patch import PePatchError, UnsupportedError, describe, patch_model, unpatch_model
from pe_patch.compare.demo import BASE
from pe_patch.errors import OptionError
from pe_patch.mla.calibration import held_out
from pe_patch.mla.calibration import tokens as rows_of

from .models import VOCABULARY, build, error, logits, snapshot, tokens, unchanged
from .test_quantised import own as quantised

SEEN = tokens(8, 24, seed=5)
SMALL = {"kv_rank": 12, "rope_dim": 8, "calibration": SEEN}
OF_NO_USE = "has no use for"
BOUND = 0.02

WRONG = [
    ({"kv_rank": None}, OptionError, "needs the size of the latent"),
    ({"cache_ratio": 0.5}, OptionError, "got kv_rank and cache_ratio"),
    ({"max_loss": 0.5}, OptionError, "got kv_rank and max_loss"),
    ({"kv_rank": 0}, OptionError, "kv_rank=0.*give 1 to 56"),
    ({"kv_rank": 57}, OptionError, "kv_rank=57.*give 1 to 56"),
    ({"kv_rank": 2.0}, OptionError, "kv_rank=2.0; give a whole number"),
    ({"kv_rank": True}, OptionError, "kv_rank=True; give a whole number"),
    ({"kv_rank": None, "cache_ratio": 0.01}, OptionError, "cache_ratio=0.01.*Use a larger cache_ratio"),
    ({"kv_rank": None, "cache_ratio": 1.5}, OptionError, "cache_ratio"),
    ({"kv_rank": None, "max_loss": -1.0}, OptionError, "max_loss"),
    ({"rope_dim": 7}, OptionError, "rope_dim=7"),
    ({"rope_dim": 12}, OptionError, "rope_dim=12.*2, 4, 8, or a multiple of 16 up to 32"),
    ({"rope_dim": 48}, OptionError, "rope_dim=48"),
    ({"rope_dim": 18, "method": "mha2mla"}, OptionError, "rope_dim=18.*from 2 to 16"),
    ({"seed": "abc"}, OptionError, "seed='abc'"),
    ({"rope_dim": 6, "method": "init"}, OptionError, "rope_dim=6.*2, 4, 8, 16"),
    ({"method": "transmlb"}, OptionError, "Did you mean 'transmla'"),
    ({"method": "mha2mla", "select": "hihg"}, OptionError, "Did you mean 'high'"),
    ({"calibration": None}, OptionError, "give calibration=<token ids or texts>"),
    ({"calibration": []}, OptionError, "calibration is empty"),
    ({"calibration": [[]]}, OptionError, "row 0 has no tokens"),
    ({"calibration": [[1, VOCABULARY]]}, OptionError, f"has the id {VOCABULARY}, and the ids of this model are 0 to"),
    ({"calibration": [[1, -100]]}, OptionError, "has the id -100"),
    ({"calibration": ["text"]}, OptionError, "not loaded from anywhere that has a tokenizer"),
    ({"calibration": torch.ones(3, dtype=torch.long)}, OptionError, r"\[rows, length\], not \[3\]"),
    ({"freqfold": 3}, OptionError, "freqfold=3"),
    ({"select": "high"}, OptionError, OF_NO_USE),
    ({"svd": "split"}, OptionError, "svd='split'"),
    ({"method": "mha2mla", "freqfold": 2}, OptionError, OF_NO_USE),
    ({"method": "svd", "balance_kv_ratio": 2.0}, OptionError, OF_NO_USE),
    ({"method": "init", "freqfold": 2}, OptionError, OF_NO_USE),
    ({"method": "init", "select": "low"}, OptionError, OF_NO_USE),
    ({"method": "mha2mla", "svd": "split", "latent_norm": True}, OptionError, "needs one latent"),
    ({"method": "init", "kv_rank": None, "max_loss": 1.0}, OptionError, "max_loss has no meaning"),
    ({"kv_rank": None, "max_loss": 0.0, "rope_dim": 2}, OptionError, "max_loss cannot be kept.*larger rope_dim"),
    ({"latent_norm": 1}, OptionError, "latent_norm"),
    ({"keep_native": True}, OptionError, "keep_native=True does not apply to 'mla'"),
    ({"factor": 2.0, "over": "yarn"}, OptionError, "got factor and over"),
    ({"over": "dynamic_ntk"}, PePatchError, "dynamic_ntk"),
    ({"backend": "flex"}, PePatchError, "flex"),
    ({"backend": "flash"}, PePatchError, "flash"),
    ({"kv_rnk": 4}, OptionError, "Did you mean 'kv_rank'"),
]


def refuses(model, kind, pattern, **options):
    before = snapshot(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(kind, match=pattern):
        patch_model(model, "mla", **options)
    assert unchanged(before, snapshot(model))
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize(("changed", "kind", "pattern"), WRONG, ids=[str(one[0])[:50] for one in WRONG])
def test_options_that_cannot_be(changed, kind, pattern):
    refuses(build("llama"), kind, pattern, **{**SMALL, **changed})


@pytest.mark.parametrize("family", ["bloom", "gpt2"])
def test_families_that_do_not_rotate(family):
    refuses(build(family), UnsupportedError, "and this family does not", **SMALL)


def test_families_whose_projections_are_not_known():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(**sizes, head_dim=8, num_hidden_layers=2, vocab_size=97, max_position_embeddings=32)
    refuses(Gemma2ForCausalLM(config).eval(), UnsupportedError, "how gemma2 projects", **SMALL)


def test_weights_that_cannot_be_read():
    refuses(quantised(None), UnsupportedError, "quantised|Int8Linear", **{**SMALL, "rope_dim": 32})
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM"))
    refuses(wrapped.eval(), UnsupportedError, "merge_and_unload|LoRA|PEFT|wrapped", **SMALL)
    model = build("llama")
    model.model.layers[1].self_attn.to("meta")
    with pytest.raises(PePatchError, match=r"layer 1 .*meta"):
        patch_model(model, "mla", **SMALL)
    assert not any(hasattr(layer.self_attn, "mla") for layer in model.model.layers)


def test_a_model_without_a_head_has_no_loss_to_keep_to():
    refuses_base = build("llama").model
    with pytest.raises(OptionError, match="no such head"):
        patch_model(refuses_base, "mla", max_loss=0.1, rope_dim=8, calibration=SEEN)
    assert not any(hasattr(layer.self_attn, "mla") for layer in refuses_base.layers)


def test_a_failure_in_the_middle(monkeypatch):
    """Of the reading, and of the search for a rank."""
    model = build("llama")
    before = snapshot(model)
    mlp = model.model.layers[1].mlp

    def fail(*_):
        raise ZeroDivisionError

    for options in (SMALL, {**SMALL, "kv_rank": None, "max_loss": 0.1}):
        handle = mlp.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            patch_model(model, "mla", **options)
        handle.remove()
        assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("option", [{"kv_rank": 8}, {"method": "svd"}, {"keep_original": False}, {"calibration": SEEN}])
def test_a_model_with_latents_has_nothing_to_convert(option):
    from .families import build as native

    refuses(native("deepseek_v3"), OptionError, "holds latents already .*nothing to convert", **option)


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE).eval(), AutoTokenizer.from_pretrained(BASE)
    source = inspect.getsource(argparse)  # it was trained on the standard library
    texts = [source[start : start + 500] for start in range(0, 16000, 500)]
    return model, tokenizer, texts


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".mla." in name}


def test_texts_are_their_ids_and_the_same_call_gives_the_same_bits(demo):
    model, tokenizer, texts = demo
    found = []
    for calibration in (texts, tokenizer(texts)["input_ids"], texts):
        patch_model(model, "mla", kv_rank=24, calibration=calibration)
        found.append(weights(model))
        unpatch_model(model)
    assert len(found[0]) > 0
    for other in found[1:]:
        assert other.keys() == found[0].keys() and all(torch.equal(one, other[name]) for name, one in found[0].items())


@torch.no_grad()
def loss_of(model, rows):
    """By Transformers' own loss, a row at a time."""
    total = sum(float(model(input_ids=row[None], labels=row[None]).loss) * (len(row) - 1) for row in rows)
    return total / sum(len(row) - 1 for row in rows)


@pytest.mark.parametrize("latent_norm", [False, True])
def test_the_smallest_rank_that_keeps_the_bound(demo, latent_norm):
    model, tokenizer, texts = demo
    model = copy.deepcopy(model)
    ids = tokenizer(texts)["input_ids"]
    _, kept = held_out(rows_of(ids, model, lambda _: [], length=512), 0.25)
    rotary = model.config.num_key_value_heads * model.config.head_dim  # all of it, so that the rank alone decides
    options = {"rope_dim": rotary, "calibration": ids, "latent_norm": latent_norm}
    native = loss_of(model, kept)
    patch_model(model, "mla", max_loss=BOUND, **options)
    rank = describe(model).options["kv_rank"]
    found, expected = loss_of(model, kept), logits(model, torch.tensor(ids[0])[None])
    unpatch_model(model)
    assert found <= (1 + BOUND) * native * (1 + 1e-5)
    assert rank > 1
    step = 1 if rank <= 64 else 8
    rows, _ = held_out(rows_of(ids, model, lambda _: [], length=512), 0.25)
    options["calibration"] = rows
    patch_model(model, "mla", kv_rank=rank - step, **options)
    assert loss_of(model, kept) > (1 + BOUND) * native * (1 - 1e-5)
    unpatch_model(model)
    patch_model(model, "mla", kv_rank=rank, **options)
    assert error(logits(model, torch.tensor(ids[0])[None]), expected) < 1e-4
