"""The scaling law's fits as a table, as lines for programs and as a page with plots, the published ones beside them."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sightline.probes.scaling_law import (
    BILLION,
    LEVEL,
    PUBLISHED,
    REPEATS,
    Cells,
    Fit,
    fit,
    inference_flops,
    pareto,
    published,
)
from sightline.report.plots import Line, Point, legend, lines

PAPERS_TEXT = 50
"""The text tokens that the paper draws its curves for."""
HEADS = ("errors of", "cells", "alpha", "beta", "alpha / beta", "A", "D", "best T", "alpha > beta")
ERROR = "error, %"


@dataclass(frozen=True)
class Result:
    """A fit and what it is of.

    Attributes:
        name: what was asked.
        cells: the measured errors; the parameters are in billions.
        fit: the law.
        text_tokens: Q, for the best number of visual tokens.
        given: exponents (alpha, beta) that the paper gives for the same.
        ours: whether it was measured here.
    """

    name: str
    cells: Cells
    fit: Fit
    text_tokens: float
    given: tuple[float, float] | None
    ours: bool


def published_results(repeats: int = REPEATS) -> list[Result]:
    """The refits of the released tables."""
    tables = [published(name) for name in PUBLISHED]
    return [
        Result(f"paper: {one.name}", one.cells, fit(one.cells, repeats=repeats), PAPERS_TEXT, one.exponents, False)
        for one in tables
    ]


def grid_results(
    cells: dict[str, list[tuple[float, float, float]]], text_tokens: float, repeats: int = REPEATS
) -> list[Result]:
    """The fits to a grid: kind of question -> (parameters, visual tokens, error) of each cell.

    Raises:
        InputError: where there are too few cells.
    """
    made = []
    for name, rows in cells.items():
        own = Cells.of((parameters / BILLION, tokens, error) for parameters, tokens, error in rows)
        made.append(Result(name, own, fit(own, repeats=repeats), text_tokens, None, True))
    return made


def table(results: Sequence[Result]) -> Table:
    """One line a fit, and one for the exponents that the paper gives."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    for place, head in enumerate(HEADS):
        made.add_column(head, justify="right" if place else "left", overflow="fold")
    for row in _rows(results):
        made.add_row(*(cell.replace(" [", "\n[") for cell in row))
    return made


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader has to know to trust the numbers, a sentence each."""
    told = [
        "Error = A / N^alpha / T^beta + D, N billions of parameters in the decoder's layers (in the paper: in all of "
        "the decoder), T visual tokens; A and D at least 0.",
        f"Brackets: {100 * LEVEL:.0f} % interval of a residual bootstrap. alpha > beta: in what share of its fits; "
        "there larger decoders do more than more visual tokens.",
        "best T: the visual tokens of the least error at given operations 2 N (Q + T), within what was measured; text "
        f"tokens Q: {', '.join(f'{q:.4g}' for q in dict.fromkeys(result.text_tokens for result in results))}.",
    ]
    flat = [result.name for result in results if (edges := result.fit.interval("floor")) and edges[1] > 2 * edges[0]]
    if flat:
        told.append(f"D is hardly determined by these errors: {', '.join(flat)}.")
    return told


def as_dict(result: Result) -> dict[str, Any]:
    """What `--json` prints of one fit; what is infinite is null."""
    law, own = result.fit.law, result.fit
    return {
        "errors_of": result.name,
        "cells": own.cells,
        **{name: _finite(getattr(law, name)) for name in ("scale", "alpha", "beta", "floor", "ratio")},
        "intervals": {
            name: None if (found := own.interval(name)) is None else [_finite(edge) for edge in found]
            for name in ("scale", "alpha", "beta", "floor", "ratio")
        },
        "squares": own.squares,
        "text_tokens": result.text_tokens,
        "best_tokens": law.best_tokens(result.text_tokens, *_range(result)),
        "larger_models": own.larger_models(),
        "given_exponents": result.given,
    }


def page(results: Sequence[Result]) -> str:
    """The whole HTML document: the table, and for each fit its errors over the cost, without and with text."""
    style = importlib.resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    rows = "".join(
        f'<tr><td class="method">{escape(row[0])}</td>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in _rows(results)
    )
    heads = "".join(f"<th>{escape(head)}</th>" for head in HEADS)
    told = "".join(f"<li>{escape(note)}</li>" for note in notes(results))
    sections = "".join(_section(result) for result in results)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Larger decoders or more visual tokens</title><style>{style}</style></head><body><main>"
        '<header><p class="product">Sightline</p><h1>Larger decoders or more visual tokens</h1>'
        f'<p class="lead">{escape(_verdict(results))}</p></header>'
        f'<h2>The law</h2><div class="panel scores"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        f'</div><ul class="notes">{told}</ul>{sections}</main></body></html>\n'
    )


def _verdict(results: Sequence[Result]) -> str:
    """Which errors fall faster with parameters, which with visual tokens, where the bootstrap is sure of it."""
    parts: dict[str, list[str]] = {}
    for result in results:
        share = result.fit.larger_models()
        if share is not None:
            edge = (1 - LEVEL) / 2
            word = (
                "larger decoders" if share >= 1 - edge else "more visual tokens" if share <= edge else "neither shown"
            )
            parts.setdefault(word, []).append(result.name)
    return ". ".join(f"What does more: {word} for {', '.join(names)}" for word, names in parts.items()) + "."


def _rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for result in results:
        if result.given is not None:
            alpha, beta = result.given
            ratio = f"{alpha / beta:.3g}"
            rows.append((f"{result.name}, as given", "", f"{alpha:g}", f"{beta:g}", ratio, "", "", "", ""))
        own, law = result.fit, result.fit.law
        share = own.larger_models()
        best = law.best_tokens(result.text_tokens, *_range(result))
        rows.append(
            (
                f"{result.name}, refitted" if result.given else result.name,
                str(own.cells),
                *(_with_interval(own, name, digits) for name, digits in (("alpha", 3), ("beta", 4), ("ratio", 2))),
                f"{law.scale:.3g}",
                _with_interval(own, "floor", 3),
                _bracketed(f"{best:.3g}", own.best_tokens(result.text_tokens, *_range(result)), 0),
                "" if share is None else f"{100 * share:.0f} %",
            )
        )
    return rows


def _with_interval(own: Fit, name: str, digits: int) -> str:
    return _bracketed(f"{getattr(own.law, name):.{digits}f}", own.interval(name), digits)


def _bracketed(text: str, edges: tuple[float, float] | None, digits: int) -> str:
    return text if edges is None else f"{text} [{edges[0]:.{digits}f}, {edges[1]:.{digits}f}]"


def _range(result: Result) -> tuple[float, float]:
    """The fewest and the most visual tokens that were measured."""
    return float(result.cells.tokens.min()), float(result.cells.tokens.max())


def _section(result: Result) -> str:
    sizes = sorted(set(result.cells.parameters.tolist()))
    names = [(place + 1, _size(size)) for place, size in enumerate(sizes)]
    panels = "".join(
        f'<div class="panel"><h3>{escape(heading)}</h3>{_plot(result, sizes, text)}</div>'
        for text, heading in (
            (0.0, "Text read beforehand (Q = 0)"),
            (result.text_tokens, f"Q = {result.text_tokens:.4g}"),
        )
    )
    kind = "measured here" if result.ours else "as released by the authors"
    return (
        f"<h2>{escape(result.name)}</h2><p>Errors {kind}; a line for each size, from few visual tokens on the left to "
        "many. Dashed is the law. Rings are what nothing cheaper beats.</p>"
        f'{legend(names)}<div class="plots">{panels}</div>'
    )


def _plot(result: Result, sizes: Sequence[float], text_tokens: float) -> str:
    cells, law = result.cells, result.fit.law
    costs = inference_flops(BILLION, text_tokens, 1.0) * cells.parameters  # of a single visual token
    unit, divisor = _unit(float(costs.max()))
    drawn, points = [], []
    for series, size in enumerate(sizes, start=1):
        mine = cells.parameters == size
        own, curve = [], []
        for tokens in sorted(set(cells.tokens[mine].tolist())):
            error = float(np.mean(cells.errors[mine & (cells.tokens == tokens)]))
            cost = inference_flops(BILLION * size, text_tokens, tokens) / divisor
            tip = f"{_size(size)}, {tokens:g} visual tokens: error {100 * error:.1f} %"
            own.append(Point(_size(size), series, cost, 100 * error, 100 * error, 100 * error, tip))
            expected = 100 * float(law.error(size, tokens))
            curve.append(Point("", series, cost, expected, expected, expected, ""))
        drawn += [Line(tuple(own)), Line(tuple(curve), dashed=True, dots=False)]
        points += own
    front = [points[place] for place in pareto([(point.x, point.y) for point in points])]
    return lines(drawn, f"operations of the decoder for a prompt, {unit}", ERROR, ratios=True, ringed=front)


def _unit(most: float) -> tuple[str, float]:
    """The unit in which the largest cost is a number of a few digits."""
    power = min(max(3 * math.floor(math.log10(most) / 3), 6), 12)
    return {6: "millions", 9: "billions", 12: "trillions"}[power], 10.0**power


def _size(billions: float) -> str:
    """Parameters as people write them: 7 B, 1.85 M, 69 k."""
    for unit, factor in (("B", 1.0), ("M", 1e3), ("k", 1e6)):
        if billions * factor >= 0.5:
            return f"{billions * factor:.3g} {unit}"
    return f"{billions * BILLION:.0f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
