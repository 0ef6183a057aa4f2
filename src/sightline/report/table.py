"""The result of a run as tables for the terminal, and as JSON lines for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sightline.benchmarks.changes import lower_is_better
from sightline.benchmarks.costs import BASELINE
from sightline.benchmarks.item import Score
from sightline.benchmarks.pairs import PairEffect
from sightline.benchmarks.summary import MethodSummary, Summary

COSTS = ("time_to_first_token", "time_per_token", "peak_memory")
ANSWER_COSTS = ("time_per_answer", "calls", "prefill_tokens")
"""What a whole answer costs; runs of earlier versions have not measured it."""
COST_NAMES = {
    "time_to_first_token": "first token",
    "time_per_token": "each further",
    "time_per_answer": "whole answer",
    "calls": "calls",
    "prefill_tokens": "tokens read",
    "peak_memory": "peak memory",
}
"""Costs in the order of their columns -> what these are called."""
COUNTS = frozenset({"length"})
"""Scores that are no shares."""
ACROSS = 4
"""So many methods stand side by side; more of them stand one below the other."""
MOST_LISTED = 8
"""A sentence names so many methods at the most."""
SCORES_ACROSS = 5
"""So many scores stand side by side there."""


def json_lines(summary: Summary) -> str:
    """One JSON object a method and line. Shares are fractions, times seconds, memory bytes; what was not measured is
    null."""
    return "".join(json.dumps(as_dict(summary, method), ensure_ascii=False) + "\n" for method in summary.methods)


def as_dict(summary: Summary, method: MethodSummary) -> dict[str, Any]:
    """What `--json` prints of one method."""
    cost = method.cost
    ratio = {"visual_tokens": token_ratio(method), **{name: cost_ratio(method, name) for name in COSTS}}
    pair = next((effect for effect in summary.pairs if effect.pair == method.method), None)
    random = next((one for one in summary.against_random if one.entry == method.method), None)
    return {
        "method": method.method,
        "benchmark": summary.settings["benchmark"],
        "split": summary.settings["split"],
        "model": summary.settings["model"],
        "n": method.n,
        "failed": method.failed,
        "headline": summary.headline,
        "scores": {name: score.value for name, score in method.scores.items()},
        "interval": [method.headline.low, method.headline.high],
        "p_value": method.p_value,
        "unparsed": method.unparsed,
        "cut_off": method.cut_off,
        "visual_tokens": method.visual_tokens,
        "time_to_first_token": cost.time_to_first_token if cost else None,
        "time_per_token": cost.time_per_token if cost else None,
        "peak_memory": cost.peak_memory if cost else None,
        "ratio": ratio,
        "p_values": method.p_values,
        "change": asdict(method.change) if method.change else None,
        "costs": {
            **{name: getattr(cost, name) if cost else None for name in ANSWER_COSTS},
            "ratio": {name: cost_ratio(method, name) for name in ANSWER_COSTS if name != "calls"},
        },
        "pair": asdict(pair) if pair else None,
        "counted": {
            "layer_visual_tokens": method.layer_visual_tokens,
            "prefill_flops_ratio": method.flops_ratio,
            "cache_ratio": method.cache_ratio,
        },
        "against_random": asdict(random) if random else None,
    }


def token_ratio(method: MethodSummary) -> float | None:
    """The share of the visual tokens that reached the decoder."""
    if method.visual_tokens is None or not method.visual_tokens_given:
        return None
    return method.visual_tokens / method.visual_tokens_given


def cost_ratio(method: MethodSummary, name: str) -> float | None:
    """What a cost is of the unmodified model's; None where that was not measured."""
    return method.cost.ratio.get(name) if method.cost else None


def costs_present(summary: Summary) -> list[str]:
    """The costs that were measured of a method at least, in the order of their columns; calls only if some are not
    one."""
    costs = [method.cost for method in summary.methods if method.cost]
    present = [name for name in COST_NAMES if any(getattr(cost, name) is not None for cost in costs)]
    return [name for name in present if name != "calls" or any(cost.calls != 1 for cost in costs)]


def tables(summary: Summary) -> RenderableType:
    """Tables (the comparison, what changed, pairs, what it costs, all scores) and the notes that belong to them."""
    parts: list[RenderableType] = [Text(title(summary), style="bold"), _comparison(summary)]
    if any(method.change for method in summary.methods):
        parts.append(_changes(summary))
    if summary.pairs:
        parts.append(_pairs(summary))
    if any(method.flops_ratio not in (None, 1) for method in summary.methods):
        parts.append(_counted(summary))
    if summary.against_random:
        parts.append(_against_random(summary))
    parts += [_costs(summary), *_all_scores(summary)]
    return Group(*parts, *(Text(note) for note in notes(summary)))


def notes(summary: Summary) -> list[str]:
    """What a reader has to know to trust the numbers, a sentence each."""
    settings, machine = summary.settings, summary.machine
    told = [
        "Brackets: 95 % interval. p: paired test against none on the same items, adjusted for the number of methods "
        "(Holm); at 0.05 or more no difference is shown.",
        f"Times and memory: medians at batch size 1, and how many times those of none in the same rounds; "
        f"{settings['dtype']} on {machine['gpu'] if settings['device'] == 'cuda' else machine['processor']}, "
        f"{machine['threads']} threads, attention {settings['attention']}.",
    ]
    if any(method.change and "calibrated_accuracy" in method.p_values for method in summary.methods):
        told.append(
            "A threshold shift is more or fewer yes on the same order of the items; separation is how well the margins "
            "of yes tell yes from no wherever the threshold lies (AUROC, calibrated accuracy)."
        )
    if summary.pairs:
        told.append(
            "Pairs: the headline of the pair minus that of the better of its two methods, tested on the same items; p "
            "adjusted for the number of pairs."
        )
    if summary.against_random:
        told.append(
            "Against random: the headline minus that of dropping as many visual tokens at random, tested on the same "
            "items; p adjusted for the number of such comparisons."
        )
    if summary.rule:
        told.append(f"Yes or no was read by the rule {summary.rule!r}.")
    troubled: dict[str, list[str]] = {}
    for method in summary.methods:
        troubles = []
        if method.failed:
            troubles.append(f"{method.failed} items failed")
        if method.unparsed:
            troubles.append(f"{100 * method.unparsed:.1f} % of the answers were not understood")
        if method.cut_off:
            troubles.append(f"{100 * method.cut_off:.1f} % of the answers were cut off")
        if method.ruled_out:
            troubles.append(f"yes or no was ruled out on {100 * method.ruled_out:.1f} % of the questions, which tie")
        if troubles:
            troubled.setdefault(", ".join(troubles), []).append(method.method)
    told += [f"{listed(names)}: {troubles}." for troubles, names in troubled.items()]
    told += [f"Refused: {name}: {why}" for name, why in summary.refused.items()]
    if len({method.n for method in summary.methods}) > 1:
        told.append("The methods answered different numbers of items: the run is not finished, or items failed.")
    return told


def title(summary: Summary) -> str:
    """The model, benchmark, split and number of items of a run."""
    settings = summary.settings
    return f"{settings['model']} on {settings['benchmark']}, {settings['split']}, {settings['item_count']} items"


def number(name: str, value: float) -> str:
    """A score as it is shown: shares in per cent."""
    return f"{value:.1f}" if name in COUNTS else f"{100 * value:.1f}"


def score(name: str, found: Score) -> str:
    """A score with its interval."""
    return f"{number(name, found.value)} [{number(name, found.low)}, {number(name, found.high)}]"


def p_value(method: MethodSummary) -> str:
    """The p-value, in words where it shows nothing."""
    if method.p_value is None:
        return ""
    shown = probability(method.p_value).removeprefix("p ").removeprefix("= ")
    return f"{shown}, no difference shown" if method.no_difference_shown else shown


def probability(p: float) -> str:
    """A p-value with its sign of equality."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def cost(method: MethodSummary, name: str) -> str:
    """A cost of a method, with its ratio to the unmodified model; empty where it was not measured."""
    plain, ratio = plain_cost(method, name), cost_ratio(method, name)
    return plain if ratio is None or method.method == BASELINE else f"{plain} (×{ratio:.2f})"


def plain_cost(method: MethodSummary, name: str) -> str:
    """A cost of a method in its unit; empty where it was not measured."""
    value = getattr(method.cost, name) if method.cost else None
    if value is None:
        return ""
    if name == "peak_memory":
        return memory(value)
    if name == "prefill_tokens":
        return str(value)
    return f"{value:.3g}" if name == "calls" else milliseconds(value)


def changed(method: MethodSummary) -> str:
    """The scores of which a difference is shown, with their p-values; empty where there are none."""
    if method.change is None:
        return ""
    parts = []
    for what in ("better", "worse", "moved"):
        names = getattr(method.change, what)
        if names:
            told = (f"{words(name)} ({probability(method.p_values[name])})" for name in names)
            parts.append(f"{what}: {', '.join(told)}")
    return "; ".join(parts)


def beyond(summary: Summary, effect: PairEffect) -> str:
    """Whether a pair is better or worse than the better of its methods, or neither is shown."""
    if effect.no_difference_shown:
        return "no difference shown"
    return "better" if (effect.difference < 0) == lower_is_better(summary.headline) else "worse"


def words(name: str) -> str:
    """A score's name as people write it."""
    for plain, known in (("chair", "CHAIR"), ("auroc", "AUROC"), ("f1", "F1")):
        name = name.replace(plain, known)
    return "all skills" if name == "all" else re.sub("_(?![si]$)", " ", name)


def listed(names: list[str]) -> str:
    """Names in a sentence, at most `MOST_LISTED` of them."""
    if len(names) > MOST_LISTED:
        return f"{', '.join(names[: MOST_LISTED - 1])} and {len(names) - MOST_LISTED + 1} more"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def signed(points: float) -> str:
    """A difference in per cent points."""
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def milliseconds(seconds: float) -> str:
    """Three figures of a time."""
    return f"{_three_figures(1000 * seconds)} ms"


def memory(n_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{_three_figures(n_bytes)} {unit}"
        n_bytes /= 1000
    return f"{_three_figures(n_bytes)} GB"


def _three_figures(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def visual_tokens(method: MethodSummary) -> str:
    """Visual tokens that reached the decoder, and their share of those given."""
    ratio = token_ratio(method)
    if ratio is None:
        return ""
    kept = f"{method.visual_tokens:.4g}"
    return kept if method.method == BASELINE else f"{kept} (×{ratio:.2f})"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    return table


def _comparison(summary: Summary) -> Table:
    table = _table("method", f"{summary.headline}, %", "p against none", "visual\ntokens")
    for method in summary.methods:
        quality = score(summary.headline, method.headline)
        table.add_row(method.method, quality, p_value(method), visual_tokens(method))
    return table


def _changes(summary: Summary) -> Table:
    table = _table("method", "what changed", "shown of")
    table.columns[2].justify = "left"
    for method in summary.methods:
        if method.change is not None:
            table.add_row(method.method, method.change.kind, changed(method))
    return table


def _pairs(summary: Summary) -> Table:
    table = _table("pair", "better alone", "beyond it,\npoints", "")
    for effect in summary.pairs:
        told = f"{probability(effect.p_value)}, {beyond(summary, effect)}"
        table.add_row(effect.pair, effect.better, difference(summary.headline, effect.difference), told)
    return table


def _counted(summary: Summary) -> Table:
    table = _table("method", "visual tokens,\nmean over layers", "operations,\ncounted", "cache,\ncounted")
    for method in summary.methods:
        tokens = method.layer_visual_tokens
        cells = ["" if tokens is None else f"{tokens:.4g}"]
        cells += ["" if ratio is None else f"×{ratio:.3f}" for ratio in (method.flops_ratio, method.cache_ratio)]
        table.add_row(method.method, *cells)
    return table


def _against_random(summary: Summary) -> Table:
    table = _table("method", "random choice", "beyond it,\npoints", "")
    for one in summary.against_random:
        better = (one.difference < 0) == lower_is_better(summary.headline)
        told = "no difference shown" if one.no_difference_shown else "better" if better else "worse"
        points = difference(summary.headline, one.difference)
        table.add_row(one.entry, one.reference, points, f"{probability(one.p_value)}, {told}")
    return table


def difference(name: str, value: float) -> str:
    """A difference of two scores, in per cent points where they are shares."""
    return signed(value if name in COUNTS else 100 * value)


def _costs(summary: Summary) -> Table:
    present = costs_present(summary) or list(COSTS)
    table = _table("method", *(COST_NAMES[name] for name in present))
    if any(method.cost for method in summary.methods):
        for method in summary.methods:
            table.add_row(method.method, *(cost(method, name) for name in present))
    else:
        table.add_row("not measured", *("" for _ in present))
    return table


def _all_scores(summary: Summary) -> list[Table]:
    """Scores down and methods across, with intervals where there is room for them; of many methods the other way round,
    in as many tables as it takes."""
    methods = summary.methods
    names = list(dict.fromkeys(name for method in methods for name in method.scores))
    if len(methods) <= ACROSS:
        table = _table("score, %", *(method.method for method in methods))
        for name in names:
            table.add_row(_unit(name), *(_cell(method, name, intervals=len(methods) <= 3) for method in methods))
        return [table]
    made = []
    for part in _parts(names, SCORES_ACROSS):
        table = _table("method, %", *(_unit(name).replace("_", "_\n") for name in part))
        for method in methods:
            table.add_row(method.method, *(_cell(method, name) for name in part))
        made.append(table)
    return made


def _parts(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _unit(name: str) -> str:
    return f"{name} (words)" if name in COUNTS else name


def _cell(method: MethodSummary, name: str, *, intervals: bool = False) -> str:
    found = method.scores.get(name)
    return "" if found is None else score(name, found) if intervals else number(name, found.value)
