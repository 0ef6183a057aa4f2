"""RITUAL: a second, randomly transformed look at the picture votes too (Woo et al. 2024, arXiv:2405.17821).

In: next-token logits l [V] of the prompt and l+ [V] of the same prompt with the picture transformed. Out: logits [V].

    C  = { w : l_w >= log(beta) + max l }               (plausible under the original picture)
    l' = l + alpha * l+   on C,   -inf elsewhere

One of six transformations, with random parameters, is drawn for each prompt. l' is a sum, so its temperature is
1 / (1 + alpha) of the model's; `normalise` divides it out (greedy decoding does not change). As in the official code
(sangminwoo/RITUAL, `ritual_sample.py`) the sum comes before temperature, top-k and top-p. It differs in this: pictures
are transformed after the model's own resizing, at the size the tower sees, and an image that the model cuts into tiles
has every tile transformed in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.errors import unknown
from sightline.grounding.contrastive_decoding import PictureView, joined
from sightline.methods import in_range, register

Transformation = Callable[[Tensor], Tensor]
LUMA = (0.299, 0.587, 0.114)


@register
@dataclass(frozen=True)
class Ritual(PictureView):
    """Adds the logits of a randomly transformed view of the picture.

    Args:
        seed: of the choice of transformations.
        alpha: weight of the transformed view's logits, in [0, 100]; 0 is the stock model (without the restriction to
            plausible tokens too).
        beta: share of the likeliest token's probability that a token needs, in [0, 1]; 0 lets all tokens through.
        normalise: divide by 1 + alpha, which takes out the lower temperature of a sum.
        transform: `random`, or always the same one of `TRANSFORMATIONS`.
    """

    paper: ClassVar[str] = "ritual"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("alpha", (0.25, 0.5, 1.0, 2.0, 3.0, 5.0))

    alpha: float = 3.0
    beta: float = 0.1
    normalise: bool = False
    transform: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "alpha", 0, 100)
        in_range(self, "beta", 0, 1)
        if self.transform not in ("random", *TRANSFORMATIONS):
            raise unknown("transform of ritual", self.transform, ["random", *TRANSFORMATIONS])

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0

    def identity(self) -> Self:
        return replace(self, alpha=0.0)

    def view(self, pictures: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        names = list(TRANSFORMATIONS)
        drawn = names[int(torch.randint(len(names), (), generator=generator))]
        chosen = TRANSFORMATIONS[drawn if self.transform == "random" else self.transform](generator)
        return [chosen(picture) for picture in pictures]

    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        return joined(logits, own, branches[0], self.alpha, self.beta, normalise=self.normalise)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def horizontal_flip(generator: torch.Generator) -> Transformation:
    """Left and right change places."""
    return lambda picture: picture.flip(-1)


def vertical_flip(generator: torch.Generator) -> Transformation:
    """Top and bottom change places."""
    return lambda picture: picture.flip(-2)


def rotation(generator: torch.Generator) -> Transformation:
    """By an angle uniform in +-180 degrees about the centre, nearest pixel, black where nothing was."""
    angle = math.radians(_uniform(generator, -180, 180))
    cos, sin = math.cos(angle), math.sin(angle)

    def rotate(picture: Tensor) -> Tensor:
        height, width = picture.shape[-2:]
        # affine_grid's axes run from -1 to 1 over unequal sides; the ratio makes it a rotation of pixels.
        turn = torch.tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
        grid = F.affine_grid(turn[None], [1, 3, height, width], align_corners=False).to(picture)
        return F.grid_sample(picture[None], grid, mode="nearest", padding_mode="zeros", align_corners=False)[0]

    return rotate


def colour_jitter(generator: torch.Generator) -> Transformation:
    """Brightness, contrast and saturation by factors uniform in [0, 2], hue by a turn uniform in +-0.5, in random
    order."""
    brightness, contrast, saturation = (_uniform(generator, 0, 2) for _ in range(3))
    hue = _uniform(generator, -0.5, 0.5)

    def blend(picture: Tensor, other: Tensor, factor: float) -> Tensor:
        return (factor * picture + (1 - factor) * other).clamp(0, 1)

    steps: list[Transformation] = [
        lambda picture: blend(picture, torch.zeros_like(picture), brightness),
        lambda picture: blend(picture, grey(picture).mean().expand_as(picture), contrast),
        lambda picture: blend(picture, grey(picture).expand_as(picture), saturation),
        lambda picture: turn_hue(picture, hue),
    ]
    order: list[int] = torch.randperm(4, generator=generator).tolist()

    def jitter(picture: Tensor) -> Tensor:
        for step in order:
            picture = steps[step](picture)
        return picture

    return jitter


def gaussian_blur(generator: torch.Generator) -> Transformation:
    """With a kernel of 13 pixels and a deviation uniform in [1.5, 2] pixels, edges reflected."""
    sigma = _uniform(generator, 1.5, 2.0)
    offsets = torch.arange(13) - 6.0
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()

    def blur(picture: Tensor) -> Tensor:
        weights = kernel.to(picture).expand(3, 1, 1, -1)
        padded = F.pad(picture[None], (6, 6, 6, 6), mode="reflect")
        return F.conv2d(F.conv2d(padded, weights, groups=3), weights.transpose(-1, -2), groups=3)[0]

    return blur


def random_resized_crop(generator: torch.Generator) -> Transformation:
    """A part of 8 to 100 % of the area with sides in a ratio of 3/4 to 4/3, stretched over the whole (bilinear)."""
    sizes = [
        (_uniform(generator, 0.08, 1), math.exp(_uniform(generator, math.log(3 / 4), math.log(4 / 3))))
        for _ in range(10)
    ]
    down, across = _uniform(generator, 0, 1), _uniform(generator, 0, 1)

    def crop(picture: Tensor) -> Tensor:
        height, width = picture.shape[-2:]
        high, wide = _first_that_fits(sizes, height, width)
        top, left = int(down * (height - high + 1)), int(across * (width - wide + 1))
        part = picture[:, top : top + high, left : left + wide]
        return F.interpolate(part[None], size=(height, width), mode="bilinear")[0]

    return crop


def _first_that_fits(sizes: list[tuple[float, float]], height: int, width: int) -> tuple[int, int]:
    """Height and width of the first part (share of the area, ratio of width to height) that lies within the picture; if
    none does, of the largest part of a ratio that is allowed."""
    for share, ratio in sizes:
        area = share * height * width
        high, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < high <= height and 0 < wide <= width:
            return high, wide
    return min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))


TRANSFORMATIONS: dict[str, Callable[[torch.Generator], Transformation]] = {
    "horizontal_flip": horizontal_flip,
    "vertical_flip": vertical_flip,
    "rotation": rotation,
    "colour_jitter": colour_jitter,
    "gaussian_blur": gaussian_blur,
    "random_resized_crop": random_resized_crop,
}
"""The six of the paper. Each draws its parameters from a generator and gives a function of pictures [3, H, W] in
[0, 1]."""


def grey(picture: Tensor) -> Tensor:
    """Luma of an RGB picture: [3, H, W] -> [1, H, W]."""
    return (picture * torch.tensor(LUMA).to(picture)[:, None, None]).sum(dim=0, keepdim=True)


def turn_hue(picture: Tensor, turn: float) -> Tensor:
    """Every pixel's hue turned by a share of the colour circle, value and saturation unchanged. [3, H, W] in [0, 1]."""
    value, low = picture.max(dim=0).values, picture.min(dim=0).values
    spread = value - low
    red, green, blue = picture
    safe = torch.where(spread == 0, 1.0, spread)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue / 6 + turn
    channels = []
    for offset in (
        5,
        3,
        1,
    ):  # red, green, blue: value - spread * clamp(min(k, 4 - k), 0, 1), k = (offset + 6 hue) mod 6
        k = (offset + 6 * hue) % 6
        channels.append(value - spread * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels)
