"""Scenes written to a folder for people to look at: a picture each, one sheet of them all, and the records."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sightline.errors import InputError
from sightline.files import write_whole
from sightline.picturebook.draw import draw
from sightline.picturebook.questions import long_caption
from sightline.picturebook.scene import Split, sample_scene

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MOST = 10_000
GAP = 12
BACKGROUND = (250, 249, 246)


def write_album(
    out: Path, n: int, *, split: Split = "train", start: int = 0, against: bool = False, size: int = 320
) -> Path:
    """Draws n scenes into a folder: `<split>-<number>.png`, `scenes.jsonl` (file, caption and record of each) and
    `sheet.png`. Each file is replaced in one step.

    Args:
        out: the folder, made if need be.
        n: how many scenes, from number `start` of the split on.
        split: which scenes.
        start: the first scene's number.
        against: whether the scenes are drawn against the co-occurrence.
        size: the pictures' side in pixels.

    Returns:
        The path of the sheet.

    Raises:
        InputError: for a number or size out of range, an unknown split, and a file that cannot be written.
    """
    if not 1 <= n <= MOST:
        raise InputError(f"the number of scenes must be from 1 to {MOST}, not {n}")
    pictures, lines = [], []
    for index in range(start, start + n):
        scene = sample_scene(split, index, against=against)
        picture = draw(scene, size)
        name = f"{split}-{'against-' if against else ''}{index}.png"
        write_whole(out / name, _png(picture))
        pictures.append(picture)
        record = {"file": name, "caption": long_caption(scene).answer, "scene": asdict(scene)}
        lines.append(json.dumps(record, separators=(",", ":")) + "\n")
    write_whole(out / "scenes.jsonl", "".join(lines))
    sheet = out / "sheet.png"
    write_whole(sheet, _png(contact_sheet(pictures)))
    return sheet


def contact_sheet(pictures: Sequence[Picture]) -> Picture:
    """Pictures of one size side by side, four to three as nearly as their number allows."""
    side = pictures[0].width
    columns = math.ceil(math.sqrt(len(pictures) * 4 / 3))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + GAP) + GAP), BACKGROUND)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        sheet.paste(picture, (GAP + column * (side + GAP), GAP + row * (side + GAP)))
    return sheet


def _png(picture: Picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
