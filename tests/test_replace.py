"""Compare a user-defined scheme that replaces projections with a Transformers model built that way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from pe_patch import PePatchError, Scheme, UnsupportedError, describe, patch_model, unpatch_model
from pe_patch.core.projections import Projections
from pe_patch.mla.protocol import ProjectionScheme
from pe_patch.schemes.rotary import rotate

from .models import build, cached_logits, error, logits, snapshot, tokens, unchanged


class MultiQueryProjections(nn.Module):
    """Project to one key and one value head, the means of the trained ones (Shazeer 2019; Ainslie et al. 2023)."""

    groups = 4
    """Number of query heads per key head."""

    def __init__(self, of: Projections) -> None:
        super().__init__()
        self.head_dim = of.head_dim
        self.query = nn.Parameter(of.query.clone())
        self.key, self.value = (
            nn.Parameter(weight.unflatten(0, (of.kv_heads, -1)).mean(0)) for weight in (of.key, of.value)
        )

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        heads = [
            (hidden @ weight.T).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for weight in (self.query, self.key, self.value)
        ]
        return rotate(heads[0], cos, sin), rotate(heads[1], cos, sin), heads[2]


class MultiQuery(ProjectionScheme):
    name = "mqa"
    mechanism = "another attention"
    keeps_rotation = True
    converts = True

    def replace(self, projections, seen):
        return MultiQueryProjections(projections)

    def attend(self, query, key, value, positions, core):
        return core(query, key, value, positions)


def multi_query_llama(model):
    """Return a Llama with one key head, whose weights are the means of the model's."""
    built = build("llama", num_key_value_heads=1)
    weights = model.state_dict()
    for name in list(weights):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weights[name].unflatten(0, (2, -1)).mean(0)
    built.load_state_dict(weights)
    return built


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_multi_query_attention_equals_a_llama_with_one_key_head(attention):
    model = build("llama")
    expected, before = multi_query_llama(model), snapshot(model)
    patch_model(model, MultiQuery, backend=attention)
    ids = tokens(2, 30)
    assert error(logits(model, ids), logits(expected, ids)) < 1e-5
    assert error(cached_logits(model, ids, 20), logits(expected, ids)) < 1e-5
    slots = StaticCache(config=model.config, max_cache_len=40)
    assert error(cached_logits(model, ids, 20, slots), logits(expected, ids)) < 1e-5
    assert "q_proj" in str(describe(model))
    unpatch_model(model)
    assert unchanged(before, snapshot(model))


def test_replacing_projections_needs_a_supported_family_and_attend():
    with pytest.raises(UnsupportedError, match="this family does not"):
        patch_model(build("bloom"), MultiQuery)
    alone = type("NoAttend", (MultiQuery,), {"attend": Scheme.attend})
    with pytest.raises(PePatchError, match="attend"):
        patch_model(build("llama"), alone)
