"""PAINT: fix imbalanced attention to visual tokens (2025, arXiv:2501.12206; Paying Attention to INformed Tokens).

In: the vision tower's attention while it encodes a picture of N patches, and the decoder's attention logits z [heads,
keys] at the position whose next token is asked for. Out: the logits of two sets of visual keys raised.

    u, v    = attention of [CLS] to the patches in the tower's first layer, and in the layer that the connector reads
    a       = attention that a patch receives from all patches in the first layer
    local   = floor(local_ratio N) largest u,      spatial = floor(spatial_ratio N) largest a
    S       = { j : v_j > Q3 + 1.5 (Q3 - Q1) }     summary tokens, outliers of v (quartiles over the picture)
    T       = (local u spatial) \\ S
    z_j    := z_j + alpha |z_j|  for j in T,       z_j + beta |z_j|  for j in S,       layers 2 to 31 of 32
    out     = gamma c + (1 - gamma) u'             where c >= log(0.1) + max c,   -inf elsewhere

with log-probabilities c of the prompt and u' of the prompt without its picture, which is not boosted. An image that the
model cuts into tiles is one picture of all their patches; newline tokens are none. Where a visual token merges several
patches (InternVL) it has the sum of theirs.

The official code (hasanar1f/llava-hallunication-fix, `modPAI`) is followed, with these differences. Its spatial score
sums rows of a softmax, which are all 1, and may pick [CLS]; columns over patches are meant and are summed here. Its
first token under guidance is not boosted, which `boost_prefill="auto"` keeps (see `GuidedBoost`). The paper also scales
the boost by how visual a head is, which the code does not: `head_modulation="none"`. The other two settings are a
reconstruction: s_h is the attention that head h pays to all visual tokens at the prompt's last position, and
`proportional` multiplies the head's alpha and beta by s_h / max s, `topk` boosts only the heads with the largest s_h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from sightline.errors import unknown
from sightline.grounding.attention_steering import GuidedBoost
from sightline.methods import in_range, register
from sightline.models.anatomy import ClsAttention, ReceivedAttention

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy, TowerReading
    from sightline.models.call import Call

MODULATIONS = ("none", "proportional", "topk")


@register
@dataclass(frozen=True)
class Paint(GuidedBoost):
    """Raises the attention to local visual tokens strongly and to summary tokens weakly, and to no others.

    Args:
        alpha: strength on local tokens, in [0, 10]. 0.7 in the paper's tables; there 0.5 does little and 0.8 breaks the
            captions. 0 with beta = 0 and gamma = 1 is the stock model.
        layers: the layers to steer (0-based); None for the paper's, all but the first two of 32, scaled to the depth.
        gamma: strength of the guidance away from the answer without the picture, in [1, 10]; 1 is none.
        boost_prefill: `always`, `never`, or `auto` (as released: only without guidance) boost the first token.
        beta: strength on summary tokens, in [0, 10]; 0.4 in the paper's tables.
        local_ratio: share of a picture's tokens that are local, in [0, 1].
        spatial_ratio: share that joins them for the attention they receive from other patches, in [0, 1]; 0.05 in the
            paper's variant.
        head_modulation: `none` (the released code), `proportional` or `topk`.
        heads_ratio: share of a layer's heads that `topk` boosts, in (0, 1]; at least one head is.
    """

    paper: ClassVar[str] = "imbalanced_attention"
    needs_cls: ClassVar[bool] = True
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("alpha", (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9))

    alpha: float = 0.7
    beta: float = 0.4
    local_ratio: float = 0.25
    spatial_ratio: float = 0.0
    head_modulation: Literal["none", "proportional", "topk"] = "none"
    heads_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "beta", 0, 10)
        in_range(self, "local_ratio", 0, 1)
        in_range(self, "spatial_ratio", 0, 1)
        in_range(self, "heads_ratio", 0, 1, low_open=True)
        if self.head_modulation not in MODULATIONS:
            raise unknown(f"head_modulation of {self.paper}", str(self.head_modulation), MODULATIONS)

    @property
    def boosted(self) -> bool:
        return (self.alpha > 0 or self.beta > 0) and self.layers != ()

    def identity(self) -> Self:
        return replace(self, alpha=0.0, beta=0.0, gamma=1.0)

    def readings(self, anatomy: Anatomy) -> dict[str, TowerReading]:
        if not self.boosted:
            return {}
        first = anatomy.tower_attentions[0]
        readings: dict[str, TowerReading] = {**super().readings(anatomy), "cls of the first layer": ClsAttention(first)}
        if self.spatial_ratio > 0:
            readings["received in the first layer"] = ReceivedAttention(first)
        return readings

    def boosts(self, call: Call) -> Tensor:
        anatomy, readings = call.boundary.anatomy, call.encoded.readings
        first, late = (anatomy.on_tokens(readings[name], call.inputs) for name in ("cls of the first layer", "cls"))
        received = first  # not looked at unless asked for
        if self.spatial_ratio > 0:
            received = anatomy.on_tokens(readings["received in the first layer"], call.inputs)
        return torch.cat([self.factors(*image) for image in zip(first, received, late, strict=True)])

    def factors(self, first: Tensor, received: Tensor, late: Tensor) -> Tensor:
        """The factor of each visual token of one image, float32 [tokens].

        Args:
            first: attention of [CLS] in the first layer, -inf for tokens that show no patch.
            received: attention received in the first layer, the same.
            late: attention of [CLS] in the layer that the connector reads, the same.
        """
        summary = outliers(late)
        local = largest(first, self.local_ratio) | largest(received, self.spatial_ratio)
        factors = torch.zeros_like(first)
        factors[local] = self.alpha
        factors[summary] = self.beta
        return factors

    def weighs_heads(self) -> bool:
        return self.head_modulation != "none"

    def head_weights(self, attention: Tensor) -> Tensor:
        if self.head_modulation == "proportional":
            return attention / attention.amax(dim=-1, keepdim=True).clamp_min(1e-12)
        most = max(1, math.floor(self.heads_ratio * attention.shape[-1] + 1e-9))
        return torch.zeros_like(attention).scatter(-1, attention.topk(most, dim=-1).indices, 1.0)


def largest(scores: Tensor, share: float) -> Tensor:
    """bool [tokens]: the `share` (rounded down) of the finite scores that are the largest; of equal ones the first."""
    count = math.floor(share * int(scores.isfinite().sum()) + 1e-9)  # 0.29 of 100 are 29, in floating point too
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def outliers(scores: Tensor) -> Tensor:
    """bool [tokens]: scores above the third quartile by more than 1.5 times the distance of the quartiles, both taken
    over the finite scores."""
    low, high = scores[scores.isfinite()].quantile(torch.tensor([0.25, 0.75]).to(scores))
    return scores > high + 1.5 * (high - low)
