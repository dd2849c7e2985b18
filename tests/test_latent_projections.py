"""The weights that a conversion starts from are those that the family's own attention computes with."""

from __future__ import annotations

import re

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface

from pe_patch import ADAPTERS, UnsupportedError
from pe_patch.adapters.projections import check_unquantised

from .families import build
from .test_quantised import Int8Linear

PROJECTING = sorted(family for family, adapter in ADAPTERS.items() if adapter.projections is not None)
LENGTH = 7


def read(model, layer=0):
    base, adapter = model.base_model, ADAPTERS[model.config.model_type]
    layer %= model.config.num_hidden_layers
    return adapter.projections.read(adapter.attentions(base)[layer], adapter.shape(base, model.config, layer))


def caught(model, ids):
    """What the attention of the last layer is given, and the queries, keys and values it hands to the interface."""
    seen = {}

    def attend(module, query, key, value, *_, **__):
        seen[module.layer_idx] = query, key, value
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("caught", attend)
    try:
        model.config._attn_implementation = "caught"
        attention = ADAPTERS[model.config.model_type].attentions(model.base_model)[model.config.num_hidden_layers - 1]

        def catch(module, args, kwargs):
            seen["hidden"] = args[0] if args else kwargs["hidden_states"]

        handle = attention.register_forward_pre_hook(catch, with_kwargs=True)
        # position 0 turns nothing, so what reaches the interface is what was projected
        model.base_model(ids, position_ids=torch.zeros_like(ids), use_cache=False)
        handle.remove()
    finally:
        AttentionInterface._global_mapping.pop("caught", None)
    return seen["hidden"], seen[model.config.num_hidden_layers - 1]


def heads(hidden, weight, bias, norm, head_dim):
    projected = nn.functional.linear(hidden, weight, bias).unflatten(-1, (-1, head_dim))
    return (projected if norm is None else norm(projected)).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("family", PROJECTING)
def test_what_is_read_projects_as_the_family_does(family):
    model = build(family)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms are built as zeros and ones, which tell nothing apart
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    hidden, native = caught(model, torch.randint(3, 90, (2, LENGTH), generator=generator))
    found = read(model, -1)
    ours = (
        heads(hidden, found.query, found.query_bias, found.query_norm, found.head_dim),
        heads(hidden, found.key, found.key_bias, found.key_norm, found.head_dim),
        heads(hidden, found.value, found.value_bias, None, found.head_dim),
    )
    assert ours[0].shape[1] == found.heads and ours[1].shape[1] == found.kv_heads
    for expected, actual in zip(native, ours, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_one_piece_is_not_copied():
    for family, name in (("llama", "q_proj"), ("phi3", "qkv_proj")):
        model = build(family)
        found = read(model)
        weight = getattr(model.model.layers[0].self_attn, name).weight
        assert found.query.data_ptr() == weight.data_ptr() and not found.query.requires_grad
        assert found.query.shape[1] == found.hidden == model.config.hidden_size


def test_modules_by_name():
    """What is taken, what stays and what normalises is there, and nothing else that has weights."""
    for family in PROJECTING:
        model = build(family)
        names = ADAPTERS[family].projections
        attention = ADAPTERS[family].attentions(model.base_model)[0]
        known = {*names.taken, names.output, *(names.norms or ())}
        assert {*names.taken, names.output} <= set(attention._modules) <= known, family
        assert names.residual_dropout is None or hasattr(attention, names.residual_dropout)
        assert hasattr(attention, "residual_dropout") == (names.residual_dropout is not None)


def subclass(model):
    attention = model.model.layers[1].self_attn
    attention.k_proj = Int8Linear(attention.k_proj)


def eighth(model):
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight = nn.Parameter(attention.k_proj.weight.to(torch.float8_e4m3fn), requires_grad=False)


class Wrapped(torch.Tensor):
    """A weight such as torchao's, which stays in a plain nn.Linear."""


def wrapped(model):
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight = nn.Parameter(attention.k_proj.weight.detach().as_subclass(Wrapped))


def lora(model):
    get_peft_model(model, LoraConfig(target_modules=["k_proj"], r=2))


def offloaded(model):
    cpu_offload(model, execution_device=torch.device("cpu"))


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[1].self_attn.k_proj)


def pruned(model):
    model.model.layers[1].self_attn.k_proj = nn.Linear(64, 16)


def removed(model):
    del model.model.layers[1].self_attn.k_proj


def configured(model):
    model.config.quantization_config = {"quant_method": "fp8"}


OBSTACLES = {
    subclass: "k_proj of LlamaAttention in layer 1 is tests's Int8Linear, not a plain nn.Linear in floating point "
    "(load the model unquantised, convert it, and quantise the result",
    eighth: "k_proj of LlamaAttention in layer 1 is torch's Linear, not a plain nn.Linear in floating point",
    wrapped: "its weight is of Wrapped, quantised or spread over processes: load the model unquantised",
    lora: "k_proj of LlamaAttention in layer 1 is peft's Linear, which adapts another layer (PEFT): call "
    "merge_and_unload() first",
    offloaded: "q_proj of LlamaAttention in layer 1 is torch's Linear, but its weight is on the meta device, offloaded "
    "or not loaded yet: load the whole model into memory",
    parametrised: "torch's ParametrizedLinear, not a plain nn.Linear",
    pruned: "has 16 rows where the config's heads make 32",
    removed: "There is no k_proj: LlamaAttention is not the attention of this family",
    configured: "was loaded quantised (fp8), whose weights cannot be read as numbers: load the model unquantised",
}


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.__name__)
def test_weights_that_cannot_be_read(obstacle):
    model = build("llama")
    obstacle(model)
    with pytest.raises(UnsupportedError, match=re.escape(OBSTACLES[obstacle])):
        read(model, 1)


def test_a_merged_adapter_is_read():
    model = build("llama")
    adapted = get_peft_model(model, LoraConfig(target_modules=["k_proj"], r=2, init_lora_weights=False))
    merged = adapted.merge_and_unload()
    assert not torch.equal(read(merged).key, read(build("llama")).key)
    check_unquantised(merged)
