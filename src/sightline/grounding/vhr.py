"""VHR: heads that look at the picture speak louder (He et al., ACL 2025, arXiv:2412.13949).

In: the head outputs A [heads, d] at the prompt's last position, with the picture and without it. Out: the same heads,
those whose output depends on the picture more than the layer's median does multiplied by alpha, from the prompt on.

    VHD_i = || A_i(picture, text) - A_i(text) ||_2                             (vision-aware head divergence)
    VHD_i := 0  where  VHD_i > mean + std  and  ||A_i(text)||^2 > mean + std   (fires because the picture is missing)
    A_i   := alpha * A_i  where  VHD_i > median(VHD)

Layer by layer: both prompts run through the decoder together, and earlier layers are already reinforced, in both, when
a layer's heads are chosen (the paper does not say whether the text prompt is scaled too; scaling both keeps their
difference the picture). The text prompt is the prompt with its visual tokens deleted, its positions closed up.

Why it works: with r = residual + attention output and y the head's part of it, the feed-forward block sees a scale-free
norm of r, and cos(r + (alpha - 1) y, y) >= cos(r, y) for alpha > 1.

No official code could be read; the algorithm box of the paper is followed. The published layers are, for a decoder of
32, the second and the last 14; other depths take the same shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from sightline.grounding.attention_steering import AttentionSteering, last_layers, median
from sightline.methods import in_range, register
from sightline.models.call import Stream


@register
@dataclass(frozen=True)
class VHR(AttentionSteering):
    """Reinforces the vision-aware heads of some decoder layers.

    Args:
        alpha: what their outputs are multiplied by, in [0, 10]. 1 is the stock model; the paper uses 2, and 4 breaks
            its models.
        layers: the layers to steer (0-based); None for the paper's: the second and the last 14 of 32.
        remove_outliers: leave out heads that fire because the picture is missing.
        keep_positions: let the text of the picture-less prompt keep its positions instead of closing up.
    """

    paper: ClassVar[str] = "vhr"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("alpha", (0.5, 1.25, 1.5, 2.0, 2.5, 3.0))

    alpha: float = 2.0
    layers: tuple[int, ...] | None = None
    remove_outliers: bool = True
    keep_positions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "alpha", 0, 10)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))  # a list cannot be hashed

    @property
    def is_identity(self) -> bool:
        return self.alpha == 1 or self.layers == ()

    def identity(self) -> Self:
        return replace(self, alpha=1.0)

    def layers_of(self, depth: int) -> Sequence[int]:
        if self.layers is not None:
            return sorted(set(self.layers))
        return sorted({min(1, depth - 1), *last_layers(depth, 14 / 32)})

    def stream(self) -> Stream:
        return Stream(self, without_picture=True, keep_positions=self.keep_positions, transient=True)

    def divergence(self, full: Tensor, text: Tensor) -> Tensor:
        """VHD with outliers set to zero: [B, heads, d] twice -> float32 [B, heads]."""
        vhd = (full.float() - text.float()).norm(dim=-1)
        if self.remove_outliers:
            firing = text.float().norm(dim=-1).square()
            vhd = torch.where(_is_high(vhd) & _is_high(firing), 0.0, vhd)
        return vhd

    def head_factors(self, full: Tensor, text: Tensor) -> Tensor:
        vhd = self.divergence(full, text)
        return torch.where(vhd > median(vhd), self.alpha, 1.0)


def _is_high(values: Tensor) -> Tensor:
    """Above the layer's mean by more than its standard deviation."""
    return values > values.mean(dim=-1, keepdim=True) + values.std(dim=-1, keepdim=True)
