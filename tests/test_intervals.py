"""Intervals cover what they say: by simulation, by scipy's own functions, and by the numbers of the authors' code."""

import numpy as np
import pytest
from scipy import stats

from pe_patch.evaluation.metrics import (
    TokenLoss,
    _capital,
    _half_width,
    binomial_interval,
    bounded_interval,
    score_interval,
    student_quantile,
)

# Losses


@pytest.mark.parametrize("windows", [2, 4, 8])
def test_the_interval_of_a_loss_covers_95_percent(windows):
    """With the normal quantile, 2 windows covered 70 % and 8 covered 91 %."""
    rng, hits, draws = np.random.default_rng(0), 0, 4000
    for means in rng.normal(3.0, 0.4, (draws, windows)):
        losses = np.repeat(means, 3).tolist()
        half = _half_width(losses, np.repeat(np.arange(windows), 3).tolist(), float(np.mean(losses)))
        hits += abs(np.mean(losses) - 3.0) <= half
    assert hits / draws == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / draws) ** 0.5)


def test_the_interval_of_a_loss_equals_scipys():
    means = [1.5, 4.5, 3.25, 2.0]
    losses, groups = np.repeat(means, 5).tolist(), np.repeat(range(4), 5).tolist()
    found = TokenLoss(keep_in_memory=True).compute(losses=losses, groups=groups)
    low, high = stats.t.interval(0.95, 3, np.mean(means), stats.sem(means))
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


def test_students_quantiles_are_those_of_the_tables():
    printed = {1: 12.706, 2: 4.303, 7: 2.365, 30: 2.042}  # t for 95 %, two-sided, as textbooks print it
    assert {degrees: round(student_quantile(degrees), 3) for degrees in printed} == printed


# Right or wrong


def test_the_binomial_interval_equals_scipys():
    for successes, trials in ((0, 1), (3, 7), (8, 10), (500, 1000), (999, 1000)):
        expected = stats.binomtest(successes, trials).proportion_ci(method="exact")
        assert binomial_interval(successes, trials) == (pytest.approx(expected.low), pytest.approx(expected.high))


# Scores in between

MEANS = np.array([0.05, 0.2, 0.5, 0.8, 0.99])
AUTHORS = [
    # `betting_mart` of github.com/gostevehoward/confseq at 70b1ef3, with lambda_predmix_eb(alpha=0.025, fixed_n=n) for
    # both sides, theta=0.5, convex_comb=True, trunc_scale=0.75: the capital against each of the means above
    ([0.5] * 8, [1460.633565580039, 123.8617628139424, 1.0, 123.86176281394253, 2248.831309365318]),
    (
        [0, 0.25, 1, 0.5, 0.75, 1, 1, 0.9],
        [672.6126623364207, 149.3180065683602, 0.92584228515625, 0.418164610389376, 16.69995581456004],
    ),
    (
        [0.1, 0.2, 0, 0, 0.05, 0.3],
        [1.4919720537153425, 0.8142542819197139, 7.7371328125, 588.9981688055941, 2116.8473590551357],
    ),
]


@pytest.mark.parametrize(("scores", "capital"), AUTHORS)
def test_the_capital_equals_that_of_the_authors_code(scores, capital):
    assert _capital(np.array(scores, dtype=float), MEANS, 0.05) == pytest.approx(capital, rel=1e-12)


def test_equal_scores_have_a_width():
    low, high = score_interval([0.5] * 20)
    assert low < 0.45 and high > 0.55 and low + high == pytest.approx(1.0)
    widths = [high - low for low, high in (score_interval([0.3] * count) for count in (1, 4, 20, 80))]
    assert widths == sorted(widths, reverse=True) and widths[0] == 1.0 and widths[-1] > 0.03


def test_the_interval_does_not_depend_much_on_the_order_and_mirrors():
    scores = [0.1, 0.9, 0.4, 1.0, 0.0, 0.25, 0.75, 0.6, 0.3, 0.8]
    first, second = score_interval(scores), score_interval(sorted(scores))
    assert first == (pytest.approx(second[0], abs=0.03), pytest.approx(second[1], abs=0.03))
    mirrored = score_interval([1 - score for score in scores])
    assert first == (pytest.approx(1 - mirrored[1], abs=2e-3), pytest.approx(1 - mirrored[0], abs=2e-3))


DRAWS = {
    "round": (lambda rng, count: rng.beta(2, 2, count), 0.5),
    "mostly 0": (lambda rng, count: rng.beta(0.5, 2, count), 0.2),
    "mostly 1": (lambda rng, count: np.where(rng.random(count) < 0.95, 1.0, 0.5), 0.975),
}


@pytest.mark.parametrize("count", [3, 10, 30])
@pytest.mark.parametrize("kind", DRAWS)
def test_the_interval_of_scores_covers_at_least_95_percent(kind, count):
    draw, mean = DRAWS[kind]
    rng, hits = np.random.default_rng(2), 0
    for _ in range(60):
        low, high = bounded_interval(draw(rng, count))
        hits += low <= mean <= high
    assert hits >= 55  # 95 % of 60 is 57


def test_groups_count_as_one_and_weigh_by_their_questions():
    texts = [0.25, 0.5, 0.75, 1.0, 0.0, 0.5]
    repeated = [score for score in texts for _ in range(4)]
    groups = [number for number in range(6) for _ in range(4)]
    assert score_interval(repeated, groups) == bounded_interval(texts)
    low, high = score_interval([1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1])
    assert low <= 0.75 <= high <= 1.0


@pytest.mark.parametrize("scores", [[], [1.5], [0.5, float("nan")], [-0.1]])
def test_scores_that_are_none_are_errors(scores):
    with pytest.raises(ValueError, match="from 0 to 1"):
        score_interval(scores)
