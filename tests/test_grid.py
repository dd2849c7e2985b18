"""Positions on a grid of patches: the authors' numbers, float64 formulas, and whole towers against a hand-made one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from pe_patch import (
    ADAPTERS,
    SCHEMES,
    AttentionShape,
    NoEffectError,
    PePatchError,
    Positions,
    UnsupportedError,
    describe,
    load_patched,
    patch_model,
    patched,
    unpatch_model,
)

from .goldens import load
from .models import build, error, tokens

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
TOWERS = {
    "clip_vision_model": (CLIPVisionModel, CLIPVisionConfig, {"initializer_factor": 8.0}),
    "vit": (ViTModel, ViTConfig, {}),
}
SCHEME_CASES = {"axial": ("rope_2d", {}), "mixed": ("rope_2d", {"mode": "mixed"}), "alibi": ("alibi_2d", {})}
IMAGES = {"trained": (32, 32), "larger": (64, 64), "wide": (24, 72)}


def vision_encoder(family, **changes):
    model_class, config_class, own = TOWERS[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **own, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" in name:  # large enough to matter
                parameter.normal_()
    return model


def images(size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def features(model, size, **options):
    return model(pixel_values=images(size), **options).last_hidden_state


def shape(**changes):
    return AttentionShape(**{
        "hidden_size": 64, "num_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "rotary_dim": 16,
        "rotary_start": 0, "rope_theta": 10000.0, "trained_length": 0, "num_layers": 2, "grid": (2, 3),
        "leading_tokens": 0, **changes,
    })  # fmt: skip


def test_axial_rotation_is_the_authors():
    case = load("rope2d/axial_dim16_3x2")["rope2d/axial_dim16_3x2"]
    query, key = torch.tensor(case["q"]), torch.tensor(case["k"])
    scheme = SCHEMES["rope_2d"](shape(num_heads=query.shape[1]))
    laid_out = scheme.lay_out(case["params"]["end_y"], case["params"]["end_x"], query.device)
    torch.testing.assert_close(scheme.angles_at(laid_out[0])[0], torch.tensor(case["angles"]))
    index = torch.arange(6)[None]
    found = scheme.encode(query, key, Positions(index, index, prepared=laid_out))
    for ours, expected in zip(found, (case["q_out"], case["k_out"]), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def places(rows, columns, grid, leading):
    """(x, y) of each token in patches of the trained grid, row by row; None for leading tokens."""
    found: list = [None] * leading
    for row in range(rows):
        for column in range(columns):
            found.append((column * grid[1] / columns, row * grid[0] / rows))
    return found


def turned(head, place, frequencies):
    """One head of one token in float64: pair k is a complex number, multiplied by e^(i (x f_x + y f_y))."""
    if place is None:
        return head
    along = torch.tensor([math.fsum((place[0] * fx, place[1] * fy)) for fx, fy in frequencies], dtype=torch.float64)
    pairs = torch.view_as_complex(head.reshape(-1, 2).contiguous()) * torch.polar(torch.ones_like(along), along)
    return torch.view_as_real(pairs).reshape(-1)


def by_hand(scheme, layer_schemes, layer, query, key, value, where):
    """Attention of one layer in float64, head by head, `[batch, heads, tokens, head]`."""
    heads, width = query.shape[1], query.shape[-1]
    magnitude = [100 ** (-4 * t / width) for t in range(width // 4)]
    output = torch.zeros_like(query)
    for head in range(heads):
        q, k, bias = query[:, head], key[:, head], 0.0
        if scheme == "alibi":
            slope = 2.0 ** (-8 * (head + 1) / heads)
            bias = torch.tensor(
                [[-slope * math.dist(a, b) if a and b else 0.0 for b in where] for a in where], dtype=torch.float64
            )
        else:
            frequencies = [(f, 0.0) for f in magnitude] + [(0.0, f) for f in magnitude]
            if scheme == "mixed":
                frequencies = layer_schemes[layer].frequencies[:, head].double().T.tolist()
            turn = [[turned(row[i], where[i], frequencies) for i in range(len(where))] for x in (q, k) for row in x]
            q, k = torch.stack([torch.stack(row) for row in turn]).chunk(2)
        weights = (q @ k.transpose(1, 2) * width**-0.5 + bias).softmax(-1)
        output[:, head] = weights @ value[:, head]
    return output


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("case", SCHEME_CASES)
@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_attends_as_the_definition_says(family, case, size, backend):
    """What enters each attention goes through float64 by hand and must come out as the encoder's own output."""
    name, options = SCHEME_CASES[case]
    model = vision_encoder(family)
    patch_model(model, name, backend=backend, **options)
    own = list(model.position_schemes.scheme)
    attentions = list(ADAPTERS[family].attentions(model).values())
    seen = []
    hooks = [
        attention.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
        )
        for attention in attentions
    ]
    found = features(model, IMAGES[size])
    rows, columns = (one // 8 for one in IMAGES[size])
    where = places(rows, columns, (4, 4), ADAPTERS[family].vision_encoder.leading_tokens)
    assert found.shape[1] == len(where)
    for layer, (attention, (args, kwargs, output)) in enumerate(zip(attentions, seen, strict=True)):
        exact = copy.deepcopy(attention).double()
        hidden = (args[0] if args else kwargs["hidden_states"]).double()
        split = [getattr(exact, f"{one}_proj")(hidden).unflatten(-1, (4, 16)).transpose(1, 2).detach() for one in "qkv"]
        mixed = by_hand(case, own, layer, *split, where).transpose(1, 2).flatten(2)
        expected = (exact.o_proj if hasattr(exact, "o_proj") else exact.out_proj)(mixed).detach()
        assert error(output[0].double(), expected) < 1e-5
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", TOWERS)
def test_the_table_is_gone_and_the_scheme_stands_for_it(family):
    """Without positions patches may be shuffled; under the scheme they may not. The class token sees all alike."""
    model, native = vision_encoder(family), vision_encoder(family)
    leading = ADAPTERS[family].vision_encoder.leading_tokens
    table = ADAPTERS[family].vision_encoder.native_table(native)
    with torch.no_grad():
        table.zero_()
    bare = features(native, (32, 32))
    patch_model(model, "alibi_2d", slopes=[1e-30] * 4)  # a bias of nothing
    assert error(features(model, (32, 32)), bare) < 1e-6
    assert not ADAPTERS[family].vision_encoder.native_table(model).requires_grad
    for case in SCHEME_CASES:
        name, options = SCHEME_CASES[case]
        patch_model(model, name, on_existing="replace", **options)
        assert error(features(model, (32, 32)), bare) > 1e-2
    patch_model(model, "rope_2d", on_existing="replace", keep_native=True)
    kept = features(model, (32, 32))
    with torch.no_grad():
        ADAPTERS[family].vision_encoder.native_table(model).zero_()
    assert error(features(model, (32, 32)), kept) > 1e-2
    with pytest.raises(ValueError, match="doesn't match model"):
        features(model, (64, 64))
    assert features(model, (64, 64), interpolate_pos_encoding=True).shape[1] == 64 + leading


@pytest.mark.parametrize("case", SCHEME_CASES)
@pytest.mark.parametrize("family", TOWERS)
def test_a_finer_image_of_the_same_is_read_at_the_same_places(family, case):
    """Coordinates are interpolated: patch (2r, 2c) of twice the resolution stands where (r, c) stood."""
    name, options = SCHEME_CASES[case]
    model = vision_encoder(family)
    patch_model(model, name, **options)
    scheme = model.position_schemes.scheme[0]
    coarse, fine = scheme.lay_out(4, 4, torch.device("cpu")), scheme.lay_out(8, 8, torch.device("cpu"))
    leading = scheme.shape.leading_tokens
    assert leading == ADAPTERS[family].vision_encoder.leading_tokens
    grid = fine[0][leading:].reshape(8, 8, 2)[::2, ::2].reshape(-1, 2)
    assert torch.equal(grid, coarse[0][leading:])
    assert fine[0].max() < 4 and torch.equal(coarse[1].nonzero()[0], torch.tensor([leading]))


@pytest.mark.parametrize("case", SCHEME_CASES)
@pytest.mark.parametrize("family", TOWERS)
def test_undone_bit_for_bit(family, case):
    name, options = SCHEME_CASES[case]
    model = vision_encoder(family)
    before = state(model)
    native = features(model, (32, 32)), features(model, (64, 64), interpolate_pos_encoding=True)
    with patched(model, name, **options):
        assert describe(model).scheme == name and len(describe(model).layers) == 2
        assert error(features(model, (32, 32)), native[0]) > 1e-2
    assert state(model) == before
    assert torch.equal(features(model, (32, 32)), native[0])
    assert torch.equal(features(model, (64, 64), interpolate_pos_encoding=True), native[1])


def state(model):
    return (
        {name: (sorted(module.__dict__), sorted(module._modules)) for name, module in model.named_modules()},
        {name: (parameter.requires_grad, parameter.sum().item()) for name, parameter in model.named_parameters()},
        model.config.to_dict(),
        model.config._attn_implementation,
    )


@pytest.mark.parametrize("family", TOWERS)
def test_mixed_frequencies_are_learned_in_every_layer_and_head(family):
    """The gradient in float64 is the slope of the loss."""
    model = vision_encoder(family).double()
    patch_model(model, "rope_2d", mode="mixed")
    frequencies = [scheme.frequencies for scheme in model.position_schemes.scheme]
    assert len(frequencies) == 2 and frequencies[0].shape == (2, 4, 8)
    assert not torch.equal(frequencies[0], frequencies[1])
    norms = frequencies[0].square().sum(0).sqrt()
    expected = torch.tensor([10 ** (-4 * t / 16) for t in range(4)] * 2, dtype=torch.float64)
    torch.testing.assert_close(norms.detach(), expected.expand(4, -1), rtol=1e-5, atol=0)
    pixels = images((32, 32)).double()

    def loss():
        return model(pixel_values=pixels).last_hidden_state.square().mean()

    loss().backward()
    for scheme in frequencies:
        assert all(scheme.grad[:, head].abs().max() > 0 for head in range(4))
    step = 1e-3  # angles are computed in float32
    with torch.no_grad():
        for frequency, place in ((frequencies[0], (0, 1, 0)), (frequencies[1], (1, 2, 4))):
            frequency[place] += step
            up = loss()
            frequency[place] -= 2 * step
            down = loss()
            frequency[place] += step
            slope = frequency.grad[place]
            assert abs((up - down) / (2 * step) - slope) < 1e-2 * max(abs(slope), 1e-4)


def clip():
    torch.manual_seed(0)
    vision = {**SIZES, "initializer_factor": 8.0}
    text = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "initializer_factor": 8.0,
    }  # fmt: skip
    return CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(**text).to_dict(),
            vision_config=CLIPVisionConfig(**vision).to_dict(),
            projection_dim=32,
        )
    ).eval()


@torch.no_grad()
def both(model, size=(32, 32), **options):
    output = model(input_ids=tokens(3, 12), pixel_values=images(size), **options)
    return output.text_embeds, output.image_embeds


@pytest.mark.parametrize("case", SCHEME_CASES)
def test_clip_s_text_tower_is_left_alone(case, tmp_path):
    name, options = SCHEME_CASES[case]
    model = clip()
    native = both(model)
    with pytest.raises(UnsupportedError, match=r"several attention stacks.*vision_model"):
        patch_model(model, name, **options)
    patch_model(model, name, submodule="vision_model", **options)
    text, image = both(model)
    assert torch.equal(text, native[0]) and error(image, native[1]) > 1e-2
    assert model.config.text_config._attn_implementation == "sdpa"
    assert both(model, (64, 64))[1].shape == image.shape
    model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, KeyError, StrictDataclassFieldValidationError), match="pe_patch"):
        type(model).from_pretrained(tmp_path)
    for read in (load_patched, AutoModel.from_pretrained):
        loaded = read(tmp_path)
        assert describe(loaded).scheme == name
        assert all(torch.equal(one, other) for one, other in zip(both(loaded), (text, image), strict=True))
    unpatch_model(model)
    assert all(torch.equal(one, other) for one, other in zip(both(model), native, strict=True))


@pytest.mark.parametrize("name", ["rope_2d", "alibi_2d"])
def test_llava_s_vision_tower(name):
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES, initializer_factor=8.0).to_dict(),
        text_config=build("llama").config.to_dict(),
        image_token_index=96,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, *[96] * 16, 7, 8]])

    def answer():
        with torch.no_grad():
            return model(input_ids=ids, pixel_values=images((32, 32), 1)).logits

    native = answer()
    with patched(model, name, submodule="vision_tower"):
        seen = answer()
        assert error(seen[:, 2:], native[:, 2:]) > 1e-3
        assert torch.equal(seen[:, :2], native[:, :2])  # text before the image
    assert torch.equal(answer(), native)


def test_recomputed_activations_give_the_same_gradient():
    """Under gradient checkpointing a layer runs again in backward."""
    model = vision_encoder("clip_vision_model").train()
    patch_model(model, "rope_2d", mode="mixed")
    found = []
    for _ in range(2):
        model.zero_grad()
        model(pixel_values=images((32, 32))).last_hidden_state.square().mean().backward()
        found.append([scheme.frequencies.grad.clone() for scheme in model.position_schemes.scheme])
        model.gradient_checkpointing_enable()
    assert all(torch.allclose(one, other, atol=1e-8) for one, other in zip(*found, strict=True))


def test_what_is_for_text_and_what_is_for_images():
    with pytest.raises(UnsupportedError, match=r"'yarn' is for text.*rope_2d, alibi_2d"):
        patch_model(vision_encoder("vit"), "yarn", factor=2)
    with pytest.raises(UnsupportedError, match="reads text: use 'rope' or 'alibi'"):
        patch_model(build("llama"), "rope_2d")
    with pytest.raises(UnsupportedError, match="submodule="):
        SCHEMES["alibi_2d"](shape(grid=None))
    for options, message in (
        ({"mode": "axal"}, "Did you mean 'axial'"), ({"theta": 1}, "theta=1"), ({"slopes": [1.0]}, "4 positive"),
        ({"layers": [0]}, "keep_native=True to keep the table"), ({"backend": "flash"}, "drop the bias"),
    ):  # fmt: skip
        name = "alibi_2d" if "slopes" in options or "backend" in options else "rope_2d"
        with pytest.raises(PePatchError, match=message):
            patch_model(vision_encoder("vit"), name, **options)
    with pytest.raises(PePatchError, match="four divides"):
        SCHEMES["rope_2d"](shape(head_dim=18))
    model = vision_encoder("vit")
    patch_model(model, "rope_2d")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(NoEffectError, match="after the patch"):
        features(model, (32, 32))


def test_some_layers_beside_the_table():
    model = vision_encoder("vit")
    native = features(model, (32, 32))
    patch_model(model, "alibi_2d", layers=[1], keep_native=True)
    one = features(model, (32, 32))
    patch_model(model, "alibi_2d", on_existing="replace", keep_native=True)
    assert error(one, native) > 1e-3 and error(features(model, (32, 32)), one) > 1e-3


def test_a_classifier_round_a_tower_is_trained():
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=3)).train()
    patch_model(model, "rope_2d", mode="mixed")
    loss = model(pixel_values=images((32, 32)), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
