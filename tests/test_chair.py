"""CHAIR's mentions and scores, worked by hand, from the picture world, from COCO-like files and from caption files."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL.Image
import pytest

from sightline.benchmarks import mentions
from sightline.benchmarks.chair import PICTUREBOOK_READER, Chair
from sightline.benchmarks.item import Answer, Item, get_benchmark
from sightline.benchmarks.mentions import Lexicon, coco_reader, nltk_lemmatiser, singular
from sightline.benchmarks.statistics import mcnemar_exact, wilson
from sightline.errors import InputError
from sightline.picturebook.draw import draw
from sightline.picturebook.questions import long_caption, short_caption
from sightline.picturebook.scene import KINDS, PLURALS, SCENE_TYPES, sample_scene

COCO_NAMES = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign
parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase
frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle
wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch
potted_plant bed dining_table toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink
refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"""


def test_own_synonym_list_has_the_80_classes_and_no_name_twice() -> None:
    node_of = coco_reader(None, "rules").lexicon.node_of
    assert set(node_of.values()) == {name.replace("_", " ") for name in COCO_NAMES.split()}
    assert all(node_of[name] == name for name in node_of.values())
    lines = (Path(mentions.__file__).parent / "coco_synonyms.txt").read_text(encoding="utf-8").splitlines()
    assert sum(len(line.split(", ")) for line in lines) == len(node_of)


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("A dog eats a hot dog.", ["dog", "hot dog"]),
        ("Two hot dogs beside a teddy bear", ["hot dog", "teddy bear"]),
        ("A baby bird and an adult elephant", ["bird", "elephant"]),
        ("A baby holds a bird", ["person", "bird"]),
        ("A passenger train; the passengers wait", ["train", "person"]),
        ("Train tracks lead to home plate", []),
        ("A man in a bow tie", ["person", "tie"]),
        ("The toilet seat is up", ["toilet"]),
        ("The seat of the toilet", ["toilet"]),
        ("The seat of the car", ["chair", "car"]),
        ("Wine glasses on the dining tables", ["wine glass", "dining table"]),
        ("Glasses", []),
        ("Traffic lights, stop signs and fire hydrants", ["traffic light", "stop sign", "fire hydrant"]),
        ("People, men, women and children", ["person"] * 4),
        ("Knives, mice, buses, benches, geese and skis", ["knife", "mouse", "bus", "bench", "bird", "skis"]),
        ("Blue skies over the grass", []),
        ("A laptop computer and a mobile phone.", ["laptop", "cell phone"]),
        ("Cats. CATS! The cat's cat-like look", ["cat", "cat", "cat"]),
        ("", []),
    ],
)
def test_mentions_of_coco_objects(caption: str, found: list[str]) -> None:
    assert coco_reader(None, "rules").mentions(caption)[0] == found


def test_length_counts_words_and_marks_with_merged_words_as_one() -> None:
    reader = coco_reader(None, "rules")
    # two | hot dog | , | a | teddy bear | .
    assert reader.mentions("Two hot dogs, a teddy bear.")[1] == 6
    # The dropped "seat" is no mention but stays a word; "dining table" stays two words.
    assert reader.mentions("the seat of the toilet")[1] == 5
    assert reader.mentions("the dining table")[1] == 3


def test_singular_keeps_words_that_only_look_like_plurals() -> None:
    words = {
        "bus",
        "glass",
        "tennis",
        "skis",
        "ski",
        "sky",
        "tie",
        "movie",
        "leaf",
        "wave",
        "box",
        "dish",
        "potato",
        "policeman",
    }
    expected = {
        "bus": "bus",
        "buses": "bus",
        "glass": "glass",
        "glasses": "glass",
        "tennis": "tennis",
        "skis": "skis",
        "skies": "sky",
        "ties": "tie",
        "movies": "movie",
        "leaves": "leaf",
        "waves": "wave",
        "boxes": "box",
        "dishes": "dish",
        "potatoes": "potato",
        "policemen": "policeman",
        "unknowns": "unknowns",
    }
    assert {word: singular(word, words) for word in expected} == expected


def test_synonym_lists_are_read_as_the_original_reads_them() -> None:
    # "wagon" has a stray space before it in the first line: it never matches, yet "hand cart" with one is still merged,
    # so that "cart" alone is not found in it. Of "van" in two lines the last counts.
    lines = ["car,  wagon,  hand cart, cart, van", "truck, van, pickup ", ""]
    lexicon = Lexicon.of_coco(lines, "list")
    assert lexicon.find(["wagon", "hand", "cart", "cart", "van", "pickup"]) == (["car", "truck", "truck"], 5)
    with pytest.raises(InputError, match=r"line 1 of list: names must be separated"):
        Lexicon.of_coco(["car,van"], "list")
    with pytest.raises(InputError, match="no names"):
        Lexicon.of_coco([""], "list")


def _row(chair: Chair, name: str, objects: list[str], caption: str) -> dict[str, Any]:
    item = Item(name, chair.prompt, "", lambda: PIL.Image.new("RGB", (4, 4)), name, "caption", 9, {"objects": objects})
    return chair.row(Answer(item, caption, 7))


# Picture world, three captions:
#   a, objects boat, fish:          boat, boat, cup, cup -> mentions 4, hallucinated 2; named {boat, cup}, right 1 of 2
#   b, objects car, tree, dog:      car, dog             -> mentions 2, hallucinated 0; named 2, right 2 of 3
#   c, objects moon:                star                 -> mentions 1, hallucinated 1; named 1, right 0 of 1
# chair_s 2/3; chair_i 3/7; recall 3/6; precision 3/5; f1 = 2 * 3 / (6 + 5); words 11, 4, 2.
CAPTIONS = [
    ("a", ["boat", "fish"], "A boat, two boats, a cup, cups."),
    ("b", ["car", "tree", "dog"], "a car and dogs"),
    ("c", ["moon"], "Star."),
]


def test_scores_by_hand() -> None:
    chair = Chair()
    rows = [_row(chair, *caption) for caption in CAPTIONS]
    assert rows[0]["mentions"] == ["boat", "boat", "cup", "cup"]
    assert rows[0]["hallucinated"] == ["cup", "cup"]
    assert [row["length"] for row in rows] == [11, 4, 2]
    scores = chair.scores(json.loads(json.dumps(rows)))
    assert next(iter(scores)) == "chair_s"
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {"chair_s": 2 / 3, "chair_i": 3 / 7, "recall": 1 / 2, "precision": 3 / 5, "f1": 6 / 11, "length": 17 / 3}
    )
    assert (scores["chair_s"].low, scores["chair_s"].high) == wilson(2, 3)
    # The draws of three captions go from three times b (no hallucination) to three times c (nothing else).
    assert (scores["chair_i"].low, scores["chair_i"].high) == (0.0, 1.0)
    assert {score.n for score in scores.values()} == {3}


def test_nothing_said_is_no_hallucination_and_no_recall() -> None:
    chair = Chair()
    scores = chair.scores([_row(chair, "a", ["boat"], ""), _row(chair, "b", ["car"], "It is dark.")])
    assert [scores[name].value for name in ("chair_s", "chair_i", "recall", "precision", "f1")] == [0] * 5
    with pytest.raises(InputError, match="no captions"):
        chair.scores([])


def test_paired_test_is_mcnemar_on_captions_with_a_hallucination() -> None:
    chair = Chair()
    clean = [_row(chair, f"{i}", ["boat"], "a boat") for i in range(9)]
    dirty = [_row(chair, f"{i}", ["boat"], "a boat and a cup and a cup" if i < 6 else "a boat") for i in range(9)]
    assert chair.paired(clean, dirty) == pytest.approx(mcnemar_exact(0, 6))


def test_ratios_are_tested_by_exchanging_captions() -> None:
    chair = Chair()
    texts = ["a boat and a cup and a cup", "a boat", "a boat and a cup", "a dog and a cup", "a boat"]
    other = ["a boat", "a boat and a dog", "a boat", "a dog", "a boat and a cup"]
    a, b = ([_row(chair, f"{i}", ["boat", "dog"], text) for i, text in enumerate(own)] for own in (texts, other))
    found = chair.paired_others(a, b)
    assert list(found) == ["chair_i", "recall", "precision", "f1", "length"]

    def difference(swapped: tuple[bool, ...], name: str) -> float:
        pairs = [(y, x) if swap else (x, y) for swap, x, y in zip(swapped, a, b, strict=True)]
        one, two = (chair.scores([pair[side] for pair in pairs])[name].value for side in (0, 1))
        return abs(one - two)

    ways = list(itertools.product((False, True), repeat=5))
    for name, p in found.items():
        as_far = [difference(way, name) >= difference(ways[0], name) - 1e-9 for way in ways]
        assert p == pytest.approx(sum(as_far) / len(ways), abs=0.02)
    lite = [dict(row, metric="chair-lite") for row in b]
    with pytest.raises(InputError, match="CHAIR-lite"):
        chair.paired_others(a, lite)
    with pytest.raises(InputError, match="in one of them only"):
        chair.paired_others(a, b[1:])


def test_picturebook_captions_of_the_record_are_read_without_a_miss() -> None:
    # Ground-truth captions name each visible kind, so nothing is hallucinated and nothing is left out.
    chair = Chair()
    rows = []
    for item in chair.items("test", 60):
        scene = sample_scene("test", item.meta["scene"])
        for style in (short_caption, long_caption):
            rows.append(chair.row(Answer(item, style(scene).answer, 1)) | {"id": f"{item.id}-{style.__name__}"})
    values = {name: score.value for name, score in chair.scores(rows).items()}
    assert values["chair_s"] == values["chair_i"] == 0
    assert values["recall"] == values["precision"] == values["f1"] == 1


def test_picturebook_reader_knows_each_kind_and_its_plural() -> None:
    for kind in KINDS:
        assert PICTUREBOOK_READER.mentions(f"One {kind}, two {PLURALS[kind]}.") == ([kind, kind], 6)


@pytest.mark.parametrize("against", [False, True])
def test_picturebook_items_tell_what_is_visible(against: bool) -> None:
    items = Chair(against=against).items("test", 40, seed=3)
    assert len({item.id for item in items}) == len({item.group for item in items}) == 40
    for item in items:
        scene = sample_scene("test", item.meta["scene"], against=against)
        assert item.meta["scene"] >= 3_000_000
        assert item.question == "Please describe this image in detail."
        assert item.meta["objects"] == list(scene.kinds)
        own = SCENE_TYPES[scene.scene_type]
        assert not against or (own.anchor in item.meta["objects"] and own.partner not in item.meta["objects"])
        json.dumps(dict(item.meta))
    assert items[5].picture().tobytes() == draw(sample_scene("test", items[5].meta["scene"], against=against)).tobytes()


def test_scenes_of_validation_are_others() -> None:
    chair = Chair(scenes="validation")
    for item in chair.items("test", 5):
        scene = sample_scene("validation", item.meta["scene"])
        assert item.meta["objects"] == list(scene.kinds)
        assert item.picture is not None
        assert item.picture().tobytes() == draw(scene).tobytes()
    with pytest.raises(InputError, match="did you mean 'validation'"):
        Chair(scenes="validatio")  # type: ignore[arg-type]


SYNONYMS = "person, man, woman\ndog, puppy\nhot dog\nchair, seat\ndining table, table\ntoilet\nbench\n"


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Annotation files of four images in val and one in train, a synonym list, and images of 1, 2 and 3."""
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 67, "name": "dining table"}]

    def write(part: str, instances: list[tuple[int, int]], captions: list[tuple[int, str]], images: list[int]) -> None:
        listed = [{"id": i, "file_name": f"COCO_{part}_{i:012}.jpg"} for i in images]
        notes = [{"image_id": image, "category_id": category} for image, category in instances]
        (tmp_path / f"instances_{part}.json").write_text(
            json.dumps({"images": listed, "categories": categories, "annotations": notes})
        )
        told = [{"image_id": image, "caption": caption} for image, caption in captions]
        (tmp_path / f"captions_{part}.json").write_text(json.dumps({"images": listed, "annotations": told}))

    write(
        "val2014",
        [(1, 1), (1, 1), (2, 18)],
        [(1, "A man with a hot dog"), (1, "Someone eats"), (2, "Two puppies on a bench"), (3, "Nothing much")],
        [1, 2, 3, 4],
    )
    write("train2014", [(9, 67)], [(9, "A table")], [9])
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    (tmp_path / "images").mkdir()
    for i in (1, 2, 3):
        PIL.Image.new("RGB", (6, 4), (i, 0, 0)).save(tmp_path / "images" / f"COCO_val2014_{i:012}.jpg")
    (tmp_path / "images" / "readme.txt").write_text("no picture")
    (tmp_path / "images" / "cover.jpg").write_text("no number")
    return tmp_path


def _coco(folder: Path, **options: Any) -> Chair:
    settings = dict(source="coco", annotations=folder, synonyms=folder / "synonyms.txt", lemmatiser="rules")
    return Chair(**(settings | options))


def test_coco_truth_is_segments_and_human_captions(coco: Path) -> None:
    items = _coco(coco, images=coco / "images").items("test")
    assert [item.meta["objects"] for item in items] == [["hot dog", "person"], ["bench", "dog"], []]
    assert [item.id for item in items] == ["coco-1", "coco-2", "coco-3"]
    assert items[0].max_new_tokens == 512
    assert items[1].picture().size == (6, 4)
    assert len(_coco(coco, images=coco / "images").items("test", 2, seed=1)) == 2
    drawn = {tuple(i.id for i in _coco(coco, images=coco / "images").items("test", 1, seed=s)) for s in range(20)}
    assert drawn == {("coco-1",), ("coco-2",), ("coco-3",)}


def _captions(folder: Path, *captions: tuple[object, str]) -> Path:
    path = folder / "captions.jsonl"
    path.write_text("\n".join(json.dumps({"image_id": image, "caption": caption}) for image, caption in captions))
    return path


def test_captions_made_elsewhere_are_scored_by_hand(coco: Path) -> None:
    # 1, objects hot dog, person: hot dog, person, dog, chair -> 4 mentions, 2 hallucinated; right 2 of 2, named 4
    # 2, objects bench, dog:      dog                         -> 1 mention; right 1 of 2, named 1
    # 9, objects dining table:    dining table, dining table  -> 2 mentions; right 1 of 1, named 1
    path = _captions(
        coco,
        (1, "A hot dog, a woman, a dog on a seat."),
        (2, "Puppies."),
        ("9", "A table and the dining tables"),
    )
    scores = _coco(coco).score_captions(path)
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {
            "chair_lite_s": 1 / 3,
            "chair_lite_i": 2 / 7,
            "recall": 4 / 5,
            "precision": 4 / 6,
            "f1": 8 / 11,
            "length": (12 + 2 + 6) / 3,
        }
    )


def test_captions_of_scenes_made_elsewhere(tmp_path: Path) -> None:
    scene = sample_scene("test", 4, against=True)
    partner = SCENE_TYPES[scene.scene_type].partner
    path = _captions(tmp_path, (4, f"There is a {scene.kinds[0]} and a {partner}."))
    (row,) = Chair(against=True).caption_rows(path)
    assert row["hallucinated"] == [partner]
    assert row["id"] == Chair(against=True).items("test", 5)[4].id
    assert Chair(against=True).score_captions(path)["chair_i"].value == 0.5


def test_images_of_train_are_only_looked_up_when_needed(coco: Path) -> None:
    (coco / "instances_train2014.json").write_text("not read")
    path = _captions(coco, (1, "a man"), (4, "a man"))
    assert [row["objects"] for row in _coco(coco).caption_rows(path)] == [["hot dog", "person"], []]
    with pytest.raises(InputError, match="not a COCO annotation file"):
        _coco(coco).caption_rows(_captions(coco, (1, "a man"), (9, "a table")))


def test_coco_files_that_cannot_be_used(coco: Path, tmp_path: Path) -> None:
    def refused(match: str, chair: Chair, *captions: tuple[object, str]) -> None:
        with pytest.raises(InputError, match=match):
            chair.score_captions(_captions(tmp_path, *captions))

    refused("image 77 is not in the annotations of val2014 and train2014", _coco(coco), (77, "a dog"))
    refused("more than one caption", _coco(coco), (1, "a dog"), (1, "a cat"))
    refused("whole number", _coco(coco), ("one", "a dog"))
    refused("cannot read the synonym list", _coco(coco, synonyms=coco / "none.txt"), (1, "a dog"))
    (coco / "short.txt").write_text("dog, puppy")
    refused("lacks COCO's category 'person'", _coco(coco, synonyms=coco / "short.txt"), (1, "a dog"))
    refused("holds no instances_val2014", _coco(coco, annotations=coco / "images"), (1, "a dog"))
    with pytest.raises(InputError, match="needs images="):
        _coco(coco).items("test")
    with pytest.raises(InputError, match="no folder"):
        _coco(coco, images=coco / "none").items("test")
    (coco / "bare").mkdir()
    with pytest.raises(InputError, match="no image whose name ends"):
        _coco(coco, images=coco / "bare").items("test")
    (coco / "captions_val2014.json").unlink()
    refused("captions_val2014.json", _coco(coco), (2, "a dog"))


def _fake_nltk(monkeypatch: pytest.MonkeyPatch, *, with_data: bool) -> None:
    """A stand-in with NLTK's three functions: it tags words in -ing as verbs, and lemmatises by tag."""
    nltk, stem = ModuleType("nltk"), ModuleType("nltk.stem")

    def word_tokenize(text: str) -> list[str]:
        if not with_data:
            raise LookupError("Resource punkt_tab not found")
        return text.replace(".", " .").split()

    class WordNetLemmatizer:
        def lemmatize(self, word: str, pos: str) -> str:
            lemmas = {("dogs", "n"): "dog", ("seating", "v"): "seat", ("men", "n"): "man", ("seats", "n"): "seat"}
            return lemmas.get((word, pos), word)

    nltk.word_tokenize = word_tokenize  # type: ignore[attr-defined]
    nltk.pos_tag = lambda words: [(w, "VBG" if w.endswith("ing") else "NNS") for w in words]  # type: ignore[attr-defined]
    stem.WordNetLemmatizer = WordNetLemmatizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "nltk.stem", stem)
    coco_reader.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_readers() -> Any:
    coco_reader.cache_clear()
    yield
    coco_reader.cache_clear()


def test_standard_name_needs_nltk_and_the_given_list(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_nltk(monkeypatch, with_data=True)
    reader = coco_reader(str(coco / "synonyms.txt"), "auto")
    assert reader.metric == "chair"
    assert reader.mentions("hot dogs and men seating dogs.") == (["hot dog", "person", "chair", "dog"], 6)
    assert coco_reader(None, "nltk").metric == "chair-lite"
    assert coco_reader(str(coco / "synonyms.txt"), "rules").metric == "chair-lite"
    path = _captions(coco, (1, "men and hot dogs"))
    assert next(iter(_coco(coco, lemmatiser="nltk").score_captions(path))) == "chair_s"


def test_nltk_without_its_data_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_nltk(monkeypatch, with_data=False)
    assert nltk_lemmatiser() is None
    assert coco_reader(None, "auto").metric == "chair-lite"
    with pytest.raises(InputError, match="punkt_tab"):
        coco_reader(None, "nltk")
    monkeypatch.setitem(sys.modules, "nltk", None)
    assert nltk_lemmatiser() is None


def test_rows_of_two_ways_of_reading_do_not_mix(coco: Path) -> None:
    rows = _coco(coco).caption_rows(_captions(coco, (1, "a man"), (2, "a dog")))
    rows[1]["metric"] = "chair"
    with pytest.raises(InputError, match="CHAIR-lite"):
        _coco(coco).scores(rows)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"source": "cocoa"}, "did you mean 'coco'"),
        ({"source": "coco"}, "needs annotations="),
        ({"source": "coco", "annotations": ".", "against": True}, "only with source=picturebook"),
        ({"annotations": ".", "images": "."}, "annotations and images only with source=coco"),
        ({"against": "yes"}, "against must be True or False"),
        ({"lemmatiser": "nltkk"}, "did you mean 'nltk'"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"promt": "?"}, "did you mean 'prompt'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        get_benchmark("chair", **options)
