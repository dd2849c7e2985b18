"""In every dtype, what must equal the unpatched model equals it bit for bit, in every family that rotates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from pe_patch import ADAPTERS, SCHEMES, UnsupportedError, compat, patch_model, unpatch_model
from pe_patch.adapters.precision import table

from .families import VOCABULARY, build
from .models import GIVEN, put

ROTARY = sorted(
    name
    for name, adapter in ADAPTERS.items()
    if adapter.native == "rope" and adapter.still_rotation is None and adapter.at_scores is None
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIKE = [name for name in ROTARY if ADAPTERS[name].arithmetic == "model" and name not in ("llama", "gpt_neox")]
"""Families that rotate as Llama does; float16 and float32 round as bfloat16 does there."""
UNSCALED: dict[str, dict] = {
    "rope": {},
    "linear": {"factor": 1},
    "ntk": {"factor": 1},
    "ntk_by_parts": {"factor": 1},
    "yarn": {"factor": 1},
    "llama3": {"factor": 1},
    "longrope": {"long_factor": 1.0},
}
WITHIN: dict[str, dict] = {
    "dynamic_ntk": {"factor": 2.0},
    "dynamic_yarn": {},
    "longrope": {"long_factor": 2.0, "factor": 1.0},
    "linear": {"factor": "auto"},
    "yarn": {"factor": "auto"},
}
"""Equal to the unpatched model within the window, and rotated at the scores."""
FAR = {"gemma3_text": {"layers": [3]}}
"""Layers that look far, where the others turn by another base and would be stretched with them."""
SIZES = {
    "llama4_text": {"head_dim": 64, "hidden_size": 256},
    "cohere": {"hidden_size": 192},
    "deepseek_v2": {"qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 24},
}
"""Heads as wide as those of real models, for which kernels take other paths; a head of 48 is no power of two."""


@torch.no_grad()
def observe(model, ids):
    """Logits of a full pass, of a padded one, and of a first pass and single tokens into a cache."""
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = [model(input_ids=ids, use_cache=False).logits]
    found.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, 4:])
    output = model(input_ids=ids[:, :17], use_cache=True)
    found.append(output.logits)
    for start, stop in ((17, 18), (18, 19), (19, 22)):
        cache = output.past_key_values
        output = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
        found.append(output.logits)
    return found


def options_for(family, model, options):
    """The options with lists of as many entries as this family rotates pairs."""
    if "long_factor" not in options:
        return options
    pairs = ADAPTERS[family].shape(model.model if hasattr(model, "model") else model.base_model, model.config)
    return {**options, "long_factor": [options["long_factor"]] * (pairs.rotary_dim // 2)}


def check(family, model):
    ids = torch.randint(3, VOCABULARY, (2, 22), generator=torch.Generator().manual_seed(1))
    native, later = observe(model, ids), False
    for schemes in (UNSCALED, WITHIN):
        for scheme, options in schemes.items():
            given = FAR.get(family, {}) if schemes is WITHIN else {}
            try:
                patch_model(model, scheme, **options_for(family, model, options), **given)
            except UnsupportedError:
                assert schemes is WITHIN and table()[family] == "refused"
                continue
            later = later or schemes is WITHIN
            for found, expected in zip(observe(model, ids), native, strict=True):
                assert torch.equal(found, expected), (scheme, options)
            unpatch_model(model)
    assert later == (table()[family] != "refused")


EVERY = [
    pytest.param(family, dtype, marks=[pytest.mark.thorough] if dtype is not torch.bfloat16 and family in ALIKE else [])
    for family in ROTARY
    for dtype in DTYPES
]


@pytest.mark.parametrize(("family", "dtype"), EVERY, ids=str)
def test_bit_for_bit(family, dtype):
    check(family, build(family, "eager" if family == "gemma2" else None, dtype=dtype))


def wide_marks(dtype, attention):
    """Float16 repeats bfloat16, and eager attention repeats SDPA in float32: the same arithmetic."""
    repeats = dtype is torch.float16 or (dtype is torch.float32 and attention == "eager")
    return [pytest.mark.thorough] if repeats else []


WIDE = [
    pytest.param(family, dtype, attention, marks=wide_marks(dtype, attention))
    for family in SIZES
    for dtype in DTYPES
    for attention in ("sdpa", "eager")
]


@pytest.mark.parametrize(("family", "dtype", "attention"), WIDE, ids=str)
def test_bit_for_bit_in_wide_heads(family, dtype, attention):
    check(family, build(family, attention, dtype=dtype, **SIZES[family]))


def test_without_its_norm_llama_4_is_the_same_too():
    check("llama4_text", build("llama4_text", dtype=torch.bfloat16, use_qk_norm=False))


@pytest.mark.skipif(not compat.OWN_SCORES, reason="GPT-J and CodeGen have another row here than in the pinned version")
def test_the_page_shows_how_every_family_rotates():
    """`docs/precision.md` holds the table as `python -m pe_patch.adapters.precision` prints it."""
    from pe_patch.adapters.precision import markdown

    page = (Path(__file__).parent.parent / "docs" / "precision.md").read_text(encoding="utf-8")
    assert markdown().strip() in page
    named = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    assert sorted(named) == sorted(table())


@pytest.mark.parametrize("name", sorted(set(GIVEN) - {"mla"}))
@torch.no_grad()
def test_a_model_in_float64_runs_under_every_scheme(name):
    """Eager, SDPA and decoding agree beyond float32 wherever the scheme's own arithmetic is not float32."""
    ids = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(3))
    model = put(build("llama", dtype=torch.float64), name).double()
    whole = {}
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        whole[backend] = model(input_ids=ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        steps = [model(input_ids=ids[:, :30], past_key_values=cache).logits]
        steps += [model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits for n in range(30, 40)]
        assert whole[backend].dtype == torch.float64
        if not SCHEMES[name].length_dependent:
            torch.testing.assert_close(torch.cat(steps, 1), whole[backend], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole["sdpa"], whole["eager"], rtol=1e-5, atol=1e-5)
