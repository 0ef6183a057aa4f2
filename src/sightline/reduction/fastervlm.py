"""FasterVLM: [CLS] attention ranks the visual tokens (Zhang et al. 2024, arXiv:2412.01818).

In: the vision tower's attention in the layer whose output the connector reads, [pictures, heads, 1 + n, 1 + n]. Out:
the T = keep * n patches that the [CLS] query attends to most, in raster order.

    s_j = mean over heads of softmax(q_cls K^T / sqrt(d))_j,   patches only, not renormalised (the rank is the same)

Only the one query's row is computed, in float32, from the layer's input, so the tower may run with any attention
kernel. The choice depends on the picture alone, never on the question. Positions are numbered anew over the shortened
prompt, as in the official code (Theia-4869/FasterVLM, `clip_encoder.py`, `llava_arch.py`).

Its authors' successor VisPruner (Zhang et al., ICCV 2025, arXiv:2412.01818v2) chooses only the share `important_ratio`
of the budget so, and the rest for being unlike each other: what [CLS] passes over is the background, whose tokens are
many and alike. The tokens that are left, in the order of their attention, fall by turns into halves a and b; of a,
those with the most similar one in b (cosine) go, eight at a time, until the budget is met. There tokens are compared
before the connector, here after it.

For LLaVA-NeXT the official code takes the same T from each tile and from the base picture and drops the newline tokens.
Here an image's tiles compete for its budget together, each with the [CLS] attention of its own pass; newline tokens
score lowest and so go first. For InternVL a visual token is scored by the sum over the four patches that pixel shuffle
makes it from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sightline.methods import in_range, register
from sightline.reduction.token_reducer import ImageTokens, TokenReducer

GONE_AT_ONCE = 8
"""Tokens that go between two comparisons, as in VisPruner."""


@register
@dataclass(frozen=True)
class FasterVLM(TokenReducer):
    """Keeps the visual tokens that the vision tower's [CLS] token attends to most.

    Args:
        keep: share of each image's visual tokens that is kept, in (0, 1]. The paper's budgets for LLaVA-1.5 are 288,
            144, 58 and 29 of 576 tokens: 0.5, 0.25, 0.1, 0.05.
        positions: as in `TokenReducer`.
        important_ratio: share of the budget that [CLS] chooses, in [0, 1]: 1 in the paper; below it, the rest is
            chosen for diversity as in VisPruner, whose code takes 0.5.
    """

    paper: ClassVar[str] = "fastervlm"
    needs_cls: ClassVar[bool] = True

    important_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "important_ratio", 0, 1)

    def scores(self, image: ImageTokens) -> Tensor:
        return image.cls

    def reduce(self, image: ImageTokens) -> tuple[Tensor, Tensor | None]:
        budget = self.budget(len(image.features))
        important = int(budget * self.important_ratio)
        if important == budget:
            return super().reduce(image)
        by_attention = image.cls.argsort(descending=True, stable=True)
        rest = by_attention[important:]
        patches = rest[image.cls[rest].isfinite()]
        others = patches[diverse(image.features[patches], budget - important)]
        newlines = rest[len(patches) :][: budget - important - len(others)]  # where there are not enough patches
        chosen = torch.cat([by_attention[:important], others, newlines])
        return torch.zeros_like(image.cls, dtype=torch.bool).index_fill(0, chosen, True), None


def diverse(features: Tensor, budget: int) -> Tensor:
    """Which of the tokens [n, D] are left when one of those most alike goes until `budget` are: ascending indices."""
    unit = functional.normalize(features.detach().float(), dim=-1)
    left = torch.arange(len(unit), device=unit.device)
    while len(left) > budget:
        here, there = left[0::2], left[1::2]
        nearest = (unit[here] @ unit[there].T).amax(dim=1)
        gone = nearest.argsort(descending=True, stable=True)[: min(GONE_AT_ONCE, len(left) - budget)]
        left = left[~torch.isin(left, here[gone])]
    return left
