"""What people use instead of a fast path: dense masks, dense scores, and Transformers' own modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import BloomConfig, T5Config
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from pe_patch.schemes.rotary import cos_sin, rotate

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _causal(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key and the lowest number ahead of it, `[1, 1, query, key]`."""
    ahead = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(ahead, torch.finfo(dtype).min)[
        None, None
    ]


def dense_mask(length: int, heads: int, width: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """ALiBi as a mask for `scaled_dot_product_attention`, built in full."""
    slopes = torch.tensor([2.0 ** -(n + 1) for n in range(heads)], device=device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        at = torch.arange(length, device=device)
        bias = (-slopes[:, None, None] * (at[:, None] - at))[None].to(dtype) + _causal(length, device, dtype)
        return scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)

    return attend


def bloom(length: int, heads: int, width: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """BLOOM's attention module, with its projections taken out."""
    config = BloomConfig(hidden_size=heads * width, n_head=heads, attention_dropout=0.0, hidden_dropout=0.0)
    module = BloomAttention(config, layer_idx=0).to(device, dtype).eval()
    for projection in ("dense", "query_key_value"):
        module.set_submodule(projection, nn.Identity())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        fused = torch.stack([one.transpose(1, 2) for one in (query, key, value)], 3).flatten(2)
        alibi = build_alibi_tensor(torch.ones(1, length, device=device), heads, dtype)
        return module(fused, torch.zeros((), device=device), alibi, _causal(length, device, dtype))[0]

    return attend


def t5(length: int, heads: int, width: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """T5's attention module, with its projections taken out."""
    config = T5Config(d_model=heads * width, d_kv=width, num_heads=heads, is_decoder=True, dropout_rate=0.0)
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).to(device, dtype).eval()
    module.set_submodule("o", nn.Identity())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        hidden = query.transpose(1, 2).flatten(2)
        for name, side in (("q", query), ("k", key), ("v", value)):
            setattr(module, name, _Instead(side.transpose(1, 2).flatten(2)))
        return module(hidden, mask=_causal(length, device, dtype))[0]

    return attend


class _Instead(nn.Module):
    """Gives what was projected before, whatever it is called with."""

    def __init__(self, projected: Tensor) -> None:
        super().__init__()
        self.projected = projected

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projected


def dense_self_extend(length: int, heads: int, width: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """Two dense score matrices, one chosen for each pair, as Self-Extend's authors have it (group 8, window 1024)."""
    inv_freq = 10000.0 ** -(torch.arange(0, width, 2, device=device).float() / width)

    def turned(x: Tensor, at: Tensor) -> Tensor:
        return rotate(x, *cos_sin(at[None, :, None] * inv_freq, 1.0, dtype, False))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        at = torch.arange(length, device=device)
        near = turned(query, at) @ turned(key, at).mT * width**-0.5
        far = turned(query, at // 8 + 1024 - 1024 // 8) @ turned(key, at // 8).mT * width**-0.5
        scores = torch.where(at[:, None] - at < 1024, near, far) + _causal(length, device, dtype)
        return (scores.softmax(-1) @ value).transpose(1, 2)

    return attend


ALTERNATIVES: dict[str, Callable[[int, int, int, torch.device, torch.dtype], Attention]] = {
    "ALiBi, dense mask": dense_mask,
    "ALiBi, BLOOM in Transformers": bloom,
    "T5's bias, T5 in Transformers": t5,
    "Self-Extend, dense scores": dense_self_extend,
}
TENSORS = {"ALiBi, dense mask": 4, "ALiBi, BLOOM in Transformers": 6, "T5's bias, T5 in Transformers": 6}
"""How many `[heads, query, key]` tensors each is likely to hold at a time, gradients included; 7 where not said."""


def fits(label: str, length: int, heads: int, limit: float) -> str | None:
    """Why an alternative is left out at this length, or None."""
    needed = TENSORS.get(label, 7) * heads * length**2 * 4
    return None if needed <= limit else f"it would hold about {needed / 2**30:.0f} GiB"
