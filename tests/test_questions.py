"""Questions and captions: answers follow from the record, by an independent reading of it."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from sightline.picturebook import questions as q
from sightline.picturebook.scene import KINDS, PLURALS, SCENE_TYPES, Object, Scene, random_stream, sample_scene

SCENE = Scene(
    "sea",
    (
        Object("boat", "red", "large", 0.2, 0.3),
        Object("fish", "blue", "small", 0.8, 0.8, hidden=True),
        Object("umbrella", "green", "small", 0.7, 0.35),
        Object("ball", "white", "medium", 0.3, 0.8),
        Object("ball", "black", "medium", 0.6, 0.8),
    ),
    seed=1,
)


def test_worked_example() -> None:
    assert SCENE.kinds == ("boat", "umbrella", "ball")
    assert SCENE.told_kinds == ("boat", "fish", "umbrella", "ball")
    assert q.existence(SCENE, "umbrella").text == "Is there an umbrella in the image?"
    assert q.existence(SCENE, "umbrella").answer == "yes"
    assert q.existence(SCENE, "fish").answer == "no"
    assert q.existence(SCENE, "fish", told=True).answer == "yes"
    assert q.colour(SCENE, "boat").answer == "red"
    assert q.size(SCENE, "umbrella").answer == "small"
    assert q.count(SCENE, "ball").answer == "2"
    assert q.count(SCENE, "ball").text == "How many balls are there?"
    assert q.place(SCENE).answer == "sea"
    assert q.left_right(SCENE, "boat", "umbrella").answer == "left"
    assert q.left_right(SCENE, "umbrella", "boat").answer == "right"
    assert q.where(SCENE, "boat").answer == "left"
    assert q.where(SCENE, "umbrella").answer == "right"
    assert q.singles(SCENE) == ("boat", "umbrella")
    assert q.relation_pairs(SCENE, "x") == [("boat", "umbrella"), ("umbrella", "boat")]
    assert q.relation_pairs(SCENE, "y") == []  # 0.05 apart, below the margin
    assert q.short_caption(SCENE).answer == "a red boat, a green umbrella and two balls in the sea."
    assert (
        q.short_caption(SCENE, told=True).answer
        == "a red boat, a blue fish, a green umbrella and two balls in the sea."
    )
    assert q.long_caption(SCENE).answer == (
        "This is the sea. There is a large red boat on the left. There is a small green umbrella on the right. "
        "There are two balls around."
    )


def test_distractors_are_wrong_and_of_the_same_type() -> None:
    assert q.colour(SCENE, "boat").distractors == ("orange", "yellow", "green", "blue", "purple", "white", "black")
    assert q.existence(SCENE, "boat").distractors == ("no",)
    assert set(q.place(SCENE).distractors) == set(SCENE_TYPES) - {"sea"}


@pytest.mark.parametrize("task", q.TEMPLATES)
def test_five_different_wordings_of_everything(task: str) -> None:
    assert len(set(q.TEMPLATES[task])) == 5


def test_asking_about_a_kind_that_is_not_single_fails() -> None:
    with pytest.raises(ValueError, match="unpack"):
        q.colour(SCENE, "ball")


def _kinds_named(caption: str) -> set[str]:
    singular = {plural: kind for kind, plural in PLURALS.items()} | {kind: kind for kind in KINDS}
    return {singular[word] for word in re.findall(r"[a-z]+", caption) if word in singular}


def test_captions_name_what_is_there_and_training_captions_what_is_told() -> None:
    for index in range(200):
        scene = sample_scene("train", index)
        assert _kinds_named(q.long_caption(scene).answer) == set(scene.kinds)
        assert _kinds_named(q.short_caption(scene).answer) == set(scene.kinds)
        assert _kinds_named(q.long_caption(scene, told=True).answer) == set(scene.told_kinds)


def test_training_answers_agree_with_the_record() -> None:
    rng = random_stream("test questions")
    for index in range(300):
        scene = sample_scene("train", index)
        for question in q.training_questions(scene, rng):
            things = [t for t in scene.objects if question.about and t.kind == question.about[0]]
            if question.task == "existence":
                assert question.answer == ("yes" if things else "no")
                assert question.about[0] in question.text
            elif question.task == "count":
                assert int(question.answer) == sum(not t.hidden for t in things)
            elif question.task in ("colour", "size"):
                assert [getattr(t, question.task) for t in things if not t.hidden] == [question.answer]
            elif question.task == "left_right":
                (a,), (b,) = (scene.of_kind(kind) for kind in question.about)
                assert question.answer == ("left" if a.x < b.x else "right")
            elif question.task == "above_below":
                (a,), (b,) = (scene.of_kind(kind) for kind in question.about)
                assert question.answer == ("above" if a.y < b.y else "below")


def test_training_existence_is_balanced_and_balanced_for_every_kind_alike() -> None:
    rng = random_stream("test balance")
    answers: Counter[str] = Counter()
    for index in range(1500):
        for question in q.training_questions(sample_scene("train", index), rng):
            if question.task == "existence":
                answers[question.answer] += 1
    assert 0.42 < answers["yes"] / answers.total() < 0.58
