"""Grid dropping: exact counts, spread evenly over rows and columns."""

from __future__ import annotations

import dataclasses
import itertools

import families as tiny
import pytest
import torch
from specimens import forward_logits, model_of

import sightline as sl
from sightline.reduction.grid_dropping import GridDropping, even, spread
from sightline.reduction.token_reducer import ImageTokens


def kept(method: GridDropping, n: int, grid: tuple[int, int] | None) -> list[int]:
    keep, features = method.reduce(ImageTokens(torch.zeros(n, 3), grid=grid))
    assert features is None
    places: list[int] = keep.nonzero()[:, 0].tolist()
    return places


def test_examples_by_hand() -> None:
    assert kept(GridDropping(keep=0.25), 16, (4, 4)) == [5, 7, 13, 15]
    assert kept(GridDropping(keep=0.0625), 16, (4, 4)) == [10]
    assert kept(GridDropping(keep=0.25), 64, (8, 8)) == [8 * y + x for y in (1, 3, 5, 7) for x in (1, 3, 5, 7)]
    assert kept(GridDropping(keep=1 / 3), 12, None) == [1, 4, 7, 10]
    assert kept(GridDropping(keep=1 / 6), 24, (2, 12)) == [12 + 1, 12 + 4, 12 + 7, 12 + 10]
    assert even(3, 3) == [0, 1, 2]


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 6), (5, 4), (1, 7), (7, 1), (24, 24), (3, 11)])
def test_exactly_so_many_stay_and_rows_share_them_evenly(rows: int, columns: int) -> None:
    for count in range(1, rows * columns + 1):
        places = spread(count, rows, columns)
        assert len(set(places)) == count
        assert places == sorted(places)
        assert places[-1] < rows * columns
        of_row = [sum(place // columns == row for place in places) for row in range(rows)]
        used = [share for share in of_row if share]
        assert max(used) - min(used) <= 1
        lines = [row for row, share in enumerate(of_row) if share]
        gaps = [after - before for before, after in itertools.pairwise(lines)]
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert spread(rows * columns, rows, columns) == list(range(rows * columns))


def test_each_image_is_spread_over_on_its_own_raster() -> None:
    model = model_of("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", model, images_per_row=[2, 0, 1])
    with sl.attach(model, GridDropping(keep=0.3)) as attachment:
        forward_logits(model, batch)
    assert attachment.kept is not None
    got = [image.tolist() for row in attachment.kept for image in row]
    assert got == [spread(7, 4, 6), spread(6, 5, 4), spread(5, 4, 4)]


def test_settings() -> None:
    assert dataclasses.asdict(GridDropping()) == {"keep": 0.25, "positions": "compact"}
    assert GridDropping(keep=1.0).is_identity
