"""The scaling law of decoders and visual tokens: planted laws come back, the published tables, and the best budget."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

from sightline.errors import InputError
from sightline.probes.scaling_law import (
    PUBLISHED,
    TOKENS,
    Cells,
    Fit,
    Law,
    fit,
    inference_flops,
    pareto,
    published,
)
from sightline.report.scaling import as_dict, grid_results, notes, page, table

SIZES = (0.5, 1.8, 4.0, 7.0)


def planted(law: Law, sizes: tuple[float, ...] = SIZES, tokens: tuple[int, ...] = TOKENS, noise: float = 0.0) -> Cells:
    rng = np.random.default_rng(3)
    grid = list(itertools.product(sizes, tokens))
    return Cells.of((n, t, float(law.error(n, t)) + noise * rng.standard_normal()) for n, t in grid)


@pytest.mark.parametrize(
    "law",
    [
        Law(0.55, 0.077, 0.015, 0.04),
        Law(0.3, 0.4, 0.6, 0.2),
        Law(0.9, 0.03, 0.04, 0.0),
        Law(0.02, 1.3, 0.25, 0.0),
        Law(0.5, 0.2, -0.1, 0.1),  # more tokens are worse
    ],
)
def test_a_planted_law_comes_back(law: Law) -> None:
    found = fit(planted(law))
    assert found.squares < 1e-12
    assert (found.law.alpha, found.law.beta) == pytest.approx((law.alpha, law.beta), abs=2e-4)
    assert (found.law.scale, found.law.floor) == pytest.approx((law.scale, law.floor), abs=2e-3)


def test_the_unit_of_the_size_changes_the_scale_alone() -> None:
    cells = planted(Law(0.5, 0.3, 0.2, 0.1), noise=0.003)
    law, other = fit(cells).law, fit(Cells(cells.parameters * 1e-4, cells.tokens, cells.errors)).law
    assert (other.alpha, other.beta, other.floor) == pytest.approx((law.alpha, law.beta, law.floor), abs=1e-5)
    assert other.scale == pytest.approx(law.scale * 1e-4**law.alpha, rel=1e-4)


def squares(law: Law, cells: Cells) -> float:
    return float(((law.error(cells.parameters, cells.tokens) - cells.errors) ** 2).sum())


@pytest.mark.parametrize("name", [*PUBLISHED])
def test_no_law_nearby_or_drawn_at_random_fits_the_published_tables_better(name: str) -> None:
    cells = published(name).cells
    found = fit(cells)
    assert squares(found.law, cells) == pytest.approx(found.squares)
    rng = np.random.default_rng(0)
    own = found.law
    for _ in range(2000):
        near = Law(*(value * math.exp(0.02 * rng.standard_normal()) for value in (own.scale, own.alpha, own.beta)), 0.0)
        drawn = Law(rng.uniform(0.1, 1.5), rng.uniform(0, 0.3), rng.uniform(0, 0.2), rng.uniform(0, 0.5))
        assert squares(near, cells) >= found.squares
        assert squares(drawn, cells) >= found.squares


def test_the_published_tables_refitted() -> None:
    reasoning = fit(published("reasoning").cells)
    law = reasoning.law
    assert (law.scale, law.alpha, law.beta) == pytest.approx((0.5908, 0.0709, 0.0151), abs=5e-5)
    assert (law.floor, reasoning.cells) == (0, 28)
    assert reasoning.squares == pytest.approx(3.8e-4, abs=5e-6)
    assert law.ratio == pytest.approx(4.7, abs=0.05)
    ocr = fit(published("ocr").cells).law
    assert (ocr.scale, ocr.alpha, ocr.beta, ocr.floor) == pytest.approx((0.917, 0.0282, 0.0394, 0), abs=5e-4)
    with pytest.raises(InputError, match="did you mean 'ocr'"):
        published("ocrr")


def best_by_trying(law: Law, text: float, tokens: np.ndarray) -> float:
    """Of these numbers of tokens that of the least error where N (Q + T) is 1."""
    return float(tokens[np.argmin(law.error(1 / (text + tokens), tokens))])


@pytest.mark.parametrize(("alpha", "beta"), [(0.077, 0.015), (0.4, 0.3), (0.2, 0.19), (0.03, 0.05), (0.1, 0.0)])
@pytest.mark.parametrize("text", [0.0, 7.0, 50.0])
def test_the_best_number_of_tokens_is_that_found_by_trying(alpha: float, beta: float, text: float) -> None:
    law = Law(0.6, alpha, beta, 0.1)
    tried = np.arange(1, 576.1, 0.25)
    assert law.best_tokens(text, 1, 576) == pytest.approx(best_by_trying(law, text, tried), abs=0.25)


def test_by_the_papers_exponents_the_best_is_a_dozen_tokens_behind_fifty_of_text() -> None:
    law = Law(0.55, 0.077, 0.015, 0.04)
    assert law.best_tokens(50) == pytest.approx(50 * 0.015 / 0.062)
    assert law.best_tokens(0) == 1
    assert Law(0.5, 0.03, 0.05, 0).best_tokens(50) == math.inf
    assert inference_flops(7e9, 50, 14) == 2 * 7e9 * 64


def test_intervals_hold_what_was_planted_and_come_again() -> None:
    law = Law(0.4, 0.5, 0.2, 0.1)
    cells = planted(law, noise=0.004)
    found = fit(cells, repeats=60, seed=1)
    assert found == fit(cells, repeats=60, seed=1)
    for name in ("alpha", "beta", "ratio"):
        edges = found.interval(name)
        assert edges is not None
        assert edges[0] < getattr(law, name) < edges[1]
        assert edges[1] - edges[0] < 1.5
    assert found.larger_models() == 1
    assert fit(cells).interval("alpha") is None
    assert Fit(law, 0, 5, tuple(Law(1, a, 0.1, 0) for a in (0.3, 0.1, 0.2))).interval("alpha") == (0.1, 0.3)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 1, 0.5), (2, 4, 0.4), (2, 1, 0.4), (1, 4, 0.3)],
        [(1, t, 0.5) for t in range(1, 9)],
        [(n, 4, 0.5) for n in range(1, 9)],
    ],
)
def test_too_few_cells(rows: list[tuple[float, float, float]]) -> None:
    with pytest.raises(InputError, match="more than 4 cells, with two sizes and two numbers"):
        Cells.of(rows)


def test_cells_that_cannot_be() -> None:
    rows = [(n, t, 0.5) for n in (1, 2) for t in (1, 4, 9)]
    for bad in ((0, 1, 0.5), (1, 0.5, 0.5), (1, 1, math.nan)):
        with pytest.raises(InputError, match="a size above 0"):
            Cells.of([*rows, bad])


def test_the_front_is_what_nothing_cheaper_or_as_cheap_beats() -> None:
    points = [(3.0, 0.2), (1.0, 0.5), (2.0, 0.5), (2.0, 0.3), (4.0, 0.2), (5.0, 0.1), (1.0, 0.6)]
    beaten = [any((c <= a and e < b) or (c < a and e <= b) for c, e in points) for a, b in points]
    assert sorted(pareto(points)) == [place for place, lost in enumerate(beaten) if not lost] == [0, 1, 3, 5]
    assert pareto(points) == [1, 3, 0, 5]


def test_the_page_shows_the_fits_of_a_grid() -> None:
    law = Law(0.01, 0.3, 0.5, 0.05)
    rows = [(n, t, float(law.error(n / 1e9, t))) for n in (7e4, 1e6, 2e6) for t in (1.0, 4.0, 25.0, 100.0)]
    results = grid_results({"colour": rows, "count": [(n, t, 1 - e) for n, t, e in rows]}, 15, repeats=5)
    html = page(results)
    assert html.count("<svg") == 4
    assert html.count("<polyline") == 4 * 6
    assert "70 k, 1 visual tokens" in html
    assert "operations of the decoder for a prompt, millions" in html
    assert len(re.findall('class="ring"', html)) >= 4
    record = as_dict(results[0])
    assert record["alpha"] == pytest.approx(0.3, abs=1e-3)
    assert record["best_tokens"] == 100
    assert record["larger_models"] == 0
    assert table(results).row_count == 2
    assert "Q: 15" in notes(results)[2]
