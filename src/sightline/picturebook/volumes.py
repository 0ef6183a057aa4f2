"""Volumes such as a scanner makes, with the class of every voxel.

An organ (a large ellipsoid) lies in soft tissue; a vessel (a bent tube) runs through the volume, and one to three
lesions (small ellipsoids, which may run together) lie inside the organ. A lesion is as bright as the vessel and is told
from it by its shape and place alone.

    classes: 0 tissue, 1 organ, 2 vessel, 3 lesion
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sightline.picturebook.cells import check_sample
from sightline.picturebook.scene import Split, random_stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOLUME_CLASSES = ("tissue", "organ", "vessel", "lesion")
SIZE_RANGE = (16, 128)
_LEVELS = np.array([0.25, 0.5, 0.85, 0.85])


@dataclass(frozen=True)
class Volume:
    """What the scanner shows."""

    voxels: NDArray[np.float32]
    """[size, size, size] (depth, height, width), mostly in [0, 1]"""
    labels: NDArray[np.uint8]
    """[size, size, size], numbers of `VOLUME_CLASSES`"""


def sample_volume(split: Split, index: int, *, size: int = 32) -> Volume:
    """Volume number `index` of a split.

    Raises:
        InputError: an unknown split, a negative index, or a size outside `SIZE_RANGE`.
    """
    check_sample("volume", split, index, size, SIZE_RANGE)
    rng = random_stream("volume", split, index)
    places = np.stack(np.meshgrid(*[(np.arange(size) + 0.5) / size] * 3, indexing="ij"), axis=-1)
    labels = np.zeros((size,) * 3, dtype=np.uint8)
    centre, radii = rng.uniform(0.4, 0.6, size=3), rng.uniform(0.22, 0.34, size=3)
    organ = _inside(places, centre, radii)
    labels[organ] = 1
    bend = rng.uniform(-0.2, 0.2, size=2)
    start = rng.uniform(0.2, 0.8, size=2)
    along = places[..., 0]
    middle = start + bend * np.sin(np.pi * along)[..., None]
    tube = ((places[..., 1:] - middle) ** 2).sum(axis=-1) < rng.uniform(0.04, 0.06) ** 2
    labels[tube] = 2
    for _ in range(int(rng.integers(1, 4))):
        direction = rng.normal(size=3)
        place = centre + radii * 0.6 * rng.random() * direction / np.linalg.norm(direction)
        lesion = _inside(places, place, rng.uniform(0.06, 0.1, size=3)) & organ & ~tube
        labels[lesion] = 3
    drift = 0.1 * (places @ rng.uniform(-1, 1, size=3))  # as of a coil that is nearer on one side
    voxels = _LEVELS[labels] + drift + rng.normal(scale=0.06, size=labels.shape)
    return Volume(voxels.astype(np.float32), labels)


def _inside(places: NDArray[np.float64], centre: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (((places - centre) / radii) ** 2).sum(axis=-1) < 1
