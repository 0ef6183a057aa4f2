"""Clips of the picture world: what the label says happens in the pixels, and only the order of the frames tells it."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sightline.errors import InputError
from sightline.picturebook import clips
from sightline.picturebook.clips import ACTIONS, FRAMES_RANGE, Clip, Sighting, bouncing_clip, draw_clip, sample_clip
from sightline.picturebook.draw import NOISE
from sightline.picturebook.scene import HELD_OUT, KINDS, SCENE_TYPES, SPLITS, Split

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLED = [sample_clip("train", index) for index in range(80)]
OPPOSITE = dict(zip(ACTIONS, (ACTIONS[number ^ 1] for number in range(len(ACTIONS))), strict=True))
GOLDEN = {("test", 0, 32): 0x9438B966, ("train", 1, 32): 0x7431BC66, ("held_out", 2, 48): 0x52BCE4AC}


def without_the_last(clip: Clip) -> Clip:
    *others, last = clip.actors
    return replace(clip, actors=(*others, replace(last, path=(None,) * clip.frames)))


def moving(clip: Clip, size: int = 48) -> NDArray[np.bool_]:
    """[T, size, size]: the pixels that the last actor changes."""
    there, gone = draw_clip(clip, size).astype(int), draw_clip(without_the_last(clip), size).astype(int)
    return np.abs(there - gone).max(axis=-1) > 0


def backwards(clip: Clip) -> Clip:
    return replace(clip, actors=tuple(replace(actor, path=actor.path[::-1]) for actor in clip.actors))


def seen_action(shapes: NDArray[np.bool_]) -> str:
    """The action, from where something moves in the pixels."""
    areas = shapes.sum(axis=(1, 2))
    if areas.min() == 0:
        return "appears" if areas[0] == 0 else "vanishes"
    if max(areas[0], areas[-1]) > 2 * min(areas[0], areas[-1]):
        return "comes closer" if areas[-1] > areas[0] else "goes away"
    rows, columns = np.mean(np.nonzero(shapes[-1]), axis=1) - np.mean(np.nonzero(shapes[0]), axis=1)
    if abs(columns) > abs(rows):
        return "moves right" if columns > 0 else "moves left"
    return "moves down" if rows > 0 else "moves up"


@pytest.mark.parametrize(("split", "index", "size"), GOLDEN)
def test_clips_are_pinned(split: Split, index: int, size: int) -> None:
    frames = draw_clip(sample_clip(split, index), size)
    assert (frames.shape, frames.dtype) == ((8, size, size, 3), np.uint8)
    assert zlib.crc32(frames.tobytes()) == GOLDEN[split, index, size]


def test_another_process_bounces_the_same() -> None:
    code = (
        "import zlib; from sightline.picturebook.clips import bouncing_clip, draw_clip; "
        "print(zlib.crc32(draw_clip(bouncing_clip('test', 3, objects=2), 32).tobytes()))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(there) == zlib.crc32(draw_clip(bouncing_clip("test", 3, objects=2), 32).tobytes())


def test_splits_and_numbers_share_no_clip() -> None:
    for make in (sample_clip, bouncing_clip):
        made = [make(split, index) for split in SPLITS for index in range(50)]
        assert len({repr(replace(clip, seed=0)) for clip in made}) == len(made)
        assert len({clip.seed for clip in made}) == len(made)


def test_the_pixels_do_what_the_label_says() -> None:
    seen = set()
    for clip in SAMPLED:
        assert clip.action is not None
        assert seen_action(moving(clip)) == clip.action
        assert ACTIONS[clip.label] == clip.action
        seen.add(clip.action)
    assert seen == set(ACTIONS)


def test_played_backwards_it_is_the_opposite() -> None:
    for clip in SAMPLED[:40]:
        assert clip.action is not None
        assert seen_action(moving(backwards(clip))) == OPPOSITE[clip.action]


def test_motion_is_steady_and_growth_too() -> None:
    for clip in SAMPLED:
        shapes = moving(clip)
        areas = shapes.sum(axis=(1, 2))
        if clip.action in ("comes closer", "goes away"):
            steps = np.diff(areas) * (1 if clip.action == "comes closer" else -1)
            assert (steps >= 0).all()
        elif clip.action not in ("appears", "vanishes"):
            centres = np.array([np.mean(np.nonzero(shape), axis=1) for shape in shapes])
            axis = int(clip.action in ("moves left", "moves right"))
            steps = np.diff(centres[:, axis]) * (1 if clip.action in ("moves right", "moves down") else -1)
            assert (steps > 0).all()
            assert np.ptp(centres[:, 1 - axis]) < 1.5
        else:
            assert len(set(areas[areas > 0])) == 1
            assert np.count_nonzero(np.diff(areas > 0)) == 1


def test_a_frame_does_not_tell_an_action_from_its_opposite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws with the names of opposites exchanged give the same frames in another order."""
    before = [sample_clip("train", index) for index in range(60)]
    monkeypatch.setattr(clips, "ACTIONS", tuple(OPPOSITE[action] for action in ACTIONS))
    for index, clip in enumerate(before):
        other = sample_clip("train", index)
        assert clip.action is not None
        assert other.action == OPPOSITE[clip.action]
        assert replace(without_the_last(other), action=None) == replace(without_the_last(clip), action=None)
        path, turned = clip.actors[-1].path, other.actors[-1].path
        if clip.action in ("appears", "vanishes"):
            assert set(path) == set(turned)  # with it and without it
        else:
            np.testing.assert_allclose(numbers(path), numbers(turned[::-1]), atol=1e-12)


def numbers(path: tuple[Sighting | None, ...]) -> NDArray[np.float64]:
    return np.array([(seen.x, seen.y, seen.half) for seen in path if seen is not None])


def test_the_turn_of_appearing_and_of_vanishing_is_anywhere() -> None:
    shown: dict[str, list[int]] = {"appears": [], "vanishes": []}
    for index in range(1500):
        clip = sample_clip("train", index, frames=5)
        if clip.action in shown:
            shown[clip.action].append(5 - clip.actors[-1].path.count(None))
    for counts in shown.values():
        shares = np.bincount(counts, minlength=6) / len(counts)
        assert shares[0] == shares[5] == 0
        # Four standard errors of a share of a quarter in 180 clips.
        assert np.abs(shares[1:5] - 0.25).max() < 0.13


def test_actions_places_and_kinds_occur_equally_often() -> None:
    made = [sample_clip("train", index) for index in range(2000)]
    counts = np.bincount([clip.label for clip in made], minlength=len(ACTIONS))
    assert np.abs(counts / 2000 - 1 / 8).max() < 0.03
    assert {clip.actors[-1].kind for clip in made} == set(KINDS)
    assert {clip.scene_type for clip in made} == set(SCENE_TYPES)
    assert {len(clip.actors) for clip in made} == {1, 2, 3}


def test_what_acts_stays_inside_the_picture() -> None:
    for index in range(500):
        seen = numbers(sample_clip("test", index).actors[-1].path)
        assert (seen[:, :2] - seen[:, 2:] >= 0).all()
        assert (seen[:, :2] + seen[:, 2:] <= 1).all()


def test_the_rest_of_the_picture_stands_still_but_for_noise() -> None:
    for clip in SAMPLED[:10]:
        frames = draw_clip(without_the_last(clip), 40).astype(int)
        assert np.abs(frames - frames[0]).max() <= 2 * NOISE
        assert (frames[1] != frames[0]).any()


@pytest.mark.parametrize("make", [sample_clip, bouncing_clip])
def test_held_out_colours_are_only_in_their_split(make: Callable[..., Clip]) -> None:
    for split in SPLITS:
        actors = [actor for index in range(200) for actor in make(split, index).actors]
        held_out = [(actor.kind, actor.colour) in HELD_OUT for actor in actors]
        assert all(held_out) if split == "held_out" else not any(held_out)


def flown(start: NDArray[np.float64], step: NDArray[np.float64], half: float, frames: int) -> NDArray[np.float64]:
    """A flight frame by frame: what is beyond an edge is thrown back, and flies the other way from then on."""
    place, step = start.copy(), step.copy()
    seen = [place.copy()]
    for _ in range(frames - 1):
        place += step
        for axis in range(2):
            for edge, beyond in ((half, place[axis] < half), (1 - half, place[axis] > 1 - half)):
                if beyond:
                    place[axis] = 2 * edge - place[axis]
                    step[axis] = -step[axis]
        seen.append(place.copy())
    return np.array(seen)


def test_bouncing_is_as_frame_by_frame() -> None:
    followed = 0
    for index in range(30):
        for actor in bouncing_clip("train", index, frames=400, objects=2).actors:
            seen = numbers(actor.path)
            assert len(seen) == 400
            places, half = seen[:, :2], actor.path[0].half  # type: ignore[union-attr]
            assert (seen[:, 2] == half).all()
            assert (places >= half - 1e-12).all()
            assert (places <= 1 - half + 1e-12).all()
            steps = np.abs(np.diff(places, axis=0))
            free = np.median(steps, axis=0)  # most steps meet no edge
            assert 0.04 <= np.hypot(*free) <= 0.09
            if np.allclose(steps[0], free):  # the first step gives the direction
                followed += 1
                np.testing.assert_allclose(places, flown(places[0], np.diff(places, axis=0)[0], half, 400), atol=1e-9)
    assert followed > 30


def test_a_bouncing_object_is_never_cut_off() -> None:
    for index in range(5):
        areas = moving(bouncing_clip("test", index, frames=40)).sum(axis=(1, 2))
        assert areas.min() > 0.8 * areas.max()


def test_a_long_clip_has_as_many_frames_as_asked() -> None:
    assert bouncing_clip("test", 0, frames=FRAMES_RANGE[1], objects=3).frames == 2048
    assert len(draw_clip(sample_clip("test", 0, frames=2), 32)) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sample_clip("tset", 0), "unknown split 'tset' .did you mean 'test'"),  # type: ignore[arg-type]
        (lambda: bouncing_clip("trian", 0), "did you mean 'train'"),  # type: ignore[arg-type]
        (lambda: sample_clip("test", -1), "index must be 0 or more, not -1"),
        (lambda: bouncing_clip("test", -7), "index must be 0 or more, not -7"),
        (lambda: sample_clip("test", 0, frames=1), "2 to 2048 frames, not 1"),
        (lambda: bouncing_clip("test", 0, frames=2049), "2 to 2048 frames, not 2049"),
        (lambda: bouncing_clip("test", 0, objects=0), "1 of them or more, not 0"),
        (lambda: draw_clip(SAMPLED[0], 16), "from 32 to 1024 pixels, not 16"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
