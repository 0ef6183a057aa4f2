import hashlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sightline.errors import InputError
from sightline.picturebook import edits
from sightline.picturebook.draw import (
    NOISE,
    boxes,
    coverage,
    depth_order,
    draw,
    masks,
    object_ids,
    visible_fraction,
)
from sightline.picturebook.kinds import COLOUR_RGB, SHAPES, palette, sprite
from sightline.picturebook.scene import COLOURS, HALF_EXTENT, KINDS, SCENE_TYPES, SIZES, Object, Scene, sample_scene

SCENES = [sample_scene("train", index) for index in range(12)] + [sample_scene("held_out", 3)]

# Two overlapping, one wholly covered, one cut off by the edge, one hidden, two at one height.
CROWDED = Scene(
    "farm",
    (
        Object("cat", "red", "large", 0.5, 0.6),
        Object("star", "yellow", "small", 0.5, 0.5),
        Object("sheep", "white", "large", 0.6, 0.65, mirrored=True),
        Object("ball", "blue", "medium", 0.02, 0.3),
        Object("dog", "green", "medium", 0.3, 0.3, hidden=True),
        Object("truck", "purple", "medium", 0.85, 0.3),
        Object("ball", "black", "large", 0.5, 0.52),
    ),
    seed=11,
)


def pixels(scene: Scene, size: int = 80) -> np.ndarray:
    return np.asarray(draw(scene, size))


def slow_samples(scene: Scene, size: int) -> list[list[int]]:
    """Which object each of the 4 x 4 samples of each pixel shows, asked one sample at a time, nearest object first."""
    side = 4 * size
    nearest_first = sorted(
        (index for index, thing in enumerate(scene.objects) if not thing.hidden),
        key=lambda index: (scene.objects[index].y, index),
        reverse=True,
    )
    shapes = {}
    for index in nearest_first:
        thing = scene.objects[index]
        half = round(HALF_EXTENT[thing.size] * side)
        mask = np.asarray(sprite(thing.kind, half, thing.mirrored).mask).tolist()
        shapes[index] = (mask, round(thing.x * side) - half, round(thing.y * side) - half)

    def shown(x: int, y: int) -> int:
        for index in nearest_first:
            mask, left, top = shapes[index]
            if 0 <= y - top < len(mask) and 0 <= x - left < len(mask) and mask[y - top][x - left]:
                return index
        return -1

    return [[shown(x, y) for x in range(side)] for y in range(side)]


@pytest.mark.parametrize("size", [64, 80, 200])
def test_a_picture_is_rgb_of_the_size_asked_for(size: int) -> None:
    picture = draw(SCENES[0], size)
    assert (picture.mode, picture.size) == ("RGB", (size, size))


@pytest.mark.parametrize("size", [0, -80, 31, 1025])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    for function in (draw, object_ids, masks, boxes):
        with pytest.raises(InputError, match=f"not {size}"):
            function(CROWDED, size)
    with pytest.raises(InputError, match=f"not {size}"):
        edits.difference(CROWDED, CROWDED, size)


GOLDEN = {
    (0, 80): "de62ef1a1040d02b",
    (1, 80): "072ad4df49e64225",
    (2, 80): "a0e3121c6f26880e",
    (3, 64): "3ac13bd9d3eb8d77",
    (4, 160): "f003ba00263d756b",
}


@pytest.mark.parametrize(("index", "size"), GOLDEN)
def test_pictures_are_pinned(index: int, size: int) -> None:
    assert hashlib.sha256(draw(sample_scene("test", index), size).tobytes()).hexdigest()[:16] == GOLDEN[index, size]


def test_another_process_draws_the_same_pixels() -> None:
    code = (
        "import hashlib, sys\n"
        "from sightline.picturebook.scene import Scene\n"
        "from sightline.picturebook.draw import draw\n"
        "print(hashlib.sha256(draw(Scene.from_json(sys.argv[1])).tobytes()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, CROWDED.to_json()]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == hashlib.sha256(draw(CROWDED).tobytes()).hexdigest()


def test_the_order_of_drawing_is_by_height_then_by_record() -> None:
    # y: .6 .5 .65 .3 (hidden) .3 .52
    assert depth_order(CROWDED) == [3, 5, 1, 6, 0, 2]


@pytest.mark.parametrize("scene", [CROWDED, SCENES[1], SCENES[12]], ids=["crowded", "sampled", "held out"])
def test_ground_truth_agrees_with_a_slow_count_of_samples(scene: Scene) -> None:
    size = 40
    samples = slow_samples(scene, size)
    owners = object_ids(scene, size)
    assert owners.dtype == np.int16
    for row, column in itertools.product(range(size), range(size)):
        cell = [samples[4 * row + dy][4 * column + dx] for dy in range(4) for dx in range(4)]
        most = max(cell.count(index) for index in range(-1, len(scene.objects)))
        assert owners[row, column] == min(index for index in cell if cell.count(index) == most)

    flat = list(itertools.chain.from_iterable(samples))
    for index, (thing, mask, box) in enumerate(zip(scene.objects, masks(scene, size), boxes(scene, size), strict=True)):
        cells = [(x, y) for y in range(size) for x in range(size) if owners[y, x] == index]
        assert mask.sum() == len(cells)
        assert all(mask[y, x] for x, y in cells)
        if cells:
            xs, ys = zip(*cells, strict=True)
            assert box == (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        else:
            assert box is None
        half = round(HALF_EXTENT[thing.size] * 4 * size)
        own = np.count_nonzero(np.asarray(sprite(thing.kind, half, thing.mirrored).mask))
        assert visible_fraction(scene, index, size) == pytest.approx(flat.count(index) / own)


def test_visible_fractions_of_hidden_covered_cut_and_free_objects() -> None:
    fraction = [visible_fraction(CROWDED, index) for index in range(7)]
    assert boxes(CROWDED)[4] is None
    assert fraction[4] == 0
    assert boxes(CROWDED)[1] is None  # behind the large ball
    assert fraction[1] == 0
    assert 0.4 < fraction[3] < 0.7
    assert fraction[2] == fraction[5] == 1
    assert 0 < fraction[0] < 1
    with pytest.raises(InputError, match="no object 7"):
        visible_fraction(CROWDED, 7)


@pytest.mark.parametrize("scene", [*SCENES, CROWDED])
def test_what_the_masks_say_is_what_the_pixels_show(scene: Scene) -> None:
    """An owned pixel changes with its owner's colour; a pixel that nobody touches is the empty picture's."""
    empty = pixels(replace(scene, objects=()))
    touched = np.zeros((80, 80), bool)
    for thing in scene.visible:
        touched |= coverage(thing)
    picture = pixels(scene)
    assert (picture[~touched] == empty[~touched]).all()
    assert (picture != empty)[object_ids(scene) >= 0].any(axis=-1).mean() > 0.97


def test_hidden_objects_leave_no_trace() -> None:
    told = [sample_scene("train", index) for index in range(120)]
    hiding = [scene for scene in told if len(scene.visible) < len(scene.objects)]
    assert hiding
    for scene in [*hiding, CROWDED]:
        bare = replace(scene, objects=scene.visible)
        assert (pixels(scene) == pixels(bare)).all()
        assert not edits.difference(scene, bare).any()
        for index, thing in enumerate(scene.objects):
            if thing.hidden:
                assert not masks(scene)[index].any()


def test_noise_is_small_grey_and_drawn_from_the_seed() -> None:
    """The room's wallpaper has upright stripes: down a column of it nothing changes but the noise."""
    walls = [pixels(Scene("room", (), seed))[:45].astype(int) for seed in (5, 6)]
    steps = [wall - wall[:1] for wall in walls]
    for step in steps:
        assert (step == step[..., :1]).all()
        assert (np.ptp(step, axis=0) <= 2 * NOISE).all()
        assert np.ptp(step) > 2 * NOISE
        assert 3 < step.std(axis=0).mean() < 4.5  # 13 equally likely levels: sqrt(14) = 3.74
    assert abs(np.corrcoef(steps[0][..., 0].ravel(), steps[1][..., 0].ravel())[0, 1]) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_fills_its_box(kind: str) -> None:
    for size in SIZES:
        box = boxes(Scene("sea", (Object(kind, "red", size, 0.5, 0.5),), seed=1))[0]
        assert box is not None
        side = 2 * HALF_EXTENT[size] * 80
        assert 0.85 * side <= max(box[2] - box[0], box[3] - box[1]) <= side + 1
        left, top, right, bottom = (round(80 * edge) for edge in Object(kind, "red", size, 0.5, 0.5).box)
        assert box[0] >= left - 1
        assert box[1] >= top - 1
        assert box[2] <= right + 1
        assert box[3] <= bottom + 1


def test_no_two_kinds_share_a_silhouette_when_small() -> None:
    """At 14 pixels, whichever way each faces: best overlap (intersection over union) of any two kinds under 0.88."""
    assert set(SHAPES) == set(KINDS)

    def silhouette(kind: str, mirrored: bool) -> np.ndarray:
        return masks(Scene("sea", (Object(kind, "red", "small", 0.5, 0.5, mirrored),), seed=1))[0]

    for one, other in itertools.combinations(KINDS, 2):
        first = silhouette(one, False)
        for mirrored in (False, True):
            second = silhouette(other, mirrored)
            assert (first & second).sum() / (first | second).sum() < 0.88, (one, other)


def test_mirroring_flips_the_sprite() -> None:
    for kind in KINDS:
        straight, flipped = sprite(kind, 30, False), sprite(kind, 30, True)
        assert (np.asarray(straight.fills)[:, ::-1] == np.asarray(flipped.fills)).all()
        assert (np.asarray(straight.mask)[:, ::-1] == np.asarray(flipped.mask)).all()
        assert ((np.asarray(straight.fills) > 0) == (np.asarray(straight.mask) > 0)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_objects_pixels_are_near_its_colour(kind: str, size: str) -> None:
    names = np.array(list(COLOUR_RGB.values()))
    shares = []
    for number, colour in enumerate(COLOURS):
        scene = Scene(list(SCENE_TYPES)[number % 6], (Object(kind, colour, size, 0.5, 0.5),), seed=number)
        own = pixels(scene)[masks(scene)[0]].astype(int)
        nearest = ((own[:, None] - names) ** 2).sum(axis=-1).argmin(axis=-1)
        share = np.bincount(nearest, minlength=len(COLOURS)) / len(own)
        assert share.argmax() == number
        shares.append(share[number])
    # The outline takes its largest share of the smallest objects.
    assert min(shares) >= (0.55 if size == "small" else 0.6)
    assert np.mean(shares) >= 0.65


def test_colours_keep_their_distance_whatever_the_shade() -> None:
    for one, other in itertools.combinations(COLOUR_RGB.values(), 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 2 * 8 + 2 * NOISE
    main = 3 * 2
    for colour, rgb in COLOUR_RGB.items():
        seen = {palette(colour, seed, 0.25, 0.5)[main : main + 3] for seed in range(200)}
        assert len(seen) > 100
        assert all(abs(level - named) <= 8 for shade in seen for level, named in zip(shade, rgb, strict=True))


def test_backdrops_differ_between_scene_types_and_a_little_between_seeds() -> None:
    empty = {name: [pixels(Scene(name, (), seed)).astype(int) for seed in range(3)] for name in SCENE_TYPES}
    for one, other in itertools.combinations(SCENE_TYPES, 2):
        assert abs(empty[one][0] - empty[other][0]).mean() > 20
    for pictures in empty.values():
        for one, other in itertools.combinations(pictures, 2):
            assert 1 < abs(one - other).mean() < 20
        # Covered from edge to edge: nowhere the black of an untouched canvas.
        assert min(picture.sum(axis=-1).min() for picture in pictures) > 100


# --- edits


def edited(scene: Scene) -> dict[str, Scene]:
    last = len(scene.objects) - 1
    extra = Object("lamp", "orange", "medium", 0.4, 0.7)
    return {
        "remove": edits.remove(scene, 0),
        "add": edits.add(scene, extra),
        "add first": edits.add(scene, extra, 0),
        "recolour": edits.recolour(scene, last, "white"),
        "resize": edits.resize(scene, 0, "large"),
        "move": edits.move(scene, 0, 0.31, 0.77),
        "swap": edits.swap(scene, 0, last),
        "mirror": edits.mirror(scene),
    }


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("scene", [*SCENES[:6], CROWDED])
def test_an_edit_changes_no_pixel_outside_the_difference(scene: Scene, size: int) -> None:
    before = pixels(scene, size)
    for name, after in edited(scene).items():
        footprint = edits.difference(scene, after, size)
        changed = (before != pixels(after, size)).any(axis=-1)
        assert not (changed & ~footprint).any(), name
        assert (footprint == edits.difference(after, scene, size)).all()


def test_the_difference_of_one_edit_is_what_the_object_touches() -> None:
    thing = CROWDED.objects[5]
    assert (edits.difference(CROWDED, edits.remove(CROWDED, 5)) == coverage(thing)).all()
    moved = edits.move(CROWDED, 5, 0.2, 0.9)
    assert (edits.difference(CROWDED, moved) == coverage(thing) | coverage(moved.objects[5])).all()
    changed = (pixels(CROWDED) != pixels(edits.remove(CROWDED, 5))).any(axis=-1)
    assert changed.sum() > 0.9 * coverage(thing).sum()


def test_the_difference_sees_a_changed_order_and_a_changed_backdrop() -> None:
    level = Scene(
        "sea",
        (Object("ball", "red", "large", 0.4, 0.5), Object("ball", "blue", "large", 0.5, 0.5)),
        seed=3,
    )
    turned = replace(level, objects=level.objects[::-1])
    changed = (pixels(level) != pixels(turned)).any(axis=-1)
    assert changed.any()
    assert not (changed & ~edits.difference(level, turned)).any()
    assert edits.difference(level, replace(level, seed=4)).all()
    assert edits.difference(level, replace(level, scene_type="night")).all()
    assert not edits.difference(level, level).any()


def test_adding_undoes_removing() -> None:
    for scene in [*SCENES, CROWDED]:
        for index, thing in enumerate(scene.objects):
            assert edits.add(edits.remove(scene, index), thing, index) == scene


def test_edits_say_exactly_what_changed() -> None:
    cat, star, *rest = CROWDED.objects
    assert edits.remove(CROWDED, 1).objects == (cat, *rest)
    assert edits.recolour(CROWDED, 0, "black").objects == (replace(cat, colour="black"), star, *rest)
    assert edits.resize(CROWDED, 1, "medium").objects == (cat, replace(star, size="medium"), *rest)
    assert edits.move(CROWDED, 0, 0.1, 0.2).objects == (replace(cat, x=0.1, y=0.2), star, *rest)
    swapped = edits.swap(CROWDED, 0, 1)
    assert swapped.objects == (replace(cat, x=0.5, y=0.5), replace(star, x=0.5, y=0.6), *rest)
    assert edits.swap(swapped, 0, 1) == CROWDED
    assert edits.swap(CROWDED, 2, 2) == CROWDED
    mirrored = edits.mirror(CROWDED)
    assert [thing.x for thing in mirrored.objects] == [0.5, 0.5, 0.4, 0.98, 0.7, 0.15, 0.5]
    assert [thing.mirrored for thing in mirrored.objects] == [True, True, False, True, True, True, True]
    for scene in SCENES:
        assert edits.mirror(edits.mirror(scene)) == scene
        assert all(after.seed == scene.seed for after in edited(scene).values())


@pytest.mark.parametrize("index", [-1, 7, 100])
def test_a_bad_index_is_refused(index: int) -> None:
    calls = [
        lambda: edits.remove(CROWDED, index),
        lambda: edits.recolour(CROWDED, index, "red"),
        lambda: edits.resize(CROWDED, index, "small"),
        lambda: edits.move(CROWDED, index, 0.5, 0.5),
        lambda: edits.swap(CROWDED, 0, index),
        lambda: edits.swap(CROWDED, index, 0),
    ]
    for call in calls:
        with pytest.raises(InputError, match=f"no object {index}"):
            call()
    if index != 7:
        with pytest.raises(InputError, match=f"not at {index}"):
            edits.add(CROWDED, CROWDED.objects[0], index)


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match="colour"):
        edits.recolour(CROWDED, 0, "pink")
    with pytest.raises(InputError, match="size"):
        edits.resize(CROWDED, 0, "huge")
    with pytest.raises(InputError, match="unit square"):
        edits.move(CROWDED, 0, 1.2, 0.5)


def test_a_large_picture_shows_the_same_as_a_small_one() -> None:
    scene = SCENES[2]
    small = pixels(scene, 80).astype(int)
    shrunk = np.asarray(draw(scene, 320).resize((80, 80), Image.Resampling.BOX)).astype(int)
    assert abs(small - shrunk).mean() < 8


def test_occluding_covers_from_below_and_hides_in_the_end() -> None:
    scene = Scene("room", (Object("ball", "red", "large", 0.5, 0.5), Object("cup", "blue", "small", 0.2, 0.2)), seed=4)
    before = np.asarray(draw(scene), dtype=int)
    for fraction, still_visible in ((0.25, True), (0.5, True), (0.8, False), (1.0, False)):
        covered = edits.occlude(scene, 0, fraction)
        after = np.asarray(draw(covered), dtype=int)
        changed = np.any(before != after, axis=-1)
        assert changed.any()
        assert not changed[~edits.difference(scene, covered)].any()
        rows = np.flatnonzero(changed.any(axis=1))
        # The box reaches from row 27 to row 53 (80 * (0.5 -+ 0.165), rounded on the canvas of 320).
        top = 53.25 - fraction * 26.5
        assert abs(rows[0] - top) <= 1
        assert ("ball" in covered.kinds) is still_visible
        assert visible_fraction(covered, 0) == pytest.approx(1 - _round_share_below(fraction), abs=0.03)
    assert edits.occlude(edits.occlude(scene, 0, 0.5), 0, 0) == scene
    assert Scene.from_json(covered.to_json()) == covered
    with pytest.raises(InputError, match="covered share"):
        edits.occlude(scene, 0, 1.5)


def _round_share_below(fraction: float) -> float:
    """The share of a disc's area below a chord that cuts off `fraction` of its height."""
    x = 1 - 2 * fraction
    return float((np.arccos(x) - x * np.sqrt(1 - x * x)) / np.pi)
