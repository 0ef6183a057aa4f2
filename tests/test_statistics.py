"""Intervals and tests against enumeration, simulation and numbers worked by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.benchmarks.statistics import (
    Z_95,
    auroc,
    auroc_test,
    bootstrap_ranking,
    bootstrap_sums,
    calibrated_accuracy,
    calibrated_hits,
    cluster_bootstrap,
    clustered_error,
    group_sums,
    holm,
    mcnemar_exact,
    sign_flip_test,
    swap_test,
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


# --- Calibrated accuracy ---


ROWS = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12)


@given(ROWS)
def test_calibrated_accuracy_is_that_of_every_way_to_break_ties(rows: list[tuple[int, bool]]) -> None:
    # Every order of the items that agrees with the scores; the first P of it are called positive.
    p = sum(label for _, label in rows)
    threshold = sorted((s for s, _ in rows), reverse=True)[p - 1] if p else math.inf
    sure = [label for s, label in rows if s > threshold]
    tied = [label for s, label in rows if s == threshold]
    below = [label for s, label in rows if s < threshold]
    found = []
    for called in itertools.combinations(range(len(tied)), p - len(sure)):
        hits = sum(sure) + sum(not label for label in below)
        hits += sum(label == (place in called) for place, label in enumerate(tied))
        found.append(hits / len(rows))
    scores, labels = [s for s, _ in rows], [label for _, label in rows]
    assert calibrated_hits(scores, labels).mean() == pytest.approx(np.mean(found))
    area = calibrated_accuracy(scores, labels)
    assert area == pytest.approx(np.mean(found)) if 0 < p < len(rows) else math.isnan(area)


def test_calibrated_hits_by_hand() -> None:
    # Three positives. 5 and 4 lie above the threshold 2, on which one of two is called positive, each with chance 1/2.
    hits = calibrated_hits([5, 4, 2, 2, 1, 0], [True, False, True, False, True, False])
    assert hits.tolist() == [1, 0, 0.5, 0.5, 0, 1]


@given(ROWS, st.floats(0.1, 10), st.floats(-50, 50))
def test_scale_and_shift_of_the_scores_change_nothing(rows: list[tuple[int, bool]], scale: float, shift: float) -> None:
    scores, labels = np.array([s for s, _ in rows], dtype=float), [label for _, label in rows]
    for metric in (auroc, calibrated_accuracy):
        np.testing.assert_equal(metric(scale * scores + shift, labels), metric(scores, labels))


def test_accuracy_at_another_threshold_is_never_far_above_the_calibrated_one() -> None:
    # At the calibrated threshold as many positives are missed as negatives are called, so it is 1 - 2 missed / n.
    rng = np.random.default_rng(5)
    labels = rng.random(101) < 0.4
    scores = rng.normal(size=101) + labels
    threshold = np.sort(scores)[-labels.sum()]
    missed, false = (labels & (scores < threshold)).sum(), (~labels & (scores >= threshold)).sum()
    assert missed == false
    assert calibrated_accuracy(scores, labels) == pytest.approx(1 - 2 * missed / 101)


# --- Bootstraps of sums and of orders are the cluster bootstrap ---


@pytest.mark.parametrize("seed", [0, 3])
def test_bootstraps_equal_the_slow_one_draw_by_draw(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(9, size=37).tolist()
    labels = rng.random(37) < 0.5
    scores = rng.integers(-4, 5, size=37).astype(float)
    table = np.stack([scores, labels.astype(float)], axis=1)

    def ranking(rows: np.ndarray) -> list[float]:
        return [metric(rows[:, 0], rows[:, 1] == 1) for metric in (auroc, calibrated_accuracy)]

    slow = cluster_bootstrap(table, ranking, groups, draws=600, seed=seed)
    np.testing.assert_allclose(bootstrap_ranking(scores, labels, groups, draws=600, seed=seed), slow)
    counts = rng.integers(1, 4, size=(37, 2))
    slow = cluster_bootstrap(counts, lambda rows: rows[:, 0].sum() / rows[:, 1].sum(), groups, draws=300, seed=seed)
    fast = bootstrap_sums(counts, lambda sums: sums[..., 0] / sums[..., 1], groups, draws=300, seed=seed)
    np.testing.assert_allclose(fast, slow)


def test_bootstrap_of_an_order_leaves_out_draws_of_one_class() -> None:
    # Two groups of one class each: half of the draws hold one class only.
    low, high = bootstrap_ranking([2.0, 1.0], [True, False], [0, 1], draws=50)
    assert low.tolist() == high.tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match="not a number"):
        bootstrap_ranking([2.0, 1.0], [True, True], [0, 1], draws=5)
    with pytest.raises(InputError, match="2 items need 2"):
        bootstrap_ranking([2.0, 1.0], [True, False], [0])


def test_sums_of_groups_in_order_of_appearance() -> None:
    sums = group_sums([[1, 10], [2, 20], [3, 30]], ["b", "a", "b"])
    assert sums.tolist() == [[4, 40], [2, 20]]


# --- Paired permutation tests ---


def _enumerated(effect: Callable[[np.ndarray], float], n: int) -> float:
    """The share of all ways to exchange n groups whose effect is as far from 0 as that of exchanging none."""
    observed = abs(effect(np.zeros(n, dtype=bool)))
    every = [abs(effect(np.array(swapped))) for swapped in itertools.product((False, True), repeat=n)]
    return float(np.mean(np.array(every) >= observed - 1e-9))


NEAR = 4 * math.sqrt(0.25 / 20_000)
"""Four standard errors of a p-value of 20000 flips."""


@pytest.mark.parametrize("seed", range(4))
def test_swap_test_equals_enumeration_of_all_exchanges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, size=(2, 8, 2)).astype(float)
    a[:, 1] += a[:, 0] + 1
    b[:, 1] += b[:, 0] + 1

    def ratio(sums: np.ndarray) -> np.ndarray:
        return np.stack([sums[..., 0] / sums[..., 1], sums[..., 0]], axis=-1)

    found = swap_test(a, b, ratio, flips=20_000, seed=seed)
    for place in (0, 1):

        def effect(swapped: np.ndarray, place: int = place) -> float:
            one, other = a.copy(), b.copy()
            one[swapped], other[swapped] = b[swapped], a[swapped]
            return float(ratio(one.sum(axis=0))[place] - ratio(other.sum(axis=0))[place])

        assert found[place] == pytest.approx(_enumerated(effect, 8), abs=NEAR)
    assert found[1] == pytest.approx(sign_flip_test(a[:, 0] - b[:, 0], flips=20_000, seed=seed), abs=2 * NEAR)


def test_swap_test_edges() -> None:
    same = np.arange(6.0).reshape(3, 2)
    assert swap_test(same, same, lambda sums: sums[..., 0]) == 1.0
    far = swap_test(same + 1, np.zeros((3, 2)), lambda sums: sums[..., 0], flips=9)
    assert far == swap_test(same + 1, np.zeros((3, 2)), lambda sums: sums[..., 0], flips=9)
    assert 1 / 10 <= far <= 1
    with pytest.raises(InputError, match="same sums"):
        swap_test(same, same[:2], lambda sums: sums[..., 0])
    with pytest.raises(InputError, match="finite"):
        swap_test(same, np.full((3, 2), np.inf), lambda sums: sums[..., 0])


def _slow_area(scores: Sequence[float], labels: Sequence[bool]) -> float:
    positive = [s for s, label in zip(scores, labels, strict=True) if label]
    negative = [s for s, label in zip(scores, labels, strict=True) if not label]
    return sum((p > n) + 0.5 * (p == n) for p in positive for n in negative) / (len(positive) * len(negative))


@pytest.mark.parametrize("seed", range(4))
def test_auroc_test_equals_enumeration_of_all_exchanges_of_ranks(seed: int) -> None:
    # Seven pictures of one to three questions; scores tie within and between the methods, on two scales.
    rng = np.random.default_rng(seed)
    groups = [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6]
    labels = [i % 2 == 0 for i in range(14)]
    a = rng.integers(0, 6, size=14) + 2.0 * np.array(labels)
    b = 100 + 7 * (rng.integers(0, 6, size=14) + 1.0 * np.array(labels))

    def ranks(scores: np.ndarray) -> np.ndarray:
        return np.array([1 + sum(other < s for other in scores) + (sum(scores == s) - 1) / 2 for s in scores])

    one, other = ranks(a), ranks(b)

    def effect(swapped: np.ndarray) -> float:
        exchanged = swapped[groups]
        return _slow_area(np.where(exchanged, other, one).tolist(), labels) - _slow_area(
            np.where(exchanged, one, other).tolist(), labels
        )

    p = auroc_test(a, b, labels, groups, flips=20_000, seed=seed)
    assert p == pytest.approx(_enumerated(effect, 7), abs=NEAR)


def planted(n: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Margins, labels and pictures of four questions."""
    rng = np.random.default_rng(seed)
    labels = np.arange(4 * n) % 2 == 0
    return rng.normal(size=4 * n) + 1.2 * labels - 0.6, labels, np.repeat(np.arange(n), 4).tolist()


def test_a_shift_of_the_threshold_is_no_separation() -> None:
    margins, labels, groups = planted()
    for other in (margins + 2.0, 3 * margins - 1.0, np.exp(margins)):
        assert auroc(other, labels) == auroc(margins, labels)
        assert calibrated_accuracy(other, labels) == calibrated_accuracy(margins, labels)
        assert auroc_test(margins, other, labels, groups) == 1.0
    assert ((margins > 0) == labels).mean() - ((margins + 2 > 0) == labels).mean() > 0.1


def test_planted_separation_is_found_on_any_scale() -> None:
    margins, labels, groups = planted()
    better = margins + 0.8 * labels
    for other in (better, 5 * better + 30):
        assert auroc_test(margins, other, labels, groups) < 0.001
    assert calibrated_accuracy(better, labels) > calibrated_accuracy(margins, labels)


def test_methods_that_differ_by_chance_are_told_apart_as_often_as_they_should() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(30), 4).tolist()
    labels = np.arange(120) % 2 == 0
    found = 0
    for seed in range(200):
        shared = labels + rng.normal(size=30).repeat(4) + rng.normal(size=120)
        a, b = (shared + 0.6 * rng.normal(size=120) for _ in range(2))
        found += auroc_test(a, 4 * b + 9, labels, groups, flips=200, seed=seed) < 0.05
    assert 0.01 <= found / 200 <= 0.1
