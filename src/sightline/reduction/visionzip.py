"""VisionZip: keep what [CLS] looks at, and averages of the rest (Yang et al., CVPR 2025, arXiv:2412.04467).

A yardstick for the papers of the list. In: the attention of [CLS] to the patches and each patch's key averaged over the
heads, of the tower layer whose output the connector reads; the connector's output [n, D]. Out, of each image: K = keep
* n tokens.

    dominant:    the K - C tokens with the highest [CLS] attention, as they are
    contextual:  of the others, in raster order, C targets at an even step; each of the rest goes to the target whose
                 key is most similar (cosine), and a target becomes the mean of itself and of what went to it

In a tower without [CLS] the attention that a patch receives from all others takes the place of [CLS]'s, as in the
paper. C is the share `contextual` of K; the paper's budgets for LLaVA-1.5 (54 + 10, 108 + 20, 162 + 30) have 10 of 64.

The official code (dvlab-research/VisionZip, `visionzip/utils.py`, `clip_encoder.py`) merges before the connector; here
it is after it, so that every family's connector works, which for connectors that are not linear is not quite the same.
It also *adds* the mean of what went to a target to the target, some twice the length of a token; the paper's text
averages, and so does this. It counts [CLS] among the dominant tokens, which here is no visual token, and puts
contextual tokens last; here they stay at their target's place. For an image cut into tiles, the tiles compete for its
budget together, and newline tokens go first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sightline.methods import in_range, register
from sightline.models.anatomy import MeanKeys, ReceivedAttention
from sightline.reduction.token_reducer import ImageTokens, TokenReducer

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy, TowerReading


@register
@dataclass(frozen=True)
class VisionZip(TokenReducer):
    """Keeps the visual tokens that [CLS] attends to most, and averages of similar ones among the rest.

    Args:
        keep: share of each image's visual tokens that are left, of both kinds together, in (0, 1].
        positions: as in `TokenReducer`.
        contextual: share of the tokens that are left that are averages, in [0, 1].
    """

    paper: ClassVar[str] = "visionzip"

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "contextual", 0, 1)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        self.readings(anatomy)

    def readings(self, anatomy: Anatomy) -> dict[str, TowerReading]:
        keys = anatomy.reading(MeanKeys, self.paper)
        if anatomy.cls is not None:
            return {"keys": keys, "cls": anatomy.cls}
        return {"keys": keys, "received": anatomy.reading(ReceivedAttention, self.paper)}

    def scores(self, image: ImageTokens) -> Tensor:
        return image.readings["cls" if "cls" in image.readings else "received"]

    def reduce(self, image: ImageTokens) -> tuple[Tensor, Tensor | None]:
        scores = self.scores(image)
        patches = scores.isfinite()
        budget = self.budget(len(scores))
        left = min(budget, int(patches.sum()))  # the rest of the budget goes to newlines
        contextual = min(round(self.contextual * left), left)
        dominant = torch.zeros_like(patches)
        dominant[scores.argsort(descending=True, stable=True)[: left - contextual]] = True
        others = (patches & ~dominant).nonzero()[:, 0]
        targets = others[:: max(1, len(others) // max(1, contextual))][:contextual]
        features = zipped(image.features, image.readings["keys"], others, targets)
        keep = dominant.index_fill(0, targets, True)
        keep[(~patches).nonzero()[: budget - left, 0]] = True
        return keep, features[keep]


def zipped(features: Tensor, keys: Tensor, others: Tensor, targets: Tensor) -> Tensor:
    """[n, D] with each target replaced by the mean of itself and of those of `others` whose keys [n, d] are more
    similar to its key than to any other target's."""
    if len(targets) == 0:
        return features
    unit = functional.normalize(keys.float(), dim=-1)
    group = (unit[others] @ unit[targets].T).argmax(dim=-1)
    group[(others[:, None] == targets).any(dim=1)] = torch.arange(len(targets), device=group.device)
    members = torch.zeros(len(targets), len(others), device=group.device).scatter(0, group[None], 1.0)
    means = members / members.sum(dim=1, keepdim=True) @ features[others].float()
    return features.index_copy(0, targets, means.to(features.dtype))
