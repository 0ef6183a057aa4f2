"""The report page, its plots and the tables."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sightline.bench import _options
from sightline.benchmarks.changes import lower_is_better
from sightline.benchmarks.costs import Cost
from sightline.benchmarks.item import Answer, Item, Score, get_benchmark
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.summary import MethodSummary, Summary, summarise
from sightline.errors import InputError
from sightline.files import write_json
from sightline.picturebook.draw import draw
from sightline.picturebook.questions import long_caption
from sightline.picturebook.scene import sample_scene
from sightline.report import table
from sightline.report.examples import Example, _marked, choose, data_uri, dropped, is_right
from sightline.report.page import verdict, write_report
from sightline.report.plots import HEIGHT, WIDTH, Point, Scale, _label_places, _meet, interval, scatter, ticks

METHODS = ("none", "fastervlm:keep=0.1", "vhr")
KEPT = [3, 14, 15, 25, 26, 55, 56, 57, 98, 99]
EVIL = '<script>alert("1")</script>&\'<img src=x onerror=y>'


def make_run(folder: Path, name: str, split: str, n: int, *, evil: bool = False, methods: Any = METHODS) -> Path:
    """A run as the runner writes it. Item i is answered wrongly by method number (i mod 4), if there is one."""
    benchmark = get_benchmark(name)
    settings = {
        "model": EVIL if evil else "picturebook-nano",
        "dtype": "float32",
        "device": "cpu",
        "attention": "sdpa",
        "benchmark": name,
        "options": _options(benchmark),
        "split": split,
        "items": n,
        "item_count": len(benchmark.items(split, n)),
        "seed": 0,
    }
    machine = {"processor": EVIL if evil else "a processor", "threads": 1, "gpu": None}
    run = RunFolder(folder)
    with run.opened(settings, machine, list(methods)):
        for number, method in enumerate(methods):
            rows = []
            for place, item in enumerate(benchmark.items(split, n)):
                facts: dict[str, Any] = {"question": item.question, "cut_off": place == 0, "visual_tokens_given": 100}
                facts["visual_tokens"] = 10 if "fastervlm" in method else 100
                if "fastervlm" in method:
                    facts |= {"kept": KEPT, "grid": [10, 10], "seen": [0, 0, 1, 1]}
                if item.answer in ("yes", "no"):
                    facts["yes_logit_margin"] = float(place % 5 - 2)
                text = EVIL if evil else answer(item, right=place % 4 != number)
                rows.append({"method": method, **benchmark.row(Answer(item, text, 3, facts))})
            run.append(rows)
    costs = {}
    for number, method in enumerate(methods, start=1):
        ratio = {"time_to_first_token": number / 2, "time_per_token": 1.0, "peak_memory": number * 1.0}
        costs[method] = asdict(Cost(0.0123 * number, 0.004567, 1_234_567 * number, ratio))
    write_json(run.costs_file, {"methods": costs, "rounds": 8, "new_tokens": 16})
    return folder


def answer(item: Item, right: bool) -> str:
    if item.answer in ("yes", "no"):
        return item.answer if right else {"yes": "no", "no": "yes"}[item.answer]
    if item.meta.get("distractors"):
        return item.answer if right else str(item.meta["distractors"][0])
    scene = sample_scene("test", item.meta["scene"], against=item.meta["against"])
    return long_caption(scene).answer + ("" if right else " There are two butterflies and a truck.")


class Checked(HTMLParser):
    """Collects tags and text; fails on a tag that is not closed in order."""

    void = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + " "

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


# --- The page ---


@pytest.fixture(scope="module")
def pope_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checked]:
    path = write_report(make_run(tmp_path_factory.mktemp("pope"), "pope", "adversarial", 24))
    return path, Checked(path.read_text())


def test_the_page_is_one_file_that_needs_nothing_else(pope_page: tuple[Path, Checked]) -> None:
    path, page = pope_page
    assert path.name == "report.html"
    assert {"script", "link", "iframe", "img", "object"}.isdisjoint({tag for tag, _ in page.tags})
    for _, attrs in page.tags:
        for name in ("href", "src"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#"))
    content = path.read_text()
    assert "http:" not in content
    assert "https:" not in content
    assert "url(" not in content
    assert "@import" not in content
    assert "prefers-color-scheme: dark" in content


def test_the_page_holds_table_plots_and_examples(pope_page: tuple[Path, Checked]) -> None:
    path, page = pope_page
    classes = [attrs.get("class") for attrs in page.of("svg")]
    assert classes.count("plot") == 4
    assert sum(str(name).startswith("interval") for name in classes) == 3
    summary = summarise(path.parent)
    for method in summary.methods:
        assert method.method in page.text
        assert table.number("accuracy", method.headline.value) in page.text
    assert "no difference shown" in page.text
    for shown in ("10 of 100", "24.6 ms", "× 1.00", "2.47 MB", "AUROC", "yes rate", "sdpa"):
        assert shown in page.text
    assert len(page.of("article")) == 4, "24 POPE questions are about four pictures"


def test_example_pictures_are_those_of_the_items(pope_page: tuple[Path, Checked]) -> None:
    _, page = pope_page
    items = get_benchmark("pope").items("adversarial", 24)
    drawn = {draw(sample_scene("test", item.meta["scene"], against=True)).tobytes() for item in items}
    images = page.of("image")
    assert len(images) == 4
    for image in images:
        data = base64.b64decode(str(image["href"]).removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).tobytes() in drawn
    names = {image["id"] for image in images}
    assert len(names) == 4
    assert {str(use["href"]).removeprefix("#") for use in page.of("use")} == names


@pytest.mark.parametrize("name", ["pope", "chair", "skills"])
def test_everything_that_is_not_ours_is_escaped(tmp_path: Path, name: str) -> None:
    split = "adversarial" if name == "pope" else "test"
    content = write_report(make_run(tmp_path, name, split, 3, evil=True)).read_text()
    page = Checked(content)
    assert "<script" not in content.lower()
    assert not page.of("img")
    assert EVIL in page.text


def test_captions_mark_what_is_hallucinated(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path, "chair", "test", 8))
    page = Checked(path.read_text())
    marked = re.findall(r"<mark>(.*?)</mark>", path.read_text())
    assert set(marked) <= {"butterflies", "truck"}
    assert "butterflies" in marked
    assert "Towards the lower left is better" in page.text
    assert "CHAIR_s" in page.text


def test_one_method_alone_has_no_plots_and_no_verdict(tmp_path: Path) -> None:
    page = Checked(write_report(make_run(tmp_path, "pope", "random", 6, methods=("none",))).read_text())
    assert not [svg for svg in page.of("svg") if svg["class"] == "plot"]
    assert "nothing to compare" in page.text


def test_a_run_that_is_not_finished_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    make_run(tmp_path, "pope", "random", 12)
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:20]) + '{"half')
    (tmp_path / "costs.json").unlink()
    page = Checked(write_report(tmp_path).read_text())
    assert "the run is not finished" in page.text
    assert "vhr" not in page.text
    assert len([svg for svg in page.of("svg") if svg["class"] == "plot"]) == 1, "only the tokens are known"


def test_pictures_that_are_gone_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "pope", "random", 6)

    def gone(*args: Any, **kwargs: Any) -> Any:
        raise InputError("there is no folder /coco")

    with monkeypatch.context() as patch:
        patch.setattr("sightline.benchmarks.pope.draw", gone)
        page = Checked(write_report(tmp_path).read_text())
        assert "cannot be opened: there is no folder /coco" in page.text
    monkeypatch.setattr("sightline.benchmarks.pope.Pope.items", gone)
    page = Checked(write_report(tmp_path).read_text())
    assert "cannot be had any more: there is no folder /coco" in page.text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- Examples ---


def test_examples_on_which_methods_differ_come_first_each_on_its_own_picture(tmp_path: Path) -> None:
    make_run(tmp_path, "skills", "test", 12)
    run = RunFolder(tmp_path)
    rows = [row for row in run.rows() if row["task"] in ("colour", "place", "caption")]
    for row in rows:
        if row["task"] == "place":
            row["hit"] = True  # on these, all agree
    chosen = choose(get_benchmark("skills"), run.info()["settings"], rows)
    assert len(chosen) == 8
    assert all(example.differ for example in chosen)
    assert {example.item.task for example in chosen} == {"colour", "caption"}
    assert len({example.item.group for example in chosen}) == 8
    tasks = [example.item.task for example in chosen]
    assert tasks == ["colour", "caption"] * 4, "the tasks take turns"
    answers = [example.item.answer for example in chosen if example.item.task == "colour"]
    assert len(set(answers)) == 4, "and the right answers too"
    agreeing = [row for row in rows if row["task"] == "place"]
    chosen = choose(get_benchmark("skills"), run.info()["settings"], agreeing)
    assert len(chosen) == 8
    assert not any(example.differ for example in chosen)


def test_items_that_a_method_has_not_answered_are_no_examples(tmp_path: Path) -> None:
    make_run(tmp_path, "pope", "random", 12)
    run = RunFolder(tmp_path)
    rows = run.rows()
    for row in rows:
        if row["method"] == "vhr" and row["id"] != rows[0]["id"]:
            row["error"] = "it failed"
    chosen = choose(get_benchmark("pope"), run.info()["settings"], rows)
    assert [example.item.id for example in chosen] == [rows[0]["id"]]


def test_right_and_wrong() -> None:
    assert is_right({"hit": True})
    assert not is_right({"hit": False})
    assert is_right({"hallucinated": []})
    assert not is_right({"hallucinated": ["dog"]})
    item = Item("i", "?", "a", lambda: Image.new("RGB", (1, 1)), "g", "t", 1)
    assert Example(item, {"none": {"hit": True}, "vhr": {"hit": False}}).differ
    assert not Example(item, {"none": {"hit": True}, "vhr": {"hit": True}}).differ


def test_marking_takes_whole_words_and_longer_names_first() -> None:
    assert _marked("A dog <b> and Dogs; a dogma, hot dog", ["dog", "hot dog"]) == (
        "A <mark>dog</mark> &lt;b&gt; and <mark>Dogs</mark>; a dogma, <mark>hot dog</mark>"
    )


def painted(path: str, width: int, height: int) -> np.ndarray:
    """Which unit cells the even-odd fill of a path covers; paths here have whole numbers and axis-parallel sides."""
    inside = np.zeros((height, width), dtype=int)
    for part in path.removesuffix("Z").replace("z", "Z").split("M")[1:]:
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", part)]
        commands = re.findall(r"[a-zA-Z]", part)
        x, y = numbers[:2]
        xs, ys = [x], [y]
        at = 2
        for command in commands:
            if command in "Zz":
                continue
            value = numbers[at]
            at += 1
            x = value if command == "H" else x + value if command == "h" else x
            y = value if command == "V" else y + value if command == "v" else y
            xs.append(x)
            ys.append(y)
        inside[round(min(ys)) : round(max(ys)), round(min(xs)) : round(max(xs))] += 1
    return inside % 2 == 1


def test_the_overlay_dims_exactly_the_dropped_patches() -> None:
    svg = dropped({"kept": [0, 5, 6, 11], "grid": [3, 4]}, 40, 30)
    dim = re.search(r'class="dropped".*?d="([^"]*)"', svg)
    assert dim is not None
    expected = np.ones((3, 4), dtype=bool)
    expected.flat[[0, 5, 6, 11]] = False
    np.testing.assert_array_equal(painted(dim[1], 40, 30), expected.repeat(10, 0).repeat(10, 1))
    outline = re.search(r'class="kept".*?d="([^"]*)"', svg)
    assert outline is not None
    # Patch 0 has four sides, 11 four (two on the edge), the pair 5-6 six: none where the two meet.
    assert outline[1].count("M") == 14
    assert "M20 10v10" not in outline[1]


def test_the_overlay_dims_what_was_cropped_away() -> None:
    svg = dropped({"kept": [0], "grid": [1, 2], "seen": [0.25, 0.0, 0.75, 1.0]}, 40, 10)
    dim = re.search(r'class="dropped".*?d="([^"]*)"', svg)
    assert dim is not None
    expected = np.ones((10, 40), dtype=bool)
    expected[:, 10:20] = False
    np.testing.assert_array_equal(painted(dim[1], 40, 10), expected)


def test_large_pictures_are_made_smaller() -> None:
    data = base64.b64decode(data_uri(Image.new("L", (2000, 1000))).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (448, 224)


# --- Plots ---


def test_ticks_are_round_and_cover() -> None:
    assert ticks(71, 88) == [70.0, 75.0, 80.0, 85.0, 90.0]
    assert ticks(0, 1.9) == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert ticks(0, 0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] or ticks(0, 0)[0] == 0.0
    rng = np.random.default_rng(0)
    for low, span in zip(rng.normal(scale=100, size=200), 10 ** rng.uniform(-4, 4, size=200), strict=True):
        found = ticks(low, low + span)
        assert found[0] <= low + 1e-9 * span
        assert found[-1] >= low + span - 1e-9 * span
        assert 2 <= len(found) <= 8
        steps = np.diff(found)
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def points(n: int, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(n):
        x, y = float(rng.uniform(10, 100)), float(rng.uniform(60, 90))
        made.append(Point(f"method-{number}", number, x, y, y - 3, y + 3, f"tip {number} <&>"))
    return made


def test_dots_stand_where_the_data_say() -> None:
    three = [
        Point("none", 0, 100, 80, 75, 85, "a"),
        Point("half", 1, 50, 70, 65, 75, "b"),
        Point("<all>", 2, 0, 90, 85, 95, "c"),
    ]
    svg = scatter(three, "tokens", "accuracy, %")
    page = Checked(svg)
    dots = [(float(str(c["cx"])), float(str(c["cy"]))) for c in page.of("circle")]
    xs = [x for x, _ in dots]
    ys = [y for _, y in dots]
    assert xs[0] - xs[1] == pytest.approx(xs[1] - xs[2], abs=0.2), "50 lies halfway between 0 and 100"
    assert ys[1] - ys[0] == pytest.approx(ys[0] - ys[2], abs=0.2), "and 80 between 70 and 90"
    assert ys[2] < ys[0] < ys[1], "up is more"
    labels = {}
    for found in re.finditer(r'<text class="tick" x="([\d.]+)" y="[\d.]+" text-anchor="middle">([\d.]+)<', svg):
        labels[float(found[2])] = float(found[1])
    assert labels[0.0] == pytest.approx(xs[2], abs=0.1)
    assert labels[100.0] == pytest.approx(xs[0], abs=0.1)
    assert "&lt;all&gt;" in svg
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in dots)


@pytest.mark.parametrize("seed", range(5))
def test_names_cover_no_dot_and_no_other_name(seed: int) -> None:
    some = points(7, seed)
    x_of, y_of = Scale(0, 110, 56, 500), Scale(55, 95, 280, 14)
    boxes = []
    for point, (x, y, anchor) in zip(some, _label_places(some, x_of, y_of), strict=True):
        width = 6.6 * len(point.name)
        left = x if anchor == "start" else x - width
        boxes.append((left, y - 7.5, left + width, y + 7.5))
    for number, box in enumerate(boxes):
        assert not any(_meet(box, other) for other in boxes[:number])
        for point in some:
            x, y = x_of(point.x), y_of(point.y)
            assert not _meet(box, (x - 5, y - 5, x + 5, y + 5))


def test_equal_values_can_be_plotted() -> None:
    same = [Point("a", 0, 5, 50, 50, 50, ""), Point("b", 1, 5, 50, 50, 50, "")]
    Checked(scatter(same, "x", "y"))
    Checked(scatter([Point("a", 0, 0, 0, 0, 0, "")], "x", "y"))
    assert "nan" not in interval(1.0, 1.0, 1.0, (0.97, 1.03), 1.0, 0)


# --- Words and tables ---


def summary(*methods: tuple[str, float, float | None], headline: str = "accuracy") -> Summary:
    made = [
        MethodSummary(
            name, 100, 0, {headline: Score(value, value - 0.05, value + 0.05, 100)}, p, 10, 100, 0.0, 0.0, None
        )
        for name, value, p in methods
    ]
    settings = {"model": "m", "benchmark": "b", "split": "s", "item_count": 100, "dtype": "float32", "device": "cpu"}
    settings["attention"] = "sdpa"
    return Summary(Path("runs/x"), settings, {"processor": "p", "threads": 2, "gpu": None}, "pope", tuple(made))


def test_the_verdict_says_what_is_shown_and_what_is_not() -> None:
    told = verdict(summary(("none", 0.8, None), ("up", 0.9, 0.01), ("down", 0.7, 0.049), ("level", 0.9, 0.05)))
    assert told == "Better than the unmodified model in accuracy: up. Worse: down. No difference shown: level."
    told = verdict(summary(("none", 0.2, None), ("up", 0.3, 0.01), ("down", 0.1, 0.01), headline="chair_s"))
    assert told == "Better than the unmodified model in CHAIR_s: down. Worse: up."
    told = verdict(summary(("none", 0.2, None), ("a", 0.1, 0.01), ("b", 0.1, 0.01), ("c", 0.1, 0.01)))
    assert told == "Worse than the unmodified model in accuracy: a, b and c."


def test_which_scores_are_better_when_low() -> None:
    low = ["chair_s", "chair_i", "chair_lite_s", "caption_chair_i", "unparsed"]
    high = ["accuracy", "f1", "recall", "caption_recall", "all", "auroc", "existence_random", "length"]
    assert all(lower_is_better(name) for name in low)
    assert not any(lower_is_better(name) for name in high)


def test_json_fields_are_frozen(tmp_path: Path) -> None:
    """Programs read these names; what is renamed here breaks them."""
    found = table.json_lines(summarise(make_run(tmp_path, "pope", "adversarial", 24)))
    records = [json.loads(line) for line in found.splitlines()]
    assert [record["method"] for record in records] == list(METHODS)
    for record in records:
        assert list(record) == [
            "method",
            "benchmark",
            "split",
            "model",
            "n",
            "failed",
            "headline",
            "scores",
            "interval",
            "p_value",
            "unparsed",
            "cut_off",
            "visual_tokens",
            "time_to_first_token",
            "time_per_token",
            "peak_memory",
            "ratio",
            "p_values",
            "change",
            "costs",
            "pair",
            "counted",
            "against_random",
        ]
        assert list(record["ratio"]) == ["visual_tokens", "time_to_first_token", "time_per_token", "peak_memory"]
        assert list(record["scores"])[:6] == ["accuracy", "precision", "recall", "f1", "yes_rate", "unparsed"]
        assert record["headline"] == "accuracy"
        low, high = record["interval"]
        assert low <= record["scores"]["accuracy"] <= high
    none, fewer, _ = records
    assert none["p_value"] is None
    assert none["ratio"] == {
        "visual_tokens": 1.0,
        "time_to_first_token": 0.5,
        "time_per_token": 1.0,
        "peak_memory": 1.0,
    }
    assert (fewer["visual_tokens"], fewer["ratio"]["visual_tokens"]) == (10.0, 0.1)
    assert fewer["time_to_first_token"] == 0.0246
    assert none["scores"]["accuracy"] == pytest.approx(18 / 24)


def test_json_of_what_was_not_measured_is_null(tmp_path: Path) -> None:
    make_run(tmp_path, "chair", "test", 4)
    (tmp_path / "costs.json").unlink()
    record = json.loads(table.json_lines(summarise(tmp_path)).splitlines()[0])
    assert record["unparsed"] is None
    assert record["peak_memory"] is None
    assert record["ratio"]["time_per_token"] is None


def test_the_tables_fit_a_terminal(tmp_path: Path) -> None:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(table.tables(summarise(make_run(tmp_path, "pope", "adversarial", 24))))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "picturebook-nano on pope, adversarial, 24 items" in rows
    assert "none 75.0 [55.1, 88.0] 100" in rows
    assert "fastervlm:keep=0.1 24.6 ms (×1.00) 4.57 ms (×1.00) 2.47 MB (×2.00)" in rows
    assert any(row.startswith("fastervlm:keep=0.1 75.0 [55.1, 88.0] 1.000, no difference") for row in rows)
    assert "Yes or no was read by the rule 'pope'." in rows
    assert "attention sdpa" in " ".join(rows)
    assert any("4.2 % of the answers were cut off" in row for row in rows)
    assert any(row.startswith("yes_rate") for row in rows)


def test_numbers_are_shown_with_their_units() -> None:
    assert [table.memory(value) for value in (0, 999, 1000, 1_234_567, 5e9)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "1.23 MB",
        "5.00 GB",
    ]
    assert [table.milliseconds(value) for value in (0.00123, 0.0456, 1.5)] == ["1.23 ms", "45.6 ms", "1500 ms"]
    assert table.number("length", 12.34) == "12.3"
    assert table.number("accuracy", 0.1234) == "12.3"
