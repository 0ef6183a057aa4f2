"""Intervals and tests against enumeration, simulation and numbers worked by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.benchmarks.statistics import (
    Z_95,
    auroc,
    cluster_bootstrap,
    clustered_error,
    holm,
    mcnemar_exact,
    sign_flip_test,
    wilson,
)
from sightline.errors import InputError


def test_wilson_worked_by_hand() -> None:
    # k = 8, n = 10, z = 2: p = .8, scale = 1 + 4/10 = 1.4, centre = (.8 + 4/20) / 1.4 = 1 / 1.4,
    # half = 2 sqrt(.8 * .2 / 10 + 4 / 400) / 1.4 = 2 sqrt(.026) / 1.4
    low, high = wilson(8, 10, z=2)
    assert low == pytest.approx((1 - 2 * math.sqrt(0.026)) / 1.4)
    assert high == pytest.approx((1 + 2 * math.sqrt(0.026)) / 1.4)


@given(st.integers(1, 400), st.data())
def test_wilson_ends_solve_the_score_equation(n: int, data: st.DataObject) -> None:
    # The interval's ends are the p at which the observed share lies exactly z standard errors away.
    k = data.draw(st.integers(0, n))
    for end in wilson(k, n):
        assert (k / n - end) ** 2 == pytest.approx(Z_95**2 * end * (1 - end) / n, abs=1e-12)


def test_wilson_edges_and_refusals() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 1.0
    for k, n in ((-1, 3), (4, 3)):
        with pytest.raises(InputError):
            wilson(k, n)


@pytest.mark.parametrize("n", [20, 100])
def test_wilson_covers_about_95_per_cent(n: int) -> None:
    # Exact coverage, by the binomial weights of all outcomes; averaged over p, since it saws up and down with p.
    intervals = [wilson(k, n) for k in range(n + 1)]
    coverage = []
    for p in np.linspace(0.02, 0.98, 193):
        weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        coverage.append(sum(w for w, (low, high) in zip(weights, intervals, strict=True) if low <= p <= high))
    assert 0.945 < np.mean(coverage) < 0.965
    assert min(coverage) > 0.83


def test_clustered_error_worked_by_hand() -> None:
    # h = 1 1 0 0 1, mean .6; groups {1, 1}: .8, {0, 0}: -1.2, {1}: .4; sqrt(.64 + 1.44 + .16) / 5
    assert clustered_error([1, 1, 0, 0, 1], "aabbc") == pytest.approx(math.sqrt(2.24) / 5)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_clustered_error_is_the_plain_one_with_groups_of_one(values: list[float]) -> None:
    plain = float(np.std(values)) / math.sqrt(len(values))
    assert clustered_error(values, range(len(values))) == pytest.approx(plain, abs=1e-12)


def test_bootstrap_with_groups_of_one_is_the_plain_bootstrap() -> None:
    values = np.random.default_rng(3).normal(size=40)
    low, high = cluster_bootstrap(values, np.mean, range(40), draws=500, seed=7)
    rng = np.random.default_rng(7)
    plain = [values[rng.integers(40, size=40)].mean() for _ in range(500)]
    assert (low, high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])))


def test_bootstrap_draws_whole_groups_in_any_order_and_size() -> None:
    # Groups interleaved and of unequal size. Each draw must hold each group's items equally often.
    groups = ["a", "b", "a", "c", "b", "a", "d"]
    sums: list[float] = []

    def metric(rows: np.ndarray) -> float:
        counts = {i: int((rows == i).sum()) for i in range(7)}
        assert counts[0] == counts[2] == counts[5]
        assert counts[1] == counts[4]
        assert counts[0] + counts[1] + counts[3] + counts[6] == 4
        sums.append(float(len(rows)))
        return 0.0

    cluster_bootstrap(np.arange(7), metric, groups, draws=5000)
    assert {min(sums), max(sums)} == {4.0, 12.0}  # four times the group of one, four times the group of three


def test_bootstrap_equals_enumeration_of_all_draws() -> None:
    # Three groups have 27 draws, all equally likely; the metric is a ratio of sums.
    rows = np.array([[1, 2], [3, 4], [0, 3], [5, 5], [1, 6]], dtype=float)
    groups = [0, 0, 1, 2, 2]
    members = [rows[[0, 1]], rows[[2]], rows[[3, 4]]]

    def ratio(table: np.ndarray) -> float:
        return float(table[:, 0].sum() / table[:, 1].sum())

    every = [ratio(np.concatenate([members[g] for g in drawn])) for drawn in itertools.product(range(3), repeat=3)]
    low, high = cluster_bootstrap(rows, ratio, groups, draws=20_000, seed=1)
    assert float(low) == pytest.approx(float(np.quantile(every, 0.025, method="inverted_cdf")), abs=1e-9)
    assert float(high) == pytest.approx(float(np.quantile(every, 0.975, method="inverted_cdf")), abs=1e-9)


def test_bootstrap_covers_about_95_per_cent_where_items_of_a_group_agree() -> None:
    # 40 groups of 5 items that are all hit or all missed: the plain bootstrap believes in 200 independent items.
    rng = np.random.default_rng(11)
    groups = np.repeat(np.arange(40), 5)
    clustered = plain = 0
    for simulation in range(200):
        hits = np.repeat(rng.random(40) < 0.7, 5).astype(float)
        low, high = cluster_bootstrap(hits, np.mean, groups.tolist(), draws=200, seed=simulation)
        clustered += low <= 0.7 <= high
        low, high = cluster_bootstrap(hits, np.mean, range(200), draws=200, seed=simulation)
        plain += low <= 0.7 <= high
    assert 0.89 <= clustered / 200 <= 0.99
    assert plain / 200 < 0.75


def test_bootstrap_takes_lists_vectors_and_seeds() -> None:
    rows = [{"hit": i % 3 == 0} for i in range(30)]
    groups = [i // 2 for i in range(30)]

    def shares(sample: list[dict[str, bool]]) -> list[float]:
        hits = sum(row["hit"] for row in sample)
        return [hits / len(sample), 1 - hits / len(sample)]

    low, high = cluster_bootstrap(rows, shares, groups, draws=100, seed=5)
    assert low.shape == high.shape == (2,)
    assert low[0] == pytest.approx(1 - high[1])
    again = cluster_bootstrap(rows, shares, groups, draws=100, seed=5)
    other = cluster_bootstrap(rows, shares, groups, draws=100, seed=6)
    assert np.array_equal(again, (low, high))
    assert not np.array_equal(other, (low, high))


def test_bootstrap_leaves_out_draws_without_a_value_and_refuses_what_has_none() -> None:
    values = np.array([1.0, 0.0])
    # The draws that hold no 1 have no value; the others give 1.
    low, high = cluster_bootstrap(values, lambda v: 1.0 if v.any() else math.nan, [0, 1], draws=50)
    assert (low, high) == (1.0, 1.0)
    with pytest.raises(InputError, match="not a number"):
        cluster_bootstrap(values, lambda v: math.nan, [0, 1], draws=5)
    with pytest.raises(InputError, match="no items"):
        cluster_bootstrap(np.array([]), np.mean, [])
    with pytest.raises(InputError, match="2 items need 2"):
        cluster_bootstrap(values, np.mean, [0])


def test_mcnemar_equals_enumeration_of_all_outcomes() -> None:
    for b, c in itertools.product(range(7), repeat=2):
        n = b + c
        outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        tail = Fraction(sum(heads <= min(b, c) for heads in outcomes), 2**n)
        assert mcnemar_exact(b, c) == pytest.approx(float(min(Fraction(1), 2 * tail)))


def test_mcnemar_by_hand_and_for_very_many_items() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 6) == pytest.approx(2 / 64)
    assert mcnemar_exact(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_exact(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    # 2 to the 2000 is far beyond the range of floats.
    tail = Fraction(2 * sum(math.comb(2000, k) for k in range(901)), 2**2000)
    assert mcnemar_exact(900, 1100) == pytest.approx(float(tail), rel=1e-12)
    with pytest.raises(InputError):
        mcnemar_exact(-1, 2)


def test_sign_flip_equals_enumeration_of_all_flips() -> None:
    for differences in ([1, 1, 1, 1, 1, -1, 2, 0, 0], [0.1, 0.2, 0.3, -0.6, 0.7], [3, -3], [1, 2, 3, 4, 5, 6]):
        flipped = [abs(np.dot(s, differences)) for s in itertools.product((1, -1), repeat=len(differences))]
        exact = np.mean(np.array(flipped) >= abs(sum(differences)) - 1e-9)
        p = sign_flip_test(differences, flips=10_000, seed=2)
        assert p == pytest.approx(exact, abs=4 * math.sqrt(0.25 / 10_000))


def test_sign_flip_of_items_of_their_own_agrees_with_mcnemar() -> None:
    # On single hit-or-miss items the two tests ask the same question: 3 against 12 discordant items.
    p = sign_flip_test([-1] * 3 + [1] * 12 + [0] * 50, flips=20_000, seed=1)
    assert p == pytest.approx(mcnemar_exact(3, 12), abs=0.006)


def test_sign_flip_edges() -> None:
    assert sign_flip_test([]) == 1.0
    assert sign_flip_test([0.0, 0.0]) == 1.0
    # The observed sum is the largest of all: only flips that repeat it (or its mirror) count. 1 / (1 + N) is the floor.
    assert sign_flip_test([1.0] * 60, flips=999) == 1 / 1000
    assert sign_flip_test([1, 2, -4], seed=3) == sign_flip_test([1, 2, -4], seed=3)
    with pytest.raises(InputError):
        sign_flip_test([1.0, math.nan])


def test_holm_by_hand() -> None:
    # Sorted .01 .03 .04: .01 * 3 = .03; .03 * 2 = .06; .04 * 1 = .04, lifted to .06.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(InputError):
        holm([0.5, 1.5])


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = (rng.random(6) * rng.choice([0.02, 0.3])).tolist()
        rejected = set()
        for rank, i in enumerate(sorted(range(6), key=p.__getitem__)):
            if p[i] > 0.05 / (6 - rank):
                break
            rejected.add(i)
        assert {i for i, adjusted in enumerate(holm(p)) if adjusted <= 0.05} == rejected


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=25))
def test_auroc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    positive = [s for s, label in rows if label]
    negative = [s for s, label in rows if not label]
    area = auroc([s for s, _ in rows], [label for _, label in rows])
    if positive and negative:
        wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
        assert area == pytest.approx(sum(wins) / len(wins))
    else:
        assert math.isnan(area)


def test_auroc_refuses() -> None:
    with pytest.raises(InputError):
        auroc([1.0, 2.0], [True])
    with pytest.raises(InputError):
        auroc([1.0, math.nan], [True, False])
