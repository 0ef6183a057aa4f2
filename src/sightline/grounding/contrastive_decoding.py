"""The kind of method that decodes from several views of the same prompt at once."""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.methods import Method
from sightline.models.call import Stream

if TYPE_CHECKING:
    from sightline.models.call import Call, Encoded


@dataclass(frozen=True)
class ContrastiveDecoding(Method):
    """Combines the next-token logits of the prompt with those of other views of it; the paper's file writes the
    `branches` and how to `combine` the logits.

    A branch rides in the same forward as extra rows and is fed the tokens that the main rows generate. Its prompt is
    read once; methods that ask for the same branch (`NO_PICTURE`) share it. Interventions inside the model act on the
    main rows only.
    """

    needs_picture: ClassVar[bool] = True

    @abstractmethod
    def branches(self, call: Call) -> Sequence[Stream]:
        """The other views of the prompt, asked for when the prompt is read (without a cache at every step)."""

    @abstractmethod
    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        """The new next-token logits, all [B, vocabulary].

        Args:
            logits: as the methods before this one have left them.
            own: the model's own. Contrasts and plausibility are taken from these, so that the order of contrastive
                methods does not matter.
            branches: those of the branches.
        """

    def streams(self, call: Call) -> Sequence[Stream]:
        streams = self.branches(call)
        call.memory[self, "branches"] = [stream.name for stream in streams]
        return streams

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        own = call.own_logits
        assert own is not None
        names = call.memory[self, "branches"]
        return self.combine(logits, own, [call.branch_logits(name).to(logits.dtype) for name in names])


@dataclass(frozen=True)
class PictureView(ContrastiveDecoding):
    """The kind whose one branch sees the pictures changed; the paper's file writes the `view`.

    Random views are drawn from `seed`, the prompt and the picture alone, so that an answer depends neither on the batch
    it is in nor on torch's global generator.
    """

    normalised: ClassVar[bool] = False
    """Whether `view` gets the pixels as the tower does, and may leave [0, 1]."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self, self.seed)

    @abstractmethod
    def view(self, pictures: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """The other view of one prompt's pictures, each float32 [3, H, W] in [0, 1] (an image that the model cuts into
        tiles comes as its tiles, one after another)."""

    def branches(self, call: Call) -> Sequence[Stream]:
        return (Stream(self, encoded=self._encoded(call)),)

    def _encoded(self, call: Call) -> Encoded:
        """The other view after the tower; encoded once a call, also when there is no cache."""
        if self not in call.memory:
            call.memory[self] = encode_view(call, self.view, seed=self.seed, normalised=self.normalised)
        encoded: Encoded = call.memory[self]
        return encoded


def encode_view(
    call: Call,
    view: Callable[[list[Tensor], torch.Generator], list[Tensor]],
    *,
    seed: int,
    normalised: bool,
) -> Encoded:
    """Encodes `view(pictures, generator)` of each prompt's pictures (see `PictureView`)."""
    anatomy = call.boundary.anatomy
    owners = anatomy.image_indices(call.inputs)  # the encoded row of each image
    pictures: dict[int, list[Tensor]] = {}
    for owner, tiles in zip(owners, anatomy.pictures(call.inputs, normalised=normalised), strict=True):
        pictures.setdefault(owner, []).extend(tiles)
    views = {row: iter(view(seen, _generator(call, row, seen, seed))) for row, seen in pictures.items()}
    return call.boundary.encode_changed(call, lambda picture, image: next(views[owners[image]]), normalised=normalised)


def _generator(call: Call, row: int, pictures: list[Tensor], seed: int) -> torch.Generator:
    """A generator on the CPU whose numbers depend on the seed, the prompt and its pictures."""
    given = torch.cat([torch.tensor([seed]), call.prompt_ids(row * call.beams)]).double()
    words = torch.cat([given, *[picture.mean(dim=(1, 2)).cpu().double() for picture in pictures]])
    # The generator is made from 32 bits, so the seed must be mixed in rather than put above them.
    return torch.Generator().manual_seed(zlib.crc32(words.mul(256).round().long().numpy().tobytes()))


def check_seed(method: Method, seed: int) -> None:
    """Raises `InputError` for a seed that no generator can be made from."""
    if not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise InputError(f"seed of {method.paper} must be a whole number from 0 to {2**32 - 1}, not {seed!r}")


def contrasted(logits: Tensor, own: Tensor, branch: Tensor, alpha: float, beta: float) -> Tensor:
    """logits + alpha (own - branch) where `own` finds tokens plausible, -inf elsewhere; all [B, vocabulary]."""
    return torch.add(logits, own - branch, alpha=alpha).masked_fill(implausible(own, beta), -math.inf)


def joined(logits: Tensor, own: Tensor, branch: Tensor, alpha: float, beta: float, *, normalise: bool) -> Tensor:
    """logits + alpha branch where `own` finds tokens plausible, -inf elsewhere; all [B, vocabulary]. With `normalise`
    the sum is divided by 1 + alpha, so that its temperature is the model's."""
    voted = torch.add(logits, branch, alpha=alpha)
    return (voted / (1 + alpha) if normalise else voted).masked_fill(implausible(own, beta), -math.inf)


def implausible(logits: Tensor, beta: float) -> Tensor:
    """bool [B, vocabulary]: tokens less than `beta` times as probable as the likeliest one (adaptive plausibility)."""
    if beta == 0:
        return torch.zeros_like(logits, dtype=torch.bool)
    return logits < logits.amax(dim=-1, keepdim=True) + math.log(beta)
