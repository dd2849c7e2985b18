"""Biases by distance and FIRE: against the authors' numbers, and each form of a bias against its formula."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from pe_patch import SCHEMES, DistanceBias, Positions, patch_model
from pe_patch.attention import engine
from pe_patch.schemes.bias import alibi_slopes

from . import oracles_relative as oracle
from .goldens import load
from .models import FAMILIES, build, error, put, tokens
from .test_relative import LENGTH, SHAPE, core, filled, inputs


def golden(key: str) -> dict[str, Any]:
    return load(key)[key]


def shape(**changes: Any) -> Any:
    return type(SHAPE)(**{**SHAPE.__dict__, **changes})


def along(n: int) -> Positions:
    return Positions(torch.arange(n)[None], torch.arange(n)[None])


def dense(scheme: Any, n: int) -> Tensor:
    """The bias of a first pass over n tokens, `[heads, n, n]`."""
    bare = torch.zeros(1, scheme.shape.num_heads, n, scheme.shape.head_dim)
    return scheme.bias(bare, bare, along(n))[0].detach()


def pointwise(scheme: Any, n: int) -> Tensor:
    """The same by `of`."""
    at, heads = torch.arange(n), torch.arange(scheme.shape.num_heads)
    return scheme.score_bias(at[:, None] - at, heads[:, None, None]).detach()


@pytest.mark.parametrize("both_ways", [False, True])
def test_t5_buckets_are_the_authors(both_ways):
    """From 300 tokens ahead to 300 behind, through the table; one-way buckets take what lies ahead for 0."""
    case = golden(f"t5/buckets_{'bidirectional' if both_ways else 'causal'}_32_128")
    scheme: Any = SCHEMES["t5"](SHAPE)
    scheme.table.data = torch.arange(32.0)[:, None] + 100 * torch.arange(4)
    distance = torch.arange(300, -301, -1)
    found = scheme.score_bias(distance, torch.arange(4)[:, None], both_ways=both_ways)
    expected = torch.tensor(case["buckets_hf"]) + 100 * torch.arange(4)[:, None]
    assert torch.equal(found, expected.float())


def test_t5_looks_both_ways_where_the_attention_does():
    case = golden("t5/buckets_bidirectional_32_128")
    scheme: Any = SCHEMES["t5"](SHAPE).double()
    scheme.table.data = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)).double()
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, heads, 200, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    index = torch.tensor([[case["buckets_hf"][300 + j - i] for j in range(200)] for i in range(200)])
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 4 + scheme.table.detach()[index].permute(2, 0, 1)
    expected = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    for backend in ("eager", "sdpa"):
        found = scheme.attend(q, k, v, along(200), core(backend, causal=False))[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_kerple_is_the_authors():
    """Their third head has a = 0.001, which is cut at 0.01."""
    case = golden("kerple/log")
    scheme: Any = SCHEMES["kerple"](shape(num_heads=3, num_key_value_heads=3))
    scheme.a.data, scheme.p.data = torch.tensor(case["params"]["bias_a"]), torch.tensor(case["params"]["bias_p"])
    expected = torch.tensor(case["bias"]).reshape(3, 6, 6)
    for found in (dense(scheme, 6), pointwise(scheme, 6)):
        torch.testing.assert_close(found.tril(), expected, rtol=0, atol=2e-5)
    last = scheme.score_bias(torch.arange(5, -1, -1), torch.arange(3)[:, None]).detach()
    torch.testing.assert_close(last, torch.tensor(case["bias_decode_last_row"]).reshape(3, 6), rtol=0, atol=2e-5)


def test_kerple_starts_in_the_authors_range():
    torch.manual_seed(0)
    schemes = [SCHEMES["kerple"](shape(num_heads=64)) for _ in range(20)]
    for name, high in (("a", 1), ("p", 2)):
        drawn = torch.cat([getattr(scheme, name).detach() for scheme in schemes])
        assert 0 <= drawn.min() < 0.02 * high and 0.98 * high < drawn.max() <= high
        assert abs(drawn.mean() - high / 2) < 0.05 * high


def test_kerple_power_is_cut_and_learns_on():
    """A weight out of bounds counts as the bound, is left alone, and has the gradient there."""
    scheme: Any = SCHEMES["kerple"](SHAPE, kind="power")
    scheme.a.data, scheme.p.data = torch.tensor([-3.0, 0.5, 0.5, 0.5]), torch.tensor([1.0, 5.0, -1.0, 2.0])
    bias = scheme.score_bias(torch.tensor([0, 1, 7]), torch.arange(4)[:, None])
    expected = [[0, -a, -a * 7**p] for a, p in ((0.01, 1), (0.5, 2), (0.5, 0.01), (0.5, 2))]
    torch.testing.assert_close(bias.detach(), torch.tensor(expected))
    bias.sum().backward()
    torch.testing.assert_close(scheme.a.grad, torch.tensor([-1 - 7.0, -1 - 49.0, -1 - 7**0.01, -1 - 49.0]))
    slopes = [-a * math.log(7) * 7**p for a, p in ((0.01, 1), (0.5, 2), (0.5, 0.01), (0.5, 2))]
    torch.testing.assert_close(scheme.p.grad, torch.tensor(slopes))
    assert scheme.a[0] == -3 and scheme.p[1] == 5


def test_sandwich_is_the_papers_construction():
    expected = torch.tensor(golden("sandwich/heads4_dbar128")["bias"])
    scheme = SCHEMES["sandwich"](SHAPE)
    for found in (dense(scheme, 8), pointwise(scheme, 8)):
        torch.testing.assert_close(found, expected.reshape(4, 8, 8), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sandwich_keeps_its_digits_far_out(dtype):
    """Its pointwise form and its extra dimensions, against sums of cosines in float64."""
    scheme: Any = SCHEMES["sandwich"](SHAPE, dim=96)
    at_key = torch.cat((torch.arange(0, 33_000, 997), torch.arange(32_900, 33_000)))[None]
    at_query = at_key[:, ::7]
    distance = at_query[0, :, None] - at_key[0]
    expected = torch.zeros(distance.shape, dtype=torch.float64)
    for k in range(48):
        expected += torch.cos(distance.double() / 10000 ** (2 * k / 96))
    expected = expected / torch.tensor([2.0, 4.0, 6.0, 8.0])[:, None, None]
    of_query, of_key = scheme.bias_as_head_dims(Positions(at_query, at_key), 0.25, dtype)
    assert of_query.dtype == of_key.dtype == dtype
    widened = (of_query.double() @ of_key.double().transpose(2, 3))[0] * 0.25
    assert float((widened - expected).abs().max()) < (1e-5 if dtype == torch.float32 else 1e-9)
    if dtype == torch.float32:
        assert float((scheme.score_bias(distance, torch.arange(4)[:, None, None]) - expected).abs().max()) < 2e-4
    assert scheme.bias_as_head_dims(along(4), 0.25, torch.bfloat16) is None


def test_fire_is_the_authors():
    """The paper's appendix as two other repositories have it; they differ above the diagonal only."""
    case = golden("fire/short_L8_n6")
    three = shape(num_heads=3, num_key_value_heads=3)
    scheme: Any = SCHEMES["fire"](three, width=4, threshold=8).double()
    assert scheme.c.item() == pytest.approx(case["params"]["c"]) and scheme.multiplier.item() == 1
    for name, key in (
        ("weight_in", "mlp0_weight"),
        ("bias_in", "mlp0_bias"),
        ("weight_out", "mlp2_weight"),
        ("bias_out", "mlp2_bias"),
    ):
        parameter = getattr(scheme, name)
        parameter.data = torch.tensor(case[key], dtype=torch.float64).reshape(parameter.shape)
    at = torch.arange(6)
    for found in (dense(scheme, 6), scheme.bias_block(at, at).detach()):
        expected = torch.tensor(case["bias_mcleish"], dtype=torch.float64).reshape(3, 6, 6)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        expected = torch.tensor(case["bias_dape"], dtype=torch.float64).reshape(3, 6, 6)
        torch.testing.assert_close(found.tril(), expected.tril(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("queries", [(0, 300), (270, 300), (299, 300)])
def test_a_bias_block_of_fire_is_its_formula(queries):
    """Forward and every gradient, over more than one block of pairs, with units that bend in some of them."""
    scheme = filled("fire")
    at, seen = torch.arange(*queries), torch.arange(0, LENGTH)
    probe = torch.randn(4, len(at), LENGTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probe = probe.tril(queries[0])
    w = {key: one.detach().clone().requires_grad_() for key, one in scheme.named_parameters()}
    expected = oracle.fire(w, LENGTH, 70)[:, at]
    (expected * probe).sum().backward()
    found = scheme.bias_block(at, seen)
    (found * probe).sum().backward()
    behind = at[:, None] >= seen
    torch.testing.assert_close(found.detach()[:, behind], expected.detach()[:, behind], rtol=0, atol=1e-9)
    for key, parameter in scheme.named_parameters():
        if key != "multiplier" or queries[0] == 0:  # it has a say up to the threshold
            assert w[key].grad.abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, w[key].grad, rtol=1e-8, atol=1e-9)


def test_fire_of_a_bfloat16_model_keeps_its_distances():
    """Positions above 256 are no bfloat16 numbers; the sum goes on in float32."""
    scheme = filled("fire").to(torch.bfloat16)
    exact = {key: one.detach().double() for key, one in scheme.named_parameters()}
    expected = oracle.fire(exact, LENGTH, 70)
    for found in (dense(scheme, LENGTH), scheme.bias_block(torch.arange(LENGTH), torch.arange(LENGTH)).detach()):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["kerple log", "t5"])
def test_a_bfloat16_table_by_distance_is_float32(name):
    scheme = filled(name).to(torch.bfloat16)
    w = {key: one.detach().double() for key, one in scheme.named_parameters()}
    expected = oracle.kerple_log(w, LENGTH) if name == "kerple log" else oracle.t5(w, LENGTH, 32, 128)
    table = scheme.score_bias(torch.arange(LENGTH), torch.arange(4)[:, None])
    assert table.dtype == torch.float32 and table.requires_grad
    torch.testing.assert_close(table.double(), expected[:, -1].flip(-1), rtol=0, atol=1e-5)


class OneSlope(DistanceBias):
    """A learned slope for all heads, so that `score_bias` ignores the head."""

    name = "one_slope"
    head_sharded_attributes = MappingProxyType({})

    def setup(self) -> None:
        super().setup()
        self.slope = torch.nn.Parameter(torch.tensor(0.05))

    def score_bias(self, distance: Tensor, head: Tensor) -> Tensor:
        return -self.slope * distance

    def min_slope(self, device: torch.device) -> Tensor | None:
        return self.slope.detach()


class OneBiasPerHead(OneSlope):
    """A bias that ignores the distance."""

    name = "one_bias_per_head"

    def score_bias(self, distance: Tensor, head: Tensor) -> Tensor:
        return self.slope * head

    def min_slope(self, device: torch.device) -> Tensor | None:
        return None


class OneBias(OneBiasPerHead):
    """A bias that ignores both."""

    name = "one_bias"

    def score_bias(self, distance: Tensor, head: Tensor) -> Tensor:
        return self.slope


@pytest.mark.parametrize("kind", [OneSlope, OneBiasPerHead, OneBias])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("long", [1, LENGTH])
def test_a_bias_may_ignore_the_head_or_the_distance(kind, learns, long, monkeypatch):
    """In the CPU kernels, with bands from one token on and without, against eager."""
    monkeypatch.setattr(engine, "LONG", long)
    results = []
    for backend in ("eager", "sdpa"):
        scheme = kind(SHAPE).double()
        scheme.slope.requires_grad_(learns)
        tensors = [tensor.requires_grad_() for tensor in inputs()]
        output = scheme.attend(*tensors, along(LENGTH), core(backend))[0]
        output.square().sum().backward()
        grads = [tensor.grad for tensor in (*tensors, scheme.slope) if tensor.requires_grad]
        results.append([output.detach(), *grads])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def by_the_paper(model: Any, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Attention in float64 with the penalty slope x |i - j|, `[1, length, heads, head]`."""
    heads, length = queries.shape[1], queries.shape[2]
    at = torch.arange(length)
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)], dtype=torch.float64)
    keys, values = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
    scores = queries.double() @ keys.mT / math.sqrt(queries.shape[-1])
    scores = scores - slopes[:, None, None] * (at[:, None] - at).abs()
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("ahead", ["config", "keyword", "mask", "never"])
def test_alibi_is_the_absolute_distance_where_queries_see_keys_ahead(ahead: str, backend: str) -> None:
    overrides = {"is_causal": False} if ahead == "config" else {}
    model = put(build("llama", num_hidden_layers=1, **overrides), "alibi")
    model.set_attn_implementation(backend)
    length, found = 24, {}
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(lambda m, i, output, name=name: found.update({name: output}))
    attention.o_proj.register_forward_hook(lambda m, args, output: found.update(mixed=args[0]))
    seen, options = torch.ones(1, 1, length, length, dtype=torch.bool), {}
    if ahead in ("mask", "never"):
        seen = seen.tril()
    if ahead == "mask":  # the first third sees itself both ways, as a prefix or an image does
        seen[..., :8, :8] = True
        options["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    if ahead == "keyword":
        options["is_causal"] = False
    with torch.no_grad():
        model(input_ids=tokens(1, length), use_cache=False, **options)
    query, key, value = (found[name].view(1, length, -1, 16).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    expected = by_the_paper(model, query, key, value, seen)
    torch.testing.assert_close(found["mixed"].view(1, length, 4, 16).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "name"),
    [*((family, "alibi") for family in FAMILIES), ("llama", "rope_alibi"), ("gpt_neox", "rope_alibi")],
)
def test_positions_that_go_back_are_as_far_away_as_those_that_go_on(family, name, backend):
    """With queries of zero the scores are the bias alone, so the weights are those of the distances."""
    model, ids = build(family), tokens(1, 12)
    patch_model(model, name, on_existing="replace")
    model.set_attn_implementation(backend)
    at = torch.tensor([[0, 1, 2, 3, 9, 10, 11, 4, 5, 6, 3, 2]])
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(ids, position_ids=at, attention_mask=torch.ones_like(ids), use_cache=False).logits
        for n in range(12):
            steps.append(model(ids[:, n : n + 1], position_ids=at[:, n : n + 1], past_key_values=cache).logits)
    assert error(torch.cat(steps, 1), whole) < 1e-5
    if (family, backend) == ("llama", "eager"):
        model.model.layers[0].self_attn.q_proj.weight.data.zero_()
        with torch.no_grad():
            weights = model(
                ids, position_ids=at, attention_mask=torch.ones_like(ids), output_attentions=True
            ).attentions[0]
        slopes = torch.tensor(alibi_slopes(weights.shape[1]), dtype=torch.float64)[:, None, None]
        bias = -slopes * (at[0, :, None] - at[0]).abs()
        expected = bias.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
        torch.testing.assert_close(weights[0].double(), expected, rtol=1e-5, atol=1e-6)
