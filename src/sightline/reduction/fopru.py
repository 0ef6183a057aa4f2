"""FoPru: the vision tower's own self-attention says which patches matter (2024, arXiv:2411.14164).

In: the attention A [N, N] among the N patches in the tower layer whose output the connector reads, averaged over the
heads, without the row and the column of [CLS] where there is one. Out: the visual tokens that stay, in raster order.

    received_j = sum_i A[i, j]     given_i = sum_j A[i, j]
    s = received if var(received) >= var(given) else given, image by image     (profile `auto`)

    rank: the max(1, floor(rho N)) tokens with the highest s
    row:  the max(1, floor(rho h)) rows of the h x w raster with the highest sums of s, whole

The paper averages where this adds up; the order is the same, and so is the choice of the profile. As the rows of a
softmax sum to 1, `given` is 1 minus the attention that a patch pays to [CLS]: nearly constant, and exactly so in a
tower without [CLS], so that `auto` takes `received` in practice. rho is the field `keep`.

There is no official code. The paper works on the tower's output, before a connector that maps token by token, which is
the same as after it. For connectors that make one token of a square of patches, the token's significance is the sum of
theirs. The rows of all pictures (tiles) of an image compete for one budget; images whose tiles are packed into one
raster with newline tokens (LLaVA-NeXT, LLaVA-OneVision) have no whole rows, and newlines go first in `rank`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from sightline.errors import InputError, unknown
from sightline.methods import register
from sightline.models.anatomy import GivenAttention, ReceivedAttention, TowerReading
from sightline.reduction.token_reducer import ImageTokens, TokenReducer

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy

STRATEGIES = ("rank", "row")
PROFILES = ("auto", "received", "given")


class RasterRow(TowerReading):
    """The raster row that a patch is in, counted through all pictures of the batch."""

    def row(self, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
        pictures, patches = len(hidden_states), hidden_states.shape[1] - self.leading
        side = math.isqrt(patches)
        rows = torch.arange(pictures * side, device=hidden_states.device, dtype=torch.float64)
        return rows.repeat_interleave(side).reshape(pictures, patches)


@register
@dataclass(frozen=True)
class FoPru(TokenReducer):
    """Keeps the visual tokens, or the rows of them, that the vision tower's patches attend to most.

    Args:
        keep: the paper's rho, in (0, 1]; of tokens under `rank`, of rows under `row`; rounded down, at least one.
        positions: as in `TokenReducer`.
        strategy: `rank`, single tokens, or `row`, whole rows.
        profile: the attention that a token `received`, or that it has `given`, or, `auto`, whichever varies more.
    """

    paper: ClassVar[str] = "fopru"

    strategy: Literal["rank", "row"] = "rank"
    profile: Literal["auto", "received", "given"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in STRATEGIES:
            raise unknown("strategy of fopru", str(self.strategy), STRATEGIES)
        if self.profile not in PROFILES:
            raise unknown("profile of fopru", str(self.profile), PROFILES)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        self.readings(anatomy)
        if self.profile == "given" and anatomy.leading_tokens == 0:
            raise InputError(
                f"profile given of fopru tells patches apart by what they do not give to [CLS], which {anatomy.family} "
                "with this tower lacks; use profile received"
            )
        if self.strategy == "row" and not anatomy.rasters:
            raise InputError(
                f"strategy row of fopru keeps whole rows of a raster, which the packed tiles of {anatomy.family} are "
                "not; use strategy rank"
            )

    def readings(self, anatomy: Anatomy) -> dict[str, TowerReading]:
        readings: dict[str, TowerReading] = {}
        if self.profile != "given":
            readings["received"] = anatomy.reading(ReceivedAttention, self.paper)
        if self.profile != "received":
            readings["given"] = anatomy.reading(GivenAttention, self.paper)
        if self.strategy == "row":
            readings["raster row"] = anatomy.reading(RasterRow, self.paper)
        return readings

    def scores(self, image: ImageTokens) -> Tensor:
        """The significance of each token, float32 [n]."""
        if self.profile != "auto":
            return image.readings[self.profile]
        received, given = image.readings["received"], image.readings["given"]
        patches = received.isfinite()
        received_varies, given_varies = received[patches].var(correction=0), given[patches].var(correction=0)
        return received if received_varies >= given_varies else given

    def budget(self, tokens: int) -> int:
        return max(1, math.floor(self.keep * tokens + 1e-9))  # 0.29 of 100 are 29, in floating point too

    def reduce(self, image: ImageTokens) -> tuple[Tensor, Tensor | None]:
        if self.strategy == "rank":
            return super().reduce(image)
        # Where a token is a square of patches, sums of their row numbers still grow from row to row.
        rows, row_of = image.readings["raster row"].unique(return_inverse=True)
        scores = self.scores(image)
        sums = scores.new_zeros(len(rows)).index_add(0, row_of, scores)
        return torch.isin(row_of, sums.topk(self.budget(len(rows))).indices), None
