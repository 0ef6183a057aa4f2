"""The tasks that encoders are trained on: shapes, ranges and answers, and that train and test share nothing."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from sightline.errors import InputError
from sightline.picturebook.cells import sample_cells
from sightline.picturebook.clips import draw_clip, sample_clip
from sightline.picturebook.scene import KINDS, SPLITS
from sightline.picturebook.volumes import sample_volume
from sightline.training import encoder_tasks
from sightline.training.encoder_tasks import BOUNCING_FRAMES, TASKS, Examples, bouncing, coins, task

N = 5
SHAPES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "picturebook": lambda side: (N, 3, side, side),
    "digits": lambda side: (N, 3, side, side),
    "cells": lambda side: (N, 3, side, side),
    "coins": lambda side: (N, 3, side, side),
    "volumes": lambda side: (N, 1, side, side, side),
    "clips": lambda side: (N, 8, 3, side, side),
    "bouncing": lambda side: (N, BOUNCING_FRAMES, 3, side, side),
}


def levels(examples: Examples) -> np.ndarray:
    """The levels from 0 to 255 that pictures were scaled from."""
    scaled = (examples.pixels + 1) * 127.5
    torch.testing.assert_close(scaled, scaled.round(), atol=1e-4, rtol=0)
    return scaled.round().to(torch.uint8).numpy()


def test_all_tasks_are_here() -> None:
    assert set(TASKS) == set(SHAPES)
    assert all(task(name).name == name for name in TASKS)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("larger", [False, True])
def test_shapes_and_ranges(name: str, larger: bool) -> None:
    wanted = TASKS[name]
    side = wanted.size + 16 * larger
    found = wanted.examples("validation", N, side)
    shape = SHAPES[name](side)
    assert found.pixels.shape == shape
    assert found.pixels.dtype == torch.float32
    assert found.pixels.abs().max() <= (1.6 if name == "volumes" else 1 + 1e-6)
    assert found.pixels.std() > 0.1
    assert shape[1 if wanted.inputs != "clips" else 2] == wanted.in_chans
    assert found.targets.dtype == torch.int64
    assert found.targets.min() >= 0
    if wanted.answer == "masks":
        assert found.targets.shape == (N, *shape[2:])
        assert found.targets.unique().tolist() == list(range(len(wanted.classes)))
    else:
        assert found.targets.shape == (N,)
        assert found.targets.max() < max(1, len(wanted.classes))


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_the_same_each_time_and_the_first_ones_of_more(name: str) -> None:
    few, more = TASKS[name].examples("train", 2, 32), TASKS[name].examples("train", 4, 32)
    assert torch.equal(few.pixels, more.pixels[:2])
    assert torch.equal(few.targets, more.targets[:2])
    assert not torch.equal(more.pixels[:2], more.pixels[2:])


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_example(name: str) -> None:
    splits = SPLITS[:3] if name == "digits" else SPLITS
    made = [one.numpy().tobytes() for split in splits for one in TASKS[name].examples(split, N, 32).pixels]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize(("name", "pinned"), [("picturebook", 0x6FF90B84), ("coins", 0xEB090387)])
def test_pixels_are_pinned(name: str, pinned: int) -> None:
    found = TASKS[name].examples("test" if name == "picturebook" else "train", 3, TASKS[name].size)
    assert zlib.crc32(levels(found).tobytes()) == pinned


@pytest.mark.parametrize(("name", "count"), [("picturebook", 1000), ("clips", 400), ("digits", 1000)])
def test_classes_occur_about_equally_often(name: str, count: int) -> None:
    wanted = TASKS[name]
    counts = torch.bincount(wanted.examples("train", count, 32).targets, minlength=len(wanted.classes))
    even = count / len(wanted.classes)
    assert (counts - even).abs().max() < 4 * even**0.5  # four standard deviations of a count


def test_a_picture_shows_one_object_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    def noted(clip: Any, size: int) -> np.ndarray:
        shown.append(clip)
        return draw_clip(clip, size)

    monkeypatch.setattr(encoder_tasks, "draw_clip", noted)
    found = TASKS["picturebook"].examples("train", 50, 32)
    for clip, label in zip(shown, found.targets.tolist(), strict=True):
        (actor,) = clip.actors
        (seen,) = actor.path
        assert actor.kind == KINDS[label]
        assert seen is not None
        assert seen.half <= min(seen.x, seen.y) <= max(seen.x, seen.y) <= 1 - seen.half
    assert len({clip.actors[0].colour for clip in shown}) == 8


def test_cells_clips_and_volumes_are_those_of_the_generators() -> None:
    cells = TASKS["cells"].examples("test", 2, 64)
    made = sample_cells("test", 1)
    assert (levels(cells)[1] == made.pixels.transpose(2, 0, 1)).all()
    assert (cells.targets[1].numpy() == made.labels).all()
    clips = TASKS["clips"].examples("test", 2, 32)
    assert (levels(clips)[1] == draw_clip(sample_clip("test", 1)).transpose(0, 3, 1, 2)).all()
    assert clips.targets[1] == sample_clip("test", 1).label
    volumes = TASKS["volumes"].examples("test", 2, 32)
    scan = sample_volume("test", 1)
    np.testing.assert_allclose(volumes.pixels[1, 0].numpy(), 2 * scan.voxels - 1, atol=1e-6)
    assert (volumes.targets[1].numpy() == scan.labels).all()


def test_the_digits_are_dealt_out_once() -> None:
    parts = [TASKS["digits"].examples(split, 5000, 8) for split in ("train", "validation", "test")]
    assert [len(part.pixels) for part in parts] == [len(part.targets) for part in parts] == [1000, 300, 497]
    bunch = importlib.import_module("sklearn.datasets").load_digits()
    # At their own size of 8 x 8 they are as they come, with levels from 0 to 16.
    own = {(image.astype(int).tobytes(), int(label)) for image, label in zip(bunch.images, bunch.target, strict=True)}
    dealt = [
        ((8 * (picture[0] + 1)).round().long().numpy().tobytes(), int(label))
        for part in parts
        for picture, label in zip(part.pixels, part.targets, strict=True)
    ]
    assert len(set(dealt)) == len(dealt) == 1797
    assert set(dealt) == own
    enlarged = TASKS["digits"].examples("test", 3, 32).pixels
    assert torch.equal(enlarged[:, 0], enlarged[:, 2])
    torch.testing.assert_close(enlarged.mean(dim=(-1, -2)), parts[2].pixels[:3].mean(dim=(-1, -2)), atol=1e-5, rtol=0)


def test_coins_for_training_and_for_testing_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a photograph whose labels are the columns."""
    columns = np.broadcast_to(np.arange(384), (303, 384))
    photograph = (columns // 2).astype(np.uint8)
    monkeypatch.setattr(encoder_tasks, "coins", lambda: (photograph, columns))
    seen = {split: TASKS["coins"].examples(split, 300, 64).targets.unique().tolist() for split in SPLITS}
    for split, columns_seen in seen.items():
        low, high = (0, 256) if split == "train" else (256, 384)
        assert low <= columns_seen[0] <= low + 5
        assert high - 5 <= columns_seen[-1] + 1 <= high
    crops = TASKS["coins"].examples("train", 10, 64)
    assert (levels(crops)[:, 0] == crops.targets.numpy() // 2).all()
    assert TASKS["coins"].examples("train", 1, 256).targets.unique().tolist() == list(range(256))
    with pytest.raises(InputError, match="a side of at most 128, not 129"):
        TASKS["coins"].examples("test", 1, 129)
    with pytest.raises(InputError, match="a side of at most 256, not 257"):
        TASKS["coins"].examples("train", 1, 257)


def test_the_photograph_has_24_coins() -> None:
    photograph, mask = coins()
    assert photograph.shape == mask.shape == (303, 384)
    pieces, count = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())[1:]
    assert (sizes > 1000).sum() == 24
    assert sizes[sizes <= 1000].sum() < 20  # specks
    assert photograph[mask == 1].mean() > photograph[mask == 0].mean() + 80
    crops = TASKS["coins"].examples("train", 100, 64)
    share = crops.targets.float().mean()
    assert 0.2 < share < 0.5
    assert torch.equal(crops.pixels[:, 0], crops.pixels[:, 1])
    assert count >= 24


def test_bouncing_clips_as_long_as_asked() -> None:
    found = bouncing("test", 2, 32, frames=100)
    assert found.pixels.shape == (2, 100, 3, 32, 32)
    change = (found.pixels[:, 1:] - found.pixels[:, :-1]).abs().amax(dim=(2, 3, 4))
    # Beyond the noise; where it is thrown straight back, an object can be where it was a frame ago.
    assert (change > 0.3).float().mean() > 0.95


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise ImportError(module)

    coins.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"needs sklearn; install it with: pip install 'sightline\[train\]'"):
        TASKS["digits"].examples("test", 1, 32)
    with pytest.raises(InputError, match="needs skimage"):
        TASKS["coins"].examples("test", 1, 32)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: task("digitts"),
            "unknown task 'digitts' .did you mean 'digits'[^;]*; known: bouncing, cells, clips, coins",
        ),
        (lambda: TASKS["clips"].examples("test", 0, 32), "number of examples must be 1 or more, not 0"),
        (lambda: TASKS["picturebook"].examples("test", 1, 31), "from 32 to 1024 pixels, not 31"),
        (lambda: TASKS["volumes"].examples("test", 1, 8), "a side of 16 to 128, not 8"),
        *((lambda n=name: TASKS[n].examples("tset", 1, 32), "unknown split 'tset'") for name in TASKS),  # type: ignore[misc]
    ],
)
def test_bad_input_is_refused_in_a_sentence(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
