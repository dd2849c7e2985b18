"""Calibration sees what the unmodified model sees, layer by layer, and leaves the model as it was."""

from __future__ import annotations

import weakref

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from pe_patch import ADAPTERS, NoEffectError
from pe_patch.mla.streaming import batches, stream

from . import families, models
from .models import snapshot, unchanged

OURS = ("llama", "mistral", "qwen3", "gpt_neox")
LENGTHS = (20, 7, 20, 24, 1, 20)
"""Some alike, one a single token, and some longer than the sliding windows."""
FAMILIES = sorted(
    {name for name, adapter in ADAPTERS.items() if adapter.projections is not None}
    | {"gemma3_text", "cohere2", "olmo3", "stablelm", "persimmon"}
)


def build(family):
    return models.build(family) if family in OURS else families.build(family)


def rows_of(lengths=LENGTHS, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (length,), generator=generator) for length in lengths]


def parts(model):
    base, adapter = model.base_model, ADAPTERS[model.config.model_type]
    return base, list(adapter.blocks(base)), list(adapter.attentions(base).values())


@torch.no_grad()
def hooked(model, rows, budget):
    """What each attention is given in full forwards of the same batches, by plain hooks."""
    base, _, attentions = parts(model)
    seen = [[] for _ in attentions]

    def catch(index):
        def hook(_, args, kwargs):
            seen[index].append((args[0] if args else kwargs["hidden_states"]).flatten(0, -2).clone())

        return hook

    hooks = [attention.register_forward_pre_hook(catch(i), with_kwargs=True) for i, attention in enumerate(attentions)]
    for batch in batches(rows, budget):
        base(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(one) for one in seen]


def streamed(model, rows, budget=64, **options):
    seen = [[] for _ in parts(model)[1]]
    stream(*parts(model), rows, lambda index, hidden: seen[index].append(hidden.clone()), budget=budget, **options)
    return [torch.cat(one) for one in seen]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_attention_is_shown_what_it_is_given(family):
    model, rows = build(family), rows_of()
    expected = hooked(model, rows, 64)
    before = snapshot(model)
    for found, one in zip(streamed(model, rows), expected, strict=True):
        assert found.shape == (sum(LENGTHS), model.config.hidden_size)
        assert torch.equal(found, one)
    assert unchanged(before, snapshot(model))


def test_dropout_rests_and_every_module_keeps_its_mode():
    model = models.build("llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    found = streamed(model, rows_of())
    assert [module.training for module in model.modules()] == modes
    for one, expected in zip(found, streamed(model.eval(), rows_of()), strict=True):
        assert torch.equal(one, expected)


def test_no_gradients():
    model = models.build("llama")
    stream(*parts(model), rows_of(), lambda _, hidden: (not hidden.requires_grad) or pytest.fail("it has gradients"))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("place", ["offloaded", "dispatched"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_under_the_hooks_of_accelerate(family, place):
    model, rows = models.build(family), rows_of()
    expected = streamed(model, rows)
    if place == "offloaded":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    assert any(forward is not None for forward in forwards)
    for found, one in zip(streamed(model, rows), expected, strict=True):
        assert torch.equal(found, one)
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    remove_hook_from_submodules(model)


def test_an_error_leaves_the_model_as_it_was():
    model = models.build("gpt_neox")
    before = snapshot(model)
    model.train()

    def fail(index, hidden):
        if index == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stream(*parts(model), rows_of(), fail)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert unchanged(before, snapshot(model.eval()))


class InTuple(nn.Module):
    """A layer as they were: it returns a tuple."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        return self.layer(hidden_states, **kwargs), "more"


class FirstOfTuple(nn.Module):
    """A base model of such layers."""

    def __init__(self, base):
        super().__init__()
        self.base, self.layers = base, nn.ModuleList(map(InTuple, base.layers))

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def forward(self, input_ids, use_cache):
        hidden = self.base.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        told = {"position_embeddings": self.base.rotary_emb(hidden, positions), "attention_mask": None}
        for layer in self.layers:
            hidden, more = layer(hidden, **told)
            assert more == "more"
        return self.base.norm(hidden)


def test_layers_that_return_tuples():
    model, rows = models.build("llama"), rows_of()
    base, found = FirstOfTuple(model.model).eval(), [[], []]
    attentions = parts(model)[2]
    stream(base, base.layers, attentions, rows, lambda i, hidden: found[i].append(hidden.clone()), budget=64)
    for one, expected in zip(found, streamed(model, rows), strict=True):
        torch.testing.assert_close(torch.cat(one), expected, rtol=1e-6, atol=1e-6)


def test_a_layer_keeps_nothing_of_the_one_before():
    """The hidden states between two layers exist once, and none of what an attention was given outlives its turn."""
    model = models.build("llama", num_hidden_layers=4)
    base, layers, attentions = parts(model)
    given, made, done = [], {}, []

    def note(number):
        def hook(_, __, output):
            made[id(output)] = (number if given else -1), weakref.ref(output)  # first come the embeddings, rehearsed

        return hook

    def each(index, hidden):
        assert not any(one() is not None for one in given)
        begun = len(given) % 3
        given.append(weakref.ref(hidden))
        alive = sorted(number for number, one in made.values() if one() is not None)
        assert alive == [index - 1] * (3 - begun) + [index] * begun

    hooks = [layer.register_forward_hook(note(number)) for number, layer in enumerate(layers)]
    stream(base, layers, attentions, rows_of((20, 20, 20)), each, done=done.append, budget=20)
    for hook in hooks:
        hook.remove()
    assert done == [0, 1, 2, 3] and len(given) == 12
    assert not any(one() is not None for one in (*given, *(one for _, one in made.values())))


def test_batches_share_masks_and_rotations():
    model = models.build("mistral")
    masks = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    streamed(model, rows_of((24, 24, 24)), budget=24)
    masks = [mask for mask in masks if mask is not None]
    full = [mask for mask in masks if mask.shape[-1] == 24]
    assert len(full) == 6 and all(mask is full[0] for mask in full)


def test_a_model_that_skips_a_layer_is_told_of():
    model = models.build("llama", num_hidden_layers=3)
    base, layers, attentions = parts(model)
    base.config.num_hidden_layers = 2
    with pytest.raises(NoEffectError, match="called 2 of 3 layers"):
        stream(base, layers, attentions, rows_of(), lambda *_: None)
    assert all("forward" not in layer.__dict__ for layer in layers)


def test_an_attention_that_is_not_called_is_told_of():
    model = models.build("llama")
    base, layers, attentions = parts(model)
    with pytest.raises(NoEffectError, match="called its LlamaAttention 0 times"):
        stream(base, layers, attentions[::-1], rows_of(), lambda *_: None)


def test_the_bar_counts_layers(capsys):
    streamed(models.build("llama"), rows_of(), progress=True)
    shown = capsys.readouterr()
    assert not shown.out
    streamed(models.build("llama"), rows_of())
    assert not capsys.readouterr().err


def test_batches_hold_rows_of_one_length():
    found = batches(rows_of(), 45)
    assert [tuple(batch.shape) for batch in found] == [(2, 20), (1, 20), (1, 7), (1, 24), (1, 1)]
