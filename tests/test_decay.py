"""xPos and rotation with ALiBi: the authors' numbers, the papers' attention in float64, and far positions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from pe_patch import SCHEMES, Positions, UnsupportedError, describe, patch_model

from . import goldens, oracles
from .models import BACKENDS, build, error, logits, put, tokens
from .pair_oracle import HEAD, THETA, compare, through
from .rotary_cases import shape, transformers_says

ZETA = (torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD + 0.4) / 1.4


class Scores:
    """A core that hands back the plain products that it would have normalised."""

    causal = True

    def blocks(self, *_):
        return None

    def rows(self, query, key, value, positions, scores):
        return scores(query, key, positions, self)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.transpose(2, 3)


def xpos_scores(query: Tensor, key: Tensor, at_query: Tensor, at_key: Tensor, interleaved: bool = False, **options):
    width = query.shape[-1]
    scheme = SCHEMES["xpos"](dataclasses.replace(shape(width, window=64), interleaved=interleaved), **options)
    positions = Positions(at_query[None], at_key[None])
    positions = positions._replace(prepared=scheme.prepare(positions))
    return scheme("attend", query, key, key, positions, Scores())


@pytest.mark.parametrize("interleaved", [True, False])
def test_xpos_scores_are_the_authors(interleaved):
    entry = goldens.load("xpos/")["xpos/dim8_scale_base512"]
    query, key, expected = (torch.tensor(entry[field])[:, None] for field in ("q", "k", "scores"))
    if not interleaved:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # half[t r/2 + k] = neighbours[2k + t]
        query, key = query[..., order], key[..., order]
    at = torch.arange(query.shape[2])
    ours = xpos_scores(query, key, at, at, interleaved, scale_base=entry["params"]["scale_base"])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_zeta_is_the_authors():
    entry = goldens.load("xpos/")["xpos/dim8_scale_base512"]
    torch.testing.assert_close(SCHEMES["xpos"](shape(8)).zeta.float(), torch.tensor(entry["zeta"]))


@pytest.mark.parametrize(("backend", "length"), [("eager", 48), ("sdpa", 48), ("sdpa", 300)])
@pytest.mark.parametrize("scale_base", [512, 16, 0.5])
def test_xpos_attention_and_its_gradients_are_the_papers(scale_base, backend, length):
    model = patch_model(build("llama", num_hidden_layers=1), "xpos", backend=backend, scale_base=scale_base)
    found = through(model, length, rows=2 if length < 100 else 1)
    compare(found, lambda i, j: i - j, zeta=ZETA ** (1 / scale_base))


def expected_scores(query: Tensor, key: Tensor, at_query: Tensor, at_key: Tensor, scale_base: float) -> Tensor:
    """Angles as Transformers has them in float32, which at far positions is another question; the rest in float64."""
    frequencies, _ = transformers_says({"rope_type": "default", "rope_theta": THETA}, HEAD, 64)
    sides = []
    for x, at in ((query, at_query), (key, at_key)):
        angles = (at[:, None].float() * frequencies).double()
        x = x.double()
        sides.append(torch.complex(x[..., : HEAD // 2], x[..., HEAD // 2 :]) * torch.polar(angles * 0 + 1, angles))
    distance = (at_query[:, None] - at_key).clamp(min=0).double()
    decay = ZETA ** (distance[..., None] / scale_base)
    return torch.einsum("bhik,bhjk,ijk->bhij", sides[0], sides[1].conj(), decay.to(sides[0].dtype)).real


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale_base", [512, 8])
def test_xpos_at_far_positions(scale_base, dtype, tolerance):
    """20,000 tokens, then a jump by 280,000 among the queries; keys far ahead of some of these are masked."""
    generator = torch.Generator().manual_seed(0)
    at_key = torch.cat((torch.arange(0, 19_700, 31), torch.arange(19_700, 20_000), torch.arange(300_000, 300_100)))
    at_query = at_key[-300:]
    query = torch.randn(1, 2, 300, HEAD, generator=generator).to(dtype)
    key = torch.randn(1, 2, len(at_key), HEAD, generator=generator).to(dtype)
    ours = xpos_scores(query, key, at_query, at_key, scale_base=scale_base).double()
    assert ours.isfinite().all()
    expected = expected_scores(query, key, at_query, at_key, scale_base)
    seen = at_query[:, None] >= at_key
    assert float((ours - expected).abs()[..., seen].max() / expected[..., seen].abs().max()) < tolerance
    near = seen & (at_query[:, None] - at_key < 100)
    assert float((ours - expected).abs()[..., near].max() / expected[..., near].abs().max()) < tolerance


def test_xpos_does_not_see_a_shift():
    model = put(build("llama"), "xpos")
    ids, at = tokens(1, 48), torch.arange(48)[None]
    ones = torch.ones_like(ids)
    before = logits(model, ids, attention_mask=ones)
    assert error(logits(model, ids, attention_mask=ones, position_ids=at + 1009), before) < 1e-3


SLOPES = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_rope_alibi_is_the_sum_of_the_two(scale, backend):
    """Rotated before the cache, with the penalty at the scores."""
    model = patch_model(build("llama", num_hidden_layers=1), "rope_alibi", slope_scale=scale, backend=backend)
    compare(through(model, 48), lambda i, j: i - j, slopes=[scale * slope for slope in SLOPES])
    assert "rope_alibi" in str(model.model.rotary_emb)
    assert [(row.where, row.new) for row in describe(model).replaced if "scores" in row.where] == [
        ("model.layers.0.self_attn.scores", "alibi")
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_alibi_over_another_scheme(backend):
    model = build("llama", num_hidden_layers=1)
    patch_model(model, "rope_alibi", over={"scheme": "linear", "factor": 4}, backend=backend)
    compare(through(model, 48), lambda i, j: i - j, slopes=SLOPES, frequencies=oracles.linear(HEAD, THETA, 4))
    assert model.config.max_position_embeddings == 128


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_alibi_at_the_scores(backend):
    """Frequencies that follow the length are turned there; within the window they are the plain ones."""
    model = patch_model(build("llama", num_hidden_layers=1), "rope_alibi", over="dynamic_ntk", backend=backend)
    compare(through(model, 30), lambda i, j: i - j, slopes=SLOPES)
    frequencies = oracles.dynamic_ntk(HEAD, THETA, 1, 32, 48)
    compare(through(model, 48), lambda i, j: i - j, slopes=SLOPES, frequencies=frequencies)


@pytest.mark.parametrize("name", ["xpos", "rope_alibi"])
def test_they_are_not_added_to_blooms_own_positions(name):
    with pytest.raises(UnsupportedError, match="leave keep_native out"):
        put(build("bloom"), name, keep_native=True)


@pytest.mark.parametrize("backend", ["flex", "flash"])
def test_kernels_that_do_not_take_xpos_are_refused(backend):
    with pytest.raises(UnsupportedError, match="use 'sdpa' or 'eager'"):
        patch_model(build("llama"), "xpos", backend=backend)


@pytest.mark.parametrize(("name", "option"), [("xpos", "scale_base"), ("rope_alibi", "slope_scale")])
def test_bad_numbers_are_errors(name, option):
    for value in (0, -1.0, "1", float("nan")):
        with pytest.raises(TypeError, match=option):
            SCHEMES[name](shape(), **{option: value})
