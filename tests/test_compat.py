"""What a patch reads of Transformers is there under a known name, or an error says so."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from itertools import product

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from pe_patch import NoEffectError, UnsupportedError, compat, patch_model

from .models import build, cached_logits, error, logits, put, tokens

pytestmark = pytest.mark.fast
STRANGE = "reminiscences"
"""A name for the cache argument that no version has."""


def renamed(forward):
    """A forward that takes its cache under the strange name, in signature and body."""
    native = compat.cache_argument(forward)

    def strange(self, *args, **kwargs):
        kwargs[native] = kwargs.pop(STRANGE, None)
        return forward(self, *args, **kwargs)

    parameters = [
        p.replace(name=STRANGE) if p.name == native else p for p in inspect.signature(forward).parameters.values()
    ]
    strange.__signature__ = inspect.Signature(parameters)
    return strange


@pytest.mark.parametrize("name", ("alibi", "yarn", "self_extend", "sinusoidal", "mla"))
def test_a_forward_whose_cache_argument_was_renamed_is_refused(name, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", renamed(modeling_llama.LlamaModel.forward))
    with pytest.raises(UnsupportedError, match=r"takes no argument 'cache/past_key_values.*reminiscences"):
        put(build("llama"), name)


@pytest.mark.parametrize("name", ("alibi", "yarn", "self_extend", "sinusoidal", "mla"))
def test_a_cache_under_an_unknown_name_is_refused(name):
    """As it would come from an outer model that was renamed while the base model keeps `**kwargs`."""
    model, ids = put(build("llama"), name), tokens(1, 8)
    cache = DynamicCache(config=model.config)
    with pytest.raises(UnsupportedError, match=f"as '{STRANGE}'"):
        model.model(input_ids=ids, **{STRANGE: cache})


@pytest.mark.parametrize("name", ("alibi", "yarn", "self_extend", "mla"))
def test_a_cache_that_only_the_layers_see_is_refused(name):
    """Hand the layers a cache that the base model does not get: they see more keys than queries without a reason."""
    model, ids = put(build("llama"), name), tokens(1, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, **compat.cache_keyword(model, cache))
    hidden = compat.cache_argument(modeling_llama.LlamaAttention.forward)

    def hand_over(module, args, kwargs):
        return args, {**kwargs, hidden: cache}

    cache.pe_patch_record.open = True  # so that the attention itself must notice
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hand_over, with_kwargs=True)
    with pytest.raises(NoEffectError, match="without a cache"):
        logits(model, ids[:, :1])


@pytest.mark.parametrize("lost", ("attention_mask", "position_ids", "inputs_embeds"))
def test_a_forward_that_lost_an_argument_is_refused(lost, monkeypatch):
    forward = modeling_llama.LlamaModel.forward
    parameters = [p for p in inspect.signature(forward).parameters.values() if p.name != lost]

    def shorter(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    shorter.__signature__ = inspect.Signature(parameters)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", shorter)
    with pytest.raises(UnsupportedError, match=f"takes no argument '{lost}'"):
        patch_model(build("llama"), "yarn", factor=2)


@pytest.mark.parametrize("family", ("llama", "bloom"))
def test_both_names_of_the_cache_reach_the_base_model(family):
    model, ids = put(build(family), "alibi"), tokens(1, 12)
    expected = logits(model, ids)
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids[:, :8], use_cache=True, **{name: cache}).last_hidden_state
            more = model.base_model(input_ids=ids[:, 8:], use_cache=True, **{name: cache}).last_hidden_state
        assert error(model.lm_head(torch.cat((hidden, more), 1)), expected) < 1e-5
    with pytest.raises(UnsupportedError, match="two caches"):
        model.base_model(input_ids=ids, cache=cache, past_key_values=DynamicCache(config=model.config))


NAMES = ("sinusoidal", "nope", "yarn", "dynamic_ntk", "alibi", "shaw", "self_extend")


@pytest.mark.parametrize(
    ("family", "name"),
    [*product(("llama", "gpt_neox", "bloom"), NAMES), ("llama", "mla"), ("gpt_neox", "mla")],
)
def test_greedy_text_is_the_same_with_and_without_a_cache(family, name):
    model, ids = put(build(family), name), tokens(2, 12)
    length = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(ids, use_cache=use_cache, **length) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    assert error(cached_logits(model, cached, 12), logits(model, cached)) < 1e-5


def test_a_newer_version_gives_one_warning(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_if_untested()
    monkeypatch.setattr(compat, "INSTALLED", compat.Version("5.24.7"))  # a patch release
    compat.warn_if_untested()
    monkeypatch.setattr(compat, "INSTALLED", compat.Version("99.1.0"))
    with pytest.warns(compat.UntestedVersionWarning, match=r"newer than every version.*5\.24\.0.*selftest"):
        compat.warn_if_untested()


def test_the_import_warns_once_about_a_newer_version():
    code = (
        "import transformers, warnings; transformers.__version__ = '99.0.0'\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); import pe_patch\n"
        "print(sum('99.0.0' in str(each.message) for each in seen))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip().endswith("1"), run.stderr


def test_nothing_else_spells_the_cache_argument():
    """A name of the cache argument outside compat.py would be the next silent loss."""
    from pathlib import Path

    package = Path(compat.__file__).parent
    files = [*package.rglob("*.py"), *(package.parent / "recipes").rglob("*.py")]
    found = [str(f) for f in files if f.name != "compat.py" and "past_key_values" in f.read_text(encoding="utf-8")]
    assert found == []
