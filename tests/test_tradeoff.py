"""Fewer visual tokens against what they cost: which curves are drawn, on which axes, and the test against chance."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from bench_runs import Tints, lines, small_run
from rich.console import Console
from test_report import Checked
from test_summary import own_margins, pope_rows, write_run
from tiny_checkpoint import save_tiny_checkpoint

from sightline.benchmarks.costs import Cost
from sightline.benchmarks.item import Score
from sightline.benchmarks.pope import Pope
from sightline.benchmarks.statistics import holm
from sightline.benchmarks.summary import MethodSummary, Summary, summarise
from sightline.benchmarks.sweep import expand
from sightline.benchmarks.tradeoff import against_random, is_reference, reducing_curves
from sightline.report import table
from sightline.report.page import write_report
from sightline.report.plots import HEIGHT, WIDTH, Line, Point, ratio_ticks
from sightline.report.plots import lines as plot
from sightline.report.tradeoff import AXES, tradeoff_section

NAMES = [f"item-{number}" for number in range(12)]


def rows(hits: int, tokens: float | None, *, given: int | None = 100, layers: bool = True) -> list[dict[str, Any]]:
    """Answers of which the first `hits` are right."""
    told = {"layer_visual_tokens" if layers else "visual_tokens": tokens, "visual_tokens_given": given}
    return [{"id": name, "group": name, "hit": place < hits, **told} for place, name in enumerate(NAMES)]


def test_each_method_is_tested_against_as_many_tokens_at_random() -> None:
    answers = {
        "none": rows(12, 100),
        "random_dropping:keep=0.25": rows(2, 25),
        "random_dropping:keep=0.1": rows(1, 10),
        "fastervlm:keep=0.25": rows(10, 25.4),
        "fastv:keep=0.5": rows(11, 55),
        "fastervlm:keep=0.1": rows(1, 10, layers=False),
        "ritual": rows(3, 100),
        "ritual+random_dropping:keep=0.1": rows(9, 10),
        "gone:keep=0.1": rows(0, 10),
    }
    found = {one.entry: one for one in against_random(Tints(), answers)}
    assert list(found) == ["fastervlm:keep=0.25", "fastervlm:keep=0.1", "gone:keep=0.1"]
    best = found["fastervlm:keep=0.25"]
    assert best.reference == "random_dropping:keep=0.25"
    assert best.difference == pytest.approx(8 / 12)
    # McNemar by hand: 8 discordant pairs, all for the method.
    assert [one.p_value for one in found.values()] == holm([2 / 2**8, 1.0, 1.0])
    assert (best.no_difference_shown, found["gone:keep=0.1"].no_difference_shown) == (False, True)
    assert found["gone:keep=0.1"].difference == pytest.approx(-1 / 12)


def test_only_items_that_both_answered_count() -> None:
    answers = {"random_dropping:keep=0.1": rows(2, 10)[:3], "fastervlm:keep=0.1": rows(12, 10)[1:]}
    (one,) = against_random(Tints(), answers)
    assert one.difference == pytest.approx(0.5)
    answers["random_dropping:keep=0.1"] = rows(2, 10)[:1]
    assert against_random(Tints(), answers) == ()
    assert against_random(Tints(), {"fastervlm:keep=0.1": rows(12, 10)}) == ()
    assert against_random(Tints(), {"random_dropping": rows(1, None), "fastervlm": rows(1, None)}) == ()


def test_the_reference_is_the_random_choice_alone() -> None:
    assert is_reference("random_dropping")
    assert is_reference("random_dropping:keep=0.1,seed=3")
    assert not is_reference("random_dropping+ritual")
    assert not is_reference("random_droppings")


# --- The report ---


def method(name: str, value: float, tokens: float, *, costs: bool = False, flops: float | None = None) -> MethodSummary:
    ratio: dict[str, float | None] = {"time_to_first_token": 0.3 + tokens / 200, "peak_memory": 0.8}
    cost = Cost(0.1, 0.1, 5, ratio) if costs else None
    score = {"accuracy": Score(value, value - 0.05, value + 0.04, 100)}
    share = (tokens + 20) / 120 if flops is None else flops
    more = {"layer_visual_tokens": tokens, "flops_ratio": share, "cache_ratio": share}
    return MethodSummary(name, 100, 0, score, None if name == "none" else 1.0, tokens, 100, 0.0, 0.0, cost, **more)


def summary(*methods: MethodSummary, **more: Any) -> Summary:
    settings = {"model": "m", "benchmark": "pope", "split": "s", "item_count": 100, "dtype": "float32", "device": "cpu"}
    settings |= {"attention": "sdpa", "seed": 0}
    return Summary(Path("runs/x"), settings, {"processor": "p", "threads": 2, "gpu": None}, "pope", methods, **more)


def swept(costs: bool = False) -> list[MethodSummary]:
    made = [method("none", 0.9, 100, costs=costs)]
    for name, loss in (("random_dropping", 0.5), ("fastervlm", 0.2)):
        for entry in expand(f"{name}:keep=0.1;0.4;0.7;1"):
            keep = float(entry.rpartition("=")[2])
            made.append(method(entry, 0.9 - loss * (1 - keep), 100 * keep, costs=costs))
    return [*made, *(method(entry, 0.8, 100, costs=costs) for entry in expand("vista:strength=0.1;0.2;0.3"))]


def test_methods_swept_together_share_the_axes_and_chance_is_dashed() -> None:
    found = summary(*swept())
    assert [curve.label for curve in reducing_curves(found)] == ["fastervlm", "random_dropping"], "vista drops nothing"
    html = Checked(tradeoff_section(found))
    labels = [str(svg["aria-label"]) for svg in html.of("svg")]
    assert labels == [f"accuracy, % against {label}" for _, label, _ in AXES[:3]]
    curves = [str(line["class"]) for line in html.of("polyline")]
    assert curves == ["curve", "curve dashed"] * 3
    assert "drops as many visual tokens at random" in html.text
    # The unmodified model is a point on every plot: four points a curve, and it.
    assert len(html.of("circle")) == 3 * (4 + 4 + 1)
    assert "none: 90.0 [85.0, 94.0], x = 100" in html.text
    assert "vista" not in html.text


def test_measured_times_and_memory_have_their_own_axes() -> None:
    html = Checked(tradeoff_section(summary(*swept(costs=True))))
    assert len(html.of("svg")) == len(AXES) == 5


def test_a_dot_lies_where_its_numbers_are() -> None:
    def point(x: float, y: float) -> Point:
        return Point("m", 1, x, y, y, y, f"{x}")

    html = Checked(plot([Line((point(1, 10), point(10, 20), point(100, 40)))], "x", "y", ratios=True))
    dots = [(float(str(c["cx"])), float(str(c["cy"]))) for c in html.of("circle")]
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
    assert dots[1][1] - dots[2][1] == pytest.approx(2 * (dots[0][1] - dots[1][1]), abs=0.2)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in dots)
    assert not [line for line in html.of("line") if line["class"] in ("base", "whisker")]
    assert ratio_ticks(0.8, 30) == [1, 2, 5, 10, 20]
    assert ratio_ticks(2, 30_000) == [10, 100, 1000, 10_000]


def test_without_a_sweep_there_is_no_section() -> None:
    assert tradeoff_section(summary(method("none", 0.9, 100), method("fastervlm:keep=0.1", 0.5, 10))) == ""
    assert tradeoff_section(summary(method("none", 0.9, 100), *swept()[-3:])) == ""


def test_the_tests_against_chance_are_told_everywhere(tmp_path: Path) -> None:
    names = ["none", "fastervlm:keep=0.1", "fastv:keep=0.1", "random_dropping:keep=0.1"]
    answers = {"none": rows(9, 100), names[1]: rows(12, 10), names[2]: rows(5, 10), names[3]: rows(3, 10)}
    shown = against_random(Tints(), answers)
    methods = [method(name, 0.5, 100 if name == "none" else 10) for name in names]
    found = summary(*methods, against_random=shown)
    html = Checked(tradeoff_section(found))
    assert "Against a random choice" in html.text
    assert [str(cell["class"]) for cell in html.of("td") if cell.get("class")] == [
        "method",
        "better",
        "method",
        "plain",
    ]
    console = Console(file=io.StringIO(), width=150)
    console.print(table.tables(found))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "+75.0" in printed
    assert "better" in printed
    assert "×0.250" in printed
    record = table.as_dict(found, methods[1])
    assert record["against_random"]["reference"] == names[3]
    assert record["counted"] == {"layer_visual_tokens": 10, "prefill_flops_ratio": 0.25, "cache_ratio": 0.25}
    assert table.as_dict(found, methods[0])["against_random"] is None


# --- A whole run ---


def test_a_sweep_can_be_added_to_a_run_and_is_drawn(tmp_path: Path) -> None:
    checkpoint = str(save_tiny_checkpoint(tmp_path / "pico"))
    first = expand("fastervlm:keep=0.1..1..3")
    small_run(checkpoint, tmp_path / "run", ["none", *first], items=4)
    before = lines(tmp_path / "run")
    found = small_run(
        checkpoint, tmp_path / "run", ["none", *first, *expand("random_dropping:keep=0.1..1..3")], items=4
    )
    assert lines(tmp_path / "run")[: len(before)] == before
    assert [one.entry for one in found.against_random] == first[:2]
    text = write_report(tmp_path / "run").read_text()
    page = Checked(text)
    assert "Fewer visual tokens" in page.text
    assert "Against a random choice" in page.text
    json.loads(table.json_lines(found).splitlines()[0])


def test_runs_of_earlier_versions_are_still_read(tmp_path: Path) -> None:

    plain = pope_rows(own_margins())
    told = [{**row, "visual_tokens": 100, "visual_tokens_given": 100} for row in plain]
    (none,) = summarise(write_run(tmp_path / "run", Pope(), "random", {"none": told})).methods
    assert (none.visual_tokens, none.layer_visual_tokens, none.flops_ratio, none.cache_ratio) == (100, None, None, None)
