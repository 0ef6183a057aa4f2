"""From the files of a run to its result: scores with intervals, paired tests, tokens, times and memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sightline.benchmarks.changes import SHOWN, Change, change
from sightline.benchmarks.costs import BASELINE, Cost
from sightline.benchmarks.item import Benchmark, Score, get_benchmark
from sightline.benchmarks.pairs import PairEffect, pair_effects
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.statistics import holm
from sightline.benchmarks.tradeoff import AgainstRandom, against_random
from sightline.errors import InputError
from sightline.models.answering import FARTHEST


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
        p_values: score -> p-value like `p_value`, for all scores that are compared, adjusted for each score by itself.
        change: what changed against the unmodified model; None for that itself.
        ruled_out: share of yes/no questions on which yes or no was ruled out, so that the margin between them is at
            the end of its range and ties with the others there; None where there are no margins.
        layer_visual_tokens: as visual_tokens, but the mean over the decoder's layers, some of which may read fewer.
        flops_ratio: counted operations of reading the prompts, as a share of those of the unmodified model; None where
            they were not counted.
        cache_ratio: the same of what the prompts take in the cache.
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
    p_values: dict[str, float] = field(default_factory=dict)
    change: Change | None = None
    ruled_out: float | None = None
    layer_visual_tokens: float | None = None
    flops_ratio: float | None = None
    cache_ratio: float | None = None

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
        pairs: what pairs of methods do beyond the better of the two, where both are in the run too.
        refused: entries that were asked for and cannot be run, and why.
        against_random: methods that drop visual tokens against dropping as many at random, where both are in the run.
    """

    folder: Path
    settings: dict[str, Any]
    machine: dict[str, Any]
    rule: str | None
    methods: tuple[MethodSummary, ...]
    pairs: tuple[PairEffect, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    against_random: tuple[AgainstRandom, ...] = ()

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
    refused: dict[str, str] = {method: why for method, why in info.get("refused", {}).items() if method not in answers}
    for method, count in failed.items():
        if count and not answers[method]:
            first = next(row["error"] for row in rows if row["method"] == method and "error" in row)
            refused[method] = f"every item failed with {method}: {first}"
    answers = {method: own for method, own in answers.items() if own}
    if not answers:
        raise InputError(next(iter(refused.values()), f"{folder} holds no answers yet"))
    scores = {method: benchmark.scores(own) for method, own in answers.items()}
    headline = next(iter(next(iter(scores.values()))))
    p_values = _adjusted(
        {
            method: _paired(benchmark, headline, answers[BASELINE], own)
            for method, own in answers.items()
            if method != BASELINE and BASELINE in answers
        }
    )
    costs = run.costs() or {"methods": {}}
    rule = next((row["matcher"] for row in rows if "matcher" in row), None)
    return Summary(
        folder,
        info["settings"],
        info["machine"],
        rule,
        tuple(
            _summary(method, own, failed[method], scores, headline, p_values.get(method), costs["methods"].get(method))
            for method, own in answers.items()
        ),
        pair_effects(benchmark, headline, answers),
        refused,
        against_random(benchmark, answers),
    )


def _paired(
    benchmark: Benchmark, headline: str, base: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Score -> p-value on the items that both answered, the headline's first."""
    both = {row["id"] for row in base} & {row["id"] for row in own}
    if not both:
        return {headline: 1.0}
    base, own = [row for row in base if row["id"] in both], [row for row in own if row["id"] in both]
    return {headline: benchmark.paired(base, own)} | benchmark.paired_others(base, own)


def _adjusted(p_values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Method -> score -> p-value, adjusted for each score over the methods that have it."""
    adjusted: dict[str, dict[str, float]] = {method: {} for method in p_values}
    for score in dict.fromkeys(score for own in p_values.values() for score in own):
        having = [method for method in p_values if score in p_values[method]]
        for method, p in zip(having, holm([p_values[method][score] for method in having]), strict=True):
            adjusted[method][score] = p
    return adjusted


def _summary(
    method: str,
    rows: Sequence[dict[str, Any]],
    failed: int,
    scores: Mapping[str, dict[str, Score]],
    headline: str,
    p_values: dict[str, float] | None,
    cost: Mapping[str, Any] | None,
) -> MethodSummary:
    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        return float(statistics.fmean(values)) if values else None

    def share(name: str) -> float | None:
        known = [row for row in rows if row.get(name) is not None]
        return sum(row[name] for row in known) / sum(row[f"{name}_given"] for row in known) if known else None

    readable = mean("readable")
    margins = [row["yes_logit_margin"] for row in rows if row.get("yes_logit_margin") is not None]
    ruled_out = sum(abs(margin) >= FARTHEST for margin in margins) / len(margins) if margins else None
    changed = None
    if p_values is not None:
        # A score that only one of the two has on all of its answers cannot be put side by side.
        base, own = scores[BASELINE], scores[method]
        shared = {name: p for name, p in p_values.items() if name in own and name in base}
        changed = change(own, base, shared, ruled_out or 0.0)
    return MethodSummary(
        method,
        len(rows),
        failed,
        scores[method],
        None if p_values is None else p_values[headline],
        mean("visual_tokens"),
        mean("visual_tokens_given"),
        None if readable is None else 1 - readable,
        mean("cut_off") or 0.0,
        None if cost is None else Cost(**cost),
        p_values or {},
        changed,
        ruled_out,
        mean("layer_visual_tokens"),
        share("prefill_flops"),
        share("cache_bytes"),
    )
