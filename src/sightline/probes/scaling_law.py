"""How a model's error depends on the size of its decoder and on how many visual tokens it reads (Li et al., ICLR 2025,
arXiv:2411.03312), and which of the two to spend a budget on. Nothing is attached to a model.

In: errors Err (1 minus the mean accuracy) of models with N parameters in the decoder that read T visual tokens. Out:
the law, intervals of its exponents, and the best T at a given cost.

    Err(N, T) = A / N^alpha / T^beta + D,    A, D >= 0
    FLOPs     = 2 N (Q + T)                  Q tokens of text; encoder and attention between tokens left out
    T*        = beta Q / (alpha - beta)      of the least error at given FLOPs, if alpha > beta; else T without end

T* sets d/dT [alpha ln(Q + T) - beta ln T] to 0: at given FLOPs, N is proportional to 1 / (Q + T). With Q = 0 (text that
was read beforehand) the fewest tokens are best if alpha > beta.

The fit is least squares over all cells. For given exponents, A and D are those of a line through the cells, within
their bounds; the exponents are searched on a grid that is narrowed around its best cell. The official code
(locuslab/llava-token-compression, `scaling_law_code`) draws from a grid at random and stops after a fifth of it, so its
result differs from run to run. Without D >= 0 the best fit runs off to A and -D without end. D is what the data say
least about; T* needs alpha and beta alone.

Intervals are of the residual bootstrap: the fit plus residuals drawn from the cells with replacement, scaled by
sqrt(n / (n - 4)), fitted again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sightline.errors import InputError, unknown

Array = NDArray[np.float64]

PARAMETERS = 4
EXPONENTS = (-1.0, 4.0)
"""Between these the exponents are searched. Below 0: more would be worse."""
FIRST_GRID, GRID, SHRINK, ROUNDS = 25, 9, 2.0, 25
"""Places of the search's first grid and of the later ones a side, how much narrower each one is, how many there are."""
REPEATS = 200
LEVEL = 0.95
TOKENS = (1, 4, 16, 36, 64, 144, 576)
BILLION = 1e9


@dataclass(frozen=True)
class Law:
    """Err(N, T) = scale / N^alpha / T^beta + floor, with N in the unit of the data it was fitted to."""

    scale: float
    alpha: float
    beta: float
    floor: float

    def error(self, parameters: Array | float, tokens: Array | float) -> Array:
        """The error of decoders of so many parameters that read so many visual tokens."""
        n, t = np.asarray(parameters, float), np.asarray(tokens, float)
        return np.asarray(self.scale * n**-self.alpha * t**-self.beta + self.floor)

    @property
    def ratio(self) -> float:
        """alpha / beta: how many per cent more visual tokens do as much as one per cent more parameters; infinite
        where visual tokens do nothing."""
        return self.alpha / self.beta if self.beta > 0 else math.inf

    def best_tokens(self, text_tokens: float, fewest: float = 1, most: float = math.inf) -> float:
        """T*, the number of visual tokens of the least error at given FLOPs, between `fewest` and `most`."""
        if self.beta <= 0 and self.alpha > 0:
            return fewest
        if self.alpha <= self.beta:
            return most
        return min(max(self.beta * text_tokens / (self.alpha - self.beta), fewest), most)


@dataclass(frozen=True)
class Cells:
    """Measured errors: arrays of one length."""

    parameters: Array
    """N, in billions for the published tables."""
    tokens: Array
    errors: Array

    @staticmethod
    def of(rows: Iterable[tuple[float, float, float]]) -> Cells:
        """(parameters, tokens, error) of each cell.

        Raises:
            InputError: where there are too few cells, or they do not vary in both.
        """
        table = np.array(list(rows), dtype=float).reshape(-1, 3)
        parameters, tokens, errors = table.T
        if len(table) <= PARAMETERS or len(set(parameters)) < 2 or len(set(tokens)) < 2:
            raise InputError(
                f"the law has {PARAMETERS} numbers: it takes more than {PARAMETERS} cells, with two sizes and two "
                f"numbers of visual tokens at least, not {len(table)}"
            )
        if (parameters <= 0).any() or (tokens < 1).any() or not np.isfinite(table).all():
            raise InputError("every cell needs a size above 0, a visual token or more, and a finite error")
        return Cells(parameters, tokens, errors)


@dataclass(frozen=True)
class Fit:
    """A law and how sure its numbers are.

    Attributes:
        law: of the least squares.
        squares: the sum of squared residuals.
        cells: how many it was fitted to.
        drawn: the laws of the bootstrap; empty if there was none.
    """

    law: Law
    squares: float
    cells: int
    drawn: tuple[Law, ...] = ()

    def interval(self, name: str) -> tuple[float, float] | None:
        """Between which bounds 95 % of the bootstrap's values of "scale", "alpha", "beta", "floor" or "ratio" lie."""
        return self._between([float(getattr(law, name)) for law in self.drawn])

    def best_tokens(self, text_tokens: float, fewest: float, most: float) -> tuple[float, float] | None:
        """The same of T*."""
        return self._between([law.best_tokens(text_tokens, fewest, most) for law in self.drawn])

    def larger_models(self) -> float | None:
        """The share of the bootstrap's laws by which parameters do more than visual tokens: alpha > beta."""
        return sum(law.alpha > law.beta for law in self.drawn) / len(self.drawn) if self.drawn else None

    @staticmethod
    def _between(values: Sequence[float]) -> tuple[float, float] | None:
        if not values:
            return None
        ordered = sorted(values)  # not np.quantile: between infinite values it would interpolate
        edge = (1 - LEVEL) / 2
        last = len(ordered) - 1
        return ordered[math.floor(edge * last)], ordered[math.ceil((1 - edge) * last)]


def fit(cells: Cells, *, repeats: int = 0, seed: int = 0) -> Fit:
    """The law of the least squares, with `repeats` laws of the bootstrap."""
    law, squares = _least_squares(cells)
    fitted = law.error(cells.parameters, cells.tokens)
    residuals = cells.errors - fitted
    residuals = (residuals - residuals.mean()) * math.sqrt(len(residuals) / (len(residuals) - PARAMETERS))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(repeats):
        errors = fitted + rng.choice(residuals, len(residuals))
        drawn.append(_least_squares(Cells(cells.parameters, cells.tokens, errors))[0])
    return Fit(law, squares, len(fitted), tuple(drawn))


def _least_squares(cells: Cells) -> tuple[Law, float]:
    log_n, log_t = np.log(cells.parameters), np.log(cells.tokens)
    # Around their middle, so that scale and exponents can be told apart numerically whatever the unit of N.
    middle_n, middle_t = log_n.mean(), log_t.mean()
    low, high = EXPONENTS
    alpha = beta = (low + high) / 2
    half = (high - low) / 2
    scale = floor = squares = 0.0
    for turn in range(ROUNDS):
        while True:
            alphas, betas = (_axis(middle, half, GRID if turn else FIRST_GRID) for middle in (alpha, beta))
            exponents = alphas[:, None, None] * (log_n - middle_n) + betas[None, :, None] * (log_t - middle_t)
            scales, floors, sums = _line(np.exp(-exponents), cells.errors)
            a, b = np.unravel_index(int(sums.argmin()), sums.shape)
            moved = (alphas[a], betas[b]) != (alpha, beta)
            on_edge = _on_edge(alphas, int(a)) or _on_edge(betas, int(b))
            alpha, beta = float(alphas[a]), float(betas[b])
            scale, floor, squares = float(scales[a, b]), float(floors[a, b]), float(sums[a, b])
            if not (on_edge and moved):  # else the best lies further on: the same grid again, around it
                break
        half /= SHRINK
    scale *= math.exp(alpha * middle_n + beta * middle_t)
    return Law(scale, alpha, beta, floor), squares


def _axis(middle: float, half: float, places: int) -> Array:
    return np.unique(np.clip(np.linspace(middle - half, middle + half, places), *EXPONENTS))


def _on_edge(axis: Array, place: int) -> bool:
    """Whether a grid's best place is at its end, and the end is not that of the search."""
    return (place == 0 and axis[0] > EXPONENTS[0]) or (place == len(axis) - 1 and axis[-1] < EXPONENTS[1])


def _line(powers: Array, errors: Array) -> tuple[Array, Array, Array]:
    """For each law [..., cells] of powers N^-alpha T^-beta: the scale >= 0 and the floor >= 0 of the least squares of
    scale * power + floor, and their sum of squares.

    Of two numbers with bounds, the best is inside or on a bound; all three cases are tried.
    """
    mean_p, mean_e = powers.mean(-1), errors.mean()
    centred = powers - mean_p[..., None]
    spread = (centred**2).sum(-1)
    slope = (centred * (errors - mean_e)).sum(-1) / np.maximum(spread, 1e-300)
    inside_floor = mean_e - slope * mean_p
    through_origin = np.maximum((powers * errors).sum(-1) / (powers**2).sum(-1), 0)
    flat = np.full_like(mean_p, max(mean_e, 0.0))
    zero = np.zeros_like(mean_p)
    allowed = (slope >= 0) & (inside_floor >= 0)
    options = [
        (np.where(allowed, slope, 0), np.where(allowed, inside_floor, flat)),
        (through_origin, zero),
        (zero, flat),
    ]
    sums = [((scale[..., None] * powers + floor[..., None] - errors) ** 2).sum(-1) for scale, floor in options]
    best = np.argmin(sums, axis=0)
    return (
        np.choose(best, [scale for scale, _ in options]),
        np.choose(best, [floor for _, floor in options]),
        np.choose(best, sums),
    )


def inference_flops(parameters: float, text_tokens: float, visual_tokens: float) -> float:
    """2 N (Q + T): what a decoder of N parameters takes to read a prompt."""
    return 2 * parameters * (text_tokens + visual_tokens)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the (cost, error) points no other one beats in both, from the cheapest on; of equal ones the first."""
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: (*points[place], place)):
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front


@dataclass(frozen=True)
class Published:
    """A table that the authors released: accuracies by billions of parameters (down) and `TOKENS` (across)."""

    name: str
    what: str
    sizes: tuple[float, ...]
    accuracies: tuple[tuple[float, ...], ...]
    exponents: tuple[float, float] | None
    """(alpha, beta) as the authors give them; None where they are not in what they released."""

    @property
    def cells(self) -> Cells:
        return Cells.of(
            (size, tokens, 1 - accuracy)
            for size, row in zip(self.sizes, self.accuracies, strict=True)
            for tokens, accuracy in zip(TOKENS, row, strict=True)
        )


PUBLISHED: dict[str, Published] = {
    "reasoning": Published(
        "reasoning",
        "visual reasoning and understanding: the mean of the paper's benchmarks",
        (0.5, 1.8, 4, 7),
        (
            (0.3855, 0.3917, 0.4078, 0.4133, 0.4151, 0.4244, 0.4320),
            (0.4333, 0.4519, 0.4528, 0.4597, 0.4609, 0.4758, 0.4808),
            (0.4630, 0.4692, 0.4858, 0.4916, 0.5023, 0.5092, 0.5185),
            (0.4810, 0.4971, 0.5050, 0.5141, 0.5172, 0.5238, 0.5354),
        ),
        (0.077, 0.015),
    ),
    "ocr": Published(
        "ocr",
        "reading text in pictures",
        (0.5, 1.8, 4, 7),
        (
            (0.0979, 0.1183, 0.1551, 0.1911, 0.1942, 0.2211, 0.2608),
            (0.1052, 0.1375, 0.1753, 0.2073, 0.2206, 0.2585, 0.3096),
            (0.1268, 0.1559, 0.1927, 0.2320, 0.2604, 0.2882, 0.3461),
            (0.1391, 0.1643, 0.2050, 0.2392, 0.2618, 0.2880, 0.3461),
        ),
        None,
    ),
}
"""From the authors' code (scaling_law_code/values.py). In the second table the last number of 7 billion equals that of
4 billion, and a comment gives .1359 for 4 billion and 4 tokens; both are kept as they are."""


def published(name: str) -> Published:
    """One of the released tables.

    Raises:
        InputError: for another name.
    """
    if name not in PUBLISHED:
        raise unknown("published table", name, PUBLISHED)
    return PUBLISHED[name]
