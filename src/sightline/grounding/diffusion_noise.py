"""The forward process of a diffusion model, by which methods make a picture unreadable."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 1000


def signal_share(step: int) -> float:
    """The product of 1 - beta over steps 0 to `step`: the share of the picture's variance that is left.

    beta runs along a sigmoid from 1e-5 to 5e-3 in 1000 steps, so that even after the last of them 8 % are left.
    """
    ramp = torch.sigmoid(torch.linspace(-6, 6, STEPS, dtype=torch.float64))
    betas = ramp * (0.5e-2 - 1e-5) + 1e-5
    return float((1 - betas[: step + 1]).prod())


def diffused(picture: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """A picture, normalised as the tower sees it, after noise of `step` (0 to 999) has been added."""
    share = signal_share(step)
    noise = torch.randn(picture.shape, generator=generator).to(picture.device)
    return (picture.float() * share**0.5 + noise * (1 - share) ** 0.5).to(picture.dtype)
