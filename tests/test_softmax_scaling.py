"""Scalable-Softmax, Llama 4's temperature and Fourier position embedding against float64 formulas of the papers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AutoModel

from pe_patch import SCHEMES, Positions, UnsupportedError, describe, load_patched, patch_model, unpatch_model

from .families import build as build_family
from .model_types.tiny import tiny_config
from .models import BACKENDS, build, error, logits, tokens
from .rotary_cases import shape

LENGTH = 40


class Weights:
    """An engine that returns the attention weights in float64."""

    causal = True
    layer = 0

    def __call__(self, query, key, value, positions, bias=None):
        groups = query.shape[1] // key.shape[1]
        scores = query.double() @ key.double().repeat_interleave(groups, 1).transpose(2, 3) / math.sqrt(query.shape[-1])
        hidden = positions.key[:, None, None, :] > positions.query[:, None, :, None]
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def weights(scheme, query, key, at):
    return scheme("attend", query, key, key, Positions(at[None], at[None]), Weights())


def heads(count, width=16, length=12):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(1, count, length, width, generator=generator)


def test_ssmax_is_the_formula():
    """Nakanishi 2025, equation 2: exp((s log n) z) / sum exp((s log n) z), n the number of keys."""
    scheme = SCHEMES["softmax_scaling"](shape(16), scale=0.7).scorer
    query, key = heads(4), heads(2)
    found = weights(scheme, query, key, torch.arange(12))
    plain = query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) / 4
    for n in range(1, 13):
        z = plain[0, :, n - 1, :n]
        raised = float(n) ** (0.7 * z)
        torch.testing.assert_close(found[0, :, n - 1, :n], raised / raised.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_the_first_scale_leaves_the_mean_factor_at_one():
    scheme = SCHEMES["softmax_scaling"](shape(16, window=1024))
    mean = scheme.scorer.factor(torch.arange(1024)[None], 0).double().mean()
    assert float(mean) == pytest.approx(1, abs=1e-4)
    assert scheme.neutral_scale == pytest.approx(1024 / sum(map(math.log, range(1, 1025))))


def test_the_temperature_is_that_of_llama_4():
    """The factors that Transformers' own attention multiplies queries by, in a layer without rotation."""
    model = build_family("llama4_text", num_hidden_layers=1, no_rope_layers=[0], floor_scale=8, attn_scale=0.3)
    plain = build_family("llama4_text", num_hidden_layers=1, no_rope_layers=[0], attn_temperature_tuning=False)
    queries = []
    for each in (model, plain):
        patch_model(each, "nope")
        each.model.layers[0].self_attn.__dict__["pe_seen"] = lambda query, key: queries.append(query)
        logits(each, tokens(1, LENGTH))
    ratio = (queries[0] / queries[1])[0, 0, :, 0]
    ours = SCHEMES["softmax_scaling"](shape(16), kind="temperature", slope=0.3, floor=8).scorer
    torch.testing.assert_close(ratio, ours.factor(torch.arange(LENGTH)[None], 0)[0, 0], rtol=1e-4, atol=1e-4)
    assert float(ratio[-1]) > 1.2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_below_its_floor_changes_nothing_beside_any_rotation(backend):
    model, ids = build("llama", attn_implementation=backend), tokens(2, 48)
    for over in ({"scheme": "yarn", "factor": 4.0}, {"scheme": "dynamic_ntk", "factor": 4.0}):
        patch_model(model, over["scheme"], factor=4.0)
        expected = logits(model, ids)
        unpatch_model(model)
        patch_model(model, "softmax_scaling", kind="temperature", floor=64, over=over)
        assert error(logits(model, ids), expected) < 1e-6
        unpatch_model(model)
        patch_model(model, "softmax_scaling", kind="temperature", floor=8, over=over)
        assert error(logits(model, ids), expected) > 1e-4
        unpatch_model(model)


def test_padding_counts_as_no_key():
    """Without position ids, as most calls are."""
    model, ids = build("llama"), tokens(1, 20)
    patch_model(model, "softmax_scaling")
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.long), ids), 1)
    mask = (torch.arange(26) >= 6).long()[None]
    assert error(logits(model, padded, attention_mask=mask)[:, 6:], logits(model, ids)) < 1e-5


def test_every_head_of_every_layer_learns_its_own_scale(tmp_path):
    model, ids = build("llama"), tokens(2, 24)
    patch_model(model, "softmax_scaling")
    model(input_ids=ids, labels=ids).loss.backward()
    (scale,) = [each for name, each in model.named_parameters() if name.endswith("scale")]
    config = model.config
    assert scale.shape == (config.num_hidden_layers, config.num_attention_heads)
    assert bool((scale.grad.abs() > 0).all())
    with torch.no_grad():
        scale.mul_(torch.linspace(0.5, 2, scale.numel()).view_as(scale))
    before = logits(model.eval(), ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_patched(tmp_path).eval(), ids), before)
    assert describe(model).scheme == "softmax_scaling"


def test_a_bidirectional_attention_has_no_number_of_keys_before_a_query():
    model = AutoModel.from_config(tiny_config("nomic_bert")).eval()
    with pytest.raises(UnsupportedError, match="'softmax_scaling' is defined for causal attention only"):
        patch_model(model, "softmax_scaling")
        model(input_ids=tokens(1, 8))


# Fourier position embedding.


@pytest.mark.parametrize("interleaved", [False, True])
def test_fope_is_the_formula(interleaved):
    """Hua et al. 2024, section 4: a pair turns by a sum over the kept frequencies, and the others stand still."""
    sizes = dataclasses.replace(shape(16, window=64), interleaved=interleaved)
    scheme = SCHEMES["fope"](sizes)
    frequencies = 10000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    kept = int((frequencies > 2 * math.pi / 64).sum())
    assert scheme.kept == kept < 8
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in (scheme.cos_coefficients, scheme.sin_coefficients):
            each.add_(0.3 * torch.randn(each.shape, generator=generator))
    query, key, at = heads(sizes.num_heads), heads(sizes.num_key_value_heads), torch.arange(5, 17)
    found = weights(scheme, query, key, at)

    def turned(x):
        result, a, b = x.double().clone(), scheme.cos_coefficients[0], scheme.sin_coefficients[0]
        for n, position in enumerate(at.tolist()):
            angles = [float(position * frequency) for frequency in frequencies[:kept]]
            for d in range(8):
                first, second = (2 * d, 2 * d + 1) if interleaved else (d, d + 8)
                one, two = float(x[n, first]), float(x[n, second])
                cos, sin = 1.0, 0.0
                if d < kept:
                    cos = sum(float(a[m, d]) * math.cos(angle) for m, angle in enumerate(angles))
                    sin = sum(float(b[m, d]) * math.sin(angle) for m, angle in enumerate(angles))
                result[n, first], result[n, second] = one * cos - two * sin, two * cos + one * sin
        return result

    groups = sizes.num_heads // sizes.num_key_value_heads
    for head in range(sizes.num_heads):
        scores = turned(query[0, head]) @ turned(key[0, head // groups]).T / 4
        scores = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
        torch.testing.assert_close(found[0, head], scores.softmax(-1), rtol=1e-4, atol=1e-5)


def test_fope_starts_as_a_rotation_without_slow_frequencies():
    model, ids = build("llama"), tokens(2, 24)
    patch_model(model, "fope")
    before = logits(model, ids)
    kept = describe(model).effective["kept"] if "kept" in describe(model).effective else None
    unpatch_model(model)
    inv_freq = model.model.rotary_emb.inv_freq
    inv_freq[inv_freq <= 2 * math.pi / model.config.max_position_embeddings] = 0
    assert error(before, logits(model, ids)) < 1e-5
    assert kept is None or kept > 0
