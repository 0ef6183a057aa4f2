"""Ways to walk over a grid of tokens, and wrappers that run a sequence mixer along several of them.

An *order* is a permutation: entry t of `scan_order(grid, kind)` is the raster index of the token that stands at place t
of the sequence, `inverse_order` says at which place each raster index stands. The kinds on a grid of rows and columns:

    raster, column             row after row, column after column
    snake_rows, snake_columns  the same, every second row (column) walked backwards, so that neighbours stay adjacent
    ..._reversed               each of the four from its end to its start
    mirror_left_right, mirror_up_down, rotate_180
                               row after row of the mirrored grid; rotate_180 is raster_reversed by another name

*Cross scan* (VMamba, arXiv:2401.10166): a map [B, E, H, W] becomes four sequences [B, 4, E, L], L = HW, along raster,
column and their reverses; *cross merge* puts each back on the map and adds the four. *Chained routes* (MSVMamba,
arXiv:2405.14174): several routes one after the other in a single sequence [B, E, R L].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor, nn

from sightline.errors import InputError, unknown
from sightline.mixers.mixer import Mixer

Combine = Literal["mean", "sum", "concat", "project"]
COMBINATIONS: tuple[Combine, ...] = ("mean", "sum", "concat", "project")


def _snake(index: Tensor) -> Tensor:
    walked = index.clone()
    walked[1::2] = walked[1::2].flip(-1)
    return walked


_ANY_GRID: dict[str, Callable[[Tensor], Tensor]] = {
    "raster": lambda index: index,
    "raster_reversed": lambda index: index.flatten().flip(0),
}
_TWO_AXES: dict[str, Callable[[Tensor], Tensor]] = {
    "column": lambda index: index.mT,
    "column_reversed": lambda index: index.mT.flatten().flip(0),
    "snake_rows": _snake,
    "snake_rows_reversed": lambda index: _snake(index).flatten().flip(0),
    "snake_columns": lambda index: _snake(index.mT),
    "snake_columns_reversed": lambda index: _snake(index.mT).flatten().flip(0),
    "mirror_left_right": lambda index: index.flip(1),
    "mirror_up_down": lambda index: index.flip(0),
    "rotate_180": lambda index: index.flip(0, 1),
}
ORDERS: tuple[str, ...] = (*_ANY_GRID, *_TWO_AXES)
"""All kinds. Grids of one axis, or of three, have the first two."""


def scan_order(grid: Sequence[int], kind: str, device: torch.device | str | None = None) -> Tensor:
    """Raster index of the token at each place of the sequence: [L], L the product of the grid.

    The tensor is kept for the next call with the same grid and device, so it must not be changed in place.

    Args:
        grid: (rows, columns); one axis or more than two for `raster` and `raster_reversed`.
        kind: one of `ORDERS`.
        device: where the answer lies; None for the CPU.

    Raises:
        InputError: an unknown kind, or one that the grid has not.
    """
    return _orders(tuple(grid), kind, torch.device(device or "cpu"))[0]


def inverse_order(grid: Sequence[int], kind: str, device: torch.device | str | None = None) -> Tensor:
    """Place in the sequence of each raster index: [L]; `sequence[:, inverse]` is in raster order again."""
    return _orders(tuple(grid), kind, torch.device(device or "cpu"))[1]


@lru_cache(maxsize=512)
def _orders(grid: tuple[int, ...], kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    walk = _ANY_GRID.get(kind) or _TWO_AXES.get(kind)
    if walk is None:
        raise unknown("scan order", kind, ORDERS)
    if not grid or any(side < 1 for side in grid):
        raise InputError(f"a grid has one or more sides of 1 or more tokens, not {grid}")
    if kind in _TWO_AXES and len(grid) != 2:
        raise InputError(f"the scan order {kind!r} needs a grid of rows and columns, not one of {len(grid)} axes")
    # What is kept must outlive the caller: a tensor made in inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        order = walk(torch.arange(math.prod(grid), device="cpu").reshape(grid)).reshape(-1).contiguous()
        return order.to(device), order.argsort().to(device)


def sequence_grid(grid: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The grid that tokens in this order form row after row: (columns, rows) where columns are walked."""
    return (grid[1], grid[0]) if "column" in kind else grid


def along(mix: Callable[[Tensor], Tensor], x: Tensor, grid: Sequence[int], kind: str) -> Tensor:
    """A function of sequences [B, L, D], run along an order: the tokens re-ordered before it and put back after it."""
    if kind == "raster":
        return mix(x)
    walked = mix(x.index_select(1, scan_order(grid, kind, x.device)))
    return walked.index_select(1, inverse_order(grid, kind, x.device))


def bidirectional(
    forwards: Callable[[Tensor], Tensor],
    x: Tensor,
    backwards: Callable[[Tensor], Tensor] | None = None,
    combine: Literal["mean", "sum", "concat"] = "mean",
) -> Tensor:
    """A function of sequences [B, L, D], run from both ends; `backwards` is another one for the way back."""
    answers = [forwards(x), (backwards or forwards)(x.flip(1)).flip(1)]
    return join(answers, combine)


def join(answers: Sequence[Tensor], combine: str) -> Tensor:
    """Mean, sum or concatenation (over the width) of what the routes gave."""
    if combine not in COMBINATIONS:
        raise unknown("way to combine routes", combine, COMBINATIONS)
    if combine in ("concat", "project"):
        return torch.cat(list(answers), dim=-1)
    total = sum(answers[1:], start=answers[0])
    return total / len(answers) if combine == "mean" else total


class Routes(Mixer):
    """Runs sequence mixers along several orders and combines what they give, token by token.

    Args:
        mixers: one mixer that serves all orders (shared weights), or one for each.
        orders: kinds of `ORDERS`.
        combine: `mean`, `sum`, `concat` (the widths add up) or `project` (concatenated, then a linear map to `width`).
        width: D, for `project`.
        inner: width that each mixer gives, for `project`; None for D.
    """

    def __init__(
        self,
        mixers: Mixer | Sequence[Mixer],
        orders: Sequence[str],
        *,
        combine: Combine = "mean",
        width: int | None = None,
        inner: int | None = None,
    ) -> None:
        super().__init__()
        given = [mixers] if isinstance(mixers, Mixer) else list(mixers)
        if not orders or len(given) not in (1, len(orders)):
            raise InputError(f"{len(given)} mixers cannot serve {len(orders)} orders; give one, or one for each order")
        for kind in orders:
            if kind not in ORDERS:
                raise unknown("scan order", kind, ORDERS)
        if combine not in COMBINATIONS:
            raise unknown("way to combine routes", combine, COMBINATIONS)
        self.mixers, self.orders, self.combine = nn.ModuleList(given), tuple(orders), combine
        if combine == "project":
            if width is None:
                raise InputError("routes that are projected need the width to project to")
            self.proj = nn.Linear((inner or width) * len(orders), width)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        check_grid(x, grid)
        answers = []
        for index, kind in enumerate(self.orders):
            mixer = self.mixers[index if len(self.mixers) > 1 else 0]
            mix = partial(mixer, grid=sequence_grid(grid, kind))
            answers.append(along(mix, x, grid, kind))
        joined = join(answers, self.combine)
        return self.proj(joined) if self.combine == "project" else joined

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...]) -> int:
        return 0  # each mixer counts its own


class Bidirectional(Routes):
    """A sequence mixer from the first token to the last and from the last to the first.

    Args:
        forwards: the mixer; without `backwards` it serves both ways.
        backwards: another mixer for the way back.
        combine: as in `Routes`.
        width: D, for `project`.
        inner: width that each mixer gives, for `project`; None for D.
    """

    def __init__(
        self,
        forwards: Mixer,
        backwards: Mixer | None = None,
        *,
        combine: Combine = "mean",
        width: int | None = None,
        inner: int | None = None,
    ) -> None:
        mixers = forwards if backwards is None else [forwards, backwards]
        super().__init__(mixers, ("raster", "raster_reversed"), combine=combine, width=width, inner=inner)


def check_grid(x: Tensor, grid: tuple[int, ...], axes: int | None = None) -> None:
    """Raises `InputError` unless the tokens [B, L, D] are exactly those of the grid."""
    if math.prod(grid) != x.shape[1] or (axes is not None and len(grid) != axes):
        raise InputError(
            f"{x.shape[1]} tokens are not those of a grid {tuple(grid)}; a scan takes one token a place, and no others"
        )


CROSS_ROUTES: tuple[str, ...] = ("raster", "column", "raster_reversed", "column_reversed")
"""The four of VMamba, in the order of its weights."""


def unroll(values: Tensor, route: str) -> Tensor:
    """A map [B, E, H, W] along one of `CROSS_ROUTES`: [B, E, L]."""
    if route not in CROSS_ROUTES:
        raise unknown("route", route, CROSS_ROUTES)
    walked = (values.mT if route.startswith("column") else values).flatten(2)
    return walked.flip(2) if route.endswith("reversed") else walked


def roll(sequence: Tensor, route: str, grid: tuple[int, int]) -> Tensor:
    """The map [B, E, H, W] of a sequence [B, E, L] along one of `CROSS_ROUTES`."""
    if route not in CROSS_ROUTES:
        raise unknown("route", route, CROSS_ROUTES)
    if route.endswith("reversed"):
        sequence = sequence.flip(2)
    return sequence.unflatten(2, (grid[1], grid[0])).mT if route.startswith("column") else sequence.unflatten(2, grid)


def cross_scan(values: Tensor, routes: Sequence[str] = CROSS_ROUTES) -> Tensor:
    """A map [B, E, H, W] along each route: [B, R, E, L]."""
    return torch.stack([unroll(values, route) for route in routes], dim=1)


def cross_merge(sequences: Tensor, grid: tuple[int, int], routes: Sequence[str] = CROSS_ROUTES) -> Tensor:
    """The sum over the routes of [B, R, E, L], each put back on the map: [B, E, H, W]."""
    maps = [roll(sequence, route, grid) for sequence, route in zip(sequences.unbind(1), routes, strict=True)]
    return sum(maps[1:], start=maps[0])


def low_routes(full_route: str = "raster") -> tuple[str, str, str]:
    """The three routes that MSVMamba walks on the small map when `full_route` is walked on the large one, in order."""
    if full_route not in CROSS_ROUTES:
        raise unknown("route", full_route, CROSS_ROUTES)
    first, second, third = (
        route for route in ("raster", "raster_reversed", "column", "column_reversed") if route != full_route
    )
    return first, second, third


def chain(values: Tensor, routes: Sequence[str]) -> Tensor:
    """A map [B, E, H, W] along each route, one after the other in a single sequence [B, E, R L]."""
    return torch.cat([unroll(values, route) for route in routes], dim=2)


def unchain(sequence: Tensor, grid: tuple[int, int], routes: Sequence[str]) -> Tensor:
    """The sum of the routes of a chained sequence [B, E, R L], each put back on the map: [B, E, H, W]."""
    return cross_merge(sequence.unflatten(2, (len(routes), -1)).transpose(1, 2), grid, routes)
