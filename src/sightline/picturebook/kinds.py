"""The shapes of the 24 kinds, as flat parts in the object's own box.

Coordinates are integers from -100 (left, top) to 100 (right, bottom) and fill the box in at least one direction. Parts
are laid one over another in order; a part filled with `none` cuts a hole. The outline is not listed: it follows from
the union of the parts. The kinds differ in silhouette, so that each can be told whatever its colour, down to a box of
14 pixels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from PIL import Image, ImageDraw

from sightline.picturebook.scene import SIZES, Colour

RGB = tuple[int, int, int]
Fill = Literal[
    "none", "outline", "main", "shade", "tint", "dark", "cream", "pink", "wood", "glass", "leaf", "metal", "gold"
]
"""What a part is filled with: `main` is the object's own colour, `shade` and `tint` a darker and a lighter tone."""

FILLS: tuple[Fill, ...] = get_args(Fill)

COLOUR_RGB: dict[Colour, RGB] = {
    "red": (216, 40, 44),
    "orange": (245, 132, 24),
    "yellow": (250, 216, 44),
    "green": (44, 152, 66),
    "blue": (42, 92, 212),
    "purple": (142, 62, 172),
    "white": (246, 246, 242),
    "black": (34, 34, 40),
}
ACCENT_RGB: dict[Fill, RGB] = {
    "none": (0, 0, 0),
    "outline": (46, 40, 48),
    "dark": (62, 56, 64),
    "cream": (255, 242, 212),
    "pink": (244, 190, 180),
    "wood": (150, 108, 76),
    "glass": (196, 224, 236),
    "leaf": (92, 128, 72),
    "metal": (142, 146, 154),
    "gold": (222, 168, 84),
}
# A dark line round a black thing, or cream spots on a white one, would not show.
ACCENT_RGB_ON: dict[Colour, dict[Fill, RGB]] = {
    "black": {"outline": (186, 182, 176), "dark": (104, 100, 108)},
    "white": {"cream": (206, 196, 176), "glass": (160, 196, 214)},
}


KEPT_HALF = 128
"""Sprites up to this half side, in pixels of the canvas, are drawn once and kept."""


@dataclass(frozen=True)
class Part:
    """One filled shape; `points` are x, y pairs (an ellipse or box has two: its corners)."""

    shape: Literal["ellipse", "box", "polygon"]
    fill: Fill
    points: tuple[int, ...]


def _ellipse(fill: Fill, left: int, top: int, right: int, bottom: int) -> Part:
    return Part("ellipse", fill, (left, top, right, bottom))


def _box(fill: Fill, left: int, top: int, right: int, bottom: int) -> Part:
    return Part("box", fill, (left, top, right, bottom))


def _polygon(fill: Fill, *points: int) -> Part:
    return Part("polygon", fill, points)


SHAPES: dict[str, tuple[Part, ...]] = {
    "boat": (
        _box("wood", -10, -98, 2, 34),
        _polygon("main", 6, -92, 6, 26, 90, 26),
        _polygon("main", -14, -74, -14, 26, -80, 26),
        _polygon("main", -100, 32, 100, 32, 66, 92, -62, 92),
        _polygon("shade", -84, 62, 83, 62, 66, 92, -62, 92),
    ),
    "fish": (
        _polygon("main", 30, 0, 98, -62, 84, 0, 98, 62),
        _polygon("shade", -30, -40, 0, -76, 34, -60, 34, -30),
        _ellipse("main", -100, -54, 56, 54),
        _polygon("shade", -16, 4, 26, -14, 26, 30),
        _ellipse("cream", -76, -28, -44, 4),
        _ellipse("dark", -70, -20, -52, -2),
    ),
    "umbrella": (
        _ellipse("main", -100, -90, 100, 110),
        _box("none", -100, 14, 100, 110),
        _ellipse("none", -98, 0, -36, 28),
        _ellipse("none", -32, 0, 32, 28),
        _ellipse("none", 36, 0, 98, 28),
        _polygon("shade", 0, -86, 34, 4, 24, 0, -24, 0, -34, 4),
        _polygon("wood", -7, -84, 0, -100, 7, -84),
        _box("wood", -7, 0, 7, 84),
        _ellipse("wood", -7, 58, 40, 100),
        _ellipse("none", 7, 52, 26, 86),
        _box("none", 8, 40, 60, 78),
        _ellipse("tint", -72, -52, -48, -22),
    ),
    "bucket": (
        _ellipse("metal", -62, -98, 62, 34),
        _ellipse("none", -52, -88, 52, 24),
        _polygon("main", -84, -38, 84, -38, 58, 98, -58, 98),
        _ellipse("shade", -88, -56, 88, -18),
        _ellipse("dark", -60, -46, 60, -30),
        _polygon("tint", -56, 0, -38, 0, -28, 80, -44, 80),
    ),
    "flower": (
        _box("leaf", -8, 20, 8, 100),
        _polygon("leaf", 0, 92, 22, 58, 66, 54, 44, 88),
        _polygon("leaf", 0, 92, -22, 58, -66, 54, -44, 88),
        _ellipse("main", -34, -100, 34, -32),
        _ellipse("main", -86, -66, -18, 2),
        _ellipse("main", 18, -66, 86, 2),
        _ellipse("main", -68, -8, 0, 58),
        _ellipse("main", 0, -8, 68, 58),
        _ellipse("cream", -26, -46, 26, 6),
        _ellipse("gold", -14, -34, 14, -6),
    ),
    "butterfly": (
        _polygon("dark", -4, -50, -34, -96, -24, -98, 4, -56),
        _polygon("dark", 4, -50, 34, -96, 24, -98, -4, -56),
        _polygon("main", 0, -10, -40, -76, -84, -84, -100, -54, -84, -2, -30, 16),
        _polygon("main", 0, -10, 40, -76, 84, -84, 100, -54, 84, -2, 30, 16),
        _polygon("shade", 0, -4, -62, 12, -78, 46, -58, 84, -30, 80),
        _polygon("shade", 0, -4, 62, 12, 78, 46, 58, 84, 30, 80),
        _ellipse("tint", -80, -66, -50, -36),
        _ellipse("tint", 50, -66, 80, -36),
        _ellipse("dark", -9, -58, 9, 66),
    ),
    "mushroom": (
        _ellipse("main", -100, -98, 100, 150),
        _box("none", -100, 38, -28, 150),
        _box("none", 28, 38, 100, 150),
        _box("none", -28, 99, 28, 150),
        _polygon("cream", -27, 39, 27, 39, 34, 90, 22, 98, -22, 98, -34, 90),
        _ellipse("cream", -24, -70, 8, -36),
        _ellipse("cream", -72, -22, -46, 4),
        _ellipse("cream", 40, -20, 66, 6),
    ),
    "bird": (
        _box("dark", -16, 50, -6, 96),
        _box("dark", 12, 50, 22, 96),
        _polygon("dark", -16, 98, 8, 98, -6, 84),
        _polygon("dark", 12, 98, 36, 98, 22, 84),
        _polygon("shade", -20, 30, -100, -22, -90, -44, 10, -16),
        _ellipse("main", -60, -36, 64, 68),
        _ellipse("main", 8, -92, 82, -14),
        _polygon("gold", 72, -66, 100, -48, 74, -34),
        _polygon("shade", -46, 4, 26, -10, 14, 36, -16, 46),
        _ellipse("cream", 40, -72, 64, -48),
        _ellipse("dark", 48, -68, 62, -52),
    ),
    "chair": (
        _box("shade", -58, 40, -38, 84),
        _box("shade", 38, 40, 58, 84),
        _box("main", -68, -98, 68, 8),
        _box("none", -42, -66, -10, -14),
        _box("none", 10, -66, 42, -14),
        _polygon("tint", -68, 6, 68, 6, 88, 32, -88, 32),
        _box("main", -88, 32, 88, 48),
        _box("main", -88, 48, -62, 98),
        _box("main", 62, 48, 88, 98),
        _box("shade", -68, 1, 68, 7),
    ),
    "cup": (
        _ellipse("main", 14, -46, 100, 46),
        _ellipse("none", 38, -20, 74, 20),
        _box("main", -92, -64, 44, 20),
        _ellipse("main", -92, -42, 44, 82),
        _ellipse("shade", -92, -82, 44, -44),
        _ellipse("cream", -78, -76, 30, -50),
        _polygon("tint", -74, -24, -58, -20, -54, 34, -66, 20),
        _box("shade", -60, 72, 12, 90),
    ),
    "book": (
        _polygon("shade", -98, -18, -4, 40, -4, 80, -98, 18),
        _polygon("shade", -4, 40, 98, -26, 98, 18, -4, 80),
        _polygon("cream", 6, 46, 98, -12, 98, 8, 6, 66),
        _polygon("main", -98, -18, 4, -76, 98, -22, -4, 44),
        _polygon("cream", -20, -24, 4, -38, 24, -26, 0, -11),
    ),
    "clock": (
        _polygon("shade", -70, 98, -40, 48, -10, 60, -46, 100),
        _polygon("shade", 70, 98, 40, 48, 10, 60, 46, 100),
        _ellipse("main", -88, -98, -14, -26),
        _ellipse("main", 14, -98, 88, -26),
        _box("dark", -7, -92, 7, -60),
        _ellipse("main", -80, -68, 80, 92),
        _ellipse("cream", -42, -30, 42, 54),
        _polygon("dark", -7, -22, 7, -22, 7, 8, 32, 22, 26, 34, -7, 19),
    ),
    "car": (
        _polygon("main", -68, -10, -40, -72, 36, -72, 72, -10),
        _polygon("glass", -40, -18, -26, -54, -9, -54, -9, -18),
        _polygon("glass", 9, -18, 9, -54, 22, -54, 40, -18),
        _polygon("main", 100, 8, 80, -18, -90, -18, -100, -2, -100, 54, 100, 54),
        _box("shade", -100, 38, 100, 54),
        _ellipse("dark", -72, 26, -28, 70),
        _ellipse("dark", 32, 26, 76, 70),
        _ellipse("metal", -57, 41, -43, 55),
        _ellipse("metal", 47, 41, 61, 55),
    ),
    "sign": (
        _box("metal", -32, -98, -16, 98),
        _polygon("main", -92, -88, 42, -88, 100, -28, 42, 32, -92, 32),
        _polygon("shade", -92, 18, 56, 18, 42, 32, -92, 32),
        _box("cream", -64, -56, 20, -42),
        _box("cream", -64, -22, 40, -8),
    ),
    "truck": (
        _box("main", -100, -78, 26, 54),
        _polygon("main", 32, -38, 70, -38, 100, -2, 100, 54, 32, 54),
        _polygon("glass", 48, -24, 66, -24, 82, -4, 48, -4),
        _box("shade", -100, -78, 26, -64),
        _box("outline", 27, -36, 31, 54),
        _ellipse("dark", -82, 30, -36, 76),
        _ellipse("dark", 36, 30, 82, 76),
        _ellipse("metal", -67, 45, -51, 61),
        _ellipse("metal", 51, 45, 67, 61),
    ),
    "house": (
        _box("shade", 38, -90, 64, -30),
        _box("main", -78, -22, 78, 98),
        _polygon("shade", 0, -98, 100, -8, 88, 2, -88, 2, -100, -8),
        _box("wood", -52, 38, -18, 98),
        _box("cream", 14, 24, 56, 62),
        _box("glass", 20, 30, 50, 56),
        _box("cream", 33, 30, 37, 56),
    ),
    "sheep": (
        _box("dark", -54, 40, -34, 94),
        _box("dark", 16, 40, 36, 94),
        _ellipse("main", -96, -40, -26, 36),
        _ellipse("main", -78, -68, 2, 14),
        _ellipse("main", -30, -74, 44, 6),
        _ellipse("main", -80, -6, -4, 66),
        _ellipse("main", -26, -6, 50, 66),
        _ellipse("main", -40, -40, 62, 44),
        _ellipse("dark", 42, -56, 96, 18),
        _ellipse("main", 34, -76, 82, -32),
        _ellipse("cream", 66, -32, 82, -16),
    ),
    "dog": (
        _polygon("main", -66, 0, -98, -62, -82, -72, -44, -10),
        _box("main", -70, 30, -42, 96),
        _box("main", 16, 30, 44, 96),
        _box("shade", -40, 30, -20, 88),
        _box("shade", -6, 30, 14, 88),
        _polygon("main", -72, -16, 20, -22, 24, -60, 50, -40, 48, 44, 34, 56, -62, 56, -74, 40),
        _polygon("main", 12, -76, 30, -92, 60, -88, 70, -58, 100, -52, 100, -26, 84, -14, 40, -14, 14, -34),
        _polygon("shade", 6, -84, 28, -86, 30, -32, 10, -20, 0, -40),
        _ellipse("dark", 84, -58, 100, -38),
        _ellipse("cream", 44, -74, 62, -56),
        _ellipse("dark", 50, -70, 60, -58),
    ),
    "tree": (
        _box("wood", -14, 70, 14, 100),
        _polygon("main", 0, -16, 88, 78, -88, 78),
        _polygon("main", 0, -62, 70, 26, -70, 26),
        _polygon("main", 0, -100, 54, -22, -54, -22),
        _polygon("shade", -44, -4, 64, 18, 70, 26, -70, 26),
        _polygon("shade", -56, 44, 82, 70, 88, 78, -88, 78),
    ),
    "cat": (
        _ellipse("main", 6, 22, 100, 98),
        _ellipse("none", 14, 10, 80, 76),
        _box("none", 44, 0, 80, 50),
        _polygon("main", -62, -28, -70, -98, -26, -68),
        _polygon("main", 30, -28, 38, -98, -6, -68),
        _ellipse("main", -72, -10, 40, 110),
        _box("none", -80, 99, 60, 112),
        _ellipse("main", -72, -78, 40, 14),
        _polygon("pink", -56, -58, -61, -84, -40, -68),
        _polygon("pink", 24, -58, 29, -84, 8, -68),
        _ellipse("cream", -50, -48, -24, -20),
        _ellipse("cream", -8, -48, 18, -20),
        _ellipse("dark", -42, -46, -32, -22),
        _ellipse("dark", 0, -46, 10, -22),
        _polygon("pink", -26, -14, -6, -14, -16, -2),
        _ellipse("tint", -40, 30, 8, 92),
    ),
    "moon": (
        _ellipse("main", -90, -98, 98, 98),
        _ellipse("none", -26, -96, 130, 56),
        _ellipse("shade", -66, 8, -42, 32),
        _ellipse("shade", -36, 50, -6, 78),
        _ellipse("tint", -70, -40, -50, -20),
    ),
    "star": (
        _polygon("main", 0, -98, 27, -32, 98, -30, 42, 14, 62, 86, 0, 44, -62, 86, -42, 14, -98, -30, -27, -32),
        _polygon("tint", 0, -66, 15, -20, 0, 8, -15, -20),
        _ellipse("dark", -26, -14, -12, 6),
        _ellipse("dark", 12, -14, 26, 6),
    ),
    "lamp": (
        _box("metal", -10, 0, 10, 84),
        _polygon("main", -34, -98, 34, -98, 82, 18, -82, 18),
        _polygon("shade", -79, 6, 79, 6, 84, 20, -84, 20),
        _polygon("tint", -20, -84, -2, -84, -14, -6, -44, -6),
        _ellipse("main", -58, 66, 58, 116),
        _box("none", -60, 99, 60, 118),
    ),
    "ball": (
        _ellipse("main", -96, -96, 96, 96),
        _ellipse("cream", -36, -94, 36, 94),
        _ellipse("main", -20, -94, 20, 94),
        _ellipse("shade", -20, -96, 20, -66),
        _ellipse("tint", -74, -52, -50, -26),
    ),
}


@dataclass(frozen=True)
class Sprite:
    """A kind drawn on a canvas of its own: `fills` (mode P) holds an index into `FILLS` per pixel, `mask` (mode L) is
    255 where there is something."""

    fills: Image.Image
    mask: Image.Image


def sprite(kind: str, half: int, mirrored: bool) -> Sprite:
    """The kind in a box of `2 * half` pixels a side."""
    # Pictures for people are few and large: keeping their sprites would cost more memory than it saves time.
    return _kept_sprite(kind, half, mirrored) if half <= KEPT_HALF else _make_sprite(kind, half, mirrored)


@lru_cache(maxsize=len(SHAPES) * len(SIZES) * 2)
def _kept_sprite(kind: str, half: int, mirrored: bool) -> Sprite:
    return _make_sprite(kind, half, mirrored)


def _make_sprite(kind: str, half: int, mirrored: bool) -> Sprite:
    line = max(1, (half + 8) // 24)
    scale = half - line
    side = 2 * half
    bare = Image.new("L", (side, side))
    pen = ImageDraw.Draw(bare)
    for part in SHAPES[kind]:
        # Integer arithmetic, rounding half up: the same pixels everywhere.
        points = [half + (2 * scale * value + 100) // 200 for value in part.points]
        index = FILLS.index(part.fill)
        if part.shape == "polygon":
            pen.polygon(points, fill=index)
        elif part.shape == "ellipse":
            pen.ellipse(points, fill=index)
        else:
            pen.rectangle(points, fill=index)
    filled = bare.point([0] + [255] * 255)
    fills = Image.new("L", (side, side))
    reach = range(-line, line + 1)
    steps = [(x, y) for x in reach for y in reach if line * (line - 1) <= x * x + y * y <= line * (line + 1)]
    for step in steps:
        fills.paste(FILLS.index("outline"), (*step, step[0] + side, step[1] + side), filled)
    fills.paste(bare, (0, 0), filled)
    if mirrored:
        fills = fills.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mask = fills.point([0] + [255] * 255)
    indexed = Image.frombytes("P", fills.size, fills.tobytes())
    return Sprite(indexed, mask)


def palette(colour: Colour, seed: int, x: float, y: float) -> bytes:
    """The RGB of each of `FILLS` for an object of a colour, the main colour shifted by up to 8 levels a channel by the
    scene's seed and the object's place."""
    bits = zlib.crc32(f"{seed}/{x:.3f}/{y:.3f}".encode())
    shift = [(bits >> 8 * channel & 255) % 17 - 8 for channel in range(3)]
    main = [min(255, max(0, level + step)) for level, step in zip(COLOUR_RGB[colour], shift, strict=True)]
    tones: dict[Fill, list[int]] = {
        "main": main,
        "shade": [level + 18 for level in main] if colour == "black" else [level * 7 // 8 for level in main],
        "tint": [level + (255 - level) * (1 if colour == "black" else 2) // 8 for level in main],
    }
    accents = ACCENT_RGB | ACCENT_RGB_ON.get(colour, {})
    return bytes(level for fill in FILLS for level in (tones.get(fill) or accents[fill]))
