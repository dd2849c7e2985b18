"""Check the space of factors: the bounds and critical dimensions of the papers, and that candidates stay inside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pe_patch.errors import OptionError, UnknownNameError
from pe_patch.search.space import Candidate, Space, known_factors, make_space, pair_of

from ..goldens import load
from .cases import shape

PHI3_MINI = shape(96, 10000.0, 2048)
LLAMA3_8B = shape(128, 500000.0, 8192)
DEMO = shape(32, 10000.0, 256)


@pytest.mark.parametrize(("attention", "critical"), [(PHI3_MINI, 31), (LLAMA3_8B, 35)])
def test_the_theoretical_critical_dimension_is_the_papers(attention, critical):
    assert pair_of(attention, 1) == critical  # Shang et al. 2025, section 2.2 and figure 4


@pytest.mark.parametrize(("attention", "real", "factor"), [(PHI3_MINI, 25, 64), (LLAMA3_8B, 30, 16)])
def test_the_critical_dimensions_that_the_authors_found_can_be_found(attention, real, factor):
    space, _ = make_space("longrope2", attention, factor)
    assert real in space.criticals and space.criticals[-1] == pair_of(attention, 1)
    assert (space.low, space.high) == (factor, 2 * factor)


def test_the_factors_that_the_authors_published_lie_in_the_space():
    published = load("longrope/llama3_8b_longrope2_su")["longrope/llama3_8b_longrope2_su"]["long_factor"]
    space, _ = make_space("longrope2", LLAMA3_8B, 16)
    found = space.given(published)
    assert found.critical == 33
    np.testing.assert_allclose(found.factors, published, rtol=1e-6)


def test_known_schemes_are_those_of_transformers_and_the_formula():
    factor, plain = 8.0, 10000.0 ** (-np.arange(16) / 16)
    found = known_factors(DEMO, factor)
    for paper, name, extra in (("PI", "linear", {}), ("YaRN", "yarn", {"original_max_position_embeddings": 256})):
        config = LlamaConfig(
            hidden_size=128, num_attention_heads=4, max_position_embeddings=2048,
            rope_parameters={"rope_type": name, "rope_theta": 10000.0, "factor": factor, **extra},
        )  # fmt: skip
        inverse, _ = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"))
        np.testing.assert_allclose(found[paper], plain / inverse.double().numpy(), rtol=2e-6)
    np.testing.assert_allclose(found["NTK"], [factor ** (2 * k / 30) for k in range(16)], rtol=2e-6)


@pytest.mark.parametrize("method", ["longrope", "longrope2"])
@pytest.mark.parametrize("attention", [DEMO, LLAMA3_8B], ids=["demo", "llama"])
def test_children_stay_in_the_space(method, attention):
    factor = 8.0
    space, starts = make_space(method, attention, factor)
    rng, alive = np.random.default_rng(0), list(starts)
    low, high = (1.0, 10.0) if method == "longrope" else (8.0, 16.0)
    for _ in range(400):
        first, second = (alive[int(i)] for i in rng.integers(len(alive), size=2))
        children = [space.mutated(first, rng), space.crossed(first, second, rng)]
        assert not space.fault(children[0])
        alive += [child for child in children if not space.fault(child)]
    for candidate in alive:
        factors, critical = np.array(candidate.factors), candidate.critical
        assert len(factors) == attention.rotary_dim // 2 and np.all(np.diff(factors) >= 0)
        assert low <= factors[critical] and factors[-1] <= high
        ntk = factors[critical] ** (np.arange(critical) / max(1, critical))
        np.testing.assert_allclose(factors[:critical], ntk, rtol=1e-12)
    searched = {value for candidate in alive[len(starts) :] for value in candidate.genes}
    given = {value for candidate in starts for value in candidate.genes}
    assert all(math.isclose(100 * value, round(100 * value), abs_tol=1e-9) for value in searched - given)
    assert len({candidate.critical for candidate in alive}) == len(space.criticals)
    assert len({candidate.factors for candidate in alive}) > 200


SMALL = Space(4, 1.0, 10.0)


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ((1, 3, 2, 4), "factor 1 is 3 and the next one 2"),
        ((0.5, 1, 1, 1), "allowed are 1 to 10"),
        ((1, 2, 3, 10.5), "allowed are 1 to 10"),
        ((1, 2, math.nan, 3), "must not decrease"),
        ((1, 2, 3), "3 factors; this attention rotates 4"),
    ],
)
def test_factors_outside_the_space_are_refused(genes, message):
    with pytest.raises(OptionError, match=message):
        SMALL.given(genes)
    assert SMALL.fault(Candidate(0, tuple(genes), "given"))


def test_factors_that_longrope2_cannot_reach_are_refused():
    space, _ = make_space("longrope2", DEMO, 8.0)
    with pytest.raises(OptionError, match=r"lambda_c\^\(k / c\)"):
        space.given([1.0, 1.0, *[8.0] * 14])


def test_unknown_methods_and_single_pairs_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'longrope2'"):
        make_space("longrop2", DEMO, 8.0)
    with pytest.raises(OptionError, match="at least two rotated pairs"):
        make_space("longrope", shape(2, 10000.0, 256), 8.0)
