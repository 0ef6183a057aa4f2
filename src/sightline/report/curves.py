"""The section of a report on strengths: how good a method is over the values of one of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from sightline.benchmarks.costs import BASELINE
from sightline.benchmarks.summary import MethodSummary, Summary
from sightline.benchmarks.sweep import Curve, curves
from sightline.report import table
from sightline.report.plots import Point, curve

BESIDE = ("auroc", "recall", "caption_recall")
"""Of these scores the first that a run has is shown beside the headline: what a gain may have been paid with."""


def curves_section(summary: Summary, series: Mapping[str, int]) -> str:
    """For each curve among the entries of a run two plots; nothing where there are none."""
    found = {method.method: method for method in summary.methods}
    base = found.get(BASELINE)
    lines = curves(list(found))
    if base is None or not lines:
        return ""
    names = [summary.headline, *(name for name in BESIDE if name in base.scores and name != summary.headline)][:2]
    panels = []
    for line in lines:
        for name in names:
            entries = [(x, found[entry]) for x, entry in line.points if name in found[entry].scores]
            if len(entries) > 1:
                panels.append(_panel(line, name, entries, base, series))
    return (
        "<h2>Over the strength</h2><p>The band holds the 95 % intervals; the dashed line is the unmodified model, the "
        f'dotted one the default of the method.</p><div class="plots">{"".join(panels)}</div>'
    )


def _panel(
    line: Curve,
    name: str,
    entries: list[tuple[float, MethodSummary]],
    base: MethodSummary,
    series: Mapping[str, int],
) -> str:
    factor = 1 if name in table.COUNTS else 100
    colour = series[entries[-1][1].method]
    points = []
    for x, method in entries:
        score = method.scores[name]
        tip = f"{line.field} = {x:g}: {table.score(name, score)}"
        points.append(
            Point(method.method, colour, x, factor * score.value, factor * score.low, factor * score.high, tip)
        )
    y_label = f"{table.words(name)}, {'words' if name in table.COUNTS else '%'}"
    svg = curve(points, factor * base.scores[name].value, line.default, f"{line.field} of {line.method}", y_label)
    return f'<div class="panel"><h3>{escape(line.label)}: {escape(table.words(name))}</h3>{svg}</div>'
