"""Edits of scenes. Each returns a new scene that differs in exactly what its name says, so the pictures before and
after are a controlled pair: outside `difference` their pixels are the same bit for bit.

The seed stays, and with it the backdrop and the noise. An object's shade is drawn from the seed and its own place, so
no edit of one object shifts the shade of another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sightline.errors import InputError
from sightline.picturebook.draw import canvas_side, coverage, depth_order, object_at
from sightline.picturebook.scene import Colour, Object, Scene, Size

if TYPE_CHECKING:
    from numpy.typing import NDArray


def remove(scene: Scene, index: int) -> Scene:
    """The scene without the object at an index.

    Raises:
        InputError: if there is no such object (so do all edits that take an index).
    """
    object_at(scene, index)
    return replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])


def add(scene: Scene, thing: Object, index: int | None = None) -> Scene:
    """The scene with one more object, placed at `index` of the record (default: at its end).

    `add(remove(scene, i), scene.objects[i], i)` equals `scene`.

    Raises:
        InputError: if the index is beyond the end of the record.
    """
    place = len(scene.objects) if index is None else index
    if not 0 <= place <= len(scene.objects):
        raise InputError(f"an object can be added at index 0 to {len(scene.objects)} of this scene, not at {place}")
    return replace(scene, objects=(*scene.objects[:place], thing, *scene.objects[place:]))


def recolour(scene: Scene, index: int, colour: Colour) -> Scene:
    """The scene with the object at an index in another colour."""
    return _replaced(scene, index, replace(object_at(scene, index), colour=colour))


def resize(scene: Scene, index: int, size: Size) -> Scene:
    """The scene with the object at an index in another size, its centre where it was."""
    return _replaced(scene, index, replace(object_at(scene, index), size=size))


def move(scene: Scene, index: int, x: float, y: float) -> Scene:
    """The scene with the object at an index centred at x, y (fractions of the picture's side)."""
    return _replaced(scene, index, replace(object_at(scene, index), x=x, y=y))


def swap(scene: Scene, first: int, second: int) -> Scene:
    """The scene with two objects in each other's places; each keeps its size, colour and index."""
    one, other = object_at(scene, first), object_at(scene, second)
    return move(move(scene, first, other.x, other.y), second, one.x, one.y)


def occlude(scene: Scene, index: int, fraction: float) -> Scene:
    """The scene with a grey card over the lower `fraction`, in [0, 1], of the box of the object at an index. An object
    covered for more than `MOST_COVERED` no longer counts as visible."""
    return _replaced(scene, index, replace(object_at(scene, index), covered=fraction))


def mirror(scene: Scene) -> Scene:
    """The scene with every object, hidden ones too, reflected left to right; the backdrop stays. Mirroring a sampled
    scene twice gives the scene back."""
    flipped = (replace(thing, x=round(1 - thing.x, 3), mirrored=not thing.mirrored) for thing in scene.objects)
    return replace(scene, objects=tuple(flipped))


def difference(before: Scene, after: Scene, size: int = 80) -> NDArray[np.bool_]:
    """[size, size]: the pixels in which the pictures of two scenes may differ; all others are equal bit for bit.

    It is the union of what the visible objects that are not in both scenes touch; everything if the backdrops differ.

    Raises:
        InputError: for a size that cannot be drawn.
    """
    canvas_side(size)  # refuses a bad size even where nothing differs
    backdrops_differ = (before.scene_type, before.seed) != (after.scene_type, after.seed)
    footprint = np.full((size, size), backdrops_differ)
    left, right = (Counter(scene.objects[i] for i in depth_order(scene)) for scene in (before, after))
    for thing in (left - right) + (right - left):
        footprint |= coverage(thing, size)
    shared = left & right
    # Objects at one height are drawn in the order of the record, which may differ though the objects do not.
    if _drawn(before, shared) != _drawn(after, shared):
        for thing in shared:
            footprint |= coverage(thing, size)
    return footprint


def _drawn(scene: Scene, among: Counter[Object]) -> list[Object]:
    return [scene.objects[index] for index in depth_order(scene) if scene.objects[index] in among]


def _replaced(scene: Scene, index: int, thing: Object) -> Scene:
    return replace(scene, objects=(*scene.objects[:index], thing, *scene.objects[index + 1 :]))
