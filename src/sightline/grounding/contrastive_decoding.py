"""The kind of method that decodes from several views of the same prompt at once."""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.methods import Method
from sightline.models.call import Stream

if TYPE_CHECKING:
    from sightline.models.call import Call, Encoded


@dataclass(frozen=True)
class ContrastiveDecoding(Method):
    """Combines the next-token logits of the prompt with those of another view of it; the paper's file writes the `view`
    and how to `combine` the two.

    The view rides in the same forward as extra rows and is fed the tokens that the main rows generate. Its prompt is
    read once. Random views are drawn from `seed`, the prompt and the picture alone, so that an answer depends neither
    on the batch it is in nor on torch's global generator.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise InputError(f"seed of {self.paper} must be a whole number from 0 to {2**32 - 1}, not {self.seed!r}")

    @abstractmethod
    def view(self, pictures: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """The other view of one prompt's pictures, each float32 [3, H, W] in [0, 1] (an image that the model cuts into
        tiles comes as its tiles, one after another)."""

    @abstractmethod
    def combine(self, logits: Tensor, view: Tensor) -> Tensor:
        """The new next-token logits from those of the prompt and of its other view, all [B, vocabulary]."""

    def streams(self, call: Call) -> Sequence[Stream]:
        return (Stream(self, encoded=self._encoded(call)),)

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        view = call.boundary.anatomy.head_logits(call.stream_hidden(self))
        return self.combine(logits, view.to(logits.dtype))

    def _encoded(self, call: Call) -> Encoded:
        """The other view after the tower; encoded once a call, also when there is no cache."""
        if self not in call.memory:
            call.memory[self] = self._encode(call)
        encoded: Encoded = call.memory[self]
        return encoded

    def _encode(self, call: Call) -> Encoded:
        anatomy = call.boundary.anatomy
        owners = anatomy.image_indices(call.inputs)  # the encoded row of each image
        pictures: dict[int, list[Tensor]] = {}

        def collect(picture: Tensor, image: int) -> Tensor:
            pictures.setdefault(owners[image], []).append(picture)
            return picture

        anatomy.map_pictures(call.inputs, collect)
        views = {row: iter(self.view(seen, self._generator(call, row, seen))) for row, seen in pictures.items()}
        return call.boundary.encode_changed(call, lambda picture, image: next(views[owners[image]]))

    def _generator(self, call: Call, row: int, pictures: list[Tensor]) -> torch.Generator:
        """A generator on the CPU whose numbers depend on the seed, the prompt and its pictures."""
        given = torch.cat([torch.tensor([self.seed]), call.prompt_ids(row * call.beams).cpu()]).double()
        words = torch.cat([given, *[picture.mean(dim=(1, 2)).cpu().double() for picture in pictures]])
        # The generator is made from 32 bits, so the seed must be mixed in rather than put above them.
        return torch.Generator().manual_seed(zlib.crc32(words.mul(256).round().long().numpy().tobytes()))


def implausible(logits: Tensor, beta: float) -> Tensor:
    """bool [B, vocabulary]: tokens less than `beta` times as probable as the likeliest one (adaptive plausibility)."""
    if beta == 0:
        return torch.zeros_like(logits, dtype=torch.bool)
    return logits < logits.amax(dim=-1, keepdim=True) + math.log(beta)
