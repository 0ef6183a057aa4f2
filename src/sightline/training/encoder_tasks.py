"""What encoders are trained on: small tasks that need no download, each as arrays in memory.

| task | input | answer |
| --- | --- | --- |
| picturebook | a picture with one object | its kind (24) |
| digits | scikit-learn's handwritten digits, enlarged | the digit (10) |
| cells | a microscope picture | the class of every pixel (5) |
| coins | a crop of scikit-image's photograph of coins | coin or table, for every pixel (2) |
| volumes | a scanner's volume | the class of every voxel (4) |
| clips | eight frames in which an object acts | the action (8) |
| bouncing | frames of an object that flies and bounces | the next frames |

scikit-learn and scikit-image come with the extra `train`. The photograph of coins has no labels of its own: its answer
is the segmentation by a marker-based watershed on the gradient, the textbook treatment of this very photograph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from sightline.errors import InputError, unknown
from sightline.picturebook.cells import CELL_CLASSES, sample_cells
from sightline.picturebook.clips import ACTIONS, Actor, Clip, Sighting, bouncing_clip, draw_clip, sample_clip
from sightline.picturebook.scene import COLOURS, KINDS, SCENE_TYPES, SPLITS, Split, random_stream
from sightline.picturebook.volumes import VOLUME_CLASSES, sample_volume

if TYPE_CHECKING:
    from numpy.typing import NDArray

Answer = Literal["class", "masks", "frames"]


@dataclass(frozen=True)
class Examples:
    """Inputs and answers of one split."""

    pixels: Tensor
    """float32 in [-1, 1], as the encoder takes them: [n, C, H, W], [n, T, C, H, W] or [n, C, D, H, W]"""
    targets: Tensor
    """int64 [n], or [n, H, W] or [n, D, H, W]; for frames 0"""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: of the command line.
        inputs: which encoders can learn it.
        answer: a class, masks, or the next frames.
        classes: names of the answers.
        size: the usual side of an input.
        in_chans: channels of an input.
        make: what `examples` calls.
    """

    name: str
    inputs: str
    answer: Answer
    classes: tuple[str, ...]
    size: int
    in_chans: int
    make: Callable[[Split, int, int], Examples]

    def examples(self, split: Split, n: int, size: int) -> Examples:
        """The first `n` examples of a split, or as many as there are (of the digits 1000, 300 and 497).

        Raises:
            InputError: an unknown split, fewer examples than one, or a size that the task does not have.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if n < 1:
            raise InputError(f"the number of examples must be 1 or more, not {n}")
        return self.make(split, n, size)


def task(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: for an unknown one, with the nearest.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def _scaled(pixels: NDArray[Any]) -> Tensor:
    """uint8 with channels last -> float32 in [-1, 1] with channels before height and width."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3))).float() / 127.5 - 1


def _picturebook(split: Split, n: int, size: int) -> Examples:
    """Objects of all colours, in all splits: it is the kind that has to be told."""
    pixels = np.empty((n, size, size, 3), dtype=np.uint8)
    labels = np.empty(n, dtype=np.int64)
    for index in range(n):
        rng = random_stream("one object", split, index)
        half = float(rng.uniform(0.2, 0.32))
        x, y = (float(value) for value in rng.uniform(half, 1 - half, size=2))
        labels[index] = int(rng.integers(len(KINDS)))
        kind, colour = KINDS[labels[index]], COLOURS[int(rng.integers(len(COLOURS)))]
        actor = Actor(kind, colour, bool(rng.random() < 0.5), (Sighting(x, y, half),))
        name = list(SCENE_TYPES)[int(rng.integers(len(SCENE_TYPES)))]
        pixels[index] = draw_clip(Clip(name, (actor,), None, int(rng.integers(2**31))), size)[0]
    return Examples(_scaled(pixels), torch.from_numpy(labels))


def _digits(split: Split, n: int, size: int) -> Examples:
    bunch = _extra("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))
    parts = {"train": order[:1000], "validation": order[1000:1300]}
    chosen = parts.get(split, order[1300:])[:n]  # no digit is held out: `held_out` is `test`
    images = torch.from_numpy(bunch.images[chosen]).float()[:, None] / 8 - 1  # levels 0 to 16
    enlarged = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return Examples(enlarged.repeat(1, 3, 1, 1), torch.from_numpy(bunch.target[chosen]).long())


def _cells(split: Split, n: int, size: int) -> Examples:
    found = [sample_cells(split, index, size=size) for index in range(n)]
    labels = torch.from_numpy(np.stack([one.labels for one in found])).long()
    return Examples(_scaled(np.stack([one.pixels for one in found])), labels)


def _volumes(split: Split, n: int, size: int) -> Examples:
    found = [sample_volume(split, index, size=size) for index in range(n)]
    voxels = torch.from_numpy(np.stack([one.voxels for one in found]))[:, None] * 2 - 1
    return Examples(voxels, torch.from_numpy(np.stack([one.labels for one in found])).long())


@lru_cache(maxsize=1)
def coins() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The photograph [H, W] and which of its pixels belong to coins, by a watershed on its gradient whose markers are
    the surely dark and the surely bright pixels."""
    image = _extra("skimage.data").coins()
    markers = np.zeros(image.shape, dtype=np.int64)
    markers[image < 30] = 1
    markers[image > 150] = 2
    flooded = _extra("skimage.segmentation").watershed(_extra("skimage.filters").sobel(image), markers)
    filled = _extra("scipy.ndimage").binary_fill_holes(flooded == 2)
    return image, filled.astype(np.int64)


def _coins(split: Split, n: int, size: int) -> Examples:
    """Crops of the left two thirds for training, of the right third for the other splits, so that none is shared."""
    image, mask = coins()
    border = 2 * image.shape[1] // 3
    low, high = (0, border) if split == "train" else (border, image.shape[1])
    if size > min(image.shape[0], high - low):
        raise InputError(f"a crop of the coins has a side of at most {min(image.shape[0], high - low)}, not {size}")
    pixels, labels = [], []
    for index in range(n):
        rng = random_stream("coins", split, index)
        top, left = int(rng.integers(image.shape[0] - size + 1)), int(rng.integers(low, high - size + 1))
        window = np.s_[top : top + size, left : left + size]
        pixels.append(np.repeat(image[window][..., None], 3, axis=-1))
        labels.append(mask[window])
    return Examples(_scaled(np.stack(pixels)), torch.from_numpy(np.stack(labels)))


def _clips(split: Split, n: int, size: int) -> Examples:
    found = [sample_clip(split, index) for index in range(n)]
    labels = torch.tensor([clip.label for clip in found])
    return Examples(_scaled(np.stack([draw_clip(clip, size) for clip in found])), labels)


BOUNCING_FRAMES = 24
"""Frames of a training clip; longer ones are drawn for long rollouts."""


def bouncing(split: Split, n: int, size: int, frames: int = BOUNCING_FRAMES) -> Examples:
    """Clips of one flying object."""
    drawn = np.stack([draw_clip(bouncing_clip(split, index, frames=frames), size) for index in range(n)])
    return Examples(_scaled(drawn), torch.zeros(n, dtype=torch.long))


TASKS: dict[str, Task] = {
    one.name: one
    for one in (
        Task("picturebook", "pictures", "class", KINDS, 32, 3, _picturebook),
        Task("digits", "pictures", "class", tuple("0123456789"), 32, 3, _digits),
        Task("cells", "pictures", "masks", CELL_CLASSES, 64, 3, _cells),
        Task("coins", "pictures", "masks", ("table", "coin"), 64, 3, _coins),
        Task("volumes", "volumes", "masks", VOLUME_CLASSES, 32, 1, _volumes),
        Task("clips", "clips", "class", ACTIONS, 32, 3, _clips),
        Task("bouncing", "clips", "frames", (), 32, 3, bouncing),
    )
}


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"this task needs {module.partition('.')[0]}; install it with: pip install 'sightline[train]'"
        ) from error
