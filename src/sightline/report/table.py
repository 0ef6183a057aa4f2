"""The result of a run as tables for the terminal, and as JSON lines for programs."""

from __future__ import annotations

import json
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sightline.benchmarks.costs import BASELINE
from sightline.benchmarks.item import Score
from sightline.benchmarks.summary import MethodSummary, Summary

COSTS = ("time_to_first_token", "time_per_token", "peak_memory")
COUNTS = frozenset({"length"})
"""Scores that are no shares."""


def json_lines(summary: Summary) -> str:
    """One JSON object a method and line. Shares are fractions, times seconds, memory bytes; what was not measured is
    null."""
    return "".join(json.dumps(as_dict(summary, method), ensure_ascii=False) + "\n" for method in summary.methods)


def as_dict(summary: Summary, method: MethodSummary) -> dict[str, Any]:
    """What `--json` prints of one method."""
    cost = method.cost
    ratio = {"visual_tokens": token_ratio(method), **{name: cost.ratio[name] if cost else None for name in COSTS}}
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
    }


def token_ratio(method: MethodSummary) -> float | None:
    """The share of the visual tokens that reached the decoder."""
    if method.visual_tokens is None or not method.visual_tokens_given:
        return None
    return method.visual_tokens / method.visual_tokens_given


def tables(summary: Summary) -> RenderableType:
    """Three tables (the comparison, what it costs, all scores) and the notes that belong to them."""
    parts: list[RenderableType] = [Text(title(summary), style="bold")]
    for table in (_comparison(summary), _costs(summary), _all_scores(summary)):
        parts.append(table)
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
    if summary.rule:
        told.append(f"Yes or no was read by the rule {summary.rule!r}.")
    for method in summary.methods:
        troubles = []
        if method.failed:
            troubles.append(f"{method.failed} items failed")
        if method.unparsed:
            troubles.append(f"{100 * method.unparsed:.1f} % of the answers were not understood")
        if method.cut_off:
            troubles.append(f"{100 * method.cut_off:.1f} % of the answers were cut off")
        if troubles:
            told.append(f"{method.method}: {', '.join(troubles)}.")
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
    shown = "< 0.001" if method.p_value < 0.001 else f"{method.p_value:.3f}"
    return f"{shown}, no difference shown" if method.no_difference_shown else shown


def cost(method: MethodSummary, name: str) -> str:
    """A time or the memory of a method, with its ratio to the unmodified model."""
    if method.cost is None:
        return ""
    value = getattr(method.cost, name)
    plain = memory(value) if name == "peak_memory" else milliseconds(value)
    return plain if method.method == BASELINE else f"{plain} (×{method.cost.ratio[name]:.2f})"


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


def _costs(summary: Summary) -> Table:
    table = _table("method", "first token", "each further", "peak memory")
    if any(method.cost for method in summary.methods):
        for method in summary.methods:
            table.add_row(method.method, *(cost(method, name) for name in COSTS))
    else:
        table.add_row("not measured", "", "", "")
    return table


def _all_scores(summary: Summary) -> Table:
    """Scores down, methods across; with intervals where there is room for them."""
    table = _table("score, %", *(method.method for method in summary.methods))
    wide = len(summary.methods) <= 3
    for name in dict.fromkeys(name for method in summary.methods for name in method.scores):
        cells = []
        for method in summary.methods:
            found = method.scores.get(name)
            cells.append("" if found is None else score(name, found) if wide else number(name, found.value))
        table.add_row(f"{name} (words)" if name in COUNTS else name, *cells)
    return table
