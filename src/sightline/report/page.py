"""The report of a run: one HTML file that needs nothing else, with its style, plots and pictures inside."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from sightline.benchmarks.changes import lower_is_better
from sightline.benchmarks.costs import BASELINE
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.summary import MethodSummary, Summary, benchmark_of, summarise
from sightline.errors import InputError
from sightline.files import write_whole
from sightline.report import table
from sightline.report.curves import curves_section
from sightline.report.examples import card, choose
from sightline.report.matrix import matrix_section
from sightline.report.plots import Point, interval, scatter
from sightline.report.table import listed, words
from sightline.report.tradeoff import tradeoff_section

SERIES = 8
"""Colours besides that of the unmodified model; with more methods they begin again."""
NAMED = 10
"""Up to so many methods are named in the plots; of more of them there are only numbers."""


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
            matrix_section(summary),
            tradeoff_section(summary),
            curves_section(summary, series),
            _costs(summary, series),
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
    name = words(summary.headline)
    told = []
    if better:
        told.append(f"Better than the unmodified model in {name}: {listed(better)}.")
    if worse:
        told.append(f"{'Worse' if better else f'Worse than the unmodified model in {name}'}: {listed(worse)}.")
    if rest:
        told.append(f"No difference shown: {listed(rest)}.")
    return " ".join(told)


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
    told = "".join(f"<li>{name} <b>{escape(str(value))}</b></li>" for name, value in facts.items())
    return (
        '<header><p class="product">Sightline</p>'
        f"<h1>{escape(Path(settings['model']).name)} on {escape(settings['benchmark'])}</h1>"
        f'<p class="lead">{escape(verdict(summary))}</p><ul class="facts">{told}</ul></header>'
    )


def _comparison(summary: Summary, series: dict[str, int]) -> str:
    name = summary.headline
    lows = [method.headline.low for method in summary.methods]
    highs = [method.headline.high for method in summary.methods]
    span = (max(highs) - min(lows)) or 1.0
    bounds = (min(lows) - 0.03 * span, max(highs) + 0.03 * span)
    base = summary.methods[0].headline.value
    rows = []
    telling = any(method.change for method in summary.methods)
    for place, method in enumerate(summary.methods):
        found = method.headline
        key = series[method.method]
        rows.append(
            f"<tr>{_method_cell(summary, place, series)}"
            f"<td>{table.number(name, found.value)}<small>{table.number(name, found.low)} to "
            f"{table.number(name, found.high)}</small></td>"
            f"<td>{interval(found.value, found.low, found.high, bounds, base, key)}</td>"
            f"{_p_cell(method, base, lower_is_better(name))}"
            + (_change_cell(method) if telling else "")
            + f"<td>{_tokens(method)}</td></tr>"
        )
    changes = ["what changed"] * telling
    heads = ("", f"{words(name)}, %", "95 % interval", "paired test", *changes, "visual tokens")
    told = " What changed is told from the tests of all scores." if telling else ""
    return (
        "<h2>The comparison</h2><p>All methods answered the same items. The dashed stroke is the unmodified model."
        f"{told}</p>{_table(heads, rows)}"
    )


def _table(heads: tuple[str, ...], rows: list[str], kind: str = "panel") -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(rows)
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _method_cell(summary: Summary, place: int, series: dict[str, int]) -> str:
    """The name of a method with its colour, and with its number where the plots show numbers."""
    name = summary.methods[place].method
    number = f"<b>{place}</b> " if len(summary.methods) > NAMED else ""
    return f'<td class="method s{series[name]}"><i class="key"></i>{number}{escape(name)}</td>'


def _change_cell(method: MethodSummary) -> str:
    if method.change is None:
        return '<td class="plain">—</td>'
    parts = [
        f"{what}: {', '.join(map(words, getattr(method.change, what)))}"
        for what in ("better", "worse", "moved")
        if getattr(method.change, what)
    ]
    plain = "" if parts else " plain"
    told = f"<small>{escape('; '.join(parts))}</small>" if parts else ""
    return f'<td class="change{plain}">{escape(method.change.kind)}{told}</td>'


def _costs(summary: Summary, series: dict[str, int]) -> str:
    present = table.costs_present(summary)
    if not present:
        return ""
    rows = [
        f"<tr>{_method_cell(summary, place, series)}"
        + "".join(f"<td>{_cost(method, name)}</td>" for name in present)
        + "</tr>"
        for place, method in enumerate(summary.methods)
    ]
    told = ["Medians at batch size 1; ratios are to the unmodified model, measured in the same rounds."]
    if "time_per_answer" in present:
        told.append("A whole answer goes from the question to the answer as text and ends where it ends.")
    if "calls" in present:
        told.append("Calls are what the model was asked for one answer.")
    if "prefill_tokens" in present:
        told.append("Tokens read are what the language model reads of prompts for one answer, all rows counted.")
    return f"<h2>What it costs</h2><p>{' '.join(told)}</p>" + _table(
        ("", *(table.COST_NAMES[name] for name in present)), rows
    )


def _p_cell(method: MethodSummary, base: float, low_is_good: bool) -> str:
    if method.p_value is None:
        return '<td class="plain">—</td>'
    p = escape(table.probability(method.p_value))
    if method.no_difference_shown:
        return f'<td class="plain">no difference shown<small>{p}</small></td>'
    better = (method.headline.value < base) if low_is_good else (method.headline.value > base)
    points = table.signed(100 * (method.headline.value - base))
    return f'<td class="{"better" if better else "worse"}">{points} points<small>{p}</small></td>'


def _tokens(method: MethodSummary) -> str:
    if method.visual_tokens is None or method.visual_tokens_given is None:
        return "—"
    kept, given = f"{method.visual_tokens:.4g}", f"{method.visual_tokens_given:.4g}"
    return _with_ratio(kept if kept == given else f"{kept} of {given}", table.token_ratio(method), method)


def _cost(method: MethodSummary, name: str) -> str:
    plain = table.plain_cost(method, name)
    return _with_ratio(plain, table.cost_ratio(method, name), method) if plain else "—"


def _with_ratio(plain: str, ratio: float | None, method: MethodSummary) -> str:
    if ratio is None or method.method == BASELINE:
        return escape(plain)
    return f"{escape(plain)}<small>× {ratio:.2f}</small>"


def _plots(summary: Summary, series: dict[str, int]) -> str:
    if len(summary.methods) < 2:
        return ""
    name = words(summary.headline)
    axes: tuple[tuple[str, str, Callable[[MethodSummary], float | None]], ...] = (
        ("Visual tokens", "visual tokens that reach the decoder", lambda m: m.visual_tokens),
        ("Time to the first token", "time to the first token, ms", _scaled("time_to_first_token", 1e3)),
        ("Time for each further token", "time for each further token, ms", _scaled("time_per_token", 1e3)),
        ("Time for a whole answer", "time for a whole answer, ms", _scaled("time_per_answer", 1e3)),
        ("Tokens read", "prompt tokens read for one answer", _scaled("prefill_tokens", 1.0)),
        ("Peak memory", "peak memory beside the weights, MB", _scaled("peak_memory", 1e-6)),
    )
    plots = []
    numbered = len(summary.methods) > NAMED
    for heading, label, value in axes:
        found = [(place, method, value(method)) for place, method in enumerate(summary.methods)]
        points = [
            _point(summary, method, x, series[method.method], str(place) if numbered else method.method)
            for place, method, x in found
            if x is not None
        ]
        if len(points) > 1:
            better = "lower" if lower_is_better(summary.headline) else "upper"
            plots.append(f'<div class="panel"><h3>{heading}</h3>{scatter(points, label, f"{name}, %")}</div>')
    if not plots:
        return ""
    told = " The numbers are those of the tables above." if numbered else ""
    return (
        f"<h2>Quality against cost</h2><p>Towards the {better} left is better. Whiskers are 95 % intervals; the "
        f'band is that of the unmodified model.{told}</p><div class="plots">{"".join(plots)}</div>'
    )


def _scaled(name: str, factor: float) -> Callable[[MethodSummary], float | None]:
    """A cost of a method in the unit of a plot."""

    def value(method: MethodSummary) -> float | None:
        found = getattr(method.cost, name) if method.cost else None
        return None if found is None else factor * found

    return value


def _point(summary: Summary, method: MethodSummary, x: float, series: int, name: str) -> Point:
    found = method.headline
    tip = f"{method.method}: {table.score(summary.headline, found)}, x = {x:.4g}"
    return Point(name, series, x, 100 * found.value, 100 * found.low, 100 * found.high, tip)


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
    methods = summary.methods
    names = list(dict.fromkeys(name for method in methods for name in method.scores))
    unit = {name: f"{words(name)}, {'words' if name in table.COUNTS else '%'}" for name in names}
    if len(methods) <= table.ACROSS:
        heads = ("", *(method.method for method in methods))
        rows = [
            f"<tr><td>{escape(unit[name])}</td>{''.join(_score_cell(method, name) for method in methods)}</tr>"
            for name in names
        ]
    else:
        heads = ("", *unit.values())
        rows = [
            f'<tr><td class="method">{escape(method.method)}</td>'
            f"{''.join(_score_cell(method, name) for name in names)}</tr>"
            for method in methods
        ]
    tested = (
        " p: paired test against the unmodified model, adjusted for the number of methods, for each score by itself."
        if any(method.p_values for method in methods)
        else ""
    )
    return f"<h2>All scores</h2><p>With 95 % intervals.{tested}</p>{_table(heads, rows, 'panel scores')}"


def _score_cell(method: MethodSummary, name: str) -> str:
    found = method.scores.get(name)
    if found is None:
        return "<td>—</td>"
    told = f"{table.number(name, found.low)} to {table.number(name, found.high)}"
    p = method.p_values.get(name)
    tested = "" if p is None else f"<small>{escape(table.probability(p))}</small>"
    return f"<td>{table.number(name, found.value)}<small>{told}</small>{tested}</td>"


def _how(summary: Summary) -> str:
    settings: dict[str, Any] = dict(summary.settings)
    shown = {**settings, **{f"machine: {name}": value for name, value in summary.machine.items()}}
    rows = "".join(f"<dt>{escape(words(name))}</dt><dd>{escape(_plain(value))}</dd>" for name, value in shown.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes(summary))
    return (
        f'<h2>How this was measured</h2><ul class="notes">{notes}</ul><div class="panel"><dl>{rows}</dl></div>'
        "<footer>Made by sightline from the files of the run; giving the same command again makes the same answers."
        "</footer>"
    )


def _series(summary: Summary) -> dict[str, int]:
    """Method -> the number of its colour; 0 is the unmodified model's."""
    others = [method.method for method in summary.methods if method.method != BASELINE]
    return {BASELINE: 0} | {name: place % SERIES + 1 for place, name in enumerate(others)}


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items() if part not in (None, ""))
    return "—" if value is None else value if isinstance(value, str) else json.dumps(value)
