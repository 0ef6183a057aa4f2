"""Words or Vision: texts are true or false as they claim to be, and the scores follow the paper's definitions."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sightline.benchmarks.item import Answer, Benchmark, Item, get_benchmark
from sightline.benchmarks.statistics import sign_flip_test, wilson
from sightline.benchmarks.words_or_vision import (
    ASKED,
    CONDITIONS,
    IRRELEVANT,
    MATCHERS,
    WordsOrVision,
    plain,
    statement,
)
from sightline.errors import InputError
from sightline.picturebook.questions import NUMBER_WORDS, Question
from sightline.picturebook.scene import COLOURS, KINDS, PLURALS, SCENE_TYPES, sample_scene

N = 40
SEVEN = ["base", *(name for c in CONDITIONS for name in (c, f"{c}_alone"))]
bench = WordsOrVision(context="{text}")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return bench.items("test", N)


def by_question(items: Sequence[Item]) -> list[dict[str, Item]]:
    found: dict[str, dict[str, Item]] = {}
    for item in items:
        found.setdefault(item.meta["of"], {})[item.meta["condition"]] = item
    return list(found.values())


# --- Items ---


def test_a_question_is_asked_in_seven_ways(items: list[Item]) -> None:
    questions = by_question(items)
    assert len(questions) == N
    assert len({item.id for item in items}) == len(items) == 7 * N
    for own in questions:
        assert list(own) == SEVEN
        assert len({(item.group, item.answer) for item in own.values()}) == 1
        for condition, item in own.items():
            assert (item.picture is None) == condition.endswith("_alone")
        for condition in CONDITIONS:
            assert own[condition].question == own[f"{condition}_alone"].question
            assert own[condition].question.endswith(f"\n----------\n{own['base'].question}")
    assert len({own["base"].group for own in questions}) == N


def test_skills_take_turns_and_answers_are_balanced(items: list[Item]) -> None:
    bases = [own["base"] for own in by_question(items)]
    assert [item.meta["skill"] for item in bases] == [ASKED[place % len(ASKED)] for place in range(N)]
    answers = {skill: Counter(i.answer for i in bases if i.meta["skill"] == skill) for skill in ASKED}
    assert answers["existence_random"] == {"yes": 4, "no": 4}
    assert answers["count"] == dict.fromkeys("1234", 2)
    wrong = {i.meta["says"] for i in items if i.task == "corruption" and i.meta["skill"] == "colour"}
    assert len(wrong) > 3


def facts(scene: Any) -> set[str]:
    """Every true sentence on a scene, of the forms that texts have, made from its record."""
    true = {f"This is the {scene.scene_type}."}
    for kind in KINDS:
        own = [thing for thing in scene.objects if thing.kind == kind and not thing.hidden]
        a = "an" if kind[0] in "aeiou" else "a"
        true.add(f"There is {a} {kind} in the picture." if own else f"There is no {kind} in the picture.")
        if len(own) == 1:
            true.add(f"There is one {kind}.")
            true.add(f"The {kind} is {own[0].colour}.")
            for other in scene.objects:
                if other.kind != kind and sum(thing.kind == other.kind for thing in scene.objects) == 1:
                    side = "left" if own[0].x < other.x else "right"
                    true.add(f"The {kind} is to the {side} of the {other.kind}.")
                    true.add(f"The {kind} is {'above' if own[0].y < other.y else 'below'} the {other.kind}.")
        elif own:
            true.add(f"There are {NUMBER_WORDS[len(own)]} {PLURALS[kind]}.")
    return true


def test_match_is_true_corruption_false_and_irrelevant_neither(items: list[Item]) -> None:
    for own in by_question(items):
        true = facts(sample_scene("test", own["base"].meta["scene"]))
        texts = {c: own[c].question.split("\n----------\n")[0] for c in CONDITIONS}
        assert texts["match"] in true
        assert texts["corruption"] not in true
        assert texts["irrelevant"] in IRRELEVANT
        # The corruption is the truth with another answer: it speaks of the same things.
        assert own["match"].meta["says"] == own["base"].answer != own["corruption"].meta["says"]
        for kind in KINDS:
            names = (f" {kind}", f" {PLURALS[kind]}")
            assert any(n in texts["match"] for n in names) == any(n in texts["corruption"] for n in names)


def test_irrelevant_texts_name_nothing_of_the_picture_world() -> None:
    words = {*KINDS, *PLURALS.values(), *COLOURS, *SCENE_TYPES, *NUMBER_WORDS, "left", "right", "above", "below", "yes"}
    for text in IRRELEVANT:
        assert not words & set(text.lower().strip(".").split())


def test_statements() -> None:
    def asked(task: str, *about: str) -> Question:
        return Question(task, "?", "", (), about)

    assert statement(asked("existence", "umbrella"), "yes") == "There is an umbrella in the picture."
    assert statement(asked("existence", "boat"), "no") == "There is no boat in the picture."
    assert statement(asked("colour", "boat"), "red") == "The boat is red."
    assert statement(asked("count", "boat"), "1") == "There is one boat."
    assert statement(asked("count", "fish"), "4") == "There are four fish."
    assert statement(asked("place"), "sea") == "This is the sea."
    assert statement(asked("left_right", "boat", "fish"), "left") == "The boat is to the left of the fish."
    assert statement(asked("above_below", "boat", "fish"), "below") == "The boat is below the fish."


def test_fewer_items_are_the_first_of_more_and_seeds_and_splits_share_no_scene(items: list[Item]) -> None:
    assert [item.id for item in bench.items("test", 7)] == [item.id for item in items[:49]]
    assert not {i.group for i in bench.items("test", 7, seed=1)} & {i.group for i in items}
    validation = bench.items("validation", 3)
    assert {item.id.split("/")[0] for item in validation} == {"validation"}
    picture = validation[0].picture
    assert picture is not None
    assert picture().size == (picture().width, picture().width)


def test_the_prompt_of_the_paper() -> None:
    text = WordsOrVision().prompt("What colour is it?", "The {boat} is red.")
    assert text.startswith("Here are some additional information which are text descriptions based on the image")
    assert text.endswith("use it with caution: The {boat} is red.\n----------\nWhat colour is it?")
    assert WordsOrVision().prompt("Q?", None) == "Q?"
    options: dict[str, Any] = dict(context="{text}", focus="text", text_position="after", suffix=" Briefly.")
    focused = "Please focus on the textual information to answer the question: Q? Briefly."
    assert WordsOrVision(**options).prompt("Q?", "T.") == f"{focused}\n----------\nT."
    assert WordsOrVision(**options).prompt("Q?", None) == "Q? Briefly."


# --- Scores ---


def row(of: str, condition: str, given: str, right: str = "a", says: str | None = None) -> dict[str, Any]:
    return {
        "id": f"{of}/{condition}",
        "of": of,
        "group": of,
        "condition": condition,
        "given": given,
        "correct": float(given == right),
        "says": says,
    }


def rows_of(triples: Sequence[tuple[str, str, str]], condition: str = "corruption") -> list[dict[str, Any]]:
    """(picture alone, text alone, both) -> rows; the right answer is always a."""
    rows = []
    for place, (picture, text, both) in enumerate(triples):
        of = f"q{place}"
        rows += [row(of, "base", picture), row(of, condition, both), row(of, f"{condition}_alone", text)]
    return rows


def slow_ratio(triples: Sequence[tuple[str, str, str]]) -> float:
    """The counting loop of the official notebook."""
    pictures = texts = 0
    for picture, text, both in triples:
        if both == picture and both != text:
            pictures += 1
        elif both == text and both != picture:
            texts += 1
    return texts / (pictures + texts) if pictures + texts else math.nan


@pytest.mark.parametrize(
    ("triples", "expected"),
    [
        ([("a", "b", "a"), ("a", "b", "a")], 0.0),
        ([("a", "b", "b"), ("a", "b", "b")], 1.0),
        ([("a", "b", "b"), ("a", "b", "a"), ("a", "b", "b"), ("a", "b", "c"), ("a", "a", "a")], 2 / 3),
        ([("a", "a", "a"), ("a", "a", "b")], None),
        ([("a", "b", "c")], None),
    ],
)
def test_text_preference_by_hand(triples: list[tuple[str, str, str]], expected: float | None) -> None:
    scores = bench.scores(rows_of(triples))
    if expected is None:
        assert "tpr_corruption" not in scores
        assert math.isnan(slow_ratio(triples))
    else:
        assert scores["tpr_corruption"].value == pytest.approx(expected) == pytest.approx(slow_ratio(triples))
    assert ("corruption_text" in scores) == any(picture != text for picture, text, _ in triples)


def test_text_preference_of_random_answers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        triples = [tuple(rng.choice(list("abc"), 3).tolist()) for _ in range(30)]
        scores = bench.scores(rows_of(triples))
        assert scores["tpr_corruption"].value == pytest.approx(slow_ratio(triples))
        differ = [(p, t, b) for p, t, b in triples if p != t]
        for share, count in (
            ("text", sum(b == t for p, t, b in differ)),
            ("picture", sum(b == p for p, t, b in differ)),
            ("neither", sum(b not in (p, t) for p, t, b in differ)),
        ):
            assert scores[f"corruption_{share}"].value == pytest.approx(count / len(differ))
            assert scores[f"corruption_{share}"].n == len(differ)
        decided = sum(b in (p, t) for p, t, b in differ)
        ratio = scores["tpr_corruption"]
        assert ratio.n == decided
        assert (ratio.low, ratio.high) == wilson(sum(b == t for p, t, b in differ), decided)


def test_accuracies_by_hand() -> None:
    rows = rows_of([("a", "b", "b"), ("a", "b", "a"), ("b", "b", "b"), ("a", "b", "a")])
    rows += [row(f"q{place}", "match", "a", says="a") for place in range(4)]
    rows += [row(f"q{place}", "match_alone", "ab"[place > 2], says="a") for place in range(4)]
    rows += [row(f"q{place}", "irrelevant", "abab"[place]) for place in range(4)]
    scores = bench.scores(rows)
    assert next(iter(scores)) == "macro"
    assert scores["macro"].value == pytest.approx((1 + 0.5 + 0.5) / 3)  # base is not in it
    assert scores["base"].value == 0.75
    assert (scores["base"].low, scores["base"].high) == wilson(3, 4)
    assert (scores["match"].value, scores["match"].n) == (1.0, 4)
    assert scores["norm_corruption"].value == pytest.approx(0.5 / 0.75)
    assert (scores["heard"].value, scores["heard"].n) == (0.75, 4)
    assert "tpr_irrelevant" not in scores  # nothing was asked with the text alone
    headline = [row for row in rows if row["condition"] in CONDITIONS]
    assert scores["macro"].value == pytest.approx(sum(bench.measure(r) for r in headline) / len(headline))
    assert scores["macro"].n == len(headline)


def test_without_a_right_answer_to_the_bare_question_there_is_no_norm() -> None:
    scores = bench.scores(rows_of([("b", "c", "a"), ("b", "c", "b")]))
    assert scores["base"].value == 0
    assert "norm_corruption" not in scores


def test_two_runs_are_compared_where_text_stands_beside_a_picture() -> None:
    a = rows_of([("a", "b", "b")] * 12)
    better = rows_of([("a", "b", "a")] * 12)
    elsewhere = rows_of([("b", "c", "b")] * 12)  # differs in base and alone only
    assert bench.paired(a, better) < 0.01
    assert bench.paired(a, elsewhere) == 1.0
    both = [*a, *(row(f"q{place}", "match", "b") for place in range(12))]
    right = [*a, *(row(f"q{place}", "match", "a") for place in range(12))]
    assert bench.paired(both, right) == sign_flip_test([1.0] * 12)


def test_an_answer_that_copies_the_text_and_one_that_looks(items: list[Item]) -> None:
    def scores(reader: Any, own: Benchmark = bench) -> dict[str, Any]:
        rows = [own.row(Answer(item, reader(item), 1, {"method": "none"})) for item in items]
        assert all(json.loads(json.dumps(r)) == r for r in rows)
        return own.scores(rows)

    def copies(item: Item) -> str:
        return str(item.meta["says"] or item.answer)

    def looks(item: Item) -> str:
        return str(item.answer if item.picture is not None else item.meta["says"] or "I cannot see.")

    blind, sighted = scores(copies), scores(looks)
    assert (blind["match"].value, blind["corruption"].value, blind["macro"].value) == (1, 0, pytest.approx(2 / 3))
    assert (blind["tpr_corruption"].value, blind["tpr_corruption"].n) == (1.0, N)
    assert blind["heard"].value == sighted["heard"].value == 1
    assert sighted["macro"].value == sighted["norm_corruption"].value == 1
    assert (sighted["tpr_corruption"].value, sighted["tpr_irrelevant"].value) == (0, 0)
    assert "tpr_match" not in sighted  # picture and text say the same


# --- Comparing answers ---


@pytest.mark.parametrize(
    ("matcher", "text", "answers", "expected"),
    [
        ("exact", " Two. ", ["2"], 1),
        ("exact", "two boats", ["2"], 0),
        ("contains", "It is The Sea, I think.", ["a sea"], 1),
        ("contains", "It is here.", ["sea"], 0),
        # One of five humans has it: her own answer counts 0 of the others, the other four count 1 of 3.
        ("vqa", "Yes, the answer is Red.", ["red", "blue", "blue", "blue", "blue"], 4 / 15),
        ("vqa", "red", ["red"] * 10, 1),
        ("vqa", "dark red", ["red", "Red.", "red", "pink", "pink"], (2 / 3 * 3 + 2) / 5),
        ("vqa", "don't", ["dont"] * 4, 1),
        ("vqa", "two", ["2"] * 4, 1),
        ("vqa", "blue", ["red"] * 4, 0),
    ],
)
def test_matchers(matcher: str, text: str, answers: list[str], expected: float) -> None:
    assert MATCHERS[matcher](text, answers) == pytest.approx(expected)


def test_answers_of_the_model_are_compared_plainly() -> None:
    assert [plain(text) for text in (" Red. ", "RED", "red..", "two", "2")] == ["red", "red", "red", "two", "2"]


# --- Files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "red.png")
    records = [
        {
            "question_id": 7,
            "image": "red.png",
            "question": "Which colour?",
            "answers": ["red", "red", "red", "crimson"],
            "match": "All of it is red.",
            "corruption": "All of it is {blue}.",
            "irrelevant": "It rained.",
            "wrong_answer": "blue",
        },
        {"question_id": 8, "image": "red.png", "question": "How many?", "answer": 1, "corruption": "There are two."},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def from_file(folder: Path, **options: Any) -> WordsOrVision:
    return WordsOrVision(source="files", questions=folder / "questions.jsonl", images=folder, **options)


def test_items_from_a_file(folder: Path) -> None:
    own = from_file(folder)
    first, second = by_question(own.items("test"))
    assert list(first) == SEVEN
    assert list(second) == ["base", "corruption", "corruption_alone"]
    assert first["base"].question == "Which colour? Please only output the answer with a single word or phrase."
    assert "All of it is {blue}.\n----------\nWhich" in first["corruption"].question
    assert first["corruption"].meta["says"] == "blue"
    assert second["corruption"].meta["says"] is None
    assert first["base"].picture is not None
    assert first["base"].picture().getpixel((0, 0)) == (200, 0, 0)
    assert len(own.items("test", 1, seed=3)) in (3, 7)
    soft = from_file(folder, matcher="vqa")
    with pytest.raises(InputError, match=r"the matcher vqa needs four answers or more, and question 8 .* has 1"):
        soft.items("test")
    assert soft.item_score(first["base"], "Red")["correct"] == pytest.approx((3 * 2 / 3 + 1) / 4)


def test_one_group_is_a_picture(folder: Path) -> None:
    own = from_file(folder)
    rows = [own.row(Answer(item, item.answer, 1)) for item in own.items("test")]
    assert {row["group"] for row in rows} == {"red.png"}
    scores = own.scores(rows)
    assert (scores["base"].value, scores["base"].low, scores["base"].high) == (1, 1, 1)  # drawn whole: one picture


def test_soft_accuracies_have_no_wilson_interval(folder: Path) -> None:
    rows = rows_of([("a", "b", "a")] * 4)
    for place, one in enumerate(rows):
        one["correct"] = 0.25 * (place % 4)
    scores = from_file(folder).scores(rows)
    assert scores["base"].value == pytest.approx(0.375)
    assert (scores["base"].low, scores["base"].high) not in [wilson(k, 4) for k in range(5)]
    assert (scores["tpr_corruption"].low, scores["tpr_corruption"].high) == wilson(0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "../red.png"}, "lies outside"),
        ({"image": "blue.png"}, "there is no image blue.png in"),
        ({"answer": [], "answers": []}, "question 9 of .* needs answer, or answers, a list of them"),
        ({"match": None}, "question 9 of .* has no text: it needs one of match, corruption, irrelevant"),
        ({"question_id": 8}, "question_id 8 occurs more than once"),
    ],
)
def test_bad_files(folder: Path, change: dict[str, Any], message: str) -> None:
    record = {"question_id": 9, "image": "red.png", "question": "Q?", "answer": "a", "match": "T.", **change}
    with (folder / "questions.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(InputError, match=message):
        from_file(folder).items("test")


# --- Bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "file"}, "did you mean 'files'"),
        ({"source": "files"}, r"needs questions= \(JSON lines\) and images= \(a folder\)"),
        ({"images": "somewhere"}, "images= only has a meaning with source=files"),
        ({"matcher": "exactly"}, "did you mean 'exact'"),
        ({"matcher": "vqa"}, "needs several human answers"),
        ({"focus": "images"}, "did you mean 'image'"),
        ({"text_position": "behind"}, "unknown text_position"),
        ({"context": "Look at this:"}, "must hold {text}"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_benchmark("words-or-vision", **options)


def test_bad_draws_and_rows() -> None:
    with pytest.raises(InputError, match="did you mean 'test'"):
        bench.items("tests", 3)
    with pytest.raises(InputError, match="number of items"):
        bench.items("test", 0)
    with pytest.raises(InputError, match="no answers"):
        bench.scores([row("q", "base", "a")])
