"""Grid dropping: `keep * n` of the n visual tokens stay, spread evenly over the picture. A yardstick.

What a method that scores tokens has to be better than, and stronger than chance where what is asked about may be
anywhere. In and out: the visual tokens of an image on their raster of h x w, and K of them, in raster order.

K tokens are spread over about sqrt(K h / w) rows at even distances, as many to one as to the next (give or take one),
and at even distances within a row. Of an image whose tokens are no single raster (tiles), every n/K-th stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sightline.methods import register
from sightline.reduction.token_reducer import ImageTokens, TokenReducer


@register
@dataclass(frozen=True)
class GridDropping(TokenReducer):
    """Keeps visual tokens at even distances.

    Args:
        keep: share of each image's visual tokens that is kept, in (0, 1]; at least one token.
        positions: as in `TokenReducer`.
    """

    paper: ClassVar[str] = "grid_dropping"

    def reduce(self, image: ImageTokens) -> tuple[Tensor, Tensor | None]:
        n = len(image.features)
        rows, columns = image.grid or (1, n)
        places = spread(self.budget(n), rows, columns)
        keep = torch.zeros(n, dtype=torch.bool)
        keep[places] = True
        return keep.to(image.features.device), None


def even(count: int, length: int) -> list[int]:
    """`count` of the places 0 .. length - 1, at even distances from each other and half of that from the ends.

    >>> even(3, 10)
    [1, 5, 8]
    """
    return [(2 * place + 1) * length // (2 * count) for place in range(count)]


def spread(count: int, rows: int, columns: int) -> list[int]:
    """`count` places of a raster, spread evenly.

    >>> spread(4, 4, 4)
    [5, 7, 13, 15]
    """
    least = math.ceil(count / columns)  # rows that hold so many at all
    used = min(rows, max(least, round(math.sqrt(count * rows / columns))))
    shares = [count * (row + 1) // used - count * row // used for row in range(used)]
    return [
        row * columns + column
        for row, share in zip(even(used, rows), shares, strict=True)
        for column in even(share, columns)
    ]
