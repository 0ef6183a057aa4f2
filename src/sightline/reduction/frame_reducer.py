"""The kind of trained method that reads all pictures of a prompt as the frames of one clip.

Each row's pictures, in the order of the prompt, are T frames: the tower's patches [T, n, C], as the connector reads
them, and the connector's own output [T, n, D]. A method makes K tokens of them, which stand at the first K visual
places of the row; the other places are dropped before the decoder's first layer. Text between the pictures stays where
it is. Each row is reduced by itself, so that clips of a batch may differ in length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.methods import Method
from sightline.models.call import Reduced
from sightline.reduction.trained_reducer import TOWER, TrainedReducer, connector_input

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy, TowerReading
    from sightline.models.call import Call, Encoded


@dataclass(frozen=True)
class Frames:
    """The frames of one row's clip, in their order, and what is asked about them."""

    anatomy: Anatomy
    tower: Tensor
    """[T, n, C]: what the connector reads."""
    features: Tensor
    """[T, n, D]: what the connector makes of it."""
    grid: tuple[int, int]
    """Rows and columns of a frame's patches; n is their product."""
    question: Tensor
    """[L, D]: the decoder's embeddings of the row's question."""
    readings: dict[str, Tensor]
    """What else the method read off the tower, each [T, ...]."""

    def __len__(self) -> int:
        return len(self.tower)

    def connected(self, tower: Tensor) -> Tensor:
        """What the model's own connector makes of other vectors, [..., n, C] -> [..., n, D]."""
        connector = self.anatomy.connector
        assert connector is not None
        projected: Tensor = connector(tower.to(self.tower.dtype))
        return projected


@dataclass(frozen=True)
class FrameReducer(TrainedReducer):
    """Replaces the visual tokens of a clip by fewer; the paper's file writes `tokens`."""

    frames: ClassVar[bool] = True
    changes: ClassVar[frozenset[str]] = frozenset({"which visual tokens reach the decoder"})

    @abstractmethod
    def tokens(self, frames: Frames) -> Tensor:
        """The K tokens of a row's clip, [K, D]; at most as many as the row has visual places."""

    def of_clips(self, clips: Sequence[Frames]) -> list[Tensor]:
        """`tokens` of the clips of a batch's rows, for methods that are faster on several at once."""
        return [self.tokens(frames) for frames in clips]

    @property
    def needs_weights(self) -> bool:
        """Whether the module is used at these settings."""
        return True

    def check(self, anatomy: Anatomy) -> None:
        connector_input(self.paper, anatomy)
        if self.needs_weights:
            super().check(anatomy)
        else:
            Method.check(self, anatomy)

    def readings(self, anatomy: Anatomy) -> dict[str, TowerReading]:
        return {**super().readings(anatomy), TOWER: connector_input(self.paper, anatomy)}

    def reduced(self, call: Call, encoded: Encoded) -> Reduced:
        anatomy, tower = call.boundary.anatomy, encoded.readings[TOWER]
        features = encoded.features.view(*tower.shape[:2], -1)
        grids, names = anatomy.grids(call.inputs), list(self.readings(anatomy))
        keep = torch.zeros(len(encoded.features), dtype=torch.bool, device=features.device)
        clips, places, seen = list[Frames](), list[tuple[int, int]](), 0
        for row, images in enumerate(call.images):
            if not images:
                continue
            pictures = slice(seen, seen + len(images))
            places.append((images[0][0], images[-1][1]))
            seen, grid = pictures.stop, grids[seen]
            assert grid is not None
            text = call.question(row * call.beams)
            readings = {name: encoded.readings[name][pictures] for name in names}
            clips.append(Frames(anatomy, readings.pop(TOWER), features[pictures], grid, text, readings))
        outputs = self.of_clips(clips)
        for tokens, (first, last) in zip(outputs, places, strict=True):
            if len(tokens) > last - first:
                raise InputError(
                    f"{self.paper} makes {len(tokens)} tokens of a clip, but the prompt has {last - first} places for "
                    "them: give more frames, or ask for fewer tokens"
                )
            keep[first : first + len(tokens)] = True
        return Reduced(keep, torch.cat([tokens.to(features.dtype) for tokens in outputs]))


def centred(vectors: Tensor) -> Tensor:
    """What differs between the vectors of frames [T, C]: each less their mean, and all enlarged to the root mean square
    that they had; zeros where frames are equal."""
    changes = vectors - vectors.mean(0)
    size, whole = changes.square().mean().sqrt(), vectors.square().mean().sqrt()
    return changes * (whole / size.clamp(min=1e-4 * whole))  # smaller changes are rounding, which stays small
