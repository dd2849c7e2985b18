"""Test that undoing a patch restores the model, whatever happened to it in between."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pe_patch import PePatchError, describe, patch_model, patched, unpatch_model

from . import families
from .models import (
    CASES,
    FAMILIES,
    WINDOW,
    applies,
    build,
    case,
    error,
    logits,
    put,
    snapshot,
    tokens,
    unchanged,
    wearing,
)

NAMES = ("yarn", "dynamic_ntk", "alibi", "learned", "nope")
cells = pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in NAMES])


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in FAMILIES for n in CASES if applies(f, n)])
def test_unpatching_restores_the_model_exactly(family, name):
    model = build(family)
    before = snapshot(model)
    put(model, name)
    assert describe(model).scheme == name.split(" ")[0]
    assert str(describe(model))
    assert snapshot(model)["attributes"] != before["attributes"]
    logits(model, tokens(2, 40))
    assert unpatch_model(model) is model
    assert unchanged(before, snapshot(model))
    with pytest.raises(PePatchError, match="no patch"):
        unpatch_model(model)


def held(model):
    """Every module of a model, and its config, with what each of them holds by attribute."""
    return [(owner, contents(owner)) for owner in [*model.modules(), model.config]]


def contents(owner):
    attributes = {**vars(owner), **vars(owner).get("_modules", {})}
    return {key: value for key, value in attributes.items() if key != "_modules"}


SHOWN_AS = {"pe_scheme": "scores", "_attn_implementation_internal": "attn_implementation"}


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in (*FAMILIES, "gpt2") for n in CASES if applies(f, n)])
def test_the_description_names_every_changed_attribute(family, name):
    model = build(family)
    before, config = held(model), model.config
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    put(model, name)
    paths = {id(module): path for path, module in model.named_modules()} | {id(config): "config"}
    changed = set()
    for owner, attributes in before:
        if id(owner) not in paths:  # a removed module, whose owner has changed
            continue
        current = contents(model.config if owner is config else owner)
        for key in attributes.keys() | current.keys():
            if attributes.get(key, "absent") is not current.get(key, "absent"):
                changed.add(".".join(part for part in (paths[id(owner)], key) if part))
    changed |= {
        name for name, parameter in model.named_parameters() if id(parameter) in trained and not parameter.requires_grad
    }
    description = describe(model)
    listed = {row.where for row in description.replaced} | {
        path for paths in description.left_out.values() for path in paths
    }
    shown = {path if path in listed else _shown(path) for path in changed}
    assert shown and shown - listed == set()


def _shown(path):
    owner, _, attribute = path.rpartition(".")
    return ".".join(part for part in (owner, SHOWN_AS.get(attribute, attribute)) if part)


@cells
def test_patched_undoes_the_patch_after_an_exception(family, name):
    model, (scheme, options) = build(family), case(family, name)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), patched(model, scheme, **options) as inside:
        assert inside is model and describe(model).scheme == scheme
        logits(model, tokens(1, 8))
        raise ZeroDivisionError
    assert unchanged(before, snapshot(model))


TARGETS = {"llama": ["q_proj", "v_proj"], "gpt_neox": ["query_key_value"], "bloom": ["query_key_value"]}


def with_lora(model):
    """Return a PEFT model whose adapter changes the logits."""
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[model.config.model_type]))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return peft.eval()


@cells
def test_patching_before_and_after_peft_give_the_same_logits(family, name):
    ids = tokens(2, 40)
    plain = logits(with_lora(build(family)), ids)
    over = put(build(family), name)
    alone = logits(over, ids)
    over = with_lora(over)
    under = with_lora(build(family))
    scheme, options = case(family, name)
    assert patch_model(under, scheme, **options) is under
    if name == "learned":
        under.load_state_dict({k: v for k, v in over.state_dict().items() if "position_schemes" in k}, strict=False)
    assert torch.equal(logits(over, ids), logits(under, ids))
    assert error(logits(over, ids), alone) > 1e-3
    for model in (over, under):
        assert describe(model).scheme == scheme
        unpatch_model(model)
        assert torch.equal(logits(model, ids), plain)


@cells
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_patched_model_are_independent(family, name, duplicate):
    model, ids = build(family), tokens(2, 40)
    native = snapshot(model)
    with_patch = logits(put(model, name), ids)
    twin = duplicate(model)
    assert torch.equal(logits(twin, ids), with_patch)
    unpatch_model(twin)
    assert unchanged(native, snapshot(twin))
    assert torch.equal(logits(model, ids), with_patch)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, ids), with_patch)
    unpatch_model(model)
    assert unchanged(native, snapshot(model))


@cells
def test_training_a_patched_model_changes_only_weights(family, name):
    model, ids = build(family), tokens(2, 40)
    before = snapshot(model)
    put(model, name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    if name == "learned":
        table = next(p for n, p in model.named_parameters() if "position_schemes" in n)
        assert table.grad is not None and table.grad.abs().max() > 0
    unpatch_model(model.eval())
    after = snapshot(model)
    assert all(after[key] == before[key] for key in ("attributes", "config", "trainable"))
    assert any(not torch.equal(after["weights"][key], weight) for key, weight in before["weights"].items())
    fresh = build(family, seed=11)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, ids), logits(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_patched_models_do_not_affect_each_other(family):
    names, ids = ("yarn", "alibi"), [tokens(2, 40, seed=seed) for seed in (1, 2)]
    expected = {name: [logits(put(build(family), name), one) for one in ids] for name in names}
    models = {name: put(build(family), name) for name in names}
    for index, one in enumerate(ids):
        for name, model in models.items():
            assert torch.equal(logits(model, one), expected[name][index])
    unpatch_model(models["yarn"])
    assert torch.equal(logits(models["alibi"], ids[0]), expected["alibi"][0])


@cells
def test_gradient_checkpointing_supports_two_forwards_before_a_backward(family, name):
    """A layer runs again in backward, after another forward pass."""
    batches = [tokens(2, 40), tokens(1, 12, seed=3)]

    def gradients(checkpointing: bool):
        model = put(build(family), name).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses = [model(input_ids=ids, labels=ids).loss for ids in batches]
        sum(losses).backward()
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys() and expected
    for key, gradient in expected.items():
        assert error(found[key], gradient) < 1e-6, key


WINDOWS = {"yarn": 64, "linear": 64, "learned": 64, "rope": WINDOW, "alibi": None, "nope": None, "linear auto": None}
"""The effective window of each case; None if it is unbounded, so that the config does not change."""


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_holds_the_effective_window(family, name):
    model = build(family)
    had = family != "bloom"
    assert hasattr(model.config, "max_position_embeddings") == had
    with wearing(model, name):
        found = getattr(model.config, "max_position_embeddings", None)
        assert found == (WINDOWS[name] or (WINDOW if had else None))
        assert found is None or type(found) is int
    assert hasattr(model.config, "max_position_embeddings") == had
    assert not had or model.config.max_position_embeddings == WINDOW


def test_a_description_names_layers_with_the_same_change_in_one_line():
    model = families.build("gemma3_text", num_hidden_layers=12, layer_types=["full_attention"] * 12)
    text = str(describe(patch_model(model, "alibi", layers=[0, 1, 2, 3, 5, 8, 9])))
    lines = [line.split("  ")[0].strip() for line in text.splitlines() if ".scores" in line]
    assert lines == ["model.layers.0 to 3, 5, 8, 9.self_attn.scores"]
