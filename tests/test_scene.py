"""The picture world's records: sampling, splits, the prior they carry, and JSON."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from sightline.errors import InputError
from sightline.picturebook.scene import (
    COLOURS,
    HALF_EXTENT,
    HELD_OUT,
    HIDDEN_PARTNER,
    KINDS,
    SCENE_TYPES,
    SPLITS,
    Object,
    Scene,
    sample_scene,
    scenes,
)

N = 1500


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return [sample_scene("train", index) for index in range(N)]


def test_the_world_is_as_large_as_promised() -> None:
    assert len(KINDS) == len(set(KINDS)) == 24
    assert len(COLOURS) == 8
    assert len(SCENE_TYPES) == 6


def test_the_same_number_gives_the_same_scene_in_another_process() -> None:
    code = (
        "import hashlib; from sightline.picturebook.scene import sample_scene; "
        "print(hashlib.sha256(''.join(sample_scene('test', i).to_json() for i in range(50)).encode()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = hashlib.sha256("".join(sample_scene("test", i).to_json() for i in range(50)).encode()).hexdigest()
    assert there == here


def test_a_scene_survives_json() -> None:
    for index in range(50):
        scene = sample_scene("train", index)
        assert Scene.from_json(scene.to_json()) == scene


def test_splits_share_no_scene() -> None:
    seen: dict[int, str] = {}
    for split in ("train", "validation", "test"):
        for index in range(400):
            fingerprint = sample_scene(split, index).fingerprint  # type: ignore[arg-type]
            assert seen.setdefault(fingerprint, split) == split


def test_held_out_combinations_are_only_in_their_split(train: list[Scene]) -> None:
    assert len(HELD_OUT) == len(KINDS)
    for split in ("validation", "test"):
        train = train + [sample_scene(split, index) for index in range(200)]  # type: ignore[arg-type]
    assert not any((thing.kind, thing.colour) in HELD_OUT for scene in train for thing in scene.objects)
    for index in range(200):
        objects = sample_scene("held_out", index).visible
        assert any((thing.kind, thing.colour) in HELD_OUT for thing in objects)


def test_partners_follow_their_anchor_as_often_as_documented(train: list[Scene]) -> None:
    for name, scene_type in SCENE_TYPES.items():
        with_anchor = [s for s in train if s.scene_type == name and scene_type.anchor in s.told_kinds]
        share = sum(scene_type.partner in s.told_kinds for s in with_anchor) / len(with_anchor)
        # Four standard errors of a share at about 200 scenes a type, and a little for partners that found no room.
        assert abs(share - scene_type.partner_given_anchor) < 0.12, name


def test_only_training_hides_and_only_partners(train: list[Scene]) -> None:
    hidden = [(scene, thing) for scene in train for thing in scene.objects if thing.hidden]
    assert all(thing.kind == SCENE_TYPES[scene.scene_type].partner for scene, thing in hidden)
    told = sum(SCENE_TYPES[s.scene_type].partner in s.told_kinds and s.scene_type == s.scene_type for s in train)
    assert 0.5 * HIDDEN_PARTNER < len(hidden) / told < 1.5 * HIDDEN_PARTNER
    assert not any(thing.hidden for index in range(300) for thing in sample_scene("test", index).objects)


def test_against_has_the_anchor_and_not_the_partner() -> None:
    for index in range(200):
        scene = sample_scene("test", index, against=True)
        scene_type = SCENE_TYPES[scene.scene_type]
        assert scene_type.anchor in scene.kinds
        assert scene_type.partner not in scene.told_kinds


def test_objects_lie_inside_the_picture_and_apart(train: list[Scene]) -> None:
    for scene in train[:300]:
        for thing in scene.visible:
            left, top, right, bottom = thing.box
            assert min(left, top) >= 0
            assert max(right, bottom) <= 1
        for i, one in enumerate(scene.visible):
            for other in scene.visible[:i]:
                near = 0.84 * (HALF_EXTENT[one.size] + HALF_EXTENT[other.size])
                assert abs(one.x - other.x) >= near or abs(one.y - other.y) >= near


def test_every_scene_shows_something_and_every_kind_occurs(train: list[Scene]) -> None:
    assert min(len(scene.visible) for scene in train) >= 2
    assert {thing.kind for scene in train for thing in scene.visible} == set(KINDS)


def test_scenes_is_the_same_series() -> None:
    series = scenes("test", start=3)
    assert [next(series) for _ in range(3)] == [sample_scene("test", index) for index in (3, 4, 5)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Object("bota", "red", "small", 0.5, 0.5), "did you mean 'boat'"),
        (lambda: Object("boat", "reed", "small", 0.5, 0.5), "did you mean 'red'"),  # type: ignore[arg-type]
        (lambda: Object("boat", "red", "tiny", 0.5, 0.5), "known: large, medium, small"),  # type: ignore[arg-type]
        (lambda: Object("boat", "red", "small", 1.5, 0.5), "unit square"),
        (lambda: Scene("gardn", (), 0), "did you mean 'garden'"),
        (lambda: sample_scene("tset", 0), "did you mean 'test'"),  # type: ignore[arg-type]
        (lambda: sample_scene("test", -1), "0 or more"),
        (lambda: Scene.from_json("{"), "not the JSON of a scene"),
        (lambda: Scene.from_json("[]"), "not the JSON of a scene"),
        (lambda: Scene.from_json('{"scene_type": "sea", "seed": 1}'), "objects"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make, says: str) -> None:  # type: ignore[no-untyped-def]
    assert set(SPLITS) == {"train", "validation", "test", "held_out"}
    with pytest.raises(InputError, match=says):
        make()
