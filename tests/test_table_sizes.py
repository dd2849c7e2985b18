"""Every scheme with tables for heads or dimensions, on every family and on heads of unusual sizes.

A pair is refused when it is patched, or its attention equals the papers' formulas in float64.
"""

from __future__ import annotations

import pytest
import torch

from pe_patch import ADAPTERS, SCHEMES, UnsupportedError, patch_model, unpatch_model
from pe_patch.mla.protocol import converts

from . import oracles_relative as oracle
from .families import LANGUAGE_MODELS, VOCABULARY, build
from .models import GIVEN

SCHEMES_WITH_TABLES = ("alibi", "t5", "kerple", "sandwich", "fire", "shaw", "transformer_xl", "cope")
LENGTH = 8
"""No longer than any sliding window of the models, which hide far keys."""
SINKS = ("gpt_oss",)
SOFT_CAPPED = ("gemma2",)
SIZES = {
    "values wider than keys": ("deepseek_v3", {"v_head_dim": 64}),
    "values a little wider": ("deepseek_v2", {"v_head_dim": 40}),
    "values narrower": ("minicpm3", {"v_head_dim": 8}),
    "heads wider than hidden": ("gemma", {"head_dim": 32}),
    "one key head": ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "three key heads of six": ("mistral", {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3,
                                           "head_dim": 10}),
    "partial rotation": ("phi", {"partial_rotary_factor": 0.25}),
    "partial rotation, interleaved": ("glm", {"head_dim": 32}),
    "heads of eight": ("gpt2", {"num_attention_heads": 8}),
    "no power of two": ("bloom", {"hidden_size": 60, "num_attention_heads": 6}),
    "many key heads": ("gpt_bigcode", {"multi_query": False}),
}  # fmt: skip


def expected(name, scheme, given, q, k, v, scaling):
    """The output of the papers' attention, `[batch, heads, query, value]`, float64."""
    w = {key: value.detach().double() for key, value in scheme.named_parameters()}
    heads, n = q.shape[1], q.shape[2]
    q, k, v = q.double(), *(x.double().repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    factor, plain = scaling * q.shape[-1] ** 0.5, q  # the formulas divide by the root of the width
    q = q * factor
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if name == "shaw":
        scores, v = oracle.shaw(w, q, k, v, given["max_distance"])
    elif name == "transformer_xl":
        scores = oracle.transformer_xl(w, plain, k, 0, None) * factor  # with what is added to the queries
    elif name == "cope":
        scores = oracle.cope(w, q, k)
    elif name == "alibi":
        scores = scores - torch.tensor(scheme.head_slopes, dtype=torch.float64)[:, None, None] * oracle.pairs(n)
    elif name == "t5":
        scores = scores + oracle.t5(w, n, given["num_buckets"], given["max_distance"])
    elif name == "kerple":
        scores = scores + oracle.kerple_log(w, n)
    elif name == "sandwich":
        scores = scores + oracle.sandwich(heads, n, 128)
    else:
        scores = scores + oracle.fire(w, n, given["threshold"])
    return oracle.attention(scores, v)


@torch.no_grad()
def check(family, model, compare=True):
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    adapter = ADAPTERS[family].at_scores or ADAPTERS[family]
    for name in SCHEMES_WITH_TABLES:
        given = GIVEN[name]
        if not adapter.forwards_kwargs:
            with pytest.raises(UnsupportedError, match="drops keywords"):
                patch_model(model, name, **given)
            continue
        patch_model(model, name, **given)
        base = next(module for module in model.modules() if "pe_patch" in module.__dict__)
        scheme = base.pe_patch.scheme_by_layer[0]
        generator = torch.Generator().manual_seed(2)
        for parameter in base.position_schemes.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).abs() * 0.3 + 0.1)
        seen: list = []

        def attend(query, key, value, positions, core, inner=scheme.attend, seen=seen):
            output = inner(query, key, value, positions, core)
            seen.append((query, key, value, core.scaling, output[0]))
            return output

        scheme.__dict__["attend"] = attend
        for backend in ("eager",) if family in SOFT_CAPPED or adapter.eager_only else ("sdpa", "eager"):
            seen.clear()
            model.set_attn_implementation(backend)
            assert model(input_ids=ids, use_cache=False).logits.isfinite().all()
            if compare:
                query, key, value, scaling, output = seen[0]
                whole = expected(name, scheme, given, query, key, value, scaling).transpose(1, 2)
                torch.testing.assert_close(output.double(), whole, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)
        del scheme.__dict__["attend"]
        unpatch_model(model)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_every_family(family):
    model = build(family, "eager" if family in SOFT_CAPPED else None)
    check(family, model, compare=family not in (*SINKS, *SOFT_CAPPED))


@pytest.mark.parametrize("size", SIZES)
def test_every_size(size):
    family, settings = SIZES[size]
    check(family, build(family, **settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [name for name in LANGUAGE_MODELS if ADAPTERS[name].native != "rope"])
@torch.no_grad()
def test_families_without_rotation_run_in_half_precision(family, dtype):
    """What takes the place of a learned table leaves the dtype of the embeddings as it is."""
    model = build(family, dtype=dtype)
    ids = torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    exact = build(family)
    for name in ("nope", "rope", "alibi", "sinusoidal"):
        given = {"original_max_position_embeddings": 64} if family == "bloom" and name == "rope" else {}
        patch_model(model, name, **given)
        patch_model(exact, name, **given)
        exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
        found = model(input_ids=ids, use_cache=False).logits
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact(input_ids=ids, use_cache=False).logits, rtol=0.1, atol=0.3)
        unpatch_model(model)
        unpatch_model(exact)


def test_every_scheme_with_parameters_of_a_head_is_here():
    """A scheme that keeps numbers for each head or each dimension of a head belongs into `SCHEMES_WITH_TABLES`.

    The exceptions are compared with their formulas elsewhere (`test_decay.py`, `test_softmax_scaling.py`).
    """
    shape = ADAPTERS["llama"].shape(build("llama").model, build("llama").config)
    learned = set()
    for name, scheme in SCHEMES.items():
        if name in GIVEN and not converts(scheme) and scheme.mechanism not in ("absolute", "none"):
            given = {key: value for key, value in GIVEN[name].items() if key != "long_factor"}
            try:
                built = scheme(shape, **given)
            except TypeError:
                continue  # longrope, whose lists have an entry for each rotated pair
            if any(True for _ in built.parameters()) or scheme.head_sharded_attributes:
                learned.add(name)
    assert learned - {"rope_alibi", "softmax_scaling", "fope"} <= set(SCHEMES_WITH_TABLES)


@torch.no_grad()
def test_slopes_too_steep_for_half_precision_are_added_otherwise():
    """A slope of 100 over a head of 16, times 2048 for the high limb of a position, is beyond float16."""
    model = build("llama", dtype=torch.float16)
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    patch_model(model, "alibi", slopes=[100.0] * 4)
    found = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, use_cache=False).logits
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
