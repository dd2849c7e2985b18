"""Where a patch must not change a bit, and how near to BLOOM its own ALiBi comes through ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pe_patch import patch_model, unpatch_model

from .models import BACKENDS, PAIRS, ROTARY_FAMILIES, build, cached_logits, logits, tokens

STATIC = {
    "rope": {},
    "linear": {"factor": 1.0},
    "ntk": {"factor": 1.0},
    "ntk_by_parts": {"factor": 1.0},
    "yarn": {"factor": 1.0},
    "llama3": {"factor": 1.0},
    "longrope": {"long_factor": "ones"},
}
"""Equal to the unpatched model at every length."""

WITHIN = {
    "dynamic_ntk": {"factor": 4.0},
    "dynamic_yarn": {},
    "longrope": {"long_factor": "twos", "factor": 1.0},
    "linear": {"factor": "auto"},
    "ntk": {"factor": "auto"},
    "ntk_by_parts": {"factor": "auto"},
    "yarn": {"factor": "auto"},
    "llama3": {"factor": "auto"},
}
"""Equal to it within the window."""

CELLS = [
    pytest.param(family, backend, scheme, options, lengths, id=f"{family}-{backend}-{scheme}-{len(lengths)}")
    for family in ROTARY_FAMILIES
    for backend in BACKENDS
    for table, lengths in ((STATIC, (20, 48)), (WITHIN, (20,)))
    for scheme, options in table.items()
]
LISTS = {"ones": 1.0, "twos": 2.0}


@pytest.mark.parametrize(("family", "backend", "scheme", "options", "lengths"), CELLS)
def test_bit_for_bit(family, backend, scheme, options, lengths):
    model = build(family, attn_implementation=backend)
    if "long_factor" in options:
        options = {**options, "long_factor": [LISTS[options["long_factor"]]] * PAIRS[family]}

    def everything(length: int) -> list[Tensor]:
        ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
        mask[0, :7] = 0
        ids_in_documents = torch.cat((torch.arange(length - 6), torch.arange(6)))[None]
        return [
            logits(model, ids),
            logits(model, ids, attention_mask=mask)[0, 7:],
            logits(model, ids, attention_mask=mask)[1],
            logits(model, ids[:1], position_ids=ids_in_documents),
            cached_logits(model, ids, length - 4),
        ]

    native = [everything(length) for length in lengths]
    patch_model(model, scheme, **options)
    for length, expected in zip(lengths, native, strict=True):
        for found, one in zip(everything(length), expected, strict=True):
            assert torch.equal(found, one)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_beyond_the_window_the_dynamic_ones_differ(family):
    """Else the cells above would hold of a patch that does nothing."""
    model, ids = build(family), tokens(1, 48)
    native = logits(model, ids)
    for scheme, options in WITHIN.items():
        if "long_factor" not in options:
            patch_model(model, scheme, **options)
            assert (logits(model, ids) - native).abs().max() > 1e-2, scheme
            unpatch_model(model)


def test_bloom_eager_is_what_bloom_computes():
    model = build("bloom", initializer_range=0.02, num_attention_heads=4)
    ids = tokens(2, 256)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    native, padded = logits(model, ids), logits(model, ids, attention_mask=mask)
    patch_model(model, "alibi", backend="eager")
    assert (logits(model, ids) - native).abs().max() <= 1e-6
    assert (logits(model, ids, attention_mask=mask) - padded)[:, 50:].abs().max() <= 1e-6


def bloom_attention_oracle(fused: Tensor, heads: int, slopes: list[float]) -> Tensor:
    """softmax(q k / sqrt(d) - m (i - j)) v in float64, a few queries at a time."""
    length = fused.shape[1]
    fused = fused.double().view(length, heads, 3, -1)
    query, key, value = (fused[:, :, part].transpose(0, 1) for part in range(3))
    slope = torch.tensor(slopes, dtype=torch.float64)[:, None, None]
    outputs = []
    for start in range(0, length, 256):
        at_query = torch.arange(start, min(start + 256, length))
        distance = at_query[:, None] - torch.arange(int(at_query[-1]) + 1)
        end = distance.shape[1]
        scores = query[:, at_query] @ key[:, :end].transpose(1, 2) / query.shape[-1] ** 0.5 - slope * distance
        outputs.append(scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ value[:, :end])
    return torch.cat(outputs, 1).transpose(0, 1).flatten(1)[None]


@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_bloom_fast_path_errs_no_more_than_bloom(length):
    heads = 2
    model = build("bloom", num_hidden_layers=1, num_attention_heads=heads, hidden_size=32, initializer_range=0.02)
    attention, ids = model.transformer.h[0].self_attention, tokens(1, length)
    seen: dict[str, Tensor] = {}
    attention.query_key_value.register_forward_hook(lambda _m, _i, output: seen.update(fused=output))
    attention.dense.register_forward_pre_hook(lambda _m, inputs: seen.update(mixed=inputs[0]))

    @torch.no_grad()
    def errs() -> float:
        model.transformer(ids, use_cache=False)
        expected = bloom_attention_oracle(seen["fused"], heads, [2.0**-4, 2.0**-8])
        return float((seen["mixed"].double() - expected).abs().max())

    native = errs()
    patch_model(model, "alibi", backend="sdpa")
    ours = errs()
    assert 0 < ours <= native < 1e-2
