"""Test a scheme on some layers, and a scheme added to the native positions."""

from __future__ import annotations

import pytest
import torch

from pe_patch import patch_model, unpatch_model

from .models import (
    BACKENDS,
    FAMILIES,
    ROTARY_FAMILIES,
    build,
    cached_logits,
    error,
    logits,
    put,
    snapshot,
    tokens,
    unchanged,
)

TOLERANCE = 1e-5
VARIANTS = {
    "one layer": ({"layers": [1]}, ("yarn", "alibi", "dynamic_ntk", "nope")),
    "kept": ({"keep_native": True}, ("sinusoidal", "learned")),
}
CELLS = [
    pytest.param(family, backend, name, arguments, id=f"{family}-{backend}-{name}-{variant}")
    for family in FAMILIES
    for backend in BACKENDS
    for variant, (arguments, names) in VARIANTS.items()
    for name in names
] + [
    pytest.param(family, backend, name, {"keep_native": True}, id=f"{family}-{backend}-{name}-beside")
    for backend in BACKENDS
    for family, name in (("llama", "alibi"), ("gpt_neox", "alibi"), ("bloom", "yarn"), ("bloom", "dynamic_ntk"))
]


@pytest.mark.parametrize(("family", "backend", "name", "arguments"), CELLS)
def test_a_scheme_on_one_layer_or_beside_native_positions_is_consistent_and_undone(family, backend, name, arguments):
    model, ids = build(family), tokens(2, 48)
    before, native = snapshot(model), logits(model, ids)
    with_all = logits(put(model, name, backend=backend), ids)
    unpatch_model(model)
    put(model, name, backend=backend, **arguments)
    full = logits(model, ids)
    assert error(full, native) > 100 * TOLERANCE or (family, name) == ("bloom", "alibi")
    assert error(full, with_all) > 100 * TOLERANCE or (family, name) == ("bloom", "alibi")
    alone = torch.cat([logits(model, row[None]) for row in ids])
    assert error(full, alone) < TOLERANCE
    padded = torch.cat((torch.zeros(2, 9, dtype=torch.long), ids), 1)
    assert error(logits(model, padded, attention_mask=(padded != 0).long())[:, 9:], full) < TOLERANCE
    end = 31 if name == "dynamic_ntk" else 48  # within one regime
    assert error(cached_logits(model, ids[:, :end], end - 4), logits(model, ids[:, :end])) < TOLERANCE
    packed = torch.cat((torch.arange(30), torch.arange(18)))[None]
    apart = torch.cat((logits(model, ids[:1, :30]), logits(model, ids[:1, 30:])), 1)
    assert error(logits(model, ids[:1], position_ids=packed), apart) < TOLERANCE
    unpatch_model(model)
    assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_native_positions_on_one_layer_change_no_bit(family, backend):
    model, ids = build(family, attn_implementation=backend), tokens(2, 48)
    native = logits(model, ids), cached_logits(model, ids, 44)
    for scheme, options in (("rope", {}), ("yarn", {"factor": 1.0})):
        patch_model(model, scheme, layers=[0], **options)
        assert torch.equal(logits(model, ids), native[0])
        assert torch.equal(cached_logits(model, ids, 44), native[1])
        unpatch_model(model)


def test_every_form_of_layers_selects_the_same_layers():
    model, ids = build("llama", num_hidden_layers=4), tokens(1, 20)
    found = []
    for layers in ([1, 3], slice(1, None, 2), lambda index: index % 2 == 1, [-1, -3], range(1, 4, 2)):
        patch_model(model, "nope", layers=layers)
        found.append(logits(model, ids))
        unpatch_model(model)
    assert all(torch.equal(one, found[0]) for one in found)
    patch_model(model, "nope", layers=[0, 2])
    assert error(logits(model, ids), found[0]) > 1e-3
