"""PAI: pay more attention to the image (Liu et al., ECCV 2024, arXiv:2407.21771). A peer, to compare papers with.

In: the attention logits z [heads, keys] of the position whose next token is asked for, and next-token log-probabilities
c of the prompt and u of the prompt without its picture. Out: the logits of all visual keys raised, and

    z_j := z_j + alpha |z_j|                     for every visual key j, in layers 2 to 31 of 32
    out  = gamma c + (1 - gamma) u               where c >= log(0.1) + max c,   -inf elsewhere

Negative logits move towards 0 and positive ones away from it, so all of them rise. Only the last query's row changes:
keys and values of the positions before it are the stock model's. The branch without the picture is not boosted.

The official code (LALBJ/PAI, `attention.py` and `CFG.py`) is followed. It sets the flag that spares the guiding branch
before the prompt is read and clears it after the first guided step, so that with guidance the answer's first token is
not boosted (`boost_prefill="auto"`): an answer of one token shows the guidance alone. One thing is not followed: where
guidance is asked for with gamma = 1, that flag is never cleared and nothing is boosted at all; here gamma = 1 is the
boost without guidance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from sightline.grounding.attention_steering import GuidedBoost
from sightline.methods import register

if TYPE_CHECKING:
    from sightline.models.call import Call


@register
@dataclass(frozen=True)
class PAI(GuidedBoost):
    """Raises the attention to all visual tokens alike, and guides away from the answer without the picture.

    Args:
        alpha: strength of the boost, in [0, 10]; 0 with gamma = 1 is the stock model. Published runs on LLaVA-1.5 use
            0.5, the commands of the official code 0.2.
        layers: the layers to steer (0-based); None for the paper's, all but the first two of 32, scaled to the depth.
        gamma: strength of the guidance, in [1, 10]; 1 is none. The official commands use 1.1, its command line's own
            default is 2.
        boost_prefill: `always`, `never`, or `auto` (as released: only without guidance) boost the first token.
    """

    paper: ClassVar[str] = "pai"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("alpha", (0.1, 0.2, 0.3, 0.5, 0.7, 1.0))

    def identity(self) -> Self:
        return replace(self, alpha=0.0, gamma=1.0)

    def boosts(self, call: Call) -> Tensor:
        features = call.encoded.features
        return torch.full((len(features),), self.alpha, device=features.device)
