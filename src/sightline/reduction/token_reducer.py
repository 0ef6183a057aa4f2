"""The kind of method that lets fewer visual tokens into the decoder."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.methods import Method, in_range

if TYPE_CHECKING:
    from sightline.models.call import Call, Encoded


@dataclass(frozen=True)
class ImageTokens:
    """What a paper may score the visual tokens of one image by."""

    features: Tensor
    """[n, D]: the connector's output, in the order of the prompt."""
    cls: Tensor | None
    """float32 [n]: the attention that the tower's [CLS] token pays them, for methods with `needs_cls`. A token that is
    no patch (a newline) has -inf."""


@dataclass(frozen=True)
class TokenReducer(Method):
    """Keeps the share `keep` of every image's visual tokens, those with the highest scores, in their order; the paper's
    file writes `scores`.

    The others are dropped before the first decoder layer: prefill, cache and decoding all shrink.

    Args:
        keep: share of each image's visual tokens that is kept, in (0, 1]; at least one token. 1 is the stock model.
        positions: `compact` numbers the shortened prompt anew, as if the dropped tokens had never been; `kept` leaves
            the positions of the survivors as they were, which equals masking the dropped ones. Multi-axis positions
            (Qwen-VL) are always kept.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"which visual tokens reach the decoder"})
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("keep", (0.05, 0.1, 0.2, 0.35, 0.5, 0.75))

    keep: float = 0.25
    positions: Literal["compact", "kept"] = "compact"

    def __post_init__(self) -> None:
        in_range(self, "keep", 0, 1, low_open=True)
        if self.positions not in ("compact", "kept"):
            raise InputError(f"positions of {self.paper} must be 'compact' or 'kept', not {self.positions!r}")

    @property
    def is_identity(self) -> bool:
        return self.keep == 1

    def identity(self) -> Self:
        return replace(self, keep=1.0)

    @abstractmethod
    def scores(self, image: ImageTokens) -> Tensor:
        """A score for each visual token of one image, [n]; the highest are kept."""

    def chosen(self, call: Call, encoded: Encoded) -> list[Tensor]:
        """For each image of the encoded batch, bool [n]: which of its visual tokens stay."""
        inputs = {**encoded.inputs, "input_ids": call.inputs["input_ids"]}
        cls = call.boundary.anatomy.cls_scores(encoded.readings["cls"], inputs) if self.needs_cls else None
        ranges = [image for row in call.images for image in row]
        chosen = []
        for index, (first, last) in enumerate(ranges):
            image = ImageTokens(encoded.features[first:last], cls[index] if cls is not None else None)
            scores = self.scores(image)
            best = scores.topk(max(1, round(self.keep * len(scores)))).indices
            chosen.append(torch.zeros(len(scores), dtype=torch.bool, device=scores.device).index_fill(0, best, True))
        return chosen
