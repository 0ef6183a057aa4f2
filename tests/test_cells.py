"""Cells under a microscope: labels fit the pixels, and only the bead's colour names the cells."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from sightline.errors import InputError
from sightline.picturebook import cells
from sightline.picturebook.cells import CELL_CLASSES, SIZE_RANGE, CellPicture, sample_cells
from sightline.picturebook.scene import SPLITS, random_stream

MEDIUM, RESTING, REACTIVE, NUCLEUS, BEAD = range(len(CELL_CLASSES))
SAMPLED = [sample_cells("train", index) for index in range(200)]


def test_the_same_number_gives_the_same_picture_in_another_process() -> None:
    code = (
        "import zlib; from sightline.picturebook.cells import sample_cells; made = sample_cells('test', 4); "
        "print(zlib.crc32(made.pixels.tobytes() + made.labels.tobytes()))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    made = sample_cells("test", 4)
    assert int(there) == zlib.crc32(made.pixels.tobytes() + made.labels.tobytes())


def test_splits_and_numbers_share_no_picture() -> None:
    made = [sample_cells(split, index).labels.tobytes() for split in SPLITS for index in range(20)]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("size", [32, 64, 100])
def test_shapes_and_classes(size: int) -> None:
    made = sample_cells("validation", 1, size=size)
    assert (made.pixels.shape, made.pixels.dtype) == ((size, size, 3), np.uint8)
    assert (made.labels.shape, made.labels.dtype) == ((size, size), np.uint8)
    assert set(np.unique(made.labels)) == {MEDIUM, REACTIVE if made.reactive else RESTING, NUCLEUS, BEAD}


def test_a_larger_picture_shows_the_same() -> None:
    for index in range(10):
        small, large = sample_cells("train", index, size=64), sample_cells("train", index, size=192)
        assert small.reactive == large.reactive
        assert (small.labels == large.labels[1::3, 1::3]).mean() > 0.97


def test_a_nucleus_lies_inside_a_body() -> None:
    for index in range(40):
        made = sample_cells("train", index, size=160)
        nuclei = made.labels == NUCLEUS
        around = ndimage.binary_dilation(nuclei, iterations=1) & ~nuclei
        body = REACTIVE if made.reactive else RESTING
        assert set(np.unique(made.labels[around])) == {body}
        # Each cell has one: four to eight, or fewer where no place was found.
        assert 2 <= ndimage.label(nuclei)[1] <= 8


def test_the_bead_is_one_disc_near_a_corner_and_its_colour_decides() -> None:
    corners = set()
    for made in SAMPLED:
        bead = made.labels == BEAD
        assert ndimage.label(bead)[1] == 1
        centre = np.mean(np.nonzero(bead), axis=1) / 64
        assert np.abs(np.abs(centre - 0.5) - 0.4).max() < 0.02
        corners.add(tuple(centre > 0.5))
        inner = ndimage.binary_erosion(bead)  # blurred at its rim
        red, _, blue = made.pixels[inner].mean(axis=0)
        assert (red > blue + 60) if made.reactive else (blue > red + 60)
    assert len(corners) == 4


def test_reactive_and_resting_pictures_are_equally_many() -> None:
    # Four standard errors of a half in 200.
    assert abs(np.mean([made.reactive for made in SAMPLED]) - 0.5) < 0.15


def with_bead(index: int, reactive: bool, monkeypatch: pytest.MonkeyPatch) -> CellPicture:
    """Picture number `index` with a bead of one colour, all else drawn as before."""

    class Decided(np.random.Generator):
        def random(self, *arguments: Any, **more: Any) -> Any:
            super().random(*arguments, **more)
            return 0.0 if reactive else 0.9

    monkeypatch.setattr(cells, "random_stream", lambda *words: Decided(random_stream(*words).bit_generator))
    made = sample_cells("train", index)
    monkeypatch.undo()
    return made


def test_far_from_the_bead_both_have_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20):
        resting, reactive = (with_bead(index, choice, monkeypatch) for choice in (False, True))
        assert (resting.reactive, reactive.reactive) == (False, True)
        assert (np.where(resting.labels == RESTING, REACTIVE, resting.labels) == reactive.labels).all()
        near = ndimage.binary_dilation(resting.labels == BEAD, iterations=4)  # as far as the blur carries
        assert (resting.pixels == reactive.pixels)[~near].all()
        assert (resting.pixels != reactive.pixels)[resting.labels == BEAD].any()
        drawn = sample_cells("train", index)
        same = reactive if drawn.reactive else resting
        assert (drawn.pixels == same.pixels).all()


def test_bodies_have_the_same_colours_in_both() -> None:
    shades: dict[bool, list[Any]] = {False: [], True: []}
    for made in SAMPLED:
        body = ndimage.binary_erosion((made.labels == RESTING) | (made.labels == REACTIVE))
        shades[made.reactive].append(made.pixels[body].mean(axis=0))
    means = {reactive: np.mean(values, axis=0) for reactive, values in shades.items()}
    spread = np.mean([np.std(values, axis=0) for values in shades.values()], axis=0)
    # Four standard errors of the difference of two means of 100 pictures each.
    assert (np.abs(means[True] - means[False]) < 4 * spread * np.sqrt(2 / 90)).all()


def test_classes_differ_in_colour_as_described() -> None:
    for made in SAMPLED[:30]:
        bright = {label: made.pixels[made.labels == label].mean() for label in (MEDIUM, NUCLEUS)}
        body = made.pixels[(made.labels == RESTING) | (made.labels == REACTIVE)].mean()
        assert bright[MEDIUM] > body + 20
        assert body > bright[NUCLEUS] + 40


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sample_cells("tset", 0), "unknown split 'tset' .did you mean 'test'"),  # type: ignore[arg-type]
        (lambda: sample_cells("test", -1), "a cell picture's index must be 0 or more, not -1"),
        (lambda: sample_cells("test", 0, size=31), "a side of 32 to 512, not 31"),
        (lambda: sample_cells("test", 0, size=SIZE_RANGE[1] + 1), "a side of 32 to 512, not 513"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
