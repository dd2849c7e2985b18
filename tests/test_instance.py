"""Test that a patch changes one model only, and keeps packed documents apart."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pe_patch import unpatch_model

from .models import CASES, FAMILIES, applies, build, error, logits, put, snapshot, tokens, unchanged


def all_attributes() -> dict[str, dict[str, object]]:
    """Return the attributes of every module of Transformers that these families use, and of its classes."""
    names = [f"transformers.models.{family}.modeling_{family}" for family in FAMILIES]
    names += ["transformers.modeling_utils", "transformers.masking_utils", "transformers.modeling_rope_utils"]
    names += ["transformers.cache_utils", "transformers.generation.utils", "transformers.integrations.sdpa_attention"]
    held: dict[str, dict[str, object]] = {}
    for name in names:
        module = sys.modules[name]
        held[name] = dict(vars(module))
        for key, value in vars(module).items():
            if isinstance(value, type) and value.__module__.startswith(("transformers", "torch.nn")):
                held[f"{name}.{key}"] = dict(vars(value))
    held["torch.nn.Module"] = dict(vars(torch.nn.Module))
    return held


def changed_attributes(before: dict[str, dict[str, object]], after: dict[str, dict[str, object]]) -> list[str]:
    found = [owner for owner in before.keys() ^ after.keys()]
    for owner in before.keys() & after.keys():
        for key in before[owner].keys() | after[owner].keys():
            if before[owner].get(key, "absent") is not after[owner].get(key, "absent"):
                found.append(f"{owner}.{key}")
    return found


def test_a_patch_changes_no_module_or_class_of_transformers():
    """Attributes are compared by identity. The documented additions are entries of two registries, made at import."""
    models = {family: build(family) for family in FAMILIES}
    for model in models.values():  # fill what a first pass and copying cache on classes
        logits(model, tokens(1, 8))
        copy.deepcopy(model.config)
    before, registries = all_attributes(), [dict(ALL_ATTENTION_FUNCTIONS), dict(AttentionMaskInterface())]
    assert sum(map(len, before.values())) > 3000
    during = []
    for family, model in models.items():
        for name in (one for one in CASES if applies(family, one)):
            put(model, name)
            logits(model, tokens(1, 40))
            if name in ("yarn", "alibi", "learned", "dynamic_ntk"):
                during += changed_attributes(before, all_attributes())
            unpatch_model(model)
    assert during == [] and changed_attributes(before, all_attributes()) == []
    assert [dict(ALL_ATTENTION_FUNCTIONS), dict(AttentionMaskInterface())] == registries


def test_only_our_names_are_added_to_the_attention_registries():
    for registry in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        ours = {name for name in registry if name.startswith("pe_")}
        assert ours == {"pe_eager", "pe_sdpa", "pe_flex_attention", "pe_flash_attention_2"}
        of_others = [value for name, value in registry.items() if name not in ours]
        assert not any(getattr(value, "__module__", "").startswith("pe_patch") for value in of_others)


@pytest.mark.parametrize("name", ["yarn", "alibi", "learned", "dynamic_ntk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_does_not_touch_another_model_of_the_class(family, name):
    model, other = build(family), build(family)
    before = snapshot(other)
    put(model, name)
    logits(model, tokens(1, 40))
    assert unchanged(before, snapshot(other))
    unpatch_model(model)
    assert unchanged(before, snapshot(other))


def influence(model, position_ids: torch.Tensor, source: int, target: int, **inputs) -> float:
    """Return how much the logits at `target` change when the token at `source` changes."""
    ids = tokens(1, position_ids.shape[1])
    changed = ids.clone()
    changed[0, source] = (ids[0, source] + 11) % 90 + 3
    found = [logits(model, one, position_ids=position_ids, **inputs)[:, target] for one in (ids, changed)]
    return error(*found)


PACKED = torch.cat((torch.arange(10), torch.arange(14)))[None]
SKIPPED = torch.cat((torch.arange(10), torch.arange(30, 44)))[None]
family_and_scheme = pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f in FAMILIES for n in ("linear", "yarn", "alibi")]
)


@family_and_scheme
def test_packed_documents_do_not_attend_to_each_other(family, name):
    model = put(build(family), name)
    assert influence(model, PACKED, source=5, target=15) == 0
    assert influence(model, PACKED, source=5, target=8) > 1e-2
    assert influence(model, PACKED, source=11, target=15) > 1e-2


@family_and_scheme
def test_positions_with_a_gap_are_one_document_under_a_mask_of_ones(family, name):
    """With a mask of ones, position ids with a gap belong to one document."""
    model, ones = put(build(family), name), torch.ones_like(SKIPPED)
    assert influence(model, SKIPPED, source=5, target=15, attention_mask=ones) > 1e-3
    ids = tokens(1, SKIPPED.shape[1])
    near = torch.arange(SKIPPED.shape[1])[None]
    far = logits(model, ids, position_ids=SKIPPED, attention_mask=ones)
    assert error(far[:, 10:], logits(model, ids, position_ids=near, attention_mask=ones)[:, 10:]) > 1e-3
    assert error(far[:, :10], logits(model, ids, position_ids=near, attention_mask=ones)[:, :10]) < 1e-5
