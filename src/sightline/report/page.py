"""The report of a run: one HTML file that needs nothing else, with its style, plots and pictures inside."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from sightline.benchmarks.costs import BASELINE
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.summary import MethodSummary, Summary, benchmark_of, summarise
from sightline.errors import InputError
from sightline.files import write_whole
from sightline.report import table
from sightline.report.examples import card, choose
from sightline.report.plots import Point, interval, scatter

SERIES = 8
"""Colours besides that of the unmodified model; with more methods they begin again."""


def write_report(folder: Path) -> Path:
    """Writes `report.html` into the folder of a run and returns its path.

    Raises:
        InputError: if the folder holds no run or one without answers, or the file cannot be written.
    """
    out = folder / "report.html"
    write_whole(out, page(summarise(folder)))
    return out


def page(summary: Summary) -> str:
    """The whole HTML document. Everything in it that comes from a run, a model or a file is escaped."""
    style = importlib.resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    series = _series(summary)
    body = "".join(
        (
            _header(summary),
            _comparison(summary, series),
            _plots(summary, series),
            _examples(summary, series),
            _all_scores(summary),
            _how(summary),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(table.title(summary))}</title><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def verdict(summary: Summary) -> str:
    """What the comparison says, in a sentence or two."""
    others = [method for method in summary.methods if method.p_value is not None]
    if not others:
        return "Only the unmodified model was run, so there is nothing to compare."
    base = summary.methods[0].headline.value
    sign = -1 if lower_is_better(summary.headline) else 1
    shown = [method for method in others if not method.no_difference_shown]
    better = [method.method for method in shown if sign * (method.headline.value - base) > 0]
    worse = [method.method for method in shown if sign * (method.headline.value - base) <= 0]
    rest = [method.method for method in others if method.no_difference_shown]
    name = _words(summary.headline)
    told = []
    if better:
        told.append(f"Better than the unmodified model in {name}: {_listed(better)}.")
    if worse:
        told.append(f"{'Worse' if better else f'Worse than the unmodified model in {name}'}: {_listed(worse)}.")
    if rest:
        told.append(f"No difference shown: {_listed(rest)}.")
    return " ".join(told)


def lower_is_better(name: str) -> bool:
    """Whether a score is the better the lower it is (CHAIR, and what could not be read)."""
    return name == "unparsed" or ("chair" in name and not name.endswith("recall"))


def _header(summary: Summary) -> str:
    settings = summary.settings
    facts = {
        "model": settings["model"],
        "split": settings["split"],
        "items": settings["item_count"],
        "seed": settings["seed"],
        "attention": settings["attention"],
        "precision": settings["dtype"],
    }
    listed = "".join(f"<li>{name} <b>{escape(str(value))}</b></li>" for name, value in facts.items())
    return (
        '<header><p class="product">Sightline</p>'
        f"<h1>{escape(Path(settings['model']).name)} on {escape(settings['benchmark'])}</h1>"
        f'<p class="lead">{escape(verdict(summary))}</p><ul class="facts">{listed}</ul></header>'
    )


def _comparison(summary: Summary, series: dict[str, int]) -> str:
    name = summary.headline
    lows = [method.headline.low for method in summary.methods]
    highs = [method.headline.high for method in summary.methods]
    span = (max(highs) - min(lows)) or 1.0
    bounds = (min(lows) - 0.03 * span, max(highs) + 0.03 * span)
    base = summary.methods[0].headline.value
    rows = []
    for method in summary.methods:
        found = method.headline
        key = series[method.method]
        rows.append(
            f'<tr><td class="method s{key}"><i class="key"></i>{escape(method.method)}</td>'
            f"<td>{table.number(name, found.value)}<small>{table.number(name, found.low)} to "
            f"{table.number(name, found.high)}</small></td>"
            f"<td>{interval(found.value, found.low, found.high, bounds, base, key)}</td>"
            f"{_p_cell(method, base, lower_is_better(name))}"
            f"<td>{_tokens(method)}</td>" + "".join(f"<td>{_cost(method, cost)}</td>" for cost in table.COSTS) + "</tr>"
        )
    heads = ("", f"{_words(name)}, %", "95 % interval", "paired test", "visual tokens", "first token", "each further")
    head = "".join(f"<th>{escape(text)}</th>" for text in (*heads, "peak memory"))
    return (
        "<h2>The comparison</h2><p>All methods answered the same items. The dashed stroke is the unmodified model; "
        "ratios are to it, measured in the same rounds.</p>"
        f'<div class="panel"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _p_cell(method: MethodSummary, base: float, low_is_good: bool) -> str:
    if method.p_value is None:
        return '<td class="plain">—</td>'
    p = "p < 0.001" if method.p_value < 0.001 else f"p = {method.p_value:.3f}"
    if method.no_difference_shown:
        return f'<td class="plain">no difference shown<small>{p}</small></td>'
    better = (method.headline.value < base) if low_is_good else (method.headline.value > base)
    points = 100 * (method.headline.value - base)
    return f'<td class="{"better" if better else "worse"}">{_signed(points)} points<small>{escape(p)}</small></td>'


def _tokens(method: MethodSummary) -> str:
    if method.visual_tokens is None or method.visual_tokens_given is None:
        return "—"
    kept, given = f"{method.visual_tokens:.4g}", f"{method.visual_tokens_given:.4g}"
    return _with_ratio(kept if kept == given else f"{kept} of {given}", table.token_ratio(method), method)


def _cost(method: MethodSummary, name: str) -> str:
    if method.cost is None:
        return "—"
    value = getattr(method.cost, name)
    plain = table.memory(value) if name == "peak_memory" else table.milliseconds(value)
    return _with_ratio(plain, method.cost.ratio[name], method)


def _with_ratio(plain: str, ratio: float | None, method: MethodSummary) -> str:
    if ratio is None or method.method == BASELINE:
        return escape(plain)
    return f"{escape(plain)}<small>× {ratio:.2f}</small>"


def _plots(summary: Summary, series: dict[str, int]) -> str:
    if len(summary.methods) < 2:
        return ""
    name = _words(summary.headline)
    axes: tuple[tuple[str, str, Callable[[MethodSummary], float | None]], ...] = (
        ("Visual tokens", "visual tokens that reach the decoder", lambda m: m.visual_tokens),
        (
            "Time to the first token",
            "time to the first token, ms",
            lambda m: 1e3 * m.cost.time_to_first_token if m.cost else None,
        ),
        (
            "Time for each further token",
            "time for each further token, ms",
            lambda m: 1e3 * m.cost.time_per_token if m.cost else None,
        ),
        ("Peak memory", "peak memory beside the weights, MB", lambda m: m.cost.peak_memory / 1e6 if m.cost else None),
    )
    plots = []
    for heading, label, value in axes:
        found = [(method, value(method)) for method in summary.methods]
        points = [_point(summary, method, x, series[method.method]) for method, x in found if x is not None]
        if len(points) > 1:
            better = "lower" if lower_is_better(summary.headline) else "upper"
            plots.append(f'<div class="panel"><h3>{heading}</h3>{scatter(points, label, f"{name}, %")}</div>')
    if not plots:
        return ""
    return (
        f"<h2>Quality against cost</h2><p>Towards the {better} left is better. Whiskers are 95 % intervals; the "
        f'band is that of the unmodified model.</p><div class="plots">{"".join(plots)}</div>'
    )


def _point(summary: Summary, method: MethodSummary, x: float, series: int) -> Point:
    found = method.headline
    tip = f"{method.method}: {table.score(summary.headline, found)}, x = {x:.4g}"
    return Point(method.method, series, x, 100 * found.value, 100 * found.low, 100 * found.high, tip)


def _examples(summary: Summary, series: dict[str, int]) -> str:
    rows = [row for row in RunFolder(summary.folder).rows() if row["method"] in series]
    try:
        chosen = choose(benchmark_of(summary.settings), summary.settings, rows)
    except InputError as error:
        return f'<h2>Examples</h2><p class="missing">The pictures cannot be had any more: {escape(str(error))}</p>'
    if not chosen:
        return ""
    kept = any(row.get("grid") for example in chosen for row in example.rows.values())
    told = "Items on which the methods differ come first." if any(example.differ for example in chosen) else ""
    if kept:
        told += " Where a method drops visual tokens, the patches that it kept are outlined and the others dimmed."
    cards = "".join(card(example, series) for example in chosen)
    return f'<h2>Examples</h2><p>{told}</p><div class="cards">{cards}</div>'


def _all_scores(summary: Summary) -> str:
    names = list(dict.fromkeys(name for method in summary.methods for name in method.scores))
    head = "".join(f"<th>{escape(method.method)}</th>" for method in summary.methods)
    rows = []
    for name in names:
        cells = []
        for method in summary.methods:
            found = method.scores.get(name)
            if found is None:
                cells.append("<td>—</td>")
                continue
            low, high = table.number(name, found.low), table.number(name, found.high)
            cells.append(f"<td>{table.number(name, found.value)}<small>{low} to {high}</small></td>")
        unit = ", words" if name in table.COUNTS else ", %"
        rows.append(f"<tr><td>{escape(_words(name))}{unit}</td>{''.join(cells)}</tr>")
    return (
        "<h2>All scores</h2><p>With 95 % intervals.</p>"
        f'<div class="panel scores"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def _how(summary: Summary) -> str:
    settings: dict[str, Any] = dict(summary.settings)
    shown = {**settings, **{f"machine: {name}": value for name, value in summary.machine.items()}}
    listed = "".join(
        f"<dt>{escape(_words(name))}</dt><dd>{escape(_plain(value))}</dd>" for name, value in shown.items()
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes(summary))
    return (
        f'<h2>How this was measured</h2><ul class="notes">{notes}</ul><div class="panel"><dl>{listed}</dl></div>'
        "<footer>Made by sightline from the files of the run; giving the same command again makes the same answers."
        "</footer>"
    )


def _series(summary: Summary) -> dict[str, int]:
    """Method -> the number of its colour; 0 is the unmodified model's."""
    others = [method.method for method in summary.methods if method.method != BASELINE]
    return {BASELINE: 0} | {name: place % SERIES + 1 for place, name in enumerate(others)}


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _words(name: str) -> str:
    """A name as people write it."""
    for plain, known in (("chair", "CHAIR"), ("auroc", "AUROC"), ("f1", "F1")):
        name = name.replace(plain, known)
    return "all skills" if name == "all" else re.sub("_(?![si]$)", " ", name)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items() if part not in (None, ""))
    return "—" if value is None else value if isinstance(value, str) else json.dumps(value)
