"""The section of a report on methods in pairs: what each pair does beyond the better of its two methods."""

from __future__ import annotations

from html import escape

from sightline.benchmarks.pairs import PairEffect, parted
from sightline.benchmarks.summary import Summary
from sightline.report import table

NAMED = 6
"""Up to so many methods are named above the columns; of more of them there are only numbers."""


def matrix_section(summary: Summary) -> str:
    """A table with the first method of each pair down and the second across, and notes on what was refused; nothing
    where a run has no pairs and nothing was refused."""
    effects = {parted(effect.pair): effect for effect in summary.pairs}
    refused = {both: why for name, why in summary.refused.items() if (both := parted(name)) is not None}
    alone = {name: why for name, why in summary.refused.items() if parted(name) is None}
    singles = _singles(summary, [*effects, *refused])
    if not effects and not refused:
        notes = [f"{name}: {why}" for name, why in alone.items()]
        return f"<h2>Refused</h2>{_notes(notes)}" if notes else ""
    reasons: list[str] = []
    rows = []
    for number, first in enumerate(singles, start=1):
        cells = []
        for second in singles:
            if first == second:
                cells.append(_alone(summary, first, alone, reasons))
            elif (first, second) in effects:
                cells.append(_effect(summary, effects[first, second]))
            elif (first, second) in refused:
                cells.append(_refused(refused[first, second], reasons))
            else:
                cells.append("<td></td>")
        rows.append(f'<tr><td class="method"><b>{number}</b> {escape(first)}</td>{"".join(cells)}</tr>')
    numbered = len(singles) > NAMED
    heads = "".join(
        f"<th>{number}{'' if numbered else ' ' + escape(name)}</th>" for number, name in enumerate(singles, start=1)
    )
    name = table.words(summary.headline)
    return (
        f"<h2>Methods in pairs</h2><p>The {escape(name)} of a pair, the method of the row acting before that of the "
        "column, minus that of the better of the two alone, in points. On the diagonal the methods alone. p: paired "
        "test on the same items, adjusted for the number of pairs; from 0.05 on no difference is shown.</p>"
        f'<div class="panel matrix"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f"</table></div>{_notes(reasons)}"
    )


def _singles(summary: Summary, both: list[tuple[str, str] | None]) -> list[str]:
    """The methods of the pairs, in the order of the run, then those that the run refused."""
    used = dict.fromkeys(name for parts in both if parts is not None for name in parts)
    there = [method.method for method in summary.methods if method.method in used]
    return there + [name for name in used if name not in there]


def _alone(summary: Summary, name: str, refused: dict[str, str], reasons: list[str]) -> str:
    for method in summary.methods:
        if method.method == name:
            return f'<td class="alone">{table.number(summary.headline, method.headline.value)}<small>alone</small></td>'
    return _refused(refused.get(name, "it was not run alone"), reasons)


def _effect(summary: Summary, effect: PairEffect) -> str:
    told = table.beyond(summary, effect)
    kind = "plain" if effect.no_difference_shown else told
    points = table.difference(summary.headline, effect.difference)
    tip = escape(f"{effect.pair}: {points} beyond {effect.better}, {told}, {table.probability(effect.p_value)}")
    short = "not shown" if effect.no_difference_shown else told
    return (
        f'<td class="{kind}" title="{tip}">{points}<small>{short}, {escape(table.probability(effect.p_value))}</small>'
        "</td>"
    )


def _refused(why: str, reasons: list[str]) -> str:
    """A cell that points at the reason; equal reasons are told once."""
    if why not in reasons:
        reasons.append(why)
    number = reasons.index(why) + 1
    return f'<td class="plain">refused<sup><a href="#refused-{number}">{number}</a></sup></td>'


def _notes(reasons: list[str]) -> str:
    listed = "".join(f'<li id="refused-{number}">{escape(why)}</li>' for number, why in enumerate(reasons, start=1))
    return f'<ol class="footnotes">{listed}</ol>' if reasons else ""
