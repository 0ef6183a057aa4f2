"""Methods in pairs: which compose, and what a pair does beyond the better of its two methods.

`pairs` plans a run of the unmodified model, each method, and each two of them together; `pair_effects` reads the
result. A pair is named by its short form: "fastervlm:keep=0.25+vista" is fastervlm and vista, acting in this order.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from sightline.benchmarks.changes import SHOWN, lower_is_better
from sightline.benchmarks.item import Benchmark
from sightline.benchmarks.statistics import holm
from sightline.errors import InputError
from sightline.methods import check_composition, parse_methods


@dataclass(frozen=True)
class PairPlan:
    """What a run of methods in pairs holds.

    Attributes:
        singles: short forms of the methods.
        pairs: those of the pairs that compose.
        refused: pairs that do not compose whatever the model, and why.
    """

    singles: tuple[str, ...]
    pairs: tuple[str, ...]
    refused: dict[str, str]

    @property
    def entries(self) -> list[str]:
        """All short forms in the order of a run, the refused ones too, so that the run can note why."""
        return ["none", *self.singles, *self.pairs, *self.refused]


def pairs(specs: Sequence[str]) -> PairPlan:
    """Each method alone and every two together, in the order in which they are given.

    Where the order of two methods matters, the other order is had by giving that pair too: `pairs(["vista", "ritual",
    "ritual+vista"])` holds vista+ritual and ritual+vista.

    Args:
        specs: short forms of single methods, and of pairs besides; "none" is always there.

    Raises:
        InputError: for a short form that cannot be read, more than two methods in one, or fewer than two methods.
    """
    asked = list(dict.fromkeys("+".join(part.strip() for part in spec.split("+")) for spec in specs))
    for spec in asked:
        if len(parse_methods(spec)) > 2:
            raise InputError(f"methods are run in pairs, so give single methods or two with a +, not {spec!r}")
    explicit = [spec for spec in asked if parted(spec) is not None]
    singles = [spec for spec in asked if parted(spec) is None and spec != "none"]
    singles += [part for spec in explicit for part in parted(spec) or ()]
    singles = list(dict.fromkeys(singles))
    if len(singles) < 2:
        raise InputError("pairs need two methods or more, such as --methods vista ritual --pairs")
    refused: dict[str, str] = {}
    composing: list[str] = []
    for spec in dict.fromkeys([*(f"{first}+{second}" for first, second in combinations(singles, 2)), *explicit]):
        try:
            check_composition(parse_methods(spec))
            composing.append(spec)
        except InputError as error:
            refused[spec] = str(error)
    return PairPlan(tuple(singles), tuple(composing), refused)


def parted(entry: str) -> tuple[str, str] | None:
    """The two short forms that a pair consists of; None for what is no pair."""
    parts = entry.split("+")
    return (parts[0], parts[1]) if len(parts) == 2 else None


@dataclass(frozen=True)
class PairEffect:
    """A pair against the better of its two methods, on the items that all three answered.

    Attributes:
        pair, first, second: short forms.
        better: which of the two is better on the headline; the first if they are equal.
        difference: the headline of the pair minus that of the better one.
        p_value: of the paired test between them, adjusted (Holm) for the number of pairs.
    """

    pair: str
    first: str
    second: str
    better: str
    difference: float
    p_value: float

    @property
    def no_difference_shown(self) -> bool:
        """Whether the test leaves open that the pair is no different from the better one alone."""
        return self.p_value >= SHOWN


def pair_effects(
    benchmark: Benchmark, headline: str, answers: Mapping[str, Sequence[dict[str, Any]]]
) -> tuple[PairEffect, ...]:
    """The effect of every pair among the entries of a run whose two methods are there as well.

    The better method is chosen by the same answers that it is then tested on, which if anything makes the pair look
    worse.

    Args:
        benchmark: of the run.
        headline: the name of the score that is compared.
        answers: entry -> its rows.
    """
    sign = -1 if lower_is_better(headline) else 1
    found: list[PairEffect] = []
    for pair, rows in answers.items():
        parts = parted(pair)
        if parts is None or any(part not in answers for part in parts):
            continue
        own = {entry: {row["id"]: row for row in answers[entry]} for entry in parts}
        shared = [row for row in rows if all(row["id"] in known for known in own.values())]
        if not shared:
            continue
        alone = {entry: [known[row["id"]] for row in shared] for entry, known in own.items()}
        means = {entry: statistics.fmean(benchmark.measure(row) for row in known) for entry, known in alone.items()}
        better = max(parts, key=lambda entry: sign * means[entry])
        difference = statistics.fmean(benchmark.measure(row) for row in shared) - means[better]
        found.append(PairEffect(pair, *parts, better, difference, benchmark.paired(alone[better], shared)))
    adjusted = holm([effect.p_value for effect in found])
    return tuple(
        PairEffect(effect.pair, effect.first, effect.second, effect.better, effect.difference, p)
        for effect, p in zip(found, adjusted, strict=True)
    )
