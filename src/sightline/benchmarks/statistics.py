"""Intervals and paired tests for scores on items that come in groups (several questions on one picture).

Notation: item i has a score h_i and belongs to group g(i); n items, G groups. Everything is seeded and needs only
numpy. Sources: Wilson (1927) for the interval of a proportion; McNemar (1947) in its exact binomial form; the cluster
bootstrap and the clustered standard error as in Miller, "Adding error bars to evals" (arXiv:2411.00640); Holm (1979);
Mann and Whitney (1947); for the paired test of two areas under ROC curves Bandos, Rockette and Gur (2005), who exchange
the two methods' ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sightline.errors import InputError

Z_95 = 1.959963984540054
"""The 97.5 % point of the standard normal: half the width of a 95 % interval in standard errors."""

Floats = NDArray[np.float64]

CHUNK = 250
"""Draws or flips that are worked on at a time."""


def wilson(k: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson interval of a proportion of k hits among n independent items.

        centre = (p + z^2 / 2n) / (1 + z^2 / n),    p = k / n
        half   = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)

    Returns:
        (low, high) within [0, 1]; (0, 1) if n is 0, since nothing is known then.

    Raises:
        InputError: if k is not one of 0..n.
    """
    if not 0 <= k <= n:
        raise InputError(f"{k} hits among {n} items is no proportion")
    if n == 0:
        return 0.0, 1.0
    p = k / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # The ends are exactly 0 and 1 for k = 0 and k = n; rounding would leave them some 1e-17 off.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def clustered_error(values: ArrayLike, groups: Sequence[Hashable]) -> float:
    """The standard error of the mean of items that come in groups.

        SE = (1 / n) sqrt( sum over groups c of ( sum over i in c of (h_i - mean h) )^2 )

    With groups of one item each it is the plain standard error sqrt(mean (h - mean h)^2 / n).

    Raises:
        InputError: if there are no values, or not one group name each.
    """
    h = np.asarray(values, dtype=np.float64)
    member = _group_index(groups, len(h))
    sums = np.bincount(member, weights=h - h.mean())
    return float(np.sqrt(np.sum(sums**2)) / len(h))


def cluster_bootstrap(
    rows: Any,
    metric: Callable[[Any], ArrayLike],
    groups: Sequence[Hashable],
    draws: int = 2000,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """The 95 % percentile interval of any metric, by drawing whole groups with replacement.

    A draw takes G of the G groups with replacement, puts all their items together and computes the whole metric anew
    (so a ratio stays a ratio); the interval runs from the 2.5 % to the 97.5 % quantile of the draws. With groups of
    one item each it is the plain bootstrap. It has no width where every group is alike, so take `wilson` for a
    proportion near 0 or 1.

    Args:
        rows: n items: a numpy array (first axis; much the fastest) or any sequence.
        metric: what to compute from such an array or list; a number or an array of numbers that then share the draws.
            A draw in which it is not a number (an empty class, say) is left out.
        groups: n group names, one for each item.
        draws: how many draws.
        seed: the same seed gives the same interval.

    Returns:
        (low, high), each of the metric's shape.

    Raises:
        InputError: if there are no rows, not one group name each, or the metric is not a number in any draw.
    """
    member = _group_index(groups, len(rows))
    order = np.argsort(member, kind="stable")
    sizes = np.bincount(member)
    starts = np.cumsum(sizes) - sizes
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = rng.integers(len(sizes), size=len(sizes))
        # A group's items stand together in `order`, from `starts` on; in this draw the group begins at `first`.
        first = np.cumsum(sizes[drawn]) - sizes[drawn]
        chosen = order[np.repeat(starts[drawn] - first, sizes[drawn]) + np.arange(sizes[drawn].sum())]
        sample = rows[chosen] if isinstance(rows, np.ndarray) else [rows[i] for i in chosen]
        values.append(np.asarray(metric(sample), dtype=np.float64))
    return _percentiles(np.stack(values))


def bootstrap_sums(
    table: ArrayLike,
    metric: Callable[[Floats], ArrayLike],
    groups: Sequence[Hashable],
    draws: int = 2000,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """`cluster_bootstrap` of a metric that only needs sums over the items: the same draws, much faster.

    Args:
        table: [n, K], what is summed.
        metric: from sums [..., K] to a value or several, [...] or [..., M].
        groups: n group names.
        draws: how many draws.
        seed: the same seed gives the same interval.

    Raises:
        InputError: as `cluster_bootstrap`.
    """
    sums = group_sums(table, groups)
    return _percentiles(np.asarray(metric(_drawn(len(sums), draws, seed) @ sums)))


def bootstrap_ranking(
    scores: ArrayLike, labels: ArrayLike, groups: Sequence[Hashable], draws: int = 2000, seed: int = 0
) -> tuple[Floats, Floats]:
    """The 95 % intervals of `auroc` and `calibrated_accuracy`, in this order, by drawing whole groups with replacement.

    The threshold is found anew in each draw; a draw without a positive or a negative is left out.

    Raises:
        InputError: as `cluster_bootstrap`.
    """
    s, positive = _scored(scores, labels)
    member = _group_index(groups, len(s))
    order = np.argsort(-s, kind="stable")
    member, positive, s = member[order], positive[order], s[order]
    ties = np.flatnonzero(np.concatenate([[True], s[1:] != s[:-1]]))
    weights = _drawn(int(member.max()) + 1, draws, seed)
    values = []
    for start in range(0, draws, CHUNK):
        weight = weights[start : start + CHUNK, member]
        positives = np.add.reduceat(np.where(positive, weight, 0.0), ties, axis=1)
        values.append(_ranking(positives, np.add.reduceat(weight, ties, axis=1) - positives))
    return _percentiles(np.concatenate(values))


def _ranking(positives: Floats, negatives: Floats) -> Floats:
    """AUROC and calibrated accuracy [D, 2] of D sets of items: of each, how many positives and negatives stand on each
    of U steps, the highest score first."""
    p, n = positives.sum(axis=1), negatives.sum(axis=1)
    above = np.cumsum(positives, axis=1)
    wins = ((above - positives / 2) * negatives).sum(axis=1)
    taken = np.cumsum(positives + negatives, axis=1)
    step = (taken < p[:, None]).sum(axis=1)  # the step on which the threshold lies
    rows = np.arange(len(p))
    tied = positives[rows, step] + negatives[rows, step]
    share = 1 - (taken[rows, step] - p) / np.maximum(tied, 1)
    right = above[rows, step] - (1 - share) * positives[rows, step]
    with np.errstate(invalid="ignore"):
        both = np.where((p > 0) & (n > 0), 1.0, np.nan)
        return np.stack([wins / (p * n), 1 - 2 * (p - right) / (p + n)], axis=1) * both[:, None]


@lru_cache(maxsize=4)
def _drawn(groups: int, draws: int, seed: int) -> Floats:
    """How often each group comes in each draw [draws, groups]; the draws of `cluster_bootstrap`."""
    rng = np.random.default_rng(seed)
    counts = [np.bincount(rng.integers(groups, size=groups), minlength=groups) for _ in range(draws)]
    return np.stack(counts).astype(np.float64)


def _percentiles(values: Floats) -> tuple[Floats, Floats]:
    if np.isnan(values).all(axis=0).any():
        raise InputError("the metric is not a number in any bootstrap draw, so it has no interval")
    low, high = np.nanquantile(values, (0.025, 0.975), axis=0)
    return low, high


def group_sums(table: ArrayLike, groups: Sequence[Hashable]) -> Floats:
    """Sums [G, K] of the rows [n, K] of each group, in order of first appearance."""
    rows = np.asarray(table, dtype=np.float64)
    member = _group_index(groups, len(rows))
    sums = np.zeros((int(member.max()) + 1, rows.shape[1]))
    np.add.at(sums, member, rows)
    return sums


def mcnemar_exact(b: int, c: int) -> float:
    """The two-sided exact McNemar p-value of two methods on the same independent items.

        p = min(1, 2 sum_{k <= min(b, c)} C(b + c, k) 2^-(b + c))

    Args:
        b: items that only the first method got right.
        c: items that only the second got right.

    Raises:
        InputError: if a count is negative.
    """
    if b < 0 or c < 0:
        raise InputError(f"counts of items cannot be negative: {b}, {c}")
    n = b + c
    term = total = 1
    for k in range(min(b, c)):
        term = term * (n - k) // (k + 1)
        total += term
    # Integers of any length divide without overflow, so hundreds of thousands of items are no matter.
    return min(1.0, 2 * total / (1 << n))


def sign_flip_test(differences: ArrayLike, flips: int = 10_000, seed: int = 0) -> float:
    """The two-sided sign-flip p-value for group differences d_c, exchangeable in sign if the methods do not differ.

        p = (1 + #{flips: |sum_c s_c d_c| >= |sum_c d_c|}) / (1 + N),    s_c = +1 or -1 with equal chance, N flips

    Args:
        differences: one number a group: the sum of its items' differences between the two methods.
        flips: N.
        seed: the same seed gives the same p.

    Raises:
        InputError: if a difference is not finite.
    """
    d = np.asarray(differences, dtype=np.float64).ravel()
    if not np.isfinite(d).all():
        raise InputError("the differences of a sign-flip test must be finite numbers")
    d = d[d != 0]
    # Sums of the same numbers in another order differ in the last bits; without the slack a tie could count as smaller.
    observed = abs(float(d.sum())) - 1e-9 * float(np.abs(d).sum())
    as_far = sum(int(np.count_nonzero(np.abs(signs @ d) >= observed)) for signs in _signs(len(d), flips, seed))
    return (1 + as_far) / (1 + flips)


def _signs(n: int, flips: int, seed: int) -> Iterator[NDArray[np.int8]]:
    """Signs +1 and -1 of n groups, flip by flip [flips, n], some rows at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, flips, 1000):
        yield rng.integers(2, size=(min(1000, flips - start), n), dtype=np.int8) * 2 - 1


def swap_test(
    a: ArrayLike,
    b: ArrayLike,
    metric: Callable[[Floats], ArrayLike],
    flips: int = 10_000,
    seed: int = 0,
) -> Floats:
    """The two-sided paired permutation p-value of a metric that only needs sums, such as a ratio of two of them.

    If the two methods do not differ, what they did in a group can be exchanged. With A and B the sums of the methods
    after exchanging each group with equal chance, and m the metric:

        p = (1 + #{flips: |m(A) - m(B)| >= |m(a) - m(b)|}) / (1 + N),    N flips

    For a metric that is itself a sum this is `sign_flip_test`.

    Args:
        a: one method's sums over each group [G, K].
        b: the other's, of the same groups.
        metric: from sums [..., K] to a value or several, [...] or [..., M].
        flips: N.
        seed: the same seed gives the same p.

    Returns:
        p, of the metric's shape: [] or [M].

    Raises:
        InputError: if the shapes differ or a sum is not finite.
    """
    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise InputError("a swap test needs the same sums of both methods, all finite numbers")
    first, second = one.sum(axis=0), other.sum(axis=0)
    observed = np.abs(np.asarray(metric(first)) - np.asarray(metric(second)))
    changes = one - other
    changes = changes[(changes != 0).any(axis=1)]
    as_far = np.zeros(observed.shape, dtype=np.int64)
    for signs in _signs(len(changes), flips, seed):
        # Where the sign is -1 the group is exchanged.
        swapped = (signs < 0) @ changes
        far = np.abs(np.asarray(metric(first - swapped)) - np.asarray(metric(second + swapped)))
        as_far += np.count_nonzero(far >= observed - 1e-9 * (1 + observed), axis=0)
    return np.asarray((1 + as_far) / (1 + flips))


def auroc_test(
    a: ArrayLike, b: ArrayLike, labels: ArrayLike, groups: Sequence[Hashable], flips: int = 10_000, seed: int = 0
) -> float:
    """The two-sided paired permutation p-value of a difference in AUROC between two methods' scores of the same items.

    Each method's scores are replaced by their ranks, because the scales of two methods may differ though the order of
    their items does not; then the two ranks of all items of a group are exchanged with equal chance. A permuted
    difference is linear in the signs s_c of the groups, so this is the sign-flip test on

        d_c = 1/2 sum over positives i of c of [V(a_i) - V(b_i)] - the same of the negatives, over positives,

    V(x) being how many of the other class's ranks, of both methods together, lie below x (ties counting half).

    Raises:
        InputError: if the lengths differ or a score is not a number.
    """
    first, positive = _scored(a, labels)
    second, _ = _scored(b, labels)
    member = _group_index(groups, len(first))
    ranks = np.stack([_mid_ranks(first), _mid_ranks(second)])
    effect = np.zeros(len(first))
    for own in (True, False):
        others = np.sort(ranks[:, positive != own].ravel())
        below = (np.searchsorted(others, ranks, "left") + np.searchsorted(others, ranks, "right")) / 2
        effect += np.where(positive == own, (below[0] - below[1]) / 2, 0.0) * (1 if own else -1)
    return sign_flip_test(np.bincount(member, weights=effect), flips, seed)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of m p-values, in the order given.

        adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),    p_(1) <= ... <= p_(m)

    Raises:
        InputError: if a p-value is outside [0, 1].
    """
    if any(not 0 <= p <= 1 for p in pvalues):
        raise InputError("p-values must lie between 0 and 1")
    adjusted = [0.0] * len(pvalues)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        highest = max(highest, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        adjusted[i] = highest
    return adjusted


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The area under the ROC curve: the chance that a positive item scores above a negative one, ties counting half.

        AUROC = (sum of the positives' mid-ranks - P (P + 1) / 2) / (P N),    P positives, N negatives

    Returns:
        The area; not a number (nan) unless there is a positive and a negative.

    Raises:
        InputError: if the lengths differ or a score is not a number.
    """
    s, positive = _scored(scores, labels)
    p = int(positive.sum())
    n = len(s) - p
    if p == 0 or n == 0:
        return math.nan
    return float((_mid_ranks(s)[positive].sum() - p * (p + 1) / 2) / (p * n))


def calibrated_hits(scores: ArrayLike, labels: ArrayLike) -> Floats:
    """How right each item is when the threshold is put where as many items are called positive as there are positives.

    With P positives, the P items of the highest scores are called positive. Of T items that tie at the threshold, r are
    still to be called positive; each of them is with probability r / T, and its hit is that of such a draw on average.
    The scores count only by their order, so that a constant added to all of them changes nothing.

    Returns:
        A number in [0, 1] for each item; 1 or 0 for all but those at the threshold.

    Raises:
        InputError: if the lengths differ or a score is not a number.
    """
    s, positive = _scored(scores, labels)
    p = int(positive.sum())
    if p == 0:
        return np.ones(len(s))
    threshold = np.sort(s)[-p]
    tied = s == threshold
    called = np.where(tied, (p - np.count_nonzero(s > threshold)) / np.count_nonzero(tied), s > threshold)
    return np.where(positive, called, 1 - called)


def calibrated_accuracy(scores: ArrayLike, labels: ArrayLike) -> float:
    """The accuracy at the threshold at which the share of items called positive is that of the positives; see
    `calibrated_hits`. Not a number (nan) unless there is a positive and a negative."""
    _, positive = _scored(scores, labels)
    return float(calibrated_hits(scores, labels).mean()) if 0 < positive.sum() < len(positive) else math.nan


def _scored(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    s = np.asarray(scores, dtype=np.float64).ravel()
    positive = np.asarray(labels).astype(bool).ravel()
    if len(s) != len(positive):
        raise InputError(f"{len(s)} scores cannot go with {len(positive)} labels")
    if np.isnan(s).any():
        raise InputError("a score is not a number")
    return s, positive


def _mid_ranks(values: Floats) -> Floats:
    """Ranks from 1 on, those of equal values averaged."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def _group_index(groups: Sequence[Hashable], n: int) -> NDArray[np.intp]:
    """Each item's group as a number 0..G-1, in order of first appearance."""
    if n == 0:
        raise InputError("there are no items to take an interval of")
    if len(groups) != n:
        raise InputError(f"{n} items need {n} group names, not {len(groups)}")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.intp)
