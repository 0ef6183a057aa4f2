"""From the files of a run to its result: scores with intervals, paired tests, tokens, times and memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sightline.benchmarks.costs import BASELINE, Cost
from sightline.benchmarks.item import Benchmark, Score, get_benchmark
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.statistics import holm
from sightline.errors import InputError

SHOWN = 0.05
"""A difference is shown when its adjusted p-value lies below this."""


@dataclass(frozen=True)
class MethodSummary:
    """What a run says about one method.

    Attributes:
        method: its short form; "none" is the unmodified model.
        n: answers that count.
        failed: items on which it failed; they count for no method's comparison.
        scores: name -> score; the first is the headline.
        p_value: of the paired test against the unmodified model on the headline, on the items that both answered,
            adjusted (Holm) for the number of methods; None for the unmodified model itself.
        visual_tokens: mean number of visual tokens an answer that reached the decoder.
        visual_tokens_given: the same before any were dropped.
        unparsed: share of short answers that no rule could read; None for captions.
        cut_off: share of answers that were stopped by the limit on tokens.
        cost: times and memory; None where they have not been measured.
    """

    method: str
    n: int
    failed: int
    scores: dict[str, Score]
    p_value: float | None
    visual_tokens: float | None
    visual_tokens_given: float | None
    unparsed: float | None
    cut_off: float
    cost: Cost | None

    @property
    def headline(self) -> Score:
        """The score that is compared."""
        return next(iter(self.scores.values()))

    @property
    def no_difference_shown(self) -> bool:
        """Whether the comparison with the unmodified model leaves open that there is no difference."""
        return self.p_value is not None and self.p_value >= SHOWN


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        folder: where the run is.
        settings: what it was made with.
        machine: what it ran on.
        rule: the rule by which yes/no answers were read; None where there are none.
        methods: one entry a method, the unmodified model first.
    """

    folder: Path
    settings: dict[str, Any]
    machine: dict[str, Any]
    rule: str | None
    methods: tuple[MethodSummary, ...]

    @property
    def headline(self) -> str:
        """The name of the score that is compared."""
        return next(iter(self.methods[0].scores))


def benchmark_of(settings: Mapping[str, Any]) -> Benchmark:
    """The benchmark of a run, with its options."""
    return get_benchmark(settings["benchmark"], **settings["options"])


def summarise(folder: Path) -> Summary:
    """The result of the run in a folder, as far as it has got.

    Raises:
        InputError: if the folder holds no run, or one without answers.
    """
    run = RunFolder(folder)
    info = run.info()
    rows = run.rows()
    benchmark = benchmark_of(info["settings"])
    answers = {
        method: [row for row in rows if row["method"] == method and "error" not in row] for method in info["methods"]
    }
    failed = {method: sum(row["method"] == method and "error" in row for row in rows) for method in answers}
    for method, count in failed.items():
        if count and not answers[method]:
            first = next(row["error"] for row in rows if row["method"] == method and "error" in row)
            raise InputError(f"every item failed with {method}: {first}")
    answers = {method: own for method, own in answers.items() if own}
    if not answers:
        raise InputError(f"{folder} holds no answers yet")
    compared = [method for method in answers if method != BASELINE and BASELINE in answers]
    p_values = holm([_paired(benchmark, answers[BASELINE], answers[method]) for method in compared])
    p_of = dict(zip(compared, p_values, strict=True))
    costs = run.costs() or {"methods": {}}
    rule = next((row["matcher"] for row in rows if "matcher" in row), None)
    return Summary(
        folder,
        info["settings"],
        info["machine"],
        rule,
        tuple(
            _summary(benchmark, method, own, failed[method], p_of.get(method), costs["methods"].get(method))
            for method, own in answers.items()
        ),
    )


def _paired(benchmark: Benchmark, base: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> float:
    """The p-value on the items that both answered."""
    both = {row["id"] for row in base} & {row["id"] for row in own}
    if not both:
        return 1.0
    return benchmark.paired([row for row in base if row["id"] in both], [row for row in own if row["id"] in both])


def _summary(
    benchmark: Benchmark,
    method: str,
    rows: Sequence[dict[str, Any]],
    failed: int,
    p_value: float | None,
    cost: Mapping[str, Any] | None,
) -> MethodSummary:
    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        return float(statistics.fmean(values)) if values else None

    readable = mean("readable")
    return MethodSummary(
        method,
        len(rows),
        failed,
        benchmark.scores(rows),
        p_value,
        mean("visual_tokens"),
        mean("visual_tokens_given"),
        None if readable is None else 1 - readable,
        mean("cut_off") or 0.0,
        None if cost is None else Cost(**cost),
    )
