"""Volumes of a scanner: where organ, vessel and lesions lie, and that brightness does not tell the last two apart."""

from __future__ import annotations

import itertools
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from sightline.errors import InputError
from sightline.picturebook import volumes
from sightline.picturebook.scene import SPLITS
from sightline.picturebook.volumes import VOLUME_CLASSES, sample_volume

TISSUE, ORGAN, VESSEL, LESION = range(len(VOLUME_CLASSES))
SAMPLED = [sample_volume("train", index) for index in range(40)]


def test_the_same_number_gives_the_same_volume_in_another_process() -> None:
    code = (
        "import zlib; from sightline.picturebook.volumes import sample_volume; made = sample_volume('test', 4); "
        "print(zlib.crc32(made.voxels.tobytes() + made.labels.tobytes()))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    made = sample_volume("test", 4)
    assert int(there) == zlib.crc32(made.voxels.tobytes() + made.labels.tobytes())


def test_splits_and_numbers_share_no_volume() -> None:
    made = [sample_volume(split, index, size=16).labels.tobytes() for split in SPLITS for index in range(20)]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("size", [16, 32, 50])
def test_shapes_and_classes(size: int) -> None:
    made = sample_volume("validation", 1, size=size)
    assert (made.voxels.shape, made.voxels.dtype) == ((size,) * 3, np.float32)
    assert (made.labels.shape, made.labels.dtype) == ((size,) * 3, np.uint8)
    assert set(np.unique(made.labels)) == set(range(len(VOLUME_CLASSES)))


def test_every_volume_has_all_classes_and_values_about_a_unit_range() -> None:
    for made in SAMPLED:
        assert len(np.unique(made.labels)) == len(VOLUME_CLASSES)
        assert ((made.voxels > 0) & (made.voxels < 1)).mean() > 0.95
        assert np.abs(made.voxels).max() < 1.6


@pytest.fixture
def ellipsoids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """Centre, radii and voxels of each ellipsoid that is drawn: the organ first, then the lesions."""
    drawn: list[tuple[Any, Any, Any]] = []
    inside = volumes._inside

    def noted(places: Any, centre: Any, radii: Any) -> Any:
        drawn.append((centre, radii, inside(places, centre, radii)))
        return drawn[-1][2]

    monkeypatch.setattr(volumes, "_inside", noted)
    return drawn


def test_lesions_lie_inside_the_organ(ellipsoids: list[tuple[Any, Any, Any]]) -> None:
    numbers = set()
    for index in range(40):
        ellipsoids.clear()
        made = sample_volume("train", index)
        organ, lesions = ellipsoids[0][2], np.any([voxels for _, _, voxels in ellipsoids[1:]], axis=0)
        assert set(np.unique(made.labels[~organ])) <= {TISSUE, VESSEL}
        assert set(np.unique(made.labels[organ])) <= {ORGAN, VESSEL, LESION}
        assert ((made.labels == LESION) == (organ & lesions & (made.labels != VESSEL))).all()
        numbers.add(len(ellipsoids) - 1)
    assert numbers == {1, 2, 3}


def test_a_lesion_that_would_reach_out_is_cut_at_the_organ(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = sample_volume("train", 3)
    inside, organs = volumes._inside, list[Any]()

    def everywhere(places: Any, centre: Any, radii: Any) -> Any:
        organs.append(inside(places, centre, radii))
        return organs[0] if len(organs) == 1 else np.ones_like(organs[0])

    monkeypatch.setattr(volumes, "_inside", everywhere)
    made = sample_volume("train", 3)
    assert ((made.labels == VESSEL) == (drawn.labels == VESSEL)).all()
    assert ((made.labels == LESION) == (organs[0] & (made.labels != VESSEL))).all()


def test_an_ellipsoid_voxel_by_voxel(ellipsoids: list[tuple[Any, Any, Any]]) -> None:
    sample_volume("test", 0, size=16)
    for centre, radii, voxels in ellipsoids:
        for place in itertools.product(range(16), repeat=3):
            away = sum((((place[axis] + 0.5) / 16 - centre[axis]) / radii[axis]) ** 2 for axis in range(3))
            assert voxels[place] == (away < 1)


def test_lesions_are_smaller_than_the_organ_and_one_piece_or_a_few() -> None:
    for made in SAMPLED:
        assert (made.labels == LESION).sum() < 0.4 * (made.labels == ORGAN).sum()
        assert ndimage.label(made.labels == LESION)[1] <= 4  # three, one of them cut by the vessel


def test_the_vessel_runs_through_the_whole_depth() -> None:
    passing = 0
    for made in SAMPLED:
        layers = (made.labels == VESSEL).any(axis=(1, 2))
        assert layers.mean() > 0.5  # its bend may carry it out at a side
        passing += bool(layers.all())
        centres = [np.mean(np.nonzero(layer == VESSEL), axis=1) for layer in made.labels if (layer == VESSEL).any()]
        assert np.abs(np.diff(centres, axis=0)).max() < 2.5  # bent, not torn
    assert passing > 30


def test_a_lesion_is_as_bright_as_the_vessel() -> None:
    means = np.array([[made.voxels[made.labels == label].mean() for label in range(4)] for made in SAMPLED])
    tissue, organ, vessel, lesion = means.mean(axis=0)
    assert abs(lesion - vessel) < 0.03
    assert organ > tissue + 0.2
    assert vessel > organ + 0.3


def test_without_noise_and_drift_the_voxels_are_the_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the difference between two levels is the levels themselves: labels and voxels are aligned."""
    before = sample_volume("test", 2)
    monkeypatch.setattr(volumes, "_LEVELS", np.array([1.25, 2.5, 3.85, 4.85]))
    after = sample_volume("test", 2)
    assert (after.labels == before.labels).all()
    np.testing.assert_allclose(after.voxels - before.voxels, np.array([1, 2, 3, 4])[before.labels], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sample_volume("tset", 0), "unknown split 'tset' .did you mean 'test'"),  # type: ignore[arg-type]
        (lambda: sample_volume("test", -1), "a volume's index must be 0 or more, not -1"),
        (lambda: sample_volume("test", 0, size=15), "a side of 16 to 128, not 15"),
        (lambda: sample_volume("test", 0, size=129), "a side of 16 to 128, not 129"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
