"""The section of a report on fewer visual tokens: what is left of the quality, over what is left of the cost."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from sightline.benchmarks.changes import lower_is_better
from sightline.benchmarks.costs import BASELINE
from sightline.benchmarks.summary import MethodSummary, Summary
from sightline.benchmarks.sweep import Curve
from sightline.benchmarks.tradeoff import AgainstRandom, is_reference, reducing_curves
from sightline.report import table
from sightline.report.plots import Line, Point, legend, lines

SERIES = 8

Axis = tuple[str, str, Callable[[MethodSummary], float | None]]

AXES: tuple[Axis, ...] = (
    ("Visual tokens", "visual tokens, mean over the layers", lambda method: method.layer_visual_tokens),
    (
        "Counted operations",
        "operations of reading the prompt, % of the unmodified model",
        lambda method: None if method.flops_ratio is None else 100 * method.flops_ratio,
    ),
    (
        "Counted cache",
        "cache of the prompt, % of the unmodified model",
        lambda method: None if method.cache_ratio is None else 100 * method.cache_ratio,
    ),
    (
        "Time to the first token",
        "time to the first token, × the unmodified model",
        lambda method: table.cost_ratio(method, "time_to_first_token"),
    ),
    (
        "Peak memory",
        "peak memory beside the weights, × the unmodified model",
        lambda method: table.cost_ratio(method, "peak_memory"),
    ),
)
"""Heading, label of the x axis, and what stands on it, of each plot."""


def tradeoff_section(summary: Summary) -> str:
    """All curves along which visual tokens get fewer on the same axes, and the tests against a random choice."""
    found = {method.method: method for method in summary.methods}
    base, drawn = found.get(BASELINE), reducing_curves(summary)
    if base is None or not drawn:
        return _against_random(summary)
    name = summary.headline
    names = _names(drawn)
    factor = 1 if name in table.COUNTS else 100
    unit = f"{table.words(name)}, {'words' if name in table.COUNTS else '%'}"
    panels = []
    for heading, label, value in AXES:
        start = _point(base, value(base), 0, factor, name)
        made = [
            _line(curve, [found[entry] for _, entry in curve.points], value, place % SERIES + 1, factor, name)
            for place, curve in enumerate(drawn)
        ]
        whole = [line for line in made if line is not None]
        if start is not None and whole:
            panels.append(f'<div class="panel"><h3>{heading}</h3>{lines(whole, label, unit, base=start)}</div>')
    told = "The dashed line across and its point are the unmodified model; whiskers are 95 % intervals."
    if any(is_reference(curve.label) for curve in drawn):
        told += " The dashed curve drops as many visual tokens at random."
    key = legend([(0, "unmodified"), *((place % SERIES + 1, one) for place, one in enumerate(names))])
    return (
        f'<h2>Fewer visual tokens</h2><p>{told}</p>{key}<div class="plots">{"".join(panels)}</div>'
        + _against_random(summary)
    )


def _names(drawn: tuple[Curve, ...]) -> list[str]:
    """The label of each curve, with its field where another one has the same label."""
    labels = [curve.label for curve in drawn]
    return [f"{curve.label} over {curve.field}" if labels.count(curve.label) > 1 else curve.label for curve in drawn]


def _line(
    curve: Curve,
    entries: list[MethodSummary],
    value: Callable[[MethodSummary], float | None],
    series: int,
    factor: int,
    name: str,
) -> Line | None:
    points = [_point(method, value(method), series, factor, name) for method in entries if name in method.scores]
    known = sorted((point for point in points if point is not None), key=lambda point: point.x)
    return Line(tuple(known), dashed=is_reference(curve.label)) if len(known) > 1 else None


def _point(method: MethodSummary, x: float | None, series: int, factor: int, name: str) -> Point | None:
    if x is None:
        return None
    score = method.scores[name]
    tip = f"{method.method}: {table.score(name, score)}, x = {x:.4g}"
    return Point(method.method, series, x, factor * score.value, factor * score.low, factor * score.high, tip)


def _against_random(summary: Summary) -> str:
    if not summary.against_random:
        return ""
    rows = "".join(_row(summary, one) for one in summary.against_random)
    heads = "".join(f"<th>{head}</th>" for head in ("", "visual tokens", "random choice", "difference"))
    return (
        "<h2>Against a random choice</h2><p>The paired test with the entry that drops as many visual tokens at random, "
        "on the same items; p adjusted for the number of such comparisons.</p>"
        f'<div class="panel"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _row(summary: Summary, one: AgainstRandom) -> str:
    points = table.difference(summary.headline, one.difference)
    p = escape(table.probability(one.p_value))
    better = (one.difference < 0) == lower_is_better(summary.headline)
    kind = "plain" if one.no_difference_shown else "better" if better else "worse"
    told = f"{p}, not shown" if one.no_difference_shown else p
    return (
        f'<tr><td class="method">{escape(one.entry)}</td><td>{one.visual_tokens:.4g}</td>'
        f'<td>{escape(one.reference)}</td><td class="{kind}">{points} points<small>{told}</small></td></tr>'
    )
