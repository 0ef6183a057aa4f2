"""Cells under a microscope, with the class of every pixel.

Cells float in a pale medium; each has a body and a dark nucleus. A bead lies near one of the four corners. Where the
bead is *red*, the cells of the picture are `reactive`, where it is *blue*, `resting`: the bodies look the same in both,
so that a network has to carry the bead's colour across the picture to name them. Everything else is decided nearby.

    classes: 0 medium, 1 resting body, 2 reactive body, 3 nucleus, 4 bead
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sightline.errors import InputError, unknown
from sightline.picturebook.scene import SPLITS, Split, random_stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

CELL_CLASSES = ("medium", "resting body", "reactive body", "nucleus", "bead")

_SCALE = 4
_MEDIUM, _BODY, _NUCLEUS = (236, 228, 238), (206, 164, 206), (112, 64, 140)
_BEADS = {False: (64, 96, 220), True: (222, 52, 60)}
SIZE_RANGE = (32, 512)


@dataclass(frozen=True)
class CellPicture:
    """What the microscope shows."""

    pixels: NDArray[np.uint8]
    """[size, size, 3]"""
    labels: NDArray[np.uint8]
    """[size, size], numbers of `CELL_CLASSES`"""
    reactive: bool


def sample_cells(split: Split, index: int, *, size: int = 64) -> CellPicture:
    """Picture number `index` of a split.

    Raises:
        InputError: an unknown split, a negative index, or a size outside `SIZE_RANGE`.
    """
    check_sample("cell picture", split, index, size, SIZE_RANGE)
    rng = random_stream("cells", split, index)
    reactive = bool(rng.random() < 0.5)
    side = _SCALE * size
    picture, labels = Image.new("RGB", (side, side), _MEDIUM), Image.new("L", (side, side), 0)
    pens = ImageDraw.Draw(picture), ImageDraw.Draw(labels)
    corner = rng.integers(2, size=2) * 0.8 + 0.1
    taken: list[tuple[float, float, float]] = [(float(corner[0]), float(corner[1]), 0.09)]
    for _ in range(int(rng.integers(4, 9))):
        radius = float(rng.uniform(0.07, 0.12))
        for _ in range(20):
            x, y = (float(v) for v in rng.uniform(radius, 1 - radius, size=2))
            if all((x - a) ** 2 + (y - b) ** 2 > (radius + r) ** 2 for a, b, r in taken):
                taken.append((x, y, radius))
                break
    for x, y, radius in taken[1:]:
        outline = _wobbly(rng, x, y, radius, side)
        shade = tuple(int(v + rng.integers(-14, 15)) for v in _BODY)
        pens[0].polygon(outline, fill=shade)
        pens[1].polygon(outline, fill=2 if reactive else 1)
        inner = _wobbly(rng, x + rng.uniform(-0.2, 0.2) * radius, y, radius * float(rng.uniform(0.35, 0.5)), side)
        pens[0].polygon(inner, fill=_NUCLEUS)
        pens[1].polygon(inner, fill=3)
    bead = [side * (c + s * 0.055) for s in (-1, 1) for c in taken[0][:2]]
    pens[0].ellipse(bead, fill=_BEADS[reactive])
    pens[1].ellipse(bead, fill=4)
    picture = picture.filter(ImageFilter.GaussianBlur(_SCALE * size / 96))
    clean = np.asarray(picture.resize((size, size), Image.Resampling.BOX), dtype=np.float64)
    noisy = clean + rng.normal(scale=6, size=(size, size, 3))
    middle = _SCALE // 2
    return CellPicture(
        np.clip(noisy, 0, 255).astype(np.uint8), np.asarray(labels)[middle::_SCALE, middle::_SCALE], reactive
    )


def _wobbly(rng: np.random.Generator, x: float, y: float, radius: float, side: int) -> list[tuple[float, float]]:
    """A rough circle."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    waves = np.stack([rng.uniform(-0.1, 0.1) * np.cos(k * angles + rng.uniform(0, 6.3)) for k in (2, 3)])
    reach = radius * (1 + waves.sum(axis=0))
    return [(side * (x + r * np.cos(a)), side * (y + r * np.sin(a))) for r, a in zip(reach, angles, strict=True)]


def check_sample(what: str, split: str, index: int, size: int, sizes: tuple[int, int]) -> None:
    """Raises `InputError` for an unknown split, a negative index, or a size out of range."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if index < 0:
        raise InputError(f"a {what}'s index must be 0 or more, not {index}")
    if not sizes[0] <= size <= sizes[1]:
        raise InputError(f"a {what} has a side of {sizes[0]} to {sizes[1]}, not {size}")
