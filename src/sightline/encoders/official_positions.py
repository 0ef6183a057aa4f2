"""Position tables of official checkpoints, resized to the grid that an encoder was made for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sightline.encoders.layers import resized_positions

if TYPE_CHECKING:
    from torch import Tensor


def with_positions(state: dict[str, Tensor], key: str, grid: tuple[int, int], *, extra: int) -> dict[str, Tensor]:
    """A state dict whose position table fits `grid`.

    Args:
        state: of an official checkpoint, whose grid is a square.
        key: of the table [1, extra + rows * columns, D] in it.
        grid: the wanted (rows, columns).
        extra: entries before those of the patches.

    Returns:
        The state dict with the table resized; as it was where there is no such table, or none of a square grid.
    """
    table = state.get(key)
    if table is None or table.ndim != 3:
        return state
    side = math.isqrt(max(0, table.shape[1] - extra))
    if side * side + extra != table.shape[1] or side == 0:
        return state
    return state | {key: resized_positions(table, (side, side), grid, extra=extra)}
