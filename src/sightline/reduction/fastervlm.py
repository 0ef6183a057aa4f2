"""FasterVLM: [CLS] attention ranks the visual tokens (Zhang et al. 2024, arXiv:2412.01818).

In: the vision tower's attention in the layer whose output the connector reads, [pictures, heads, 1 + n, 1 + n]. Out:
the T = keep * n patches that the [CLS] query attends to most, in raster order.

    s_j = mean over heads of softmax(q_cls K^T / sqrt(d))_j,   patches only, not renormalised (the rank is the same)

Only the one query's row is computed, in float32, from the layer's input, so the tower may run with any attention
kernel. The choice depends on the picture alone, never on the question. Positions are numbered anew over the shortened
prompt, as in the official code (Theia-4869/FasterVLM, `clip_encoder.py`, `llava_arch.py`).

For LLaVA-NeXT the official code takes the same T from each tile and from the base picture and drops the newline tokens.
Here an image's tiles compete for its budget together, each with the [CLS] attention of its own pass; newline tokens
score lowest and so go first. For InternVL a visual token is scored by the sum over the four patches that pixel shuffle
makes it from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sightline.methods import register
from sightline.reduction.token_reducer import ImageTokens, TokenReducer

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class FasterVLM(TokenReducer):
    """Keeps the visual tokens that the vision tower's [CLS] token attends to most.

    The paper's budgets for LLaVA-1.5 are 288, 144, 58 and 29 of 576 tokens: `keep` 0.5, 0.25, 0.1, 0.05.
    """

    paper: ClassVar[str] = "fastervlm"
    needs_cls: ClassVar[bool] = True

    def scores(self, image: ImageTokens) -> Tensor:
        return image.cls
