"""The benchmark of the built-in model's skills: every answer is checked against the scene's record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice

import pytest

from sightline.benchmarks.chair import Chair
from sightline.benchmarks.item import Answer, Item, get_benchmark
from sightline.benchmarks.skills import SKILLS, likely_absent, normalised, popular_kinds
from sightline.benchmarks.statistics import mcnemar_exact, wilson
from sightline.errors import InputError
from sightline.picturebook.draw import draw
from sightline.picturebook.scene import (
    HELD_OUT,
    KINDS,
    PLURALS,
    SCENE_TYPES,
    Scene,
    random_stream,
    sample_scene,
    scenes,
)

N = 24
skills = get_benchmark("skills")


@pytest.fixture(scope="module")
def items() -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in skills.items("test", N):
        found.setdefault(item.task, []).append(item)
    return found


def scene_of(item: Item) -> Scene:
    return sample_scene("test", item.meta["scene"], against=item.meta["against"])


def kind_in(text: str) -> str:
    """The kind that a question is about: the one that its text names first."""
    names = {name: kind for kind in KINDS for name in (kind, PLURALS[kind])}
    words = [word.strip("?.,") for word in text.split()]
    return next(names[word] for word in words if word in names)


def test_every_skill_has_its_items_each_on_a_scene_of_its_own(items: dict[str, list[Item]]) -> None:
    assert list(items) == list(SKILLS)
    for own in items.values():
        assert len(own) == N
        assert len({item.group for item in own}) == N
    everything = [item for own in items.values() for item in own]
    assert len({item.id for item in everything}) == len(everything)
    for item in everything[::17]:
        assert item.picture().tobytes() == draw(scene_of(item)).tobytes()


def test_fewer_items_are_the_first_of_more(items: dict[str, list[Item]]) -> None:
    fewer: dict[str, list[str]] = {}
    for item in skills.items("test", 5):
        fewer.setdefault(item.task, []).append(item.id)
    assert fewer == {task: [item.id for item in own[:5]] for task, own in items.items()}


def test_another_seed_has_other_scenes(items: dict[str, list[Item]]) -> None:
    other = {(item.task, item.group) for item in skills.items("test", 3, seed=1)}
    assert not other & {(item.task, item.group) for own in items.values() for item in own}


@pytest.mark.parametrize("task", ["existence_random", "existence_popular", "existence_adversarial"])
def test_existence_is_balanced_and_true(items: dict[str, list[Item]], task: str) -> None:
    assert Counter(item.answer for item in items[task]) == {"yes": N / 2, "no": N / 2}
    for item in items[task]:
        kind = kind_in(item.question)
        assert any(thing.kind == kind for thing in scene_of(item).objects) == (item.answer == "yes")
        assert item.meta["against"] == (task == "existence_adversarial")


def test_absent_kinds_are_random_popular_or_likely(items: dict[str, list[Item]]) -> None:
    def absent(task: str) -> list[tuple[str, Scene]]:
        return [(kind_in(i.question), scene_of(i)) for i in items[task] if i.answer == "no"]

    assert all(kind == SCENE_TYPES[scene.scene_type].partner for kind, scene in absent("existence_adversarial"))
    for kind, scene in absent("existence_popular"):
        assert kind in [k for k in popular_kinds() if k not in scene.kinds][:6]
    assert len({kind for kind, _ in absent("existence_random")}) > 6
    shown = Counter(kind for index in range(600) for kind in sample_scene("train", index).kinds)
    anchors = {scene_type.anchor for scene_type in SCENE_TYPES.values()}
    assert set(popular_kinds()[:6]) == anchors
    assert min(shown[kind] for kind in anchors) > max(shown[kind] for kind in popular_kinds()[12:])
    assert sorted(popular_kinds()) == sorted(KINDS)


def test_attributes_and_relations_follow_the_record(items: dict[str, list[Item]]) -> None:
    for item in items["colour"]:
        (thing,) = (thing for thing in scene_of(item).visible if thing.kind == kind_in(item.question))
        assert item.answer == thing.colour
    for item in items["count"]:
        kind = kind_in(item.question)
        assert item.answer == str(sum(thing.kind == kind for thing in scene_of(item).visible))
    assert Counter(item.answer for item in items["count"]) == dict.fromkeys("1234", N / 4)
    for item in items["place"]:
        assert item.answer == scene_of(item).scene_type
    for place, item in enumerate(items["relation"]):
        words = [word.strip("?.,") for word in item.question.split()]
        one, other = (next(t for t in scene_of(item).visible if t.kind == word) for word in words if word in KINDS)
        if place % 2:
            assert item.answer == ("above" if one.y < other.y else "below")
        else:
            assert item.answer == ("left" if one.x < other.x else "right")


def test_captions_are_asked_against_the_co_occurrence(items: dict[str, list[Item]]) -> None:
    for item in items["caption"]:
        scene = scene_of(item)
        assert item.meta["objects"] == list(scene.kinds)
        assert SCENE_TYPES[scene.scene_type].partner not in scene.kinds
        assert item.question == "Please describe this image in detail."
        assert item.max_new_tokens > 100
        facts = skills.item_score(item, item.answer)
        assert facts["hit"]
        assert set(facts["mentions"]) == set(scene.kinds)


def test_held_out_scenes_hold_a_held_out_combination() -> None:
    for item in skills.items("held_out", 2):
        scene = sample_scene("held_out", item.meta["scene"], against=item.meta["against"])
        assert any((thing.kind, thing.colour) in HELD_OUT for thing in scene.visible)


@pytest.mark.parametrize(
    ("answer", "text", "hit", "readable"),
    [
        ("yes", " Yes.", True, True),
        ("yes", "no", False, True),
        ("yes", "Yes, there is a boat.", False, False),
        ("no", "", False, False),
        ("2", "two", True, True),
        ("2", "3", False, True),
        ("2", "2 boats", False, False),
        ("left", "LEFT ", True, True),
        ("left", "right", False, True),
        ("sea", "sea", True, True),
        ("sea", "moon", False, False),
    ],
)
def test_short_answers_are_compared_exactly(
    items: dict[str, list[Item]], answer: str, text: str, hit: bool, readable: bool
) -> None:
    everything = (item for own in items.values() for item in own if item.task != "caption")
    item = next(item for item in everything if item.answer == answer)
    assert skills.item_score(item, text) == {"hit": hit, "readable": readable}


def test_number_words() -> None:
    assert [normalised(word) for word in ("One", "two.", "three", "FOUR", "five", "no")] == [
        *"1234",
        "five",
        "no",
    ]


def test_scores_by_hand(items: dict[str, list[Item]]) -> None:
    def row(item: Item, right: bool) -> dict[str, object]:
        wrong = "nothing of the kind"
        if item.task == "caption":
            partner = SCENE_TYPES[scene_of(item).scene_type].partner
            wrong = f"There is a {partner} and a {partner}."
        return skills.row(Answer(item, item.answer if right else wrong, 1, {"method": "none"}))

    rows = [row(item, place < 3) for item, place in zip(items["colour"], range(4), strict=False)]
    rows += [row(item, place == 0) for item, place in zip(items["place"], range(2), strict=False)]
    captions = [row(item, place == 0) for item, place in zip(items["caption"], range(4), strict=False)]
    scores = skills.scores(rows + captions)
    assert list(scores) == [
        "all",
        "colour",
        "place",
        "caption_chair_i",
        "caption_chair_s",
        "caption_recall",
    ]
    assert scores["all"].value == pytest.approx((3 + 1 + 1) / 10)
    assert scores["all"].value == sum(skills.measure(row) for row in rows + captions) / 10
    assert (scores["colour"].value, scores["colour"].n) == (0.75, 4)
    assert (scores["colour"].low, scores["colour"].high) == wilson(3, 4)
    assert scores["place"].value == 0.5
    named, there = len(scene_of(items["caption"][0]).kinds), [len(i.meta["objects"]) for i in items["caption"][:4]]
    assert scores["caption_chair_s"].value == 0.75
    assert scores["caption_chair_i"].value == pytest.approx(6 / (6 + named))
    assert scores["caption_recall"].value == pytest.approx(named / sum(there))
    assert scores["caption_chair_i"] == Chair(against=True).scores(captions)["chair_i"]


def test_each_skill_is_tested_on_its_own_items(items: dict[str, list[Item]]) -> None:
    def rows(right: Callable[[str, int], bool]) -> list[dict[str, object]]:
        made = []
        for task in ("colour", "count", "caption"):
            for place, item in enumerate(items[task][:12]):
                partner = SCENE_TYPES[scene_of(item).scene_type].partner
                wrong = f"There is a {partner}." if task == "caption" else "nothing of the kind"
                made.append(skills.row(Answer(item, item.answer if right(task, place) else wrong, 1)))
        return made

    before = rows(lambda task, place: place >= 6)
    after = rows(lambda task, place: place >= 6 or task != "count")
    found = skills.paired_others(before, after)
    assert list(found) == ["colour", "count", "caption_chair_i", "caption_chair_s", "caption_recall"]
    assert found["colour"] == mcnemar_exact(0, 6)
    assert found["count"] == 1.0
    assert found["caption_chair_s"] == mcnemar_exact(6, 0)
    captions = [[row for row in own if row["task"] == "caption"] for own in (before, after)]
    others = Chair(against=True).paired_others(*captions)
    assert (found["caption_chair_i"], found["caption_recall"]) == (others["chair_i"], others["recall"])


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no answers"):
        skills.scores([])
    with pytest.raises(InputError, match="did you mean 'test'"):
        skills.items("tests", 3)
    with pytest.raises(InputError, match="number of items"):
        skills.items("test", 0)


def test_adversarial_negatives_fall_back_to_extras() -> None:
    """On a natural scene that has the partner, a likely absent kind is an extra of the scene type."""
    seen = set()
    for scene in islice(scenes("test"), 300):
        own = SCENE_TYPES[scene.scene_type]
        kind = likely_absent(scene, random_stream("test"))
        assert kind not in scene.kinds
        if own.partner not in scene.kinds:
            assert kind == own.partner
        elif not set(own.extras) <= set(scene.kinds):
            assert kind in own.extras
            seen.add(kind)
    assert len(seen) > 3
