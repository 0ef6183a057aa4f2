"""Plots as SVG text: what a method costs against how good it is, how good it is against its strength, and intervals
beside a table.

Colours are CSS variables of the page (`--c` of the classes s0, s1, ...), so that a plot follows its light and dark
dress. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 330
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 14, 46
LABEL_HEIGHT = 15
CHARACTER = 6.6
"""Width of a character of a label, in pixels, on average."""
WIDE = 10.0
"""Strengths whose ends are at least this many times apart are shown in equal ratios."""


@dataclass(frozen=True)
class Point:
    """One method in a plot: where it stands, its interval on the y axis, and what is told when the mouse is on it."""

    name: str
    series: int
    x: float
    y: float
    low: float
    high: float
    tip: str


@dataclass(frozen=True)
class Scale:
    """A linear map from data to pixels, or one of equal ratios."""

    low: float
    high: float
    start: float
    end: float
    ratios: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.ratios:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that cover [low, high], at most `most` steps of 1, 2 or 5 times a power of ten apart.

    >>> ticks(71, 88), ticks(0, 1.9)
    ([70.0, 75.0, 80.0, 85.0, 90.0], [0.0, 0.5, 1.0, 1.5, 2.0])
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(step * power for step in (1, 2, 5, 10) if step * power * most >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def scatter(points: Sequence[Point], x_label: str, y_label: str, *, x_from_zero: bool = True) -> str:
    """Quality against cost: a dot with its interval for each method. The first point is the unmodified model, whose
    value and interval run across the plot."""
    xs = ticks(*_bounds([point.x for point in points], x_from_zero))
    ys = ticks(*_bounds([value for point in points for value in (point.low, point.high)], False))
    x_of = Scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    y_of = Scale(ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
    base = points[0]
    parts = [_frame(xs, ys, x_of, y_of, x_label, y_label)]
    high, low = y_of(base.high), y_of(base.low)
    parts.append(
        f'<rect class="band" x="{LEFT}" y="{high:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{low - high:.1f}"/>'
        f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(base.y):.1f}" y2="{y_of(base.y):.1f}"/>'
    )
    for point, (label_x, label_y, anchor) in zip(points, _label_places(points, x_of, y_of), strict=True):
        x, y = x_of(point.x), y_of(point.y)
        top, bottom = y_of(point.high), y_of(point.low)
        parts.append(
            f'<g class="s{point.series}"><title>{escape(point.tip)}</title>'
            f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            f'<line class="whisker" x1="{x - 4:.1f}" x2="{x + 4:.1f}" y1="{top:.1f}" y2="{top:.1f}"/>'
            f'<line class="whisker" x1="{x - 4:.1f}" x2="{x + 4:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>'
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
            f'<text class="name" x="{label_x:.1f}" y="{label_y + 4:.1f}" text-anchor="{anchor}">{escape(point.name)}'
            "</text></g>"
        )
    return "".join(parts) + "</svg>"


def curve(
    points: Sequence[Point],
    base: float,
    default: float | None,
    x_label: str,
    y_label: str,
) -> str:
    """Quality over a method's strength: a line through the points, whose intervals make a band. The unmodified model is
    a horizontal line; the default is marked where it lies among the strengths.

    Args:
        points: from the smallest strength on.
        base: what the unmodified model reaches.
        default: the method's default strength.
        x_label: what the strength is called.
        y_label: what is measured.
    """
    strengths = [point.x for point in points]
    first, last = strengths[0], strengths[-1]
    ratios = first > 0 and last / first >= WIDE
    xs = strengths if ratios else [x for x in ticks(first, last) if first <= x <= last]
    ys = ticks(*_bounds([base, *(value for point in points for value in (point.low, point.high))], False))
    x_of = Scale(first, last, LEFT + 12, WIDTH - RIGHT - 12, ratios)
    y_of = Scale(ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
    there = [(x_of(point.x), point) for point in points]
    edge = [(x, y_of(point.high)) for x, point in there] + [(x, y_of(point.low)) for x, point in reversed(there)]
    parts = [
        _frame(xs, ys, x_of, y_of, x_label, y_label),
        f'<g class="s{points[0].series}"><polygon class="range" points="{_listed(edge)}"/>',
        f'<polyline class="curve" points="{_listed([(x, y_of(point.y)) for x, point in there])}"/></g>',
        f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(base):.1f}" y2="{y_of(base):.1f}"/>',
    ]
    if default is not None and first <= default <= last:
        x = x_of(default)
        anchor = "end" if x > (LEFT + WIDTH) / 2 else "start"
        parts.append(
            f'<line class="default" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="tick" x="{x + (5 if anchor == "start" else -5):.1f}" y="{TOP + 9}" text-anchor="{anchor}">'
            "default</text>"
        )
    for x, point in there:
        parts.append(
            f'<g class="s{point.series}"><title>{escape(point.tip)}</title>'
            f'<circle class="dot" cx="{x:.1f}" cy="{y_of(point.y):.1f}" r="5"/></g>'
        )
    return "".join(parts) + "</svg>"


@dataclass(frozen=True)
class Line:
    """One of several lines in a plot: its points from left to right."""

    points: tuple[Point, ...]
    dashed: bool = False
    dots: bool = True


def lines(
    drawn: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    base: Point | None = None,
    ratios: bool = False,
    ringed: Sequence[Point] = (),
) -> str:
    """Several lines on the same axes.

    Args:
        drawn: the lines; what they are called is the caller's to say beside the plot.
        x_label: what is on the x axis.
        y_label: what is measured.
        base: the unmodified model: a point, whose value also runs across the plot.
        ratios: show x, which must be positive, in equal ratios.
        ringed: points of the lines that a ring sets apart.
    """
    points = [point for line in drawn for point in line.points] + ([base] if base else [])
    if ratios:
        edges = (min(point.x for point in points) / 1.25, max(point.x for point in points) * 1.25)
        xs = ratio_ticks(*edges)
    else:
        xs = ticks(*_bounds([point.x for point in points], True))
        edges = (xs[0], xs[-1])
    ys = ticks(*_bounds([value for point in points for value in (point.low, point.high)], False))
    x_of = Scale(*edges, LEFT, WIDTH - RIGHT, ratios)
    y_of = Scale(ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
    parts = [_frame(xs, ys, x_of, y_of, x_label, y_label)]
    if base is not None:
        y = y_of(base.y)
        parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for line in drawn:
        places = [(x_of(point.x), y_of(point.y)) for point in line.points]
        parts.append(
            f'<g class="s{line.points[0].series}"><polyline class="curve{" dashed" * line.dashed}" '
            f'points="{_listed(places)}"/>{"".join(_whisker(point, x_of, y_of) for point in line.points)}</g>'
        )
    for point in [point for line in drawn if line.dots for point in line.points] + ([base] if base else []):
        parts.append(
            f'<g class="s{point.series}"><title>{escape(point.tip)}</title>'
            f'<circle class="dot" cx="{x_of(point.x):.1f}" cy="{y_of(point.y):.1f}" r="4.5"/></g>'
        )
    for point in ringed:
        parts.append(f'<circle class="ring" cx="{x_of(point.x):.1f}" cy="{y_of(point.y):.1f}" r="8"/>')
    return "".join(parts) + "</svg>"


def ratio_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside [low, high], or the powers alone where that would be many.

    >>> ratio_ticks(0.8, 30), ratio_ticks(2, 30_000)
    ([1.0, 2.0, 5.0, 10.0, 20.0], [10.0, 100.0, 1000.0, 10000.0])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        inside = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(inside) <= 7:
            break
    return inside


def _whisker(point: Point, x_of: Scale, y_of: Scale) -> str:
    if point.low == point.high:
        return ""
    x = x_of(point.x)
    return f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{y_of(point.high):.1f}" y2="{y_of(point.low):.1f}"/>'


def legend(names: Sequence[tuple[int, str]]) -> str:
    """What the colours of a plot's lines stand for: (series, name)."""
    told = "".join(f'<span class="s{series}"><i class="key"></i>{escape(name)}</span>' for series, name in names)
    return f'<p class="legend">{told}</p>'


def _frame(xs: Sequence[float], ys: Sequence[float], x_of: Scale, y_of: Scale, x_label: str, y_label: str) -> str:
    """The start of a plot: its grid, ticks and what its axes are called."""
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} against '
        f'{escape(x_label)}">'
    ]
    for tick in ys:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    free = -math.inf  # where the next number on the x axis may begin
    for tick in xs:
        x, half = x_of(tick), CHARACTER * len(f"{tick:g}") / 2
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        if x - half >= free:
            at = f'x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}"'
            parts.append(f'<text class="tick" {at} text-anchor="middle">{tick:g}</text>')
            free = x + half + 4
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="axis" transform="translate(13 {middle_y}) rotate(-90)" text-anchor="middle">{escape(y_label)}'
        "</text>"
    )
    return "".join(parts)


def _listed(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def interval(value: float, low: float, high: float, bounds: tuple[float, float], base: float, series: int) -> str:
    """A dot and its interval on a line that all rows of a table share; a vertical stroke marks the unmodified model."""
    x_of = Scale(*bounds, 6, 194)
    return (
        f'<svg class="interval s{series}" viewBox="0 0 200 22" aria-hidden="true">'
        '<line class="grid" x1="0" x2="200" y1="11" y2="11"/>'
        f'<line class="base" x1="{x_of(base):.1f}" x2="{x_of(base):.1f}" y1="1" y2="21"/>'
        f'<line class="whisker" x1="{x_of(low):.1f}" x2="{x_of(high):.1f}" y1="11" y2="11"/>'
        f'<circle class="dot" cx="{x_of(value):.1f}" cy="11" r="5"/></svg>'
    )


def _bounds(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    return (0.0 if from_zero else low - margin), high + margin


def _label_places(points: Sequence[Point], x_of: Scale, y_of: Scale) -> list[tuple[float, float, str]]:
    """Where each name goes: right of its dot, or left of it near the right edge, moved up or down until it covers no
    dot, no interval and no other name."""
    dots = [(x_of(point.x) - 7, y_of(point.y) - 7, x_of(point.x) + 7, y_of(point.y) + 7) for point in points]
    lines = [(x_of(point.x) - 5, y_of(point.high), x_of(point.x) + 5, y_of(point.low)) for point in points]
    taken: list[tuple[float, float, float, float]] = []
    places = []
    for point in points:
        x, y = x_of(point.x), y_of(point.y)
        width = CHARACTER * len(point.name)
        sides = [(x + 10, x + 10 + width, "start"), (x - 10 - width, x - 10, "end")]
        sides = [side for side in sides if side[0] >= LEFT and side[1] <= WIDTH] or sides[:1]
        shifts = [sign * LABEL_HEIGHT * step / 2 for step in range(16) for sign in (-1, 1)]
        options = [
            (left, min(max(y + shift, TOP + 6), HEIGHT - BOTTOM - 6), right, anchor)
            for shift in shifts
            for left, right, anchor in sides
        ]
        boxes = [(left, at - LABEL_HEIGHT / 2, right, at + LABEL_HEIGHT / 2) for left, at, right, _ in options]
        free = [
            option
            for option, box in zip(options, boxes, strict=True)
            if not any(_meet(box, b) for b in dots + taken + lines)
        ]
        left, at, right, anchor = (free or options)[0]
        taken.append((left, at - LABEL_HEIGHT / 2, right, at + LABEL_HEIGHT / 2))
        places.append((left if anchor == "start" else right, at, anchor))
    return places


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
