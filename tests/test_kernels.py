"""Compare every fast kernel with dense attention in float64: values, gradients and memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pe_patch import SCHEMES, AttentionShape, Positions
from pe_patch.attention.interface import BACKENDS, Engine
from pe_patch.attention.kernels import cpu
from pe_patch.attention.kernels.clipped import Clipped
from pe_patch.attention.kernels.dense import Dense
from pe_patch.attention.kernels.ranges import attention as attention_over_ranges
from pe_patch.attention.kernels.relative import Relative, distances
from pe_patch.attention.kernels.toeplitz import Toeplitz
from pe_patch.core.ranges import Range
from pe_patch.schemes.rotary import RotaryTransform, cos_sin

from .models import build, error, logits, tokens, wearing

HEADS, SHARED, WIDTH, SCALING = 4, 2, 16, 0.3
BOUND = 5

LENGTHS = {
    # Queries and keys: more than one chunk; a filled cache; more keys than any kernel takes at a time.
    "two chunks": (300, 300),
    "continued": (270, 700),
    "long": (2304, 2304),
}


def distance(count: int, total: int) -> Tensor:
    return torch.arange(total - count, total)[:, None] - torch.arange(total)


def dense_attention(query, key, value, scores_too=0.0, allowed=None, values_too=None) -> Tensor:
    """Return softmax attention over all pairs, `[batch, heads, query, head]`; queries are the last of the keys."""
    apart = distance(query.shape[2], key.shape[2])
    key, value = (one.repeat_interleave(HEADS // SHARED, 1) for one in (key, value))
    scores = query @ key.mT * SCALING + scores_too
    scores = scores.masked_fill(~(apart >= 0 if allowed is None else allowed), -math.inf)
    weights = scores.softmax(-1)
    output = weights @ value
    return output if values_too is None else output + torch.einsum("bhij,ijd->bhid", weights, values_too)


def random_states(count: int, total: int, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(count)
    shapes = ((HEADS, count), (SHARED, total), (SHARED, total))
    return [torch.randn(batch, heads, length, WIDTH) for heads, length in shapes]


def toeplitz(count, total):
    def fast(query, key, value, table):
        return Toeplitz.apply(query, key, value, table, SCALING, total)

    def slow(query, key, value, table):
        return dense_attention(query, key, value, table[:, distance(count, total).clamp(min=0)])

    return fast, slow, [torch.randn(HEADS, total)]


def toeplitz_without_gradient(count, total):
    fast, slow, (table,) = toeplitz(count, total)
    return lambda *sides: fast(*sides, table), lambda *sides: slow(*sides, table.double()), []


def relative(count, total):
    def fast(query, key, value, u, v, vectors):
        return Relative.apply(query, key, value, u, v, vectors[:, distances(total)], SCALING)

    def slow(query, key, value, u, v, vectors):
        by_pair = vectors[:, distance(count, total).clamp(min=0)]
        shared = key.repeat_interleave(HEADS // SHARED, 1)
        more = torch.einsum("bhid,hijd->bhij", query + v[:, None], by_pair) + u[:, None] @ shared.mT
        return dense_attention(query, key, value, more * SCALING)

    return fast, slow, [torch.randn(HEADS, WIDTH), torch.randn(HEADS, WIDTH), torch.randn(HEADS, total, WIDTH)]


def clipped(count, total):
    def fast(query, key, value, on_keys, on_values):
        return Clipped.apply(query, key, value, on_keys, on_values, SCALING)

    def slow(query, key, value, on_keys, on_values):
        steps = distance(count, total).clamp(0, BOUND)
        terms = (query @ on_keys.T).gather(-1, steps.expand(*query.shape[:2], -1, -1))
        return dense_attention(query, key, value, terms * SCALING, values_too=on_values[steps])

    return fast, slow, [torch.randn(BOUND + 1, WIDTH), torch.randn(BOUND + 1, WIDTH)]


def dense(count, total):
    at = torch.arange(total - count, total), torch.arange(total)

    def waves(of_query, of_distance, at_query, at_key):
        apart = (at_query[:, None] - at_key) / total
        return torch.sin(3 * at_query[:, None] / total * of_query) * torch.cos(3 * apart * of_distance)

    def fast(query, key, value, *waving):
        return Dense.apply(query, key, value, at, lambda q, k: waves(*waving, q, k), SCALING, *waving)

    def slow(query, key, value, *waving):
        return dense_attention(query, key, value, waves(*waving, *at))

    return fast, slow, [torch.randn(HEADS, 1, 1), torch.randn(HEADS, 1, 1)]


KERNELS = {
    "toeplitz": toeplitz,
    "toeplitz_without_gradient": toeplitz_without_gradient,
    "relative": relative,
    "clipped": clipped,
    "dense": dense,
}
SMALL = {"relative": ("two chunks", "continued"), "clipped": ("two chunks", "continued", "long")}
CASES = [(name, length) for name in KERNELS for length in SMALL.get(name, LENGTHS)]


def check_values_and_gradients(found: Tensor, expected: Tensor, ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Check that the values and the gradients of all inputs are equal."""
    assert float((found - expected).detach().abs().max()) < 1e-5
    weight = torch.randn(expected.shape)
    gradients = torch.autograd.grad((found * weight).sum(), ours)
    truth = torch.autograd.grad((expected * weight.double()).sum(), theirs)
    for one, other in zip(gradients, truth, strict=True):
        assert float((one - other).abs().max() / other.abs().max()) < 5e-5


@pytest.mark.parametrize(("name", "length"), CASES)
def test_kernels_give_the_values_and_gradients_of_dense_attention(name, length):
    count, total = LENGTHS[length]
    batch = 2 if total < 2000 else 1
    sides = random_states(count, total, batch)
    fast, slow, parameters = KERNELS[name](count, total)
    ours = [one.clone().requires_grad_() for one in (*sides, *parameters)]
    theirs = [one.double().requires_grad_() for one in (*sides, *parameters)]
    found, expected = fast(*ours), slow(*theirs)
    check_values_and_gradients(found, expected, ours, theirs)


WINDOW = 40


def rotation_at(positions: Tensor) -> RotaryTransform:
    inv_freq = 100.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    return RotaryTransform(*cos_sin(positions[..., None] * inv_freq, 1.1, torch.float32, False))


def mask_and_positions(kind: str, count: int) -> tuple[Tensor | None, Tensor]:
    """Return a mask `[batch, 1, query, key]` and the positions, `[batch | 1, query]`."""
    at = torch.arange(count)
    causal = at[:, None] >= at
    if kind == "none":
        return None, at[None]
    if kind == "padded":
        pads = torch.tensor([0, 30])[:, None]
        return (causal & (at >= pads)[:, None])[:, None], (at - pads).clamp(min=0)
    document = at // 130
    return (causal & (document[:, None] == document))[None, None].expand(2, -1, -1, -1), (at % 130)[None]


@pytest.mark.parametrize("kind", ["none", "padded", "packed"])
def test_attention_over_ranges_equals_dense_attention(kind):
    """One softmax covers near, far and farthest pairs, by chunks of positions; some of the farthest are left out."""
    count = 2304 if kind == "none" else 300
    query, key, value = random_states(count, count, 2 if kind != "none" else 1)
    mask, at = mask_and_positions(kind, count)
    turns = [rotation_at(at.float()), rotation_at(at / 3), rotation_at(at // 4 + 7)]
    chunk = at // WINDOW
    ranges = [
        Range(high=2, step_query=chunk, step_key=chunk, rotate_query=turns[0], rotate_key=turns[0]),
        Range(low=2, high=4, step_query=chunk, step_key=chunk, rotate_query=turns[1], rotate_key=turns[2]),
        Range(low=4, step_query=chunk, step_key=chunk, below=9, rotate_query=turns[2]),
    ]

    def slow(query, key, value):
        shared = key.repeat_interleave(HEADS // SHARED, 1)
        steps = chunk[:, :, None] - chunk[:, None]
        near, far, sinks = steps < 2, (steps >= 2) & (steps < 4), (steps >= 4) & (at[:, None] < 9)
        scores = [
            turns[a](query) @ (shared if b is None else turns[b](shared)).mT * SCALING
            for a, b in ((0, 0), (1, 2), (2, None))
        ]
        total = torch.where(near[:, None], scores[0], torch.where(far[:, None], scores[1], scores[2]))
        allowed = (near | far | sinks)[:, None] & (distance(count, count) >= 0 if mask is None else mask)
        total = total.masked_fill(~allowed, -math.inf)
        seeing = allowed.any(-1, keepdim=True)
        return total.masked_fill(~seeing, 0).softmax(-1) @ value.repeat_interleave(HEADS // SHARED, 1) * seeing

    ours = [one.clone().requires_grad_() for one in (query, key, value)]
    theirs = [one.double().requires_grad_() for one in (query, key, value)]
    found = attention_over_ranges(*ours, Positions(at, at), ranges, mask, SCALING).transpose(1, 2)
    expected = slow(*theirs)
    check_values_and_gradients(found, expected, ours, theirs)


SHAPE = AttentionShape(HEADS * WIDTH, HEADS, SHARED, WIDTH, WIDTH, 0, 10000.0, 512, 1)


def make_engine(backend: str = "sdpa", mask: Tensor | None = None) -> Engine:
    module = nn.Module()
    module.__dict__.update(is_causal=True, num_key_value_groups=HEADS // SHARED, pe_layer=0)
    return Engine(module, mask, SCALING, 0.0, BACKENDS[backend], {})


FAST = ("alibi", "t5", "kerple", "sandwich", "fire", "shaw", "transformer_xl", "rerope", "self_extend", "dca", "string",
        "lm_infinite")  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_no_fast_path_allocates_the_scores_of_all_pairs(name):
    """The peak of allocated memory, forward and backward, is a third of one `[heads, query, key]` tensor at most."""
    length = 2048
    scheme, at = SCHEMES[name](SHAPE), torch.arange(length)[None]
    sides = [one.requires_grad_() for one in random_states(length, length)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        positions = Positions(at, at)
        positions = positions._replace(prepared=scheme.prepare(positions))
        output = scheme("attend", *sides, positions, make_engine())[0]
        output.sum().backward()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    assert 0 < int(held.max()) < HEADS * length**2 * 4 / 3


@pytest.mark.parametrize("count", [64, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_alibi_stays_accurate_in_bfloat16_at_a_hundred_thousand_positions(count, padded):
    total = 100_000
    query, key, value = (one.bfloat16() for one in random_states(count, total))
    at = torch.arange(total)[None]
    mask = (distance(count, total) >= 0)[None, None]
    if padded:
        mask = mask & (torch.arange(total) >= 10)
    positions = Positions(at[:, total - count :], at)
    found = SCHEMES["alibi"](SHAPE)("attend", query, key, value, positions, make_engine(mask=mask))[0].transpose(1, 2)
    assert found.dtype == torch.bfloat16
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / HEADS) for head in range(HEADS)], dtype=torch.float64)
    bias = -slopes[:, None, None] * distance(count, total)
    expected = dense_attention(query.double(), key.double(), value.double(), bias, mask)
    assert float((found - expected).abs().max()) < 1e-2


def test_empty_slots_of_a_static_cache_are_not_attended():
    """The first pass into a static cache has keys that no token has filled."""
    query, key, value = random_states(40, 64)
    at = torch.arange(40)[None]
    slots = torch.cat((at, torch.zeros(1, 24, dtype=torch.long)), 1)
    for name in ("t5", "self_extend", "shaw"):
        scheme = SCHEMES[name](SHAPE)
        results = []
        for keys, values, places in ((key, value, slots), (key[:, :, :40], value[:, :, :40], at)):
            positions = Positions(at, places)
            positions = positions._replace(prepared=scheme.prepare(positions))
            results.append(scheme("attend", query, keys, values, positions, make_engine())[0])
        assert torch.equal(*results)


def test_kernels_refuse_attentions_that_they_would_change():
    query, _, value = random_states(8, 8)
    assert cpu.is_supported(make_engine(), query, value)
    training = make_engine()
    training.dropout = 0.1
    assert not cpu.is_supported(training, query, value) and training.module.training
    for extra in ({"softcap": 30.0}, {"s_aux": torch.zeros(HEADS)}):
        changed = make_engine()
        changed.extra = extra
        assert not cpu.is_supported(changed, query, value)
    assert not cpu.is_supported(make_engine("eager"), query, value)
    assert not cpu.is_supported(make_engine(), query, torch.cat((value, value), -1))


@pytest.mark.parametrize("name", ["self_extend", "dca", "lm_infinite"])
def test_flex_attention_over_ranges_equals_eager(name):
    """The model runs uncompiled, with padding, so that its mask must be kept."""
    model, ids = build("llama"), tokens(2, 48)
    ids[0, :9] = 0
    mask = (ids != 0).long()
    found = {}
    for backend in ("eager", "flex"):
        with wearing(model, name, backend=backend):
            found[backend] = logits(model, ids, attention_mask=mask)
    assert error(found["flex"][0, 9:], found["eager"][0, 9:]) < 1e-5
    assert error(found["flex"][1], found["eager"][1]) < 1e-5
