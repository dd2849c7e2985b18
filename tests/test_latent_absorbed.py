"""Latent attention against the numbers of DeepSeek's own code, expanded and absorbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2Model, DeepseekV3Config, DeepseekV3Model

from pe_patch import patch_model
from pe_patch.attention.engine import Engine
from pe_patch.attention.interface import BACKENDS
from pe_patch.mla import attention as over_latents

from .goldens import load

ENTRY = load("mla/plain")["mla/plain"]
SAID = ENTRY["params"]
NOPE, ROPE, HEADS = SAID["qk_nope_head_dim"], SAID["qk_rope_head_dim"], SAID["n_heads"]
PREFILL = 5
NAMES = {
    "wq": "q_proj", "wkv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj",
}  # fmt: skip


def double(name: str) -> Tensor:
    values = ENTRY[name] if name in ENTRY else ENTRY["weights"][f"{name}.weight"]
    return torch.tensor(values, dtype=torch.float64)


def authors(family: str, backend: str) -> Any:
    """A model of one layer whose attention has the weights of the golden, patched."""
    config, cls = {"v2": (DeepseekV2Config, DeepseekV2Model), "v3": (DeepseekV3Config, DeepseekV3Model)}[family]
    sizes = {name: SAID[name] for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    made = config(
        **sizes, hidden_size=SAID["dim"], num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=None,
        num_hidden_layers=1, first_k_dense_replace=1, intermediate_size=8, vocab_size=16, max_position_embeddings=16,
        pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    made._attn_implementation = backend
    model = cls(made).double().eval()
    attention = model.layers[0].self_attn
    for theirs, name in NAMES.items():
        getattr(attention, name).weight.data = double(theirs)
    norm = nn.RMSNorm(SAID["kv_lora_rank"], eps=1e-6, dtype=torch.float64)  # Transformers' own rounds to float32
    norm.weight.data = double("kv_norm")
    attention.kv_a_layernorm = norm
    return patch_model(model, "mla")


@torch.no_grad()
def driven(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Any, list[int]]:
    """Outputs of the attention over the golden's hidden states as the model calls it: a prefill and single tokens; the
    cache; and the new tokens of each absorbed pass."""
    hidden, outputs, absorbed, real = double("x"), [], [], over_latents.absorbed
    attention, at = model.layers[0].self_attn, [0]

    def enter(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        count = kwargs["hidden_states"].shape[1]
        at[0] += count
        return args, {**kwargs, "hidden_states": hidden[:, at[0] - count : at[0]]}

    def spy(heads: Any, query: Tensor, *rest: Any) -> Any:
        absorbed.append(query.shape[2])
        return real(heads, query, *rest)

    monkeypatch.setattr(over_latents, "absorbed", spy)
    attention.register_forward_pre_hook(enter, with_kwargs=True)
    attention.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    cache = None
    for count in (PREFILL, 1, 1):
        cache = model(input_ids=torch.ones(1, count, dtype=torch.long), past_key_values=cache, use_cache=True)
        cache = cache.past_key_values
    return torch.cat(outputs, 1), cache, absorbed


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["v2", "v3"])
def test_a_patched_model_is_the_authors(family, backend, monkeypatch):
    """To 1e-6: Transformers makes cos and sin, and eager its softmax, in float32."""
    model = authors(family, backend)
    assert model.layers[0].self_attn.scaling == pytest.approx(ENTRY["softmax_scale"], rel=1e-12)
    found, cache, absorbed = driven(model, monkeypatch)
    assert absorbed == [1, 1]
    for expected in (double("out_naive_f64"), double("out_absorb_f64")):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    latent, key = cache.layers[0].keys, cache.layers[0].values
    torch.testing.assert_close(latent[0, 0], double("kv_cache").view(7, -1), rtol=0, atol=1e-6)
    expected = double("pe_cache").view(7, ROPE)
    if family == "v3":  # Transformers leaves the pairs in halves
        expected = torch.cat((expected[:, ::2], expected[:, 1::2]), 1)
    torch.testing.assert_close(key[0, 0], expected, rtol=0, atol=1e-6)


def queries() -> Tensor:
    """Rotated queries `[1, heads, 7, nope + rope]` by the formula, pairs as neighbours."""
    query = (double("x")[0] @ double("wq").T).view(7, HEADS, NOPE + ROPE)
    pairs = torch.view_as_complex(query[..., NOPE:].reshape(7, HEADS, -1, 2))
    angles = double("rope_angles")
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    rope = torch.view_as_real(pairs).flatten(2)
    return torch.cat((query[..., :NOPE], rope), -1).transpose(0, 1)[None]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_both_ways_are_the_authors_in_double_precision(count):
    """What the authors cached, and the queries of its last `count` tokens."""
    model = authors("v3", "sdpa")
    attention = model.layers[0].self_attn
    latent, key = (double(name).view(1, 1, 7, -1) for name in ("kv_cache", "pe_cache"))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None, 7 - count :]
    core = Engine(attention, mask, ENTRY["softmax_scale"], 0.0, BACKENDS["sdpa"], {})
    expected = double("out_absorb_f64")[:, 7 - count :]
    for way in (over_latents.absorbed, over_latents.expanded):
        with torch.no_grad():
            heads, _ = way(attention.mla, queries()[:, :, 7 - count :], latent, key, core)
            found = attention.o_proj(heads.flatten(2))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found, double("out_naive_f64")[:, 7 - count :], rtol=0, atol=1e-12)
