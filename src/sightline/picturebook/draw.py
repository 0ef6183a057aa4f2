"""Pictures of scenes, and their exact ground truth.

A picture is drawn four times too large in flat colours, far objects first, averaged down, and given pixel noise that
depends on the scene's seed and the picture's size alone. Only integers reach the drawing, so a scene has the same
pixels on every machine, and two scenes that differ in one object have the same pixels everywhere but there.

The ground truth follows from the same shapes: a pixel belongs to what shows in most of its 16 samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sightline.errors import InputError
from sightline.picturebook.backdrops import backdrop
from sightline.picturebook.kinds import Sprite, palette, sprite
from sightline.picturebook.scene import HALF_EXTENT, Object, Scene, random_stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUPERSAMPLING = 4
NOISE = 6
"""The pixel noise is an integer from -NOISE to NOISE, the same in the three channels."""

CARD = (128, 128, 128)
"""The colour of the card that covers a part of an object."""

SIZE_RANGE = (32, 1024)


def draw(scene: Scene, size: int = 80) -> Image.Image:
    """The picture of a scene: RGB, `size` x `size`.

    Raises:
        InputError: for a size outside `SIZE_RANGE`.
    """
    side = canvas_side(size)
    canvas = backdrop(scene.scene_type, scene.seed, side)
    for index in depth_order(scene):
        thing = scene.objects[index]
        shape, corner = _placed(thing, side)
        fills = shape.fills.copy()
        fills.putpalette(palette(thing.colour, scene.seed, thing.x, thing.y))
        canvas.paste(fills.convert("RGB"), corner, shape.mask)
        if thing.covered:
            canvas.paste(CARD, _card(thing, side))
    clean = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.int16)
    return Image.fromarray(np.clip(clean + _noise(scene.seed, size), 0, 255).astype(np.uint8))


def depth_order(scene: Scene) -> list[int]:
    """The indices of the visible objects, the farthest (highest) first; of equally high ones, the earlier in the record
    first."""
    visible = [index for index, thing in enumerate(scene.objects) if not thing.hidden]
    return sorted(visible, key=lambda index: scene.objects[index].y)


def object_at(scene: Scene, index: int) -> Object:
    """The object at an index.

    Raises:
        InputError: if the scene has no such object.
    """
    if not 0 <= index < len(scene.objects):
        raise InputError(f"the scene has {len(scene.objects)} objects, counted from 0: there is no object {index}")
    return scene.objects[index]


def object_ids(scene: Scene, size: int = 80) -> NDArray[np.int16]:
    """[size, size]: the index into `scene.objects` of the object that shows in most of a pixel's samples, -1 for the
    backdrop. Where two show equally much, the backdrop wins, then the earlier in the record. Hidden objects own none.

    Raises:
        InputError: for a size outside `SIZE_RANGE`.
    """
    samples = _sample_ids(scene, size)
    counts = np.stack([_samples_per_pixel(samples == index) for index in range(-1, len(scene.objects))])
    owners: NDArray[np.int16] = (counts.argmax(axis=0) - 1).astype(np.int16)
    return owners


def masks(scene: Scene, size: int = 80) -> NDArray[np.bool_]:
    """[objects, size, size]: the pixels that each object owns (see `object_ids`)."""
    indices = np.arange(len(scene.objects), dtype=np.int16)
    return np.equal(object_ids(scene, size), indices[:, None, None])


def boxes(scene: Scene, size: int = 80) -> list[tuple[int, int, int, int] | None]:
    """For each object the tightest box round the pixels it owns: left, top, right, bottom in pixels, right and bottom
    excluded. None for an object that owns no pixel, because it is hidden or wholly covered."""
    return [_tight_box(mask) for mask in masks(scene, size)]


def visible_fraction(scene: Scene, index: int, size: int = 80) -> float:
    """The share of an object's own samples that neither another object covers nor the picture's edge cuts off; 0 for a
    hidden object.

    Raises:
        InputError: for an index without an object or a size outside `SIZE_RANGE`.
    """
    thing = object_at(scene, index)
    shape, _ = _placed(thing, canvas_side(size))
    own = np.count_nonzero(np.asarray(shape.mask))
    return float(np.count_nonzero(_sample_ids(scene, size) == index) / own)


def coverage(thing: Object, size: int = 80) -> NDArray[np.bool_]:
    """[size, size]: the pixels that an object touches with at least one sample, were it alone and not hidden. No other
    pixel of any picture depends on it."""
    side = canvas_side(size)
    shape, corner = _placed(thing, side)
    canvas = Image.new("L", (side, side))
    canvas.paste(1, (*corner, corner[0] + shape.mask.width, corner[1] + shape.mask.height), shape.mask)
    if thing.covered:
        canvas.paste(1, _card(thing, side))
    return _samples_per_pixel(np.asarray(canvas) > 0) > 0


def _sample_ids(scene: Scene, size: int) -> NDArray[np.int32]:
    """[4 * size, 4 * size]: the index of the object that each sample shows, -1 for the backdrop."""
    side = canvas_side(size)
    canvas = Image.new("I", (side, side), -1)
    for index in depth_order(scene):
        shape, corner = _placed(scene.objects[index], side)
        canvas.paste(index, (*corner, corner[0] + shape.mask.width, corner[1] + shape.mask.height), shape.mask)
        if scene.objects[index].covered:
            canvas.paste(-1, _card(scene.objects[index], side))
    return np.asarray(canvas, dtype=np.int32)


def _samples_per_pixel(samples: NDArray[np.bool_]) -> NDArray[np.int64]:
    size = len(samples) // SUPERSAMPLING
    counts: NDArray[np.int64] = samples.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).sum(axis=(1, 3))
    return counts


def _tight_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def canvas_side(size: int) -> int:
    """The side of the canvas on which a picture of `size` pixels a side is drawn.

    Raises:
        InputError: for a size outside `SIZE_RANGE`.
    """
    if not SIZE_RANGE[0] <= size <= SIZE_RANGE[1]:
        raise InputError(f"a picture's size must be from {SIZE_RANGE[0]} to {SIZE_RANGE[1]} pixels, not {size}")
    return SUPERSAMPLING * size


def _placed(thing: Object, side: int) -> tuple[Sprite, tuple[int, int]]:
    """The object's sprite and its top left corner on a canvas of a side."""
    half = round(HALF_EXTENT[thing.size] * side)
    corner = (round(thing.x * side) - half, round(thing.y * side) - half)
    return sprite(thing.kind, half, thing.mirrored), corner


def _card(thing: Object, side: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the card over the lower part of an object's box, on a canvas of a side."""
    shape, (left, top) = _placed(thing, side)
    bottom = top + shape.mask.height
    return (left, bottom - round(thing.covered * shape.mask.height), left + shape.mask.width, bottom)


def _noise(seed: int, size: int) -> NDArray[np.int16]:
    """[size, size, 1]. Made of the generator's raw words, which no release changes (unlike derived distributions)."""
    words = random_stream("noise", seed, size).bit_generator.random_raw((size * size + 7) // 8)
    levels = words.astype("<u8").view(np.uint8)[: size * size] % (2 * NOISE + 1)
    return levels.astype(np.int16).reshape(size, size, 1) - NOISE
