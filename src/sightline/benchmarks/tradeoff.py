"""What fewer visual tokens cost in quality: which curves of a run are of that kind, and whether a method's choice of
tokens is any better than a random one of as many."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sightline.benchmarks.changes import SHOWN
from sightline.benchmarks.costs import BASELINE
from sightline.benchmarks.item import Benchmark
from sightline.benchmarks.statistics import holm
from sightline.benchmarks.sweep import Curve, curves
from sightline.errors import InputError
from sightline.methods import parse_methods

if TYPE_CHECKING:
    from sightline.benchmarks.summary import Summary

REFERENCE = "random_dropping"
"""The method that drops as many visual tokens without looking at them."""
ALIKE = 0.5
"""Entries whose answers had as many visual tokens, up to this mean difference, are compared."""


@dataclass(frozen=True)
class AgainstRandom:
    """A method that drops visual tokens against dropping as many at random, on the items that both answered.

    Attributes:
        entry, reference: short forms.
        visual_tokens: how many were left, the mean over layers and answers.
        difference: the headline of the entry minus that of the reference.
        p_value: of the paired test between them, adjusted (Holm) for the number of such comparisons.
    """

    entry: str
    reference: str
    visual_tokens: float
    difference: float
    p_value: float

    @property
    def no_difference_shown(self) -> bool:
        """Whether the test leaves open that a random choice is as good."""
        return self.p_value >= SHOWN


def is_reference(entry: str) -> bool:
    """Whether an entry is the random choice alone."""
    return entry.partition(":")[0] == REFERENCE and "+" not in entry


def against_random(benchmark: Benchmark, answers: Mapping[str, Sequence[dict[str, Any]]]) -> tuple[AgainstRandom, ...]:
    """Every entry of a run that drops visual tokens, against the entry that drops the nearest number at random, if
    there is one within `ALIKE` tokens.

    Args:
        benchmark: of the run.
        answers: entry -> its rows.
    """
    tokens = {entry: _tokens(rows) for entry, rows in answers.items()}
    references = {entry: found for entry, found in tokens.items() if is_reference(entry) and found is not None}
    made: list[AgainstRandom] = []
    for entry, found in tokens.items():
        if found is None or not references or not _drops(answers[entry]) or _has_reference(entry):
            continue
        reference = min(references, key=lambda name: abs(references[name] - found))
        if abs(references[reference] - found) > ALIKE:
            continue
        random = {row["id"]: row for row in answers[reference]}
        own = [row for row in answers[entry] if row["id"] in random]
        if not own:
            continue
        other = [random[row["id"]] for row in own]
        means = [statistics.fmean(benchmark.measure(row) for row in rows) for rows in (own, other)]
        p = benchmark.paired(other, own)
        made.append(AgainstRandom(entry, reference, found, means[0] - means[1], p))
    adjusted = holm([one.p_value for one in made])
    return tuple(
        AgainstRandom(one.entry, one.reference, one.visual_tokens, one.difference, p)
        for one, p in zip(made, adjusted, strict=True)
    )


def reducing_curves(summary: Summary) -> tuple[Curve, ...]:
    """The curves of a run along which the number of visual tokens changes, the reference's last."""
    found = {method.method: method for method in summary.methods}
    made = []
    for curve in curves([name for name in found if name != BASELINE]):
        counts = {found[entry].layer_visual_tokens for _, entry in curve.points}
        if None not in counts and len(counts) > 1:
            made.append(curve)
    return tuple(sorted(made, key=lambda curve: is_reference(curve.label)))


def _tokens(rows: Sequence[dict[str, Any]]) -> float | None:
    """Mean visual tokens a layer and answer; runs of earlier versions only have those that reach the decoder."""
    counts = [row.get("layer_visual_tokens", row.get("visual_tokens")) for row in rows]
    known = [float(count) for count in counts if count is not None]
    return statistics.fmean(known) if known else None


def _drops(rows: Sequence[dict[str, Any]]) -> bool:
    given = [row["visual_tokens_given"] for row in rows if row.get("visual_tokens_given") is not None]
    found = _tokens(rows)
    return bool(given) and found is not None and found < statistics.fmean(given)


def _has_reference(entry: str) -> bool:
    try:
        return any(method.paper == REFERENCE for method in parse_methods(entry))
    except InputError:  # a method of another version
        return REFERENCE in entry
