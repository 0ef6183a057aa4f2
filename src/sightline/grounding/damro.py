"""DAMRO: contrast with what the outlier tokens alone say (Gong et al., EMNLP 2024, arXiv:2410.04514).

The [CLS] token of the vision tower looks hard at a few patches, often background, and the decoder follows it. The
branch sees a picture of these tokens only, and what it says is taken off.

In: the [CLS] row a of the tower's attention in the layer whose output the connector reads, next-token logits l [V] of
the prompt, and l- [V] of the same prompt with k visual tokens. Out: logits [V].

    a  = softmax(q_cls K^T / sqrt(d)),   patches only;   the branch has the k patches with the largest a
    C  = { w : l_w >= log(beta) + max l }
    l' = (1 + alpha) l - alpha l-   on C,   -inf elsewhere

The paper writes one softmax and does not say what becomes of the heads. `head_mode="mean"` (the default) averages the
heads' maps, as the official code (coder-gx/DAMRO, `transformers-4.43.0`) does for InstructBLIP; "flat" takes the full
width as a single head with d = heads * width, as that code does for LLaVA, and is more peaked.

The k features stand in raster order, and positions close up, so the branch is a prompt of k visual tokens. The official
code has them in descending order of attention, which the decoder's positions tell apart, and for LLaVA-NeXT takes the k
of every tile before the padding is cut away. Here, too, each tile gives its k (of what the packing leaves of it), and
of the newline tokens only the last of each image stays, as there. For InternVL a token has the sum over its four
patches. The official code samples straight from l'; here temperature, top-k and top-p come after.

With a method that drops visual tokens, the branch has those of the k that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from sightline.errors import unknown
from sightline.grounding.contrastive_decoding import ContrastiveDecoding, contrasted
from sightline.methods import in_range, register
from sightline.models.anatomy import ClsAttention
from sightline.models.call import Stream

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy, TowerReading
    from sightline.models.call import Call


@register
@dataclass(frozen=True)
class Damro(ContrastiveDecoding):
    """Contrasts the answer with that to a picture of which only the tokens are left that [CLS] attends to most.

    Args:
        alpha: weight of the contrast, in [0, 100]; 0 is the stock model (without the restriction to plausible tokens
            too). 2 is the official default for LLaVA; 0.5 (yes/no) and 1.5 (captions) for InstructBLIP.
        k: tokens of each picture that the branch sees, 1 or more; all where a picture has no more. The official code
            has 10 for LLaVA's 576, 4 for InstructBLIP.
        beta: share of the likeliest token's probability that a token needs, in [0, 1]; 0 lets all tokens through.
        head_mode: `mean` over the tower's heads, or `flat`, one head of the full width.
    """

    paper: ClassVar[str] = "damro"
    needs_cls: ClassVar[bool] = True
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("alpha", (0.1, 0.25, 0.5, 1.0, 1.5, 2.0))

    alpha: float = 2.0
    k: int = 10
    beta: float = 0.1
    head_mode: Literal["mean", "flat"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "alpha", 0, 100)
        in_range(self, "k", 1, 1_000_000, whole=True)
        in_range(self, "beta", 0, 1)
        if self.head_mode not in ("mean", "flat"):
            raise unknown("head_mode of damro", str(self.head_mode), ["mean", "flat"])

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0

    def identity(self) -> Self:
        return replace(self, alpha=0.0)

    @property
    def _reading(self) -> str:
        return "cls" if self.head_mode == "mean" else "cls, one head"

    def readings(self, anatomy: Anatomy) -> dict[str, TowerReading]:
        layer = anatomy.connected_layer
        if layer is None:
            return {}
        return {self._reading: ClsAttention(anatomy.tower_attentions[layer], split=self.head_mode == "mean")}

    def branches(self, call: Call) -> Sequence[Stream]:
        anatomy, row = call.boundary.anatomy, call.encoded.readings[self._reading]
        # Scored by its picture's number, each token says which picture (tile) it comes from.
        numbers = torch.arange(len(row), dtype=row.dtype, device=row.device)[:, None].expand_as(row)
        images = zip(anatomy.on_tokens(row, call.inputs), anatomy.on_tokens(numbers, call.inputs), strict=True)
        return (Stream(self, visible=torch.cat([self._outliers(scores, pictures) for scores, pictures in images])),)

    def _outliers(self, scores: Tensor, pictures: Tensor) -> Tensor:
        """bool [n]: the k highest scores of each picture among the n tokens of an image, and a closing newline."""
        patches = scores != -math.inf
        visible = torch.zeros_like(patches)
        for picture in pictures[patches].unique():
            places = (pictures == picture).nonzero()[:, 0]
            visible[places[scores[places].topk(min(self.k, len(places))).indices]] = True
        if bool(visible[patches].all()):
            return torch.ones_like(visible)
        visible[(~patches).nonzero()[-1:, 0]] = True
        return visible

    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        return contrasted(logits, own, branches[0], self.alpha, self.beta)
