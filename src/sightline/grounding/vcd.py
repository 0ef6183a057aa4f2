"""VCD: contrast with what is said of a noised picture (Leng et al., CVPR 2024, arXiv:2311.16922).

A peer: not one of the papers that the library set out with, but the yardstick that most of them compare themselves to.

In: next-token logits l [V] of the prompt, and l- [V] of the same prompt with noise over its pictures v, which are
noised as the tower sees them, after normalisation. Out: logits [V].

    v- = sqrt(abar_s) v + sqrt(1 - abar_s) e,   e ~ N(0, 1),   abar_s = prod_{t <= s} (1 - beta_t)
    beta_t = 1e-5 + (5e-3 - 1e-5) sigmoid(-6 + 12 t / 999),    t = 0 ... 999
    C  = { w : l_w >= log(beta) + max l }
    l' = (1 + alpha) l - alpha l-   on C,   -inf elsewhere

As in the official code (DAMO-NLP-SG/VCD, `vcd_utils`) the contrast comes before temperature, top-k and top-p. It draws
the noise from torch's global generator; here it follows from `seed`, the prompt and its pictures. An image that the
model cuts into tiles has noise of its own in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from sightline.grounding.contrastive_decoding import PictureView, contrasted
from sightline.grounding.diffusion_noise import STEPS, diffused
from sightline.methods import in_range, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@register
@dataclass(frozen=True)
class Vcd(PictureView):
    """A peer, there to measure the papers by: contrasts the answer with that to the picture under noise.

    Args:
        seed: of the noise.
        alpha: weight of the contrast, in [0, 100]; 0 is the stock model (without the restriction to plausible tokens
            too). 1 is the default of paper and code.
        beta: share of the likeliest token's probability that a token needs, in [0, 1]; 0 lets all tokens through. 0.1
            is the default of paper and code; the official scripts for POPE have 0.2.
        noise_step: the diffusion step, from 0 (hardly any noise) to 999. At the code's 500 the picture is multiplied by
            0.86 (and the noise by 0.51), at 999 by 0.29.
    """

    paper: ClassVar[str] = "vcd"
    normalised: ClassVar[bool] = True
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("alpha", (0.25, 0.5, 1.0, 1.5, 2.0))

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "alpha", 0, 100)
        in_range(self, "beta", 0, 1)
        in_range(self, "noise_step", 0, STEPS - 1, whole=True)

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0

    def identity(self) -> Self:
        return replace(self, alpha=0.0)

    def view(self, pictures: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        return [diffused(picture, self.noise_step, generator) for picture in pictures]

    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        return contrasted(logits, own, branches[0], self.alpha, self.beta)
