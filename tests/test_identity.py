"""Test patches that must not change a bit, and compare our ALiBi with BLOOM's."""

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
"""Schemes that equal the unpatched model at every length."""

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
"""Schemes that equal the unpatched model within the window."""

CELLS = [
    pytest.param(family, backend, scheme, options, lengths, id=f"{family}-{backend}-{scheme}-{len(lengths)}")
    for family in ROTARY_FAMILIES
    for backend in BACKENDS
    for table, lengths in ((STATIC, (20, 48)), (WITHIN, (20,)))
    for scheme, options in table.items()
]
LISTS = {"ones": 1.0, "twos": 2.0}


@pytest.mark.parametrize(("family", "backend", "scheme", "options", "lengths"), CELLS)
def test_a_scheme_without_effect_changes_no_bit(family, backend, scheme, options, lengths):
    model = build(family, attn_implementation=backend)
    if "long_factor" in options:
        options = {**options, "long_factor": [LISTS[options["long_factor"]]] * PAIRS[family]}

    def all_logits(length: int) -> list[Tensor]:
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

    native = [all_logits(length) for length in lengths]
    patch_model(model, scheme, **options)
    for length, expected in zip(lengths, native, strict=True):
        for found, one in zip(all_logits(length), expected, strict=True):
            assert torch.equal(found, one)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_dynamic_schemes_change_logits_beyond_the_window(family):
    """Without this, the test above would pass for a patch that does nothing."""
    model, ids = build(family), tokens(1, 48)
    native = logits(model, ids)
    for scheme, options in WITHIN.items():
        if "long_factor" not in options:
            patch_model(model, scheme, **options)
            assert (logits(model, ids) - native).abs().max() > 1e-2, scheme
            unpatch_model(model)


def test_eager_alibi_equals_blooms_own():
    model = build("bloom", initializer_range=0.02, num_attention_heads=4)
    ids = tokens(2, 256)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    native, padded = logits(model, ids), logits(model, ids, attention_mask=mask)
    patch_model(model, "alibi", backend="eager")
    assert (logits(model, ids) - native).abs().max() <= 1e-6
    assert (logits(model, ids, attention_mask=mask) - padded)[:, 50:].abs().max() <= 1e-6


def bloom_attention_oracle(fused: Tensor, heads: int, slopes: list[float]) -> Tensor:
    """Return softmax(q k / sqrt(d) - m (i - j)) v in float64, computed for 256 queries at a time."""
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
def test_the_fast_path_of_alibi_is_as_accurate_as_bloom(length):
    heads = 2
    model = build("bloom", num_hidden_layers=1, num_attention_heads=heads, hidden_size=32, initializer_range=0.02)
    attention, ids = model.transformer.h[0].self_attention, tokens(1, length)
    seen: dict[str, Tensor] = {}
    attention.query_key_value.register_forward_hook(lambda _m, _i, output: seen.update(fused=output))
    attention.dense.register_forward_pre_hook(lambda _m, inputs: seen.update(mixed=inputs[0]))

    @torch.no_grad()
    def largest_error() -> float:
        model.transformer(ids, use_cache=False)
        expected = bloom_attention_oracle(seen["fused"], heads, [2.0**-4, 2.0**-8])
        return float((seen["mixed"].double() - expected).abs().max())

    native = largest_error()
    patch_model(model, "alibi", backend="sdpa")
    ours = largest_error()
    assert 0 < ours <= native < 1e-2
