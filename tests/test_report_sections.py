"""The sections of a report on pairs, strengths, changes and costs, from summaries made by hand."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import EVIL, KEPT, Checked, make_run
from test_summary import own_margins, pope_rows, write_run

from sightline.benchmarks.changes import Change
from sightline.benchmarks.costs import Cost
from sightline.benchmarks.item import Item, Score, get_benchmark
from sightline.benchmarks.pairs import PairEffect, pairs
from sightline.benchmarks.pope import Pope
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.summary import MethodSummary, Summary, summarise
from sightline.report import table
from sightline.report.curves import curves_section
from sightline.report.examples import Example, card
from sightline.report.matrix import matrix_section
from sightline.report.page import _change_cell, _costs, page, write_report
from sightline.report.plots import BOTTOM, HEIGHT, TOP, Point, curve


def method(name: str, value: float, *, auroc: float | None = None, cost: Cost | None = None, **more: Any) -> Any:
    scores = {"accuracy": Score(value, value - 0.05, value + 0.04, 100)}
    if auroc is not None:
        scores["auroc"] = Score(auroc, auroc - 0.1, auroc + 0.1, 100)
    p = None if name == "none" else 1.0
    return MethodSummary(name, 100, 0, scores, p, 10, 100, 0.0, 0.0, cost, **more)


def summary(*methods: MethodSummary, **more: Any) -> Summary:
    settings = {"model": "m", "benchmark": "pope", "split": "s", "item_count": 100, "dtype": "float32", "device": "cpu"}
    settings |= {"attention": "sdpa", "seed": 0}
    return Summary(Path("runs/x"), settings, {"processor": "p", "threads": 2, "gpu": None}, "pope", methods, **more)


# --- Pairs ---


def cells(html: str) -> list[list[str]]:
    """The body of the first table, tags taken out."""
    body = re.search(r"<tbody>(.*?)</tbody>", html, re.DOTALL)
    assert body is not None
    rows = re.findall(r"<tr>(.*?)</tr>", body[1])
    return [[re.sub("<[^>]*>", " ", cell).strip() for cell in re.findall(r"<td.*?</td>", row)] for row in rows]


def test_the_matrix_has_the_first_method_down_and_the_second_across() -> None:
    found = summary(
        method("none", 0.5),
        method("vista", 0.6),
        method("vhr", 0.7),
        method("vista+vhr", 0.8),
        pairs=(PairEffect("vista+vhr", "vista", "vhr", "vhr", 0.1, 0.0004),),
        refused={"vhr+pai": "both change <heads>", "pai": "pai cannot", "vista+pai": "pai cannot"},
    )
    html = matrix_section(found)
    page = Checked(html)
    vista, vhr, pai = cells(html)
    assert vista[0].split() == ["1", "vista"]
    assert vista[1].split() == ["60.0", "alone"]
    assert vista[2] == "+10.0 better, p &lt; 0.001"
    assert vista[3].split() == ["refused", "1"]
    assert vhr[1] == "", "vhr before vista was not run"
    assert vhr[2].split() == ["70.0", "alone"]
    assert vhr[3].split() == ["refused", "2"]
    assert pai[3].split() == ["refused", "1"], "the same reason is told once"
    assert [attrs["id"] for attrs in page.of("li")] == ["refused-1", "refused-2"]
    assert {attrs["href"] for attrs in page.of("a")} == {"#refused-1", "#refused-2"}
    assert "both change <heads>" in page.text
    titles = [attrs["title"] for attrs in page.of("td") if attrs.get("title")]
    assert titles == ["vista+vhr: +10.0 beyond vhr, better, p < 0.001"]


def test_pairs_of_which_nothing_is_shown_are_grey_and_worse_ones_red() -> None:
    effects = (PairEffect("a+b", "a", "b", "b", 0.1, 0.05), PairEffect("b+a", "b", "a", "b", -0.1, 0.01))
    html = matrix_section(summary(*(method(name, 0.5) for name in ("none", "a", "b", "a+b", "b+a")), pairs=effects))
    assert re.search(r'<td class="plain" title="[^"]*">\+10.0<small>not shown, p = 0.050', html)
    assert re.search(r'<td class="worse" title="[^"]*">\N{MINUS SIGN}10.0<small>worse, p = 0.010', html)


def test_without_pairs_there_is_no_matrix_but_what_was_refused_is_told() -> None:
    assert matrix_section(summary(method("none", 0.5), method("a", 0.5))) == ""
    told = Checked(matrix_section(summary(method("none", 0.5), refused={"dola": EVIL}))).text
    assert "Refused" in told
    assert f"dola: {EVIL}" in told


# --- Strengths ---


STRENGTHS = {"vista:strength=0.01": 0.5, "vista:strength=0.1": 0.6, "vista": 0.7, "vista:strength=1": 0.4}


def test_a_sweep_has_a_plot_of_the_headline_and_one_of_auroc() -> None:
    methods = [method("none", 0.55, auroc=0.8), *(method(name, y, auroc=y) for name, y in STRENGTHS.items())]
    html = curves_section(summary(*methods, method("vhr", 0.5)), {m.method: i for i, m in enumerate(methods)})
    page = Checked(html)
    labels = [svg["aria-label"] for svg in page.of("svg")]
    assert labels == ["accuracy, % against strength of vista", "AUROC, % against strength of vista"]
    assert "vhr" not in page.text
    assert "strength = 0.17: 70.0 [65.0, 74.0]" in page.text
    assert page.text.count("default") == 3, "once in words and once in each plot"
    assert curves_section(summary(method("none", 0.5), method("vista", 0.6)), {}) == ""


def points() -> list[Point]:
    values = [(0.01, 40.0), (0.1, 80.0), (1.0, 60.0)]
    return [Point(f"m{x}", 3, x, y, y - 10, y + 5, f"<{x}>") for x, y in values]


def test_a_curve_goes_through_its_points_and_the_band_round_them() -> None:
    page = Checked(curve(points(), 50.0, 0.1, "strength", "accuracy, %"))
    dots = [(float(str(c["cx"])), float(str(c["cy"]))) for c in page.of("circle")]
    line = str(page.of("polyline")[0]["points"])
    assert line == " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    # In equal ratios 0.1 lies halfway between 0.01 and 1.
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
    per_point = (dots[0][1] - dots[1][1]) / 40
    assert dots[2][1] == pytest.approx(dots[1][1] + 20 * per_point, abs=0.2)
    band = [tuple(map(float, place.split(","))) for place in str(page.of("polygon")[0]["points"]).split()]
    upper, lower = band[:3], band[:2:-1]
    for (x, y), (high_x, high), (low_x, low) in zip(dots, upper, lower, strict=True):
        assert x == high_x == low_x
        assert high == pytest.approx(y - 5 * per_point, abs=0.2)
        assert low == pytest.approx(y + 10 * per_point, abs=0.2)
        assert TOP <= high <= low <= HEIGHT - BOTTOM
    (base,) = [attrs for attrs in page.of("line") if attrs["class"] == "base"]
    assert float(str(base["y1"])) == pytest.approx(dots[0][1] - 10 * per_point, abs=0.2)
    (default,) = [attrs for attrs in page.of("line") if attrs["class"] == "default"]
    assert float(str(default["x1"])) == dots[1][0]


def test_the_default_is_marked_only_where_it_lies_among_the_strengths() -> None:
    for default in (None, 2.0, 0.001):
        lines = Checked(curve(points(), 50.0, default, "x", "y")).of("line")
        assert not [attrs for attrs in lines if attrs["class"] == "default"]


def test_strengths_that_lie_close_or_reach_zero_are_shown_in_equal_steps() -> None:
    three = [Point("m", 1, x, 50.0, 40.0, 60.0, "") for x in (0.0, 0.2, 0.8)]
    dots = [float(str(c["cx"])) for c in Checked(curve(three, 50.0, None, "x", "y")).of("circle")]
    assert dots[2] - dots[1] == pytest.approx(3 * (dots[1] - dots[0]), abs=0.2)


# --- What changed, and what it costs ---


def test_what_changed_is_told_score_by_score() -> None:
    shift = Change("threshold shift", (), ("accuracy",), ("yes_rate",), ("auroc", "calibrated_accuracy"))
    one = method("vista", 0.4, p_values={"accuracy": 0.01, "yes_rate": 0.0001}, change=shift)
    told = " ".join(Checked(_change_cell(one)).text.split())
    assert told == "threshold shift worse: accuracy; moved: yes rate"
    assert table.changed(one) == "worse: accuracy (p = 0.010); moved: yes rate (p < 0.001)"
    none = method("a", 0.5, change=Change("no difference shown", (), (), (), ("accuracy",)))
    assert table.changed(none) == ""
    assert 'class="change plain"' in _change_cell(none)


def test_a_planted_shift_is_told_on_the_page_and_in_the_tables(tmp_path: Path) -> None:
    rows = {"none": pope_rows(own_margins()), "vista": pope_rows(own_margins() + 1.5)}
    folder = write_run(tmp_path, Pope(), "random", rows)
    run = RunFolder(folder)
    info = run.info()
    info["settings"] |= {"item_count": 360, "items": 360, "seed": 0, "attention": "sdpa", "dtype": "float32"}
    info["settings"]["device"] = "cpu"
    info["machine"] = {"processor": "p", "threads": 1, "gpu": None}
    run.update(info)
    found = summarise(folder)
    told = Checked(page(found)).text
    assert "threshold shift" in told
    assert "worse: accuracy" in told
    assert "calibrated accuracy, %" in told
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(table.tables(found))
    assert isinstance(console.file, io.StringIO)
    shown = " ".join(console.file.getvalue().split())
    assert "threshold shift" in shown
    assert "A threshold shift is more or fewer yes on the same order" in shown
    (none, vista) = (table.as_dict(found, one) for one in found.methods)
    assert none["change"] is None
    assert vista["change"]["kind"] == "threshold shift"
    assert vista["p_values"]["auroc"] == 1.0
    assert vista["p_values"]["accuracy"] == vista["p_value"]


def test_costs_of_whole_answers_are_shown_where_they_were_measured() -> None:
    ratio: dict[str, float | None] = {"time_to_first_token": 2.0, "time_per_token": 1.0, "peak_memory": 1.0}
    old = Cost(0.1, 0.01, 1000, ratio)
    assert "whole answer" not in _costs(summary(method("none", 0.5, cost=old)), {"none": 0})
    new = Cost(0.1, 0.01, 1000, ratio | {"time_per_answer": 1.0}, 0.5, 1.0, 120)
    asked = {"time_to_first_token": None, "time_per_token": None, "peak_memory": 3.0, "time_per_answer": 4.0}
    strategy = Cost(None, None, 3000, asked | {"prefill_tokens": 5.0}, 2.0, 4.5, 600)
    html = _costs(summary(method("none", 0.5, cost=new), method("mvp", 0.5, cost=strategy)), {"none": 0, "mvp": 1})
    heads = re.findall("<th>(.*?)</th>", html)
    assert heads == ["", *table.COST_NAMES.values()]
    none, mvp = cells(html)
    assert none[1:] == ["100 ms", "10.0 ms", "500 ms", "1", "120", "1.00 kB"]
    assert [cell.split() for cell in mvp[1:]] == [
        ["—"],
        ["—"],
        ["2000", "ms", "×", "4.00"],
        ["4.5"],
        ["600", "×", "5.00"],
        ["3.00", "kB", "×", "3.00"],
    ]


# --- Many methods ---


MANY = [*pairs(["vista", "ritual", "vhr", "fastervlm:keep=0.25"]).entries, "vista:strength=0.01", "vista:strength=0.3"]


def test_of_many_methods_the_plots_show_numbers_and_scores_stand_across(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "pope", "adversarial", 12, methods=MANY)
    content = write_report(folder).read_text()
    told = Checked(content)
    names = re.findall(r'<text class="name"[^>]*>(.*?)</text>', content)
    assert set(names) == {str(place) for place in range(len(MANY))}
    for place, name in enumerate(MANY):
        assert re.search(rf"<b>{place}</b> {re.escape(name)}<", content)
    scores = content[content.index("<h2>All scores") :]
    assert [name for name in MANY if f">{name}<" in scores[: scores.index("</thead>")]] == []
    assert len(cells(scores)) == len(MANY)
    assert "Methods in pairs" in told.text
    assert "Over the strength" in told.text
    assert len(content) < 600_000
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(table.tables(summarise(folder)))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.split()[:1] == ["vista+fastervlm:keep=0.25"] for line in lines), "long names stay on one line"
    assert sum("were cut off" in line for line in lines) == 1, "what is true of all is told once"


def test_methods_that_kept_the_same_patches_share_a_picture() -> None:
    (item,) = get_benchmark("pope").items("random", 1)
    kept = {"text": "yes", "hit": True, "kept": KEPT, "grid": [10, 10], "seen": [0, 0, 1, 1]}
    rows: dict[str, Any] = dict.fromkeys(("a", "b", "c", "d", "e"), kept)
    rows["f"] = kept | {"kept": KEPT[:5]}
    told = Checked(card(Example(item, rows), dict.fromkeys(rows, 1)))
    assert len(told.of("figure")) == 3
    assert "a, b, c and 2 more" in told.text


def test_an_item_without_a_picture_is_shown_as_one() -> None:
    item = Item("i", "Is it?", "yes", None, "g", "t", 1)
    told = Checked(card(Example(item, {"none": {"text": "yes", "hit": True}}), {"none": 0})).text
    assert "Asked without a picture." in told
