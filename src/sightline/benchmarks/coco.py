"""COCO 2014's annotation files: which categories an image shows, and how people described it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from sightline.errors import InputError


def coco_annotations(folder: Path, images: Sequence[int]) -> dict[int, tuple[set[str], list[str]]]:
    """Image -> its categories and its human captions, from as few of the folder's files as hold all images.

    Raises:
        InputError: if a file is missing or malformed, or an image is in none of them.
    """
    found: dict[int, tuple[set[str], list[str]]] = {}
    seen = []
    for part in ("val2014", "train2014"):
        files = [folder / f"{kind}_{part}.json" for kind in ("instances", "captions")]
        if all(image in found for image in images) or not any(file.exists() for file in files):
            continue
        categories, captions = (_annotations_of(file) for file in files)
        known = categories.keys() | captions.keys()
        found |= {i: (set(categories.get(i, ())), list(captions.get(i, ()))) for i in images if i in known}
        seen.append(part)
    if not seen:
        raise InputError(f"{folder} holds no instances_val2014.json and captions_val2014.json (nor those of train2014)")
    lost = [image for image in images if image not in found]
    if lost:
        raise InputError(f"image {lost[0]} is not in the annotations of {' and '.join(seen)} in {folder}")
    return {image: found[image] for image in images}


def _annotations_of(file: Path) -> dict[int, list[str]]:
    """Image -> the category names of an instances file, or the captions of a captions file; an image may have none."""
    try:
        return _read_file(str(file), file.stat().st_mtime_ns)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error}") from error


@functools.lru_cache(maxsize=4)
def _read_file(path: str, changed: int) -> dict[int, list[str]]:
    """COCO's files take seconds to parse; `changed` makes one that was written anew be read anew."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        names = {int(category["id"]): str(category["name"]) for category in record.get("categories", ())}
        of_image: dict[int, list[str]] = {int(image["id"]): [] for image in record["images"]}
        for note in record["annotations"]:
            text = str(note["caption"]) if "caption" in note else names[int(note["category_id"])]
            of_image.setdefault(int(note["image_id"]), []).append(text)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a COCO annotation file: {error!r}") from error
    return of_image
