"""Random dropping: any `keep * n` of the n visual tokens stay, drawn at random. A yardstick.

What a method that scores tokens has to be better than. In and out: the n visual tokens of an image, and those of them
that stay, in the order of the prompt. The draw depends on the seed, on n and on which image of its row it is, so that a
batch gives what its rows give alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sightline.methods import in_range, register
from sightline.reduction.token_reducer import ImageTokens, TokenReducer


@register
@dataclass(frozen=True)
class RandomDropping(TokenReducer):
    """Keeps visual tokens drawn at random.

    Args:
        keep: share of each image's visual tokens that is kept, in (0, 1]; at least one token.
        positions: as in `TokenReducer`.
        seed: of the draw, a whole number from 0.
    """

    paper: ClassVar[str] = "random_dropping"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "seed", 0, 2**31 - 1, whole=True)

    def scores(self, image: ImageTokens) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + image.index)
        ranks = torch.randperm(len(image.features), generator=generator)
        return ranks.to(image.features.device, torch.float32)
