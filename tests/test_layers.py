"""Compare schemes on some layers with Transformers models built that way, and with layers run one by one."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, SmolLM3Config, SmolLM3ForCausalLM

from pe_patch import (
    ADAPTERS,
    AlreadyPatchedError,
    PePatchError,
    Scheme,
    UnsupportedError,
    describe,
    export,
    load_patched,
    patch_model,
    unpatch_model,
)

from . import families
from .models import BACKENDS, build, cached_logits, error, logits, snapshot, tokens, unchanged
from .test_adapters import ROTARY, attention_of


def every_fourth(index: int) -> bool:
    return (index + 1) % 4 == 0


def full_attention_layers(model) -> list[int]:
    return [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]


@pytest.mark.parametrize("family", [family for family in ROTARY if ADAPTERS[family].rotary])
def test_the_native_rotation_on_one_layer_changes_no_bit_in_half_precision(family):
    """The weights are bfloat16 and the frequencies float32, as after loading a checkpoint."""
    model, ids = families.build(family, attention_of(family)), tokens(2, 20)
    rotary = next(module for name, module in model.named_modules() if name.endswith(ADAPTERS[family].rotary))
    exact = {name: buffer.clone() for name, buffer in rotary.named_buffers()}
    model = model.to(torch.bfloat16)
    for name, buffer in rotary.named_buffers():
        buffer.data = exact[name]
    native = logits(model, ids)
    for layers in (None, [0]):
        patch_model(model, "rope", layers=layers)
        assert torch.equal(logits(model, ids), native)
        unpatch_model(model)
    patch_model(model, "nope", layers=[0])
    silent = logits(model, ids)
    assert error(silent, native) > 1e-2
    patch_model(model, "nope", on_existing="replace")
    assert not torch.equal(logits(model, ids), silent)
    unpatch_model(model)
    assert torch.equal(logits(model, ids), native)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nope_on_every_fourth_layer_equals_smollm3(backend):
    """Compare with the same weights in SmolLM3, which is built with `no_rope_layers`."""
    model, ids = build("llama", num_hidden_layers=8), tokens(2, 40)
    config = model.config.to_dict() | {"no_rope_layers": [int(not every_fourth(i)) for i in range(8)]}
    host = SmolLM3ForCausalLM(SmolLM3Config(**config)).eval()
    host.load_state_dict(model.state_dict())
    expected = logits(host, ids)
    before = snapshot(model)
    assert error(before["logits"], logits(host, ids[:, :20])) > 1e-2
    for name in ("nope", "drope"):
        patch_model(model, name, layers=every_fourth, backend=backend)
        assert error(logits(model, ids), expected) < 1e-5
        assert error(cached_logits(model, ids, 33), expected) < 1e-5
        unpatch_model(model)
    assert unchanged(before, snapshot(model))


def gemma(**scaling):
    """Return a Gemma 3 with a scaling for each layer type; the weights do not depend on the scaling."""
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    rope |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    rope |= {kind: rope[kind] | changes for kind, changes in scaling.items()}
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=32, rope_parameters=rope,
        initializer_range=0.2, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=16, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("backend", BACKENDS)
def test_yarn_on_gemmas_full_attention_layers_equals_transformers(backend, tmp_path):
    model, ids = gemma(), tokens(2, 60)
    model.save_pretrained(tmp_path / "plain")  # writes into the config by itself
    before = snapshot(model)
    expected = logits(gemma(full_attention=YARN), ids)
    assert error(logits(model, ids), expected) > 1e-2
    patch_model(model, "yarn", factor=4, layers=full_attention_layers(model), backend=backend)
    assert describe(model).effective["theta"] == 1e6 and model.config.max_position_embeddings == 128
    assert error(logits(model, ids), expected) < 1e-5
    assert error(cached_logits(model, ids, 50), expected) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    for plain in (tmp_path / "saved", export(model, tmp_path / "exported")):
        loaded = AutoModelForCausalLM.from_pretrained(plain, attn_implementation=backend).eval()
        assert error(logits(loaded, ids), expected) < 1e-5
    assert torch.equal(logits(load_patched(tmp_path / "saved", attn_implementation=backend), ids), logits(model, ids))
    unpatch_model(model)
    assert unchanged(before, snapshot(model))


def test_each_layer_type_keeps_its_own_rotary_base():
    model, ids = gemma(), tokens(2, 60)
    native = logits(model, ids)
    for layers in (None, full_attention_layers(model), [0, 1, 3, 4], [0], [0, 5], range(6)):
        patch_model(model, "rope", layers=layers)
        assert torch.equal(logits(model, ids), native)
        unpatch_model(model)
    patch_model(model, "yarn", factor=4, layers=range(6))
    assert error(logits(model, ids), logits(gemma(full_attention=YARN, sliding_attention=YARN), ids)) < 1e-5
    patch_model(model, "linear", factor=2, layers=[0, 1, 3, 4], on_existing="replace")
    assert describe(model).effective["theta"] == 1e4
    halved = gemma(sliding_attention={"rope_type": "linear", "factor": 2.0})
    assert error(logits(model, ids), logits(halved, ids)) < 1e-5


@pytest.mark.parametrize("name, options", [("yarn", {"factor": 4}), ("rope", {"theta": 5e5}), ("dynamic_ntk", {})])
def test_layer_types_with_different_bases_are_scaled_together_only_on_request(name, options):
    model = gemma()
    before = snapshot(model)
    if "theta" not in options:
        with pytest.raises(PePatchError, match=r"base 1e\+06.*layers=lambda i: .* == 'full_attention'"):
            patch_model(model, name, **options)
        assert unchanged(before, snapshot(model))
    if name == "dynamic_ntk":
        with pytest.raises(UnsupportedError, match="one layer type"):
            patch_model(model, name, layers=range(6), **options)
    patch_model(model, name, layers=full_attention_layers(model), **options)
    assert describe(model).layers == [2, 5]


def test_schemes_without_rotation_apply_to_every_layer_type():
    model, ids = gemma(), tokens(2, 30)
    native = logits(model, ids)
    for name in ("alibi", "nope"):
        patch_model(model, name)
        assert error(logits(model, ids), native) > 1e-2
        assert error(cached_logits(model, ids, 20), logits(model, ids)) < 1e-5
        unpatch_model(model)
    assert torch.equal(logits(model, ids), native)


def test_a_scaling_of_one_layer_type_must_be_replaced_before_another_scaling():
    """Gemma 3 from 4B on scales its full-attention layers by 8, and not its sliding ones."""
    eight = {"rope_type": "linear", "factor": 8.0}
    model, ids = gemma(full_attention=eight), tokens(2, 60)
    with pytest.raises(AlreadyPatchedError, match="rope_type='linear'"):
        patch_model(model, "yarn", factor=4, layers=full_attention_layers(model))
    with pytest.raises(UnsupportedError, match="Only the full_attention layers"):
        patch_model(model, "clipped_rope", dims=2, on_existing="compose")
    patch_model(model, "ntk", factor=2, layers=[0, 1, 3, 4])
    unpatch_model(model)
    patch_model(model, "yarn", factor=4, layers=full_attention_layers(model), on_existing="replace")
    assert error(logits(model, ids), logits(gemma(full_attention=YARN), ids)) < 1e-5


@pytest.mark.parametrize("family", ["smollm3", "llama4_text", "exaone4", "cohere2"])
def test_scaling_only_layers_without_rotation_raises(family):
    model = families.build(family)
    with pytest.raises(PePatchError, match=r"do not rotate in this family \(\[3\]\)"):
        patch_model(model, "yarn", factor=2, layers=[3])
    patch_model(model, "yarn", factor=2, layers=[0, 3])
    twin, ids = pickle.loads(pickle.dumps(model)), tokens(1, 20)
    assert torch.equal(logits(twin, ids), logits(model, ids))


class LearnedSlope(Scheme):
    """A distance bias with a learned slope for each layer."""

    name = "learned_slope"
    per_layer = True

    def __init__(self, shape):
        super().__init__(shape)
        self.slope = nn.Parameter(torch.zeros(()))

    def bias(self, query, key, positions):
        return (-self.slope.abs() * positions.distance[:, None]).float().expand(-1, query.shape[1], -1, -1)


@torch.no_grad()
def logits_layer_by_layer(model, ids: Tensor, slopes: dict[int, Tensor]) -> Tensor:
    """Run the unpatched layers one by one; those in `slopes` without rotation, with the bias in the mask."""
    length = ids.shape[1]
    place = torch.arange(length)
    distance = (place[:, None] - place[None]).float()
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    hidden = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(hidden, place[None])
    for index, layer in enumerate(model.model.layers):
        mask, turn = causal[None, None], (cos, sin)
        if index in slopes:
            mask = mask - slopes[index].reshape(1, -1, 1, 1) * distance
            turn = (torch.ones_like(cos), torch.zeros_like(sin))
        hidden = layer(hidden, attention_mask=mask, position_embeddings=turn, position_ids=place[None])
    return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", [[0, 2], [1], slice(None, None, 3), None])
def test_a_bias_on_some_layers_equals_the_layers_run_one_by_one(layers, backend):
    model, ids = build("llama", num_hidden_layers=4), tokens(2, 40)
    chosen = [0, 3] if isinstance(layers, slice) else layers or range(4)
    alibi = {index: torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]) for index in chosen}
    own = {index: torch.tensor(0.1 * (index + 1)) for index in chosen}
    expected = {
        "alibi": logits_layer_by_layer(model, ids, alibi),
        "learned_slope": logits_layer_by_layer(model, ids, own),
    }
    before = snapshot(model)
    for name, scheme in (("alibi", "alibi"), ("learned_slope", LearnedSlope)):
        patch_model(model, scheme, layers=layers, backend=backend)
        weights = [p for n, p in model.named_parameters() if "position_schemes.scheme" in n]
        assert len(weights) == (len(own) if name == "learned_slope" else 0)
        for weight, slope in zip(weights, own.values(), strict=name == "learned_slope"):
            weight.data = slope
        assert error(logits(model, ids), expected[name]) < 1e-5
        assert error(cached_logits(model, ids, 33), expected[name]) < 1e-5
        unpatch_model(model)
    assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("name, options", [("yarn", {"factor": 4}), ("alibi", {})])
def test_gradient_checkpointing_does_not_change_the_gradient(name, options):
    """Checkpointing runs a layer again in backward, with the rotation of its forward pass."""
    model, ids = build("llama"), tokens(2, 40)
    patch_model(model, name, layers=[1], **options)
    found = []
    for _ in range(2):
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.gradient_checkpointing_enable()
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_every_layer_of_a_per_layer_scheme_gets_a_gradient():
    model, ids = build("llama", num_hidden_layers=4), tokens(2, 20)
    patch_model(model, LearnedSlope, layers=[1, 3])
    weights = [p for n, p in model.named_parameters() if "position_schemes.scheme" in n]
    for weight in weights:
        weight.data.fill_(0.2)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(weights) == 2 and all(weight.grad is not None and weight.grad != 0 for weight in weights)
