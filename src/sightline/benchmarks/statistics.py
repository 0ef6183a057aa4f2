"""Intervals and paired tests for scores on items that come in groups (several questions on one picture).

Notation: item i has a score h_i and belongs to group g(i); n items, G groups. Everything is seeded and needs only
numpy. Sources: Wilson (1927) for the interval of a proportion; McNemar (1947) in its exact binomial form; the cluster
bootstrap and the clustered standard error as in Miller, "Adding error bars to evals" (arXiv:2411.00640); Holm (1979);
Mann and Whitney (1947).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sightline.errors import InputError

Z_95 = 1.959963984540054
"""The 97.5 % point of the standard normal: half the width of a 95 % interval in standard errors."""

Floats = NDArray[np.float64]


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
    table = np.stack(values)
    if np.isnan(table).all(axis=0).any():
        raise InputError("the metric is not a number in any bootstrap draw, so it has no interval")
    low, high = np.nanquantile(table, (0.025, 0.975), axis=0)
    return low, high


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
    rng = np.random.default_rng(seed)
    as_far = 0
    for start in range(0, flips, 1000):
        signs = rng.integers(2, size=(min(1000, flips - start), len(d)), dtype=np.int8) * 2 - 1
        as_far += int(np.count_nonzero(np.abs(signs @ d) >= observed))
    return (1 + as_far) / (1 + flips)


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
    s = np.asarray(scores, dtype=np.float64).ravel()
    positive = np.asarray(labels).astype(bool).ravel()
    if len(s) != len(positive):
        raise InputError(f"{len(s)} scores cannot go with {len(positive)} labels")
    if np.isnan(s).any():
        raise InputError("a score is not a number")
    p = int(positive.sum())
    n = len(s) - p
    if p == 0 or n == 0:
        return math.nan
    _, place, counts = np.unique(s, return_inverse=True, return_counts=True)
    mid_ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((mid_ranks[place][positive].sum() - p * (p + 1) / 2) / (p * n))


def _group_index(groups: Sequence[Hashable], n: int) -> NDArray[np.intp]:
    """Each item's group as a number 0..G-1, in order of first appearance."""
    if n == 0:
        raise InputError("there are no items to take an interval of")
    if len(groups) != n:
        raise InputError(f"{n} items need {n} group names, not {len(groups)}")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.intp)
