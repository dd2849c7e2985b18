"""Schemes of rotation and of scores work on a quantised model; taking its projections' place is refused by name."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pe_patch import ADAPTERS, UnsupportedError, patch_model, unpatch_model

SCHEMES = {
    "rope": {}, "yarn": {"factor": 2}, "self_extend": {"group": 2, "window": 16}, "alibi": {}, "fire": {}, "nope": {},
}  # fmt: skip


class Int8Linear(nn.Linear):
    """Weights in eight bits and a scale for each row, in a subclass of nn.Linear, as bitsandbytes and fp8 have them."""

    scale: torch.Tensor

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def plain():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, vocab_size=97, num_hidden_layers=2, max_position_embeddings=32, initializer_range=0.1)
    return LlamaForCausalLM(config).eval()


def own(_):
    model = plain()
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
    return model


def loaded(library, config, folder):
    pytest.importorskip(library)
    plain().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), device_map="cpu").eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # with it bitsandbytes computes in bfloat16 on some machines
            module.support_avx512bf16_for_cpu = False
    return model


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto():
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def four_bits():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def eight_bits():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


QUANTISED = {
    "own": own,
    "torchao": partial(loaded, "torchao", torchao),
    "quanto": partial(loaded, "optimum.quanto", quanto),
    "bitsandbytes nf4": partial(loaded, "bitsandbytes", four_bits),
    "bitsandbytes int8": partial(loaded, "bitsandbytes", eight_bits),
}
LOOSE = {"bitsandbytes int8": 0.2}
"""It quantises what goes in too, which no linear layer in floating point does."""


@torch.no_grad()
def dequantised(quantised):
    """The model in floating point that has the weights which the quantised one multiplies by."""
    model = plain()
    inner = dict(quantised.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            unit = torch.eye(module.in_features)
            module.weight.copy_(inner[name](unit[None])[0].T)
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUANTISED)
def test_schemes_on_a_quantised_model(kind, tmp_path):
    model = QUANTISED[kind](tmp_path)
    twin, ids = dequantised(model), torch.randint(3, 97, (2, 28), generator=torch.Generator().manual_seed(1))
    native = model(ids, use_cache=False).logits
    tolerance = LOOSE.get(kind, 1e-4)
    for scheme, options in SCHEMES.items():
        for one in (model, twin):
            patch_model(one, scheme, **copy.deepcopy(options))
        learned = {name: weight for name, weight in twin.state_dict().items() if "position_schemes" in name}
        model.load_state_dict(learned, strict=False)
        found, expected = model(ids, use_cache=False).logits, twin(ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
        assert torch.equal(found, native) == (scheme == "rope")
        model.generate(ids[:, :8], max_new_tokens=2, do_sample=False, pad_token_id=0)
        for one in (model, twin):
            unpatch_model(one)
        assert torch.equal(model(ids, use_cache=False).logits, native)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUANTISED)
def test_projections_of_a_quantised_model_are_not_read(kind, tmp_path):
    model = QUANTISED[kind](tmp_path)
    adapter = ADAPTERS["llama"]
    assert adapter.projections is not None
    attention, shape = model.model.layers[1].self_attn, adapter.shape(model.model, model.config)
    if kind != "own":
        with pytest.raises(UnsupportedError, match=r"was loaded quantised \(.*load the model unquantised"):
            adapter.projections.read(attention, shape)
        del model.config.quantization_config  # a config may have been made anew; the weights say it too
    with pytest.raises(UnsupportedError, match=r"q_proj of LlamaAttention in layer 1 is .*load the model unquantised"):
        adapter.projections.read(attention, shape)
