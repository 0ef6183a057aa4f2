"""POPE's questions, reading rules and scores, worked by hand; and the benchmark registry, by its example."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from sightline.benchmarks.item import Answer, Item, get_benchmark, list_benchmarks, register_benchmark
from sightline.benchmarks.pope import Pope, PopeQuestion, build_pope_questions
from sightline.benchmarks.statistics import mcnemar_exact, wilson
from sightline.benchmarks.yes_no import MATCHERS, is_plain
from sightline.errors import InputError
from sightline.picturebook.draw import draw
from sightline.picturebook.scene import KINDS, SCENE_TYPES, sample_scene


def _item(name: str, label: str, group: str) -> Item:
    return Item(
        name, "Is there a cat in the image?", label, lambda: PIL.Image.new("RGB", (4, 4)), group, "existence", 8
    )


def _rows(benchmark: Pope, answers: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Rows of (picture, label, text)."""
    return [
        benchmark.row(Answer(_item(f"{i}", label, picture), text, 1))
        for i, (picture, label, text) in enumerate(answers)
    ]


READINGS = [
    # answer, label, pope, opera, llava, strict
    ("Yes, there is a dog.", "yes", "yes", "yes", "yes", "yes"),
    ("No, there is not.", "no", "no", "no", "no", "no"),
    ("no", "no", "no", "no", "no", "no"),
    ("Yes. But no cat is to be seen", "yes", "yes", "no", "yes", "yes"),
    ("There isn't a dog.", "no", "yes", "no", "yes", None),
    ("NO", "no", "yes", "no", "no", "no"),
    ("No!", "no", "yes", "yes", "no", "no"),
    ("No\nThere is none", "no", "yes", "yes", "no", "no"),
    ("It does not show one, no", "no", "no", "no", "no", None),
    ("I do not know", "no", "no", "no", "no", None),
    ("I do not know", "yes", "no", "no", "no", None),
    ("yes and no", "no", "no", "no", "no", "yes"),
    ("yes and no", "yes", "no", "no", "yes", "yes"),
    ("Nothing of the kind", "yes", "yes", "yes", "no", None),
    ("A dog", "no", "yes", "yes", "yes", None),
    ("", "no", "yes", "yes", "yes", None),
    (" **Yes**", "yes", "yes", "yes", "yes", "yes"),
]


@pytest.mark.parametrize(("text", "label", "pope", "opera", "llava", "strict"), READINGS)
def test_each_rule_reads_as_its_code_does(
    text: str, label: str, pope: str, opera: str, llava: str, strict: str | None
) -> None:
    read = {name: rule(text, label) for name, rule in MATCHERS.items()}
    assert read == {"pope": pope, "opera": opera, "llava": llava, "strict": strict}
    assert is_plain(text) == (strict is not None)


PICTURES = [
    ("apple", "cup", "table"),
    ("apple", "cup", "orange"),
    ("cup", "table", "dog"),
    ("dog", "cat", "kite"),
]
# Popularity, ties by first appearance: cup 3; apple, table, dog 2; orange, cat, kite 1.


def _absent(questions: list[PopeQuestion], picture: int) -> list[str]:
    return [question.object for question in questions if question.picture == picture and question.label == "no"]


def test_popular_asks_for_the_most_frequent_absent_objects() -> None:
    questions = build_pope_questions(PICTURES, "popular", seed=0)
    assert _absent(questions, 0) == ["dog", "orange", "cat"]
    assert _absent(questions, 1) == ["table", "dog", "cat"]
    assert _absent(questions, 2) == ["apple", "orange", "cat"]
    assert _absent(questions, 3) == ["cup", "apple", "table"]


def test_adversarial_asks_for_the_most_frequent_company() -> None:
    # Company: apple: cup 2, table 1, orange 1. cup: apple 2, table 2, orange 1, dog 1. table: cup 2, apple 1, dog 1.
    # dog: cup, table, cat, kite 1 each. orange: apple, cup. cat: dog, kite. kite: dog, cat.
    questions = build_pope_questions(PICTURES, "adversarial", seed=0)
    # Picture 0: apple -> orange; cup -> dog (orange used); table -> none left, so random among cat and kite.
    assert _absent(questions, 0)[:2] == ["orange", "dog"]
    assert _absent(questions, 0)[2] in {"cat", "kite"}
    # Picture 1: apple -> table; cup -> dog; orange -> its company is all there, so random among cat and kite.
    assert _absent(questions, 1)[:2] == ["table", "dog"]
    assert _absent(questions, 1)[2] in {"cat", "kite"}
    # Picture 2: cup -> apple; table -> none left (cup, apple, dog), so random; dog -> cat, or kite if cat is used.
    assert _absent(questions, 2)[0] == "apple"
    # Picture 3: dog -> cup (there before table); cat and kite -> random.
    assert _absent(questions, 3)[0] == "cup"


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_questions_alternate_are_true_and_never_repeat(split: str) -> None:
    pictures = [tuple(sample_scene("test", i).kinds) for i in range(80)]
    questions = build_pope_questions(pictures, split, seed=1)
    usable = [i for i, objects in enumerate(pictures) if len(objects) >= 3]
    assert [question.picture for question in questions] == [i for i in usable for _ in range(6)]
    assert [question.label for question in questions] == ["yes", "no"] * (3 * len(usable))
    for i in usable:
        asked = [question for question in questions if question.picture == i]
        assert [question.object for question in asked[::2]] == list(pictures[i][:3])
        assert len({question.object for question in asked}) == 6
        assert not {question.object for question in asked[1::2]} & set(pictures[i])


def test_random_absent_objects_are_uniform_and_seeded() -> None:
    vocabulary = ["a1", "b1", "c1", "d1", "e1", "f1", "g1"]
    pictures = [("a1", "b1", "c1")] * 3000
    questions = build_pope_questions(pictures, "random", seed=0, vocabulary=vocabulary)
    first = [question.object for question in questions[1::6]]
    shares = [first.count(name) / 3000 for name in vocabulary]
    assert shares[:3] == [0, 0, 0]
    assert all(abs(share - 0.25) < 4 * (0.25 * 0.75 / 3000) ** 0.5 for share in shares[3:])
    assert questions == build_pope_questions(pictures, "random", seed=0, vocabulary=vocabulary)
    assert questions != build_pope_questions(pictures, "random", seed=1, vocabulary=vocabulary)


def test_article_and_spelling() -> None:
    questions = build_pope_questions(PICTURES, "popular", seed=0)
    texts = {question.object: question.text for question in questions}
    assert texts["apple"] == "Is there an apple in the image?"
    assert texts["orange"] == "Is there an orange in the image?"
    assert texts["cup"] == "Is there a cup in the image?"


def test_small_pictures_are_left_out_of_the_counts_too() -> None:
    # "owl" is in most pictures, but in those that are too small to ask about.
    pictures = [*PICTURES, ("owl",), ("owl", "owl", "owl"), ("owl", "cup"), ("owl",)]
    assert build_pope_questions(pictures, "popular", 0) == build_pope_questions(PICTURES, "popular", 0)


def test_counts_can_come_from_other_pictures() -> None:
    questions = build_pope_questions(
        PICTURES[:1], "adversarial", 0, KINDS, counted_on=[("apple", "boat"), ("cup", "cat")]
    )
    assert _absent(questions, 0)[:2] == ["boat", "cat"]


def test_builder_refuses() -> None:
    with pytest.raises(InputError, match="did you mean 'popular'"):
        build_pope_questions(PICTURES, "populer", 0)
    for odd in (0, 3):
        with pytest.raises(InputError, match="even"):
            build_pope_questions(PICTURES, "random", 0, questions_per_picture=odd)
    with pytest.raises(InputError, match="no picture shows 3"):
        build_pope_questions([("cup", "cup", "dog")], "random", 0)
    with pytest.raises(InputError, match="too few"):
        build_pope_questions([("cup", "dog", "cat")], "random", 0)


# Two pictures, eight answers under the official rule. Labels yes: 4, of which answered yes 3 (TP 3, FN 1).
# Labels no: 4, of which answered yes 2 ("Nope" and "" are read as yes: FP 2, TN 2). Accuracy 5/8, precision 3/5,
# recall 3/4, F1 = 6 / (5 + 4) = 2/3, yes-rate 5/8. Without a plain yes or no: "Nope", "", "A cat": 3/8.
ANSWERS = [
    ("p", "yes", "Yes, there is."),
    ("p", "no", "No."),
    ("p", "yes", "A cat"),
    ("p", "no", "Nope"),
    ("q", "yes", "no"),
    ("q", "no", "No, it is a dog"),
    ("q", "yes", "yes"),
    ("q", "no", ""),
]


def test_scores_by_hand() -> None:
    scores = Pope().scores(_rows(Pope(), ANSWERS))
    assert next(iter(scores)) == "accuracy"
    values = {name: score.value for name, score in scores.items()}
    assert values == pytest.approx(
        {"accuracy": 5 / 8, "precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3, "yes_rate": 5 / 8, "unparsed": 3 / 8}
    )
    assert (scores["accuracy"].low, scores["accuracy"].high) == wilson(5, 8)
    assert (scores["unparsed"].low, scores["unparsed"].high) == wilson(3, 8)
    assert {score.n for score in scores.values()} == {8}
    # Two pictures have three distinct draws: both p (recall 2/2), both q (1/2), or one of each.
    assert (scores["recall"].low, scores["recall"].high) == (0.5, 1.0)


def test_strict_counts_what_it_cannot_read_as_wrong_and_as_no_answer() -> None:
    # TP 2 of 4 labels yes; FP 0; answers yes 2. Hits: two yes, two no.
    strict = Pope(matcher="strict")
    values = {name: score.value for name, score in strict.scores(_rows(strict, ANSWERS)).items()}
    assert values == pytest.approx(
        {"accuracy": 4 / 8, "precision": 1, "recall": 2 / 4, "f1": 2 / 3, "yes_rate": 2 / 8, "unparsed": 3 / 8}
    )


def test_scores_of_an_empty_class_are_zero_and_of_no_rows_an_error() -> None:
    values = Pope().scores(_rows(Pope(), [("p", "no", "no"), ("q", "no", "no")]))
    assert [values[name].value for name in ("precision", "recall", "f1", "yes_rate")] == [0, 0, 0, 0]
    with pytest.raises(InputError, match="no answers"):
        Pope().scores([])


def test_margin_gives_p_yes_and_auroc() -> None:
    # Margins of labels yes: 2, 0; of labels no: 1, 0. Pairs: 2>1, 2>0, 0<1, 0=0: 2.5 of 4.
    answers = [("yes", 2.0), ("no", 1.0), ("yes", 0.0), ("no", 0.0)]
    items = [_item(f"{i}", label, f"{i}") for i, (label, _) in enumerate(answers)]
    rows = [
        Pope().row(Answer(item, "yes", 1, {"yes_logit_margin": margin}))
        for item, (_, margin) in zip(items, answers, strict=True)
    ]
    assert [row["p_yes"] for row in rows] == pytest.approx([0.880797, 0.731059, 0.5, 0.5], abs=1e-6)
    scores = Pope().scores(rows)
    assert scores["auroc"].value == pytest.approx(2.5 / 4)
    # Two labels are yes, and so are the answers of the two highest margins: one of them rightly, so one no too.
    assert scores["calibrated_accuracy"].value == 0.5
    for name in ("auroc", "calibrated_accuracy"):
        assert scores[name].low <= scores[name].value <= scores[name].high
    del rows[0]["yes_logit_margin"]
    assert {"auroc", "calibrated_accuracy"}.isdisjoint(Pope().scores(rows))
    assert list(Pope().paired_others(rows, rows)) == ["precision", "recall", "f1", "yes_rate"]


def test_rows_are_json_and_scores_survive_the_file() -> None:
    rows = _rows(Pope(matcher="strict"), ANSWERS)
    assert rows[2] == {
        "id": "2",
        "group": "p",
        "task": "existence",
        "answer": "yes",
        "text": "A cat",
        "n_tokens": 1,
        "label": "yes",
        "parsed": None,
        "hit": False,
        "readable": False,
        "matcher": "strict",
    }
    assert Pope().scores(json.loads(json.dumps(rows))) == Pope().scores(rows)


def test_paired_flips_pictures_or_is_mcnemar_where_each_has_one_item() -> None:
    right, wrong = "yes", "no"
    labels = [(f"{i}", "yes", right) for i in range(12)]
    worse = [(f"{i}", "yes", wrong if i < 7 else right) for i in range(12)]
    pope = Pope()
    assert pope.paired(_rows(pope, labels), _rows(pope, worse)) == pytest.approx(mcnemar_exact(7, 0))
    # The same answers on a single picture are one observation: no p-value can be small.
    together_a = [("p", label, text) for _, label, text in labels]
    together_b = [("p", label, text) for _, label, text in worse]
    assert pope.paired(_rows(pope, together_a), _rows(pope, together_b)) == 1.0
    assert pope.paired(_rows(pope, labels), _rows(pope, labels)) == 1.0


def test_other_scores_are_tested_by_exchanging_pictures() -> None:
    # Two pictures of two questions each: four ways to exchange them, of which two are mirror images of the others.
    before = [("p", "yes", "no"), ("p", "no", "no"), ("q", "yes", "yes"), ("q", "no", "yes")]
    after = [("p", "yes", "yes"), ("p", "no", "yes"), ("q", "yes", "yes"), ("q", "no", "no")]
    found = Pope().paired_others(_rows(Pope(), before), _rows(Pope(), after))
    # yes_rate 2/4, then 3/4, and by picture +2 and -1: only exchanging one of the two takes them further apart.
    assert found["yes_rate"] == 1.0
    # recall 1/2, then 2/2: only p changed, so each exchange is as far.
    assert found["recall"] == 1.0
    assert "auroc" not in found
    many = [(f"{i}", "yes", "no") for i in range(12)]
    few = [(f"{i}", "yes", "yes") for i in range(12)]
    p = Pope().paired_others(_rows(Pope(), many), _rows(Pope(), few))
    assert p["recall"] == p["yes_rate"] == p["f1"] < 0.002, "two of 4096 ways, as often as 10000 draws find them"


def test_paired_refuses_other_items() -> None:
    rows = _rows(Pope(), ANSWERS)
    with pytest.raises(InputError, match="1 items are in one of them only"):
        Pope().paired(rows, rows[1:])
    with pytest.raises(InputError, match="more than once"):
        Pope().paired(rows, [*rows[:-1], rows[0]])
    with pytest.raises(InputError, match="1 items are in one of them only"):
        Pope().paired_others(rows, rows[1:])


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_picturebook_items_tell_the_truth(split: str) -> None:
    items = Pope(suffix=" Yes or no?").items(split, 50, seed=2)
    assert len(items) == 50
    assert len({item.id for item in items}) == 50
    assert len({item.group for item in items}) == 9
    for item in items:
        scene = sample_scene("test", item.meta["scene"], against=split == "adversarial")
        assert item.meta["scene"] >= 2_000_000
        assert (item.meta["object"] in scene.kinds) == (item.answer == "yes")
        assert f" {item.meta['object']} in the image? Yes or no?" in item.question
        json.dumps(dict(item.meta))
    assert (
        items[7].picture().tobytes()
        == draw(sample_scene("test", items[7].meta["scene"], against=split == "adversarial")).tobytes()
    )
    again = Pope(suffix=" Yes or no?").items(split, 50, seed=2)
    assert [replace(item, picture=len) for item in items] == [replace(item, picture=len) for item in again]  # type: ignore[arg-type]


def test_adversarial_picturebook_asks_for_the_missing_partner() -> None:
    items = Pope().items("adversarial", 240)
    absent: dict[int, list[str]] = {}
    for item in items:
        if item.answer == "no":
            absent.setdefault(item.meta["scene"], []).append(item.meta["object"])
    asked = [
        SCENE_TYPES[sample_scene("test", i, against=True).scene_type].partner in names for i, names in absent.items()
    ]
    assert len(asked) == 40
    assert sum(asked) >= 36


@pytest.mark.parametrize("split", ["random", "adversarial"])
def test_scenes_of_validation_are_others(split: str) -> None:
    items, tested = (Pope(scenes=scenes).items(split, 12) for scenes in ("validation", "test"))
    against = split == "adversarial"
    assert [item.id for item in Pope().items(split, 12)] == [item.id for item in tested]
    for item in items:
        scene = sample_scene("validation", item.meta["scene"], against=against)
        assert (item.answer == "yes") == (item.meta["object"] in scene.kinds)
        assert item.picture is not None
        assert item.picture().tobytes() == draw(scene).tobytes()
    with pytest.raises(InputError, match="did you mean 'validation'"):
        Pope(scenes="validatio")  # type: ignore[arg-type]


def test_positives_of_the_picturebook_are_not_always_the_anchor() -> None:
    # With kinds in their listed order the first question would be about the anchor in nine of ten scenes.
    items = Pope().items("random", 360)
    first = items[::6]
    anchors = [
        item.meta["object"] == SCENE_TYPES[sample_scene("test", item.meta["scene"]).scene_type].anchor for item in first
    ]
    assert 0.05 < sum(anchors) / len(anchors) < 0.6


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Official-looking files of two splits, and an image folder."""
    (tmp_path / "images").mkdir()
    for split in ("random", "popular"):
        lines = []
        for k in range(12):
            image = f"COCO_{k // 6}.png"
            PIL.Image.new("RGB", (5, 4), (k // 6, 0, 0)).save(tmp_path / "images" / image)
            text = f"Is there an object{k} in the imange?"
            lines.append(
                json.dumps({"question_id": k + 1, "image": image, "text": text, "label": "yes" if k % 2 == 0 else "no"})
            )
        (tmp_path / f"coco_pope_{split}.json").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def test_official_files_by_folder_pattern_mapping_and_path(official: Path) -> None:
    images = official / "images"
    ways: list[Any] = [
        official,
        f"{official}/coco_pope_{{split}}.json",
        {"random": official / "coco_pope_random.json"},
        official / "coco_pope_random.json",
    ]
    for questions in ways:
        items = Pope(source="files", questions=questions, images=images).items("random")
        assert [item.id for item in items] == [f"random/{k}" for k in range(1, 13)]
        assert items[0].question == "Is there an object0 in the imange?"
        assert [item.answer for item in items] == ["yes", "no"] * 6
        assert [item.group for item in items] == ["COCO_0.png"] * 6 + ["COCO_1.png"] * 6
        assert items[6].picture().getpixel((0, 0)) == (1, 0, 0)


def test_a_part_of_the_official_files_is_whole_pictures(official: Path) -> None:
    pope = Pope(source="files", questions=official, images=official / "images")
    drawn = {tuple(item.group for item in pope.items("random", 6, seed=seed)) for seed in range(12)}
    assert drawn == {("COCO_0.png",) * 6, ("COCO_1.png",) * 6}
    assert [item.group for item in pope.items("random", 8, seed=1)] == ["COCO_0.png"] * 6 + ["COCO_1.png"] * 2
    assert len(pope.items("random", 100)) == 12


def test_official_files_that_cannot_be_used(official: Path) -> None:
    images = official / "images"

    def refused(match: str, questions: Any, split: str = "random") -> None:
        with pytest.raises(InputError, match=match):
            Pope(source="files", questions=questions, images=images).items(split)

    refused("holds none", official, "adversarial")
    refused("no file for the split 'popular'", {"random": official / "x.json"}, "popular")
    refused("is the file of the split 'popular'", official / "coco_pope_popular.json")
    refused("cannot read", official / "nothing.json")
    (official / "coco_pope_random.jsonl").write_text("{}")
    refused("several", official)

    good = {"question_id": 1, "image": "COCO_0.png", "text": "?", "label": "yes"}
    bad = official / "bad.jsonl"
    cases: list[tuple[str, list[Any]]] = [
        ("line 2 of .* is not JSON", [good, "{"]),
        ("line 1 of .* lacks label", [{key: good[key] for key in ("question_id", "image", "text")}]),
        ("line 1 of .* lacks question_id", [[1, 2]]),
        ("labelled 'maybe'", [good | {"label": "maybe"}]),
        ("question_id 1 occurs more than once", [good, good]),
        ("no image gone.png", [good | {"image": "gone.png"}]),
        ("outside", [good | {"image": "../bad.jsonl"}]),
        ("is empty", []),
    ]
    for match, records in cases:
        bad.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
        refused(match, bad)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"source": "file"}, "did you mean 'files'"),
        ({"matcher": "stric"}, "did you mean 'strict'"),
        ({"source": "files"}, "needs questions="),
        ({"images": "somewhere"}, "only with source=files"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": "8"}, "max_new_tokens"),
        ({"mather": "strict"}, "did you mean 'matcher'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        get_benchmark("pope", **options)


def test_splits_and_counts_are_checked() -> None:
    with pytest.raises(InputError, match="did you mean 'adversarial'"):
        Pope().items("adverserial")
    with pytest.raises(InputError, match="1 or more"):
        Pope().items("random", 0)
    with pytest.raises(InputError, match="seed"):
        Pope().items("random", 6, seed=-1)


def test_registry_finds_benchmarks_by_module_and_refuses_doubles() -> None:
    assert {"pope", "chair"} <= set(list_benchmarks())
    assert get_benchmark("pope", matcher="strict") == Pope(matcher="strict")
    assert get_benchmark("pope").name == "pope"
    with pytest.raises(InputError, match="did you mean 'pope'"):
        get_benchmark("poep")

    class Other(Pope):
        pass

    with pytest.raises(AssertionError):
        register_benchmark("pope")(Other)
