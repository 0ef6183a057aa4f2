"""The kind of method that lets fewer visual tokens into the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.methods import Method, in_range, methods
from sightline.models.call import Reduced

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.call import Call, Encoded


@dataclass(frozen=True)
class ImageTokens:
    """What a paper may score or merge the visual tokens of one image by."""

    features: Tensor
    """[n, D]: the connector's output, in the order of the prompt."""
    index: int = 0
    """The image's number in its row."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of the raster that the tokens are, if they are one."""
    readings: dict[str, Tensor] = field(default_factory=dict)
    """What `Method.readings` asked for, [n] or [n, d], mostly float32. A token that is no patch (a newline) has -inf,
    or zeros for a vector."""

    @property
    def cls(self) -> Tensor:
        """float32 [n]: the attention that the tower's [CLS] token pays the tokens, for methods with `needs_cls`."""
        return self.readings["cls"]


@dataclass(frozen=True)
class TokenReducer(Method):
    """Keeps the share `keep` of every image's visual tokens, those with the highest scores, in their order; the paper's
    file writes `scores`, or `reduce` where tokens are merged.

    The others are gone before the first decoder layer: prefill, cache and decoding all shrink.

    Args:
        keep: share of each image's visual tokens that is kept, in (0, 1]; at least one token. 1 is the stock model.
        positions: `compact` numbers the shortened prompt anew, as if the dropped tokens had never been; `kept` leaves
            the positions of the survivors as they were, which equals masking the dropped ones (but for layers that
            slide: their windows count what is left). Multi-axis positions (Qwen-VL) are always kept.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"which visual tokens reach the decoder"})
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("keep", (0.05, 0.1, 0.2, 0.35, 0.5, 0.75))

    own_readings: ClassVar[tuple[str, ...]] = ()
    """Names of what the method itself reads off the tower (`Boundary.add_reading`), beside `readings`."""

    keep: float = 0.25
    positions: Literal["compact", "kept"] = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "keep", 0, 1, low_open=True)
        if self.positions not in ("compact", "kept"):
            raise InputError(f"positions of {self.paper} must be 'compact' or 'kept', not {self.positions!r}")

    @property
    def is_identity(self) -> bool:
        return self.keep == 1

    def identity(self) -> Self:
        return replace(self, keep=1.0)

    def check(self, anatomy: Anatomy) -> None:
        try:
            super().check(anatomy)
        except InputError as error:
            others = [name for name, kind in methods().items() if issubclass(kind, TokenReducer) and not kind.needs_cls]
            raise InputError(f"{error}; of the methods that drop visual tokens {', '.join(others)} need none") from None

    def scores(self, image: ImageTokens) -> Tensor:
        """A score for each visual token of one image, [n]; the highest are kept."""
        raise NotImplementedError(f"{type(self).__name__} writes neither scores nor reduce")

    def reduce(self, image: ImageTokens) -> tuple[Tensor, Tensor | None]:
        """What is left of one image: bool [n], the places that stay, and [K, D], what stands there if it is not what
        was there. By default the places with the highest scores, as they were."""
        scores = self.scores(image)
        best = scores.topk(self.budget(len(scores))).indices
        return torch.zeros(len(scores), dtype=torch.bool, device=scores.device).index_fill(0, best, True), None

    def budget(self, tokens: int) -> int:
        """How many of an image's tokens are kept."""
        return max(1, round(self.keep * tokens))

    def reduced(self, call: Call, encoded: Encoded) -> Reduced:
        anatomy = call.boundary.anatomy
        inputs = {**encoded.inputs, "input_ids": call.inputs["input_ids"]}
        names = (*self.readings(anatomy), *self.own_readings)
        read = {name: anatomy.on_tokens(encoded.readings[name], inputs) for name in names}
        grids = anatomy.grids(inputs)
        ranges = [image for row in call.images for image in row]
        numbers = [number for row in call.images for number in range(len(row))]
        left = []
        for index, (first, last) in enumerate(ranges):
            readings = {name: images[index] for name, images in read.items()}
            left.append(self.reduce(ImageTokens(encoded.features[first:last], numbers[index], grids[index], readings)))
        keep = torch.cat([stays for stays, _ in left])
        if all(features is None for _, features in left):
            return Reduced(keep)
        parts = [
            encoded.features[first:last][stays] if features is None else features
            for (first, last), (stays, features) in zip(ranges, left, strict=True)
        ]
        return Reduced(keep, torch.cat(parts))
