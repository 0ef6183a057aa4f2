"""The backdrops of the six scene types: soft, pale, and free of anything that could be taken for one of the kinds."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw

from sightline.picturebook.kinds import RGB
from sightline.picturebook.scene import random_stream


class _Paper:
    """A canvas measured in thousandths of its side. `tint` is added to every colour."""

    def __init__(self, side: int, tint: RGB) -> None:
        self.side = side
        self.tint = tint
        self.image = Image.new("RGB", (side, side))
        self.pen = ImageDraw.Draw(self.image)

    def _at(self, *values: int) -> list[int]:
        return [(2 * value * self.side + 1000) // 2000 for value in values]

    def _ink(self, colour: RGB) -> RGB:
        red, green, blue = (min(255, max(0, level + step)) for level, step in zip(colour, self.tint, strict=True))
        return (red, green, blue)

    def box(self, colour: RGB, left: int, top: int, right: int, bottom: int) -> None:
        """A rectangle, right and bottom edge excluded."""
        x0, y0, x1, y1 = self._at(left, top, right, bottom)
        if x1 > x0 and y1 > y0:
            self.pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=self._ink(colour))

    def ellipse(self, colour: RGB, left: int, top: int, right: int, bottom: int) -> None:
        self.pen.ellipse(self._at(left, top, right, bottom), fill=self._ink(colour))

    def polygon(self, colour: RGB, *points: int) -> None:
        self.pen.polygon(self._at(*points), fill=self._ink(colour))

    def blend(self, upper: RGB, lower: RGB, top: int, bottom: int, bands: int = 14) -> None:
        """Horizontal bands over the full width that go from one colour to the other."""
        for band in range(bands):
            red, green, blue = (a + (b - a) * band // (bands - 1) for a, b in zip(upper, lower, strict=True))
            edge = top + (bottom - top) * band // bands
            self.box((red, green, blue), 0, edge, 1000, top + (bottom - top) * (band + 1) // bands)

    def scallops(self, colour: RGB, y: int, width: int, height: int, start: int) -> None:
        """A row of bumps whose tops reach `height` above `y`."""
        for left in range(start - width, 1000, width):
            self.ellipse(colour, left - width // 12, y - height, left + width + width // 12, y + height)


def _sea(paper: _Paper, shift: int, phase: int) -> None:
    horizon = 300 + shift
    paper.blend((188, 220, 240), (226, 238, 242), 0, horizon)
    paper.blend((126, 186, 212), (158, 210, 222), horizon, 820)
    for row, y in enumerate((horizon + 90, horizon + 200, horizon + 330, horizon + 450)):
        for left in range((phase + 130 * row) % 260 - 260, 1000, 260):
            paper.ellipse((178, 218, 230), left, y, left + 150, y + 16)
    paper.scallops((220, 238, 238), 834, 170, 26, phase % 170)
    paper.scallops((240, 226, 190), 856, 170, 26, phase % 170)
    paper.blend((240, 226, 190), (232, 212, 172), 856, 1000, 6)


def _garden(paper: _Paper, shift: int, phase: int) -> None:
    hedge = 250 + shift
    paper.blend((204, 228, 240), (232, 240, 236), 0, hedge)
    paper.scallops((158, 196, 146), hedge, 120, 46, phase % 120)
    paper.box((158, 196, 146), 0, hedge, 1000, hedge + 150)
    paper.scallops((148, 188, 138), hedge + 110, 120, 36, phase % 120 + 60)
    paper.box((148, 188, 138), 0, hedge + 110, 1000, hedge + 160)
    edge, light = hedge + 150, True
    for depth in (70, 90, 110, 140, 170, 200):
        paper.box((190, 222, 156) if light else (180, 214, 148), 0, edge, 1000, min(edge + depth, 1000))
        edge, light = edge + depth, not light


def _room(paper: _Paper, shift: int, phase: int) -> None:
    floor = 660 + shift
    paper.box((244, 226, 206), 0, 0, 1000, floor)
    for left in range(phase % 125 - 125, 1000, 125):
        paper.box((238, 217, 196), left, 0, left + 62, floor)
    paper.box((252, 246, 236), 0, floor - 50, 1000, floor)
    paper.box((214, 196, 176), 0, floor - 4, 1000, floor + 8)
    paper.blend((200, 168, 136), (212, 182, 150), floor + 8, 1000, 5)
    edge = floor + 8
    for depth in (60, 80, 100, 130):
        edge += depth
        paper.box((188, 156, 126), 0, edge - 5, 1000, edge + 3)


def _street(paper: _Paper, shift: int, phase: int) -> None:
    kerb = 520 + shift
    paper.blend((206, 220, 232), (232, 234, 234), 0, kerb)
    for block, (width, roof) in enumerate(((210, 190), (160, 110), (240, 230), (150, 150), (220, 90), (180, 200))):
        left = (0, 210, 370, 610, 760, 980)[block] - phase % 160
        shade = (208, 202, 204) if block % 2 else (218, 208, 202)
        paper.box(shade, left, roof + shift, left + width, kerb - 110)
    paper.box((208, 202, 204), 0, kerb - 130, 1000, kerb)
    paper.blend((206, 204, 200), (214, 212, 208), kerb - 110, kerb + 60, 4)
    paper.box((232, 230, 226), 0, kerb + 60, 1000, kerb + 80)
    paper.blend((146, 150, 160), (160, 164, 172), kerb + 80, 1000, 6)
    for left in range(phase % 250 - 250, 1000, 250):
        paper.box((206, 206, 200), left, kerb + 262, left + 130, kerb + 282)


def _farm(paper: _Paper, shift: int, phase: int) -> None:
    horizon = 380 + shift
    paper.blend((196, 222, 240), (240, 240, 226), 0, horizon)
    paper.ellipse((190, 210, 170), -500 + phase // 4, horizon - 120, 700 + phase // 4, horizon + 300)
    paper.ellipse((180, 202, 158), 300 + phase // 4, horizon - 90, 1500, horizon + 300)
    paper.box((226, 208, 150), 0, horizon, 1000, 1000)
    centre = 300 + 2 * phase // 5
    for furrow in range(-7, 8):
        near, far = centre + 260 * furrow, centre + 60 * furrow
        paper.polygon((216, 196, 138), far, horizon, far + 24, horizon, near + 100, 1000, near, 1000)


def _night(paper: _Paper, shift: int, phase: int) -> None:
    horizon = 640 + shift
    paper.blend((48, 60, 116), (104, 108, 158), 0, horizon, 18)
    paper.box((76, 92, 126), 0, horizon, 1000, horizon + 60)
    paper.ellipse((76, 92, 126), -400 + phase // 3, horizon - 90, 560 + phase // 3, horizon + 400)
    paper.ellipse((68, 84, 118), 300 + phase // 3, horizon - 60, 1700, horizon + 400)
    paper.blend((66, 92, 108), (56, 80, 96), horizon + 60, 1000, 5)


_PAINTERS: dict[str, Callable[[_Paper, int, int], None]] = {
    "sea": _sea,
    "garden": _garden,
    "room": _room,
    "street": _street,
    "farm": _farm,
    "night": _night,
}


def backdrop(scene_type: str, seed: int, side: int) -> Image.Image:
    """What stands behind the objects: RGB, `side` pixels a side. The seed moves the horizon by up to 3 % of the side,
    every colour by up to 4 levels a channel, and waves, stripes and hills sideways."""
    rng = random_stream("backdrop", scene_type, seed)
    shift, phase, red, green, blue = rng.integers((-30, 0, -4, -4, -4), (31, 1000, 5, 5, 5)).tolist()
    paper = _Paper(side, (red, green, blue))
    _PAINTERS[scene_type](paper, shift, phase)
    return paper.image
