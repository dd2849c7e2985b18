"""Test that ALiBi's kernel skips only keys whose weight float32 cannot represent."""

from __future__ import annotations

import math

import pytest
import torch

from pe_patch.attention.kernels.band import LONG, attention_by_distance, reaches
from pe_patch.schemes.bias import alibi_slopes


def oracle(query, key, value, slopes, scaling):
    """Return dense causal attention with ALiBi, `[batch, query, heads, head]`, in float64."""
    group = query.shape[1] // key.shape[1]
    query, key, value = (
        query.double(),
        key.double().repeat_interleave(group, 1),
        value.double().repeat_interleave(group, 1),
    )
    place = torch.arange(query.shape[2])
    distance = (place[:, None] - place[None, :]).double()
    outputs = []
    for head, slope in enumerate(slopes):
        scores = query[:, head] @ key[:, head].mT * scaling - slope * distance
        outputs.append(scores.masked_fill(distance < 0, -math.inf).softmax(-1) @ value[:, head])
    return torch.stack(outputs, 2)


@pytest.fixture
def random_states():
    torch.manual_seed(0)
    query, value = torch.randn(1, 4, LONG + 100, 16), torch.randn(1, 2, LONG + 100, 16)
    return query, torch.randn(1, 2, LONG + 100, 16), value


SCALING = 0.25


def bias_by_distance(count, slopes):
    """Return the bias for each distance, `[heads, count]`."""
    return -torch.tensor(slopes, dtype=torch.float64)[:, None] * torch.arange(count)


@pytest.mark.parametrize("slopes", [alibi_slopes(4), [4.0, 1.0, 0.5, 0.001]])
def test_skipped_keys_change_nothing_in_float32(random_states, slopes):
    query, key, value = random_states
    reach = reaches(query, key, SCALING, torch.tensor(slopes))
    assert reach[0] < LONG // 2, "no head skips a key, so this tests nothing"
    table = bias_by_distance(query.shape[2], slopes)
    ours = attention_by_distance(query.double(), key.double(), value.double(), table, SCALING, reach)
    torch.testing.assert_close(ours, oracle(query, key, value, slopes, SCALING), rtol=0, atol=2**-24)


def test_gradients_with_skipped_keys_equal_those_of_dense_attention(random_states):
    slopes = alibi_slopes(4)
    query, key, value = (state.double().requires_grad_() for state in random_states)
    weight = torch.randn(LONG + 100, 16, dtype=torch.float64)
    expected = torch.autograd.grad(
        (oracle(query, key, value, slopes, SCALING)[0, :, 0] * weight).sum(), (query, key, value)
    )
    reach = reaches(query, key, SCALING, torch.tensor(slopes))
    banded = attention_by_distance(query, key, value, bias_by_distance(query.shape[2], slopes), SCALING, reach)
    actual = torch.autograd.grad((banded[0, :, 0] * weight).sum(), (query, key, value))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_larger_scores_keep_keys_farther_away(random_states):
    query, key, _ = random_states
    slopes = torch.tensor(alibi_slopes(4))
    near, far = reaches(query, key, SCALING, slopes), reaches(8 * query, key, SCALING, slopes)
    assert all(b > a for a, b in zip(near, far, strict=True))
    assert min(reaches(1e6 * query, key, SCALING, slopes)) > LONG
