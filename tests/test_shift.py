"""A shift of all positions by 1009: nothing to the schemes that see distances alone, something to the others."""

from __future__ import annotations

import pytest
import torch

from pe_patch import SCHEMES, patch_model

from .models import GIVEN, LENGTH_DEPENDENT, build, case, error, logits, tokens

SEES_PLACES = {
    "integer", "one_hot", "sinusoidal", "learned",  # absolute
    "fire", "self_extend", "dca", "lm_infinite",  # rows normalised by position, groups, chunks, the first tokens
    "softmax_scaling", "fope",  # a factor by the number of keys, a sum of frequencies
    "dynamic_ntk", "dynamic_yarn", "longrope",  # the length, which explicit positions tell
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_a_shift_of_all_positions(name):
    scheme, options = case("llama", name)
    if scheme in ("learned", "one_hot"):
        options["max_positions"] = 1100
    model = patch_model(build("llama"), scheme, **options)
    generator = torch.Generator().manual_seed(2)
    for label, parameter in model.named_parameters():
        if "position_schemes.scheme" in label:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    length = 24 if scheme in LENGTH_DEPENDENT else 48  # within the window, so that the shift leaves it
    ids, at = tokens(1, length), torch.arange(length)[None]
    mask = torch.ones_like(ids)
    here, there = (logits(model, ids, attention_mask=mask, position_ids=at + shift) for shift in (0, 1009))
    moved = error(there, here)
    assert moved > 5e-3 if scheme in SEES_PLACES else moved < 1e-3
    if SCHEMES[scheme].mechanism != "rotary":  # those that follow the length do not see the place by itself
        assert (scheme in SEES_PLACES) != SCHEMES[scheme].shift_invariant
