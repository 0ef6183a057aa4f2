"""Scan orders: small grids walked by hand, permutations and inverses, routes, cross scan and chained routes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.mixers.mixer import Mixer
from sightline.mixers.scan_orders import (
    CROSS_ROUTES,
    ORDERS,
    Bidirectional,
    Routes,
    along,
    bidirectional,
    chain,
    cross_merge,
    cross_scan,
    inverse_order,
    low_routes,
    roll,
    scan_order,
    sequence_grid,
    unchain,
    unroll,
)

GRIDS = [(2, 3), (3, 2), (5, 4), (1, 7), (6, 1), (1, 1)]


class RunningSum(Mixer):
    """y_t = x_1 + ... + x_t: what a token sees is exactly what the order put before it."""

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return x.cumsum(dim=1)


class GridNoting(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        self.seen.append(grid)
        return x


def tokens(grid: tuple[int, ...], width: int = 3, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(sum(grid))
    return torch.randn(batch, torch.Size(grid).numel(), width, generator=generator, dtype=torch.float64)


# --- Orders ---


def test_a_grid_of_two_rows_and_three_columns_by_hand() -> None:
    expected = {
        "raster": [0, 1, 2, 3, 4, 5],
        "raster_reversed": [5, 4, 3, 2, 1, 0],
        "column": [0, 3, 1, 4, 2, 5],
        "column_reversed": [5, 2, 4, 1, 3, 0],
        "snake_rows": [0, 1, 2, 5, 4, 3],
        "snake_rows_reversed": [3, 4, 5, 2, 1, 0],
        "snake_columns": [0, 3, 4, 1, 2, 5],
        "snake_columns_reversed": [5, 2, 1, 4, 3, 0],
        "mirror_left_right": [2, 1, 0, 5, 4, 3],
        "mirror_up_down": [3, 4, 5, 0, 1, 2],
        "rotate_180": [5, 4, 3, 2, 1, 0],
    }
    assert {kind: scan_order((2, 3), kind).tolist() for kind in ORDERS} == expected


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_order_is_a_permutation_and_its_inverse_undoes_it(grid: tuple[int, int], kind: str) -> None:
    order, inverse = scan_order(grid, kind), inverse_order(grid, kind)
    count = grid[0] * grid[1]
    assert sorted(order.tolist()) == list(range(count))
    assert order[inverse].tolist() == inverse[order].tolist() == list(range(count))


@pytest.mark.parametrize("kind", [kind for kind in ORDERS if "snake" in kind])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_snake_steps_from_neighbour_to_neighbour(grid: tuple[int, int], kind: str) -> None:
    places = [divmod(index, grid[1]) for index in scan_order(grid, kind).tolist()]
    for (row, column), (next_row, next_column) in itertools.pairwise(places):
        assert abs(row - next_row) + abs(column - next_column) == 1


def test_orders_of_one_and_of_three_axes() -> None:
    assert scan_order((4,), "raster_reversed").tolist() == [3, 2, 1, 0]
    assert scan_order((2, 2, 3), "raster_reversed").tolist() == list(range(11, -1, -1))
    with pytest.raises(InputError, match="'column' needs a grid of rows and columns, not one of 3 axes"):
        scan_order((2, 2, 3), "column")


def test_orders_are_kept_and_can_be_trained_with_when_first_made_in_inference_mode() -> None:
    with torch.inference_mode():
        first = scan_order((3, 11), "snake_columns")
    assert scan_order([3, 11], "snake_columns") is first
    x = torch.ones(1, 33, 2, requires_grad=True)
    along(lambda sequence: sequence * 2, x, (3, 11), "snake_columns").sum().backward()
    assert x.grad is not None
    assert (x.grad == 2).all()


def test_orders_on_the_meta_device_do_not_replace_real_ones() -> None:
    with torch.device("meta"):
        assert scan_order((3, 5), "column").device.type == "cpu"
        assert scan_order((3, 5), "column", "meta").is_meta
    assert scan_order((3, 5), "column").tolist()[:3] == [0, 5, 10]


def test_the_grid_that_a_route_sees() -> None:
    mixer = GridNoting()
    Routes(mixer, ORDERS, combine="sum")(tokens((2, 3)), (2, 3))
    assert dict(zip(ORDERS, mixer.seen, strict=True)) == {
        kind: (3, 2) if "column" in kind else (2, 3) for kind in ORDERS
    }
    assert sequence_grid((4,), "raster") == (4,)


@pytest.mark.parametrize(
    ("grid", "kind", "message"),
    [
        ((2, 3), "rows", r"unknown scan order 'rows'"),
        ((), "raster", r"one or more sides"),
        ((0, 3), "raster", r"sides of 1 or more tokens, not \(0, 3\)"),
    ],
)
def test_orders_that_do_not_exist(grid: tuple[int, ...], kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scan_order(grid, kind)


# --- Routes ---


@pytest.mark.parametrize("kind", ORDERS)
def test_along_an_order_each_token_sees_those_before_it(kind: str) -> None:
    grid = (4, 3)
    x = tokens(grid)
    mixed = along(lambda sequence: sequence.cumsum(dim=1), x, grid, kind)
    order = scan_order(grid, kind).tolist()
    for place, index in enumerate(order):
        torch.testing.assert_close(mixed[:, index], x[:, order[: place + 1]].sum(dim=1))


def test_two_directions_of_a_running_sum_see_everything_and_the_token_twice() -> None:
    x = tokens((2, 5))
    everything = x.sum(dim=1, keepdim=True) + x
    both = bidirectional(lambda sequence: sequence.cumsum(dim=1), x, combine="sum")
    torch.testing.assert_close(both, everything)
    torch.testing.assert_close(Bidirectional(RunningSum(), combine="sum")(x, (2, 5)), everything)
    torch.testing.assert_close(Bidirectional(RunningSum())(x, (2, 5)), everything / 2)


def test_ways_to_combine_routes() -> None:
    x, grid = tokens((3, 2)), (3, 2)
    orders = ("raster", "column", "snake_rows")
    alone = [along(lambda sequence: sequence.cumsum(dim=1), x, grid, kind) for kind in orders]
    torch.testing.assert_close(Routes(RunningSum(), orders)(x, grid), (alone[0] + alone[1] + alone[2]) / 3)
    torch.testing.assert_close(Routes(RunningSum(), orders, combine="concat")(x, grid), torch.cat(alone, dim=-1))
    projected = Routes(RunningSum(), orders, combine="project", width=3).double()
    expected = torch.cat(alone, dim=-1) @ projected.proj.weight.mT + projected.proj.bias
    torch.testing.assert_close(projected(x, grid), expected)


def test_routes_share_one_mixer_or_have_one_each() -> None:
    class Scale(Mixer):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(factor, dtype=torch.float64))

        def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
            return self.factor * x.cumsum(dim=1)

    x, grid = tokens((2, 2)), (2, 2)
    own = Routes([Scale(1.0), Scale(10.0)], ("raster", "raster_reversed"), combine="sum")
    expected = x.cumsum(dim=1) + 10 * x.flip(1).cumsum(dim=1).flip(1)
    torch.testing.assert_close(own(x, grid), expected)
    assert sum(parameter.numel() for parameter in own.parameters()) == 2
    assert sum(parameter.numel() for parameter in Routes(Scale(1.0), ORDERS).parameters()) == 1
    assert len(list(Bidirectional(Scale(1.0), Scale(2.0)).parameters())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mixers=[RunningSum(), RunningSum()], orders=("raster",)), "2 mixers cannot serve 1 orders"),
        (dict(mixers=RunningSum(), orders=()), "1 mixers cannot serve 0 orders"),
        (dict(mixers=RunningSum(), orders=("zigzag",)), "unknown scan order 'zigzag'"),
        (dict(mixers=RunningSum(), orders=("raster",), combine="max"), "unknown way to combine routes 'max'"),
        (dict(mixers=RunningSum(), orders=("raster",), combine="project"), "need the width to project to"),
    ],
)
def test_routes_that_cannot_be_made(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Routes(**arguments)  # type: ignore[arg-type]


def test_extra_tokens_are_refused() -> None:
    with pytest.raises(InputError, match=r"7 tokens are not those of a grid \(2, 3\)"):
        Routes(RunningSum(), ("raster",))(torch.zeros(1, 7, 3), (2, 3))


# --- Cross scan ---


def slow_route(values: Tensor, route: str) -> list[tuple[int, int]]:
    rows, columns = values.shape[2:]
    places = [(row, column) for row in range(rows) for column in range(columns)]
    if route.startswith("column"):
        places = [(row, column) for column in range(columns) for row in range(rows)]
    return places[::-1] if route.endswith("reversed") else places


@pytest.mark.parametrize("grid", GRIDS)
def test_cross_scan_walks_four_ways_and_merging_gives_the_map_four_times(grid: tuple[int, int]) -> None:
    values = tokens(grid).mT.unflatten(2, grid)
    scanned = cross_scan(values)
    assert scanned.shape == (2, 4, 3, grid[0] * grid[1])
    for number, route in enumerate(CROSS_ROUTES):
        expected = torch.stack([values[:, :, row, column] for row, column in slow_route(values, route)], dim=-1)
        assert torch.equal(scanned[:, number], expected)
        assert torch.equal(unroll(values, route), expected)
        assert torch.equal(roll(expected, route, grid), values)
        order = scan_order(grid, route)
        assert torch.equal(values.flatten(2)[:, :, order], expected)
    torch.testing.assert_close(cross_merge(scanned, grid), 4 * values)


@pytest.mark.parametrize("full", CROSS_ROUTES)
def test_chained_routes_are_the_three_others_one_after_the_other(full: str) -> None:
    grid = (3, 4)
    values = tokens(grid).mT.unflatten(2, grid)
    routes = low_routes(full)
    assert set(routes) == set(CROSS_ROUTES) - {full}
    chained = chain(values, routes)
    assert torch.equal(chained, torch.cat([unroll(values, route) for route in routes], dim=2))
    torch.testing.assert_close(unchain(chained, grid, routes), 3 * values)
    # Each third goes back on its own: marks on single places of the sequence land where the route was there.
    marks = torch.zeros_like(chained)
    marks[:, :, 12 + 1] = 1.0
    row, column = slow_route(values, routes[1])[1]
    marked = unchain(marks, grid, routes)
    assert (marked[:, :, row, column] == 1).all()
    assert marked.sum() == marked[:, :, row, column].sum()


def test_the_order_of_the_low_routes_is_the_paper_s() -> None:
    assert low_routes() == ("raster_reversed", "column", "column_reversed")
    with pytest.raises(InputError, match="unknown route 'snake_rows'"):
        low_routes("snake_rows")
    with pytest.raises(InputError, match="unknown route 'diagonal'"):
        unroll(torch.zeros(1, 1, 2, 2), "diagonal")
    with pytest.raises(InputError, match="unknown route 'diagonal'"):
        roll(torch.zeros(1, 1, 4), "diagonal", (2, 2))
