"""FastV: half of the visual tokens are left after layer 2 (Chen et al., ECCV 2024, arXiv:2403.06764).

In: the attention of decoder layer K - 1 (counted from 0) at the prompt's last token, over the V visual tokens of the
prompt. Out: the keep * V visual tokens that it attends to most; the layers from K on read no others.

    s_j = mean over heads of softmax(q_last K^T / sqrt(d))_j        in layer K - 1
    kept = the round(keep V) largest s_j                            in layers K, K + 1, ...

Layers 0 to K - 1 read the whole prompt, so their caches are whole; those of the later layers hold text and survivors
only. Positions stay as they were: the keys carry them already. The official code (pkunlp-icler/FastV) knows prompts of
one picture; here the pictures of a row compete for its budget together. Its pruning ratio R is 1 - keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from sightline.methods import in_range, register
from sightline.models.narrowing import Chosen, LayerInput
from sightline.reduction.layer_reducer import LayerReducer

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.models.call import Call


@register
@dataclass(frozen=True)
class FastV(LayerReducer):
    """Keeps the visual tokens that the prompt's last token attends to most, from decoder layer `layer` on.

    Args:
        keep: share of a prompt's visual tokens that is kept, in (0, 1]; at least one. 0.5 in the paper; 1 is the stock
            model.
        layer: K, the first layer that reads the survivors alone, counted from 0, in [1, 1000]; 2 in the paper.
    """

    paper: ClassVar[str] = "fastv"
    watches: ClassVar[bool] = True
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("keep", (0.05, 0.1, 0.2, 0.35, 0.5, 0.75))

    keep: float = 0.5
    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "keep", 0, 1, low_open=True)
        in_range(self, "layer", 1, 1000, whole=True)

    @property
    def is_identity(self) -> bool:
        return self.keep == 1

    def identity(self) -> Self:
        return replace(self, keep=1.0)

    def layers(self, depth: int) -> Sequence[int]:
        return (self.layer,)

    def choose(self, call: Call, here: LayerInput) -> Chosen:
        assert here.attention is not None
        return Chosen(most_attended(here.attention, here.columns.visual, self.keep))


def most_attended(attention: Tensor, visual: Tensor, keep: float) -> Tensor:
    """bool [R, K]: in each row the `keep` share (at least one, rounded to the nearest) of the visual columns with the
    highest attention, the first of equal ones."""
    budget = (visual.sum(dim=1).double() * keep).round().clamp(min=1)
    order = attention.masked_fill(~visual, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return visual & (rank < budget[:, None])
