"""The loops of `selective_scan` for the CPU, which numba compiles (`pip install 'sightline[cpu]'`).

Each call handles a block of channels of one sample; calls hold no interpreter lock, so that several threads share the
blocks. All arrays are contiguous: step, x, y [L, E], A, h [N, E], B, C [L, N]. What is innermost runs over the channels
of the block, which lie side by side: no sum goes across a vector, and N may be anything.

    h_t = exp(step_t A) h_{t-1} + x_t B_t,   y_t = sum_n C_t h_t

The compiler makes vectors of a loop only while few pairs of its arrays could overlap (eight comparisons); this is why
the loops of the gradient are split as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sightline.machine_code import compiled, fast_exp


def _scan(
    step: Any,
    x: Any,
    A: Any,
    B: Any,
    C: Any,
    start: Any,
    y: Any,
    last: Any,
    kept: Any,
    every: int,
    first: int,
    end: int,
) -> None:
    """Channels first to end - 1. `kept` [L / every, N, E] takes the state before each `every`-th token, unless it is
    empty."""
    width, states = end - first, A.shape[0]
    h = np.empty((states, width), x.dtype)
    rates = np.empty((states, width), x.dtype)
    total = np.empty(width, x.dtype)
    for n in range(states):
        for e in range(width):
            h[n, e], rates[n, e] = start[n, first + e], A[n, first + e]
    for t in range(step.shape[0]):
        if len(kept) and t % every == 0:
            for n in range(states):
                for e in range(width):
                    kept[t // every, n, first + e] = h[n, e]
        times, inputs = step[t, first:end], x[t, first:end]
        for e in range(width):
            total[e] = 0
        for n in range(states):
            b, c = B[t, n], C[t, n]
            for e in range(width):
                value = fast_exp(times[e] * rates[n, e]) * h[n, e] + inputs[e] * b
                h[n, e] = value
                total[e] += c * value
        for e in range(width):
            y[t, first + e] = total[e]
    for n in range(states):
        for e in range(width):
            last[n, first + e] = h[n, e]


def _scan_gradient(
    step: Any,
    x: Any,
    A: Any,
    B: Any,
    C: Any,
    kept: Any,
    every: int,
    of_y: Any,
    of_last: Any,
    of_step: Any,
    of_x: Any,
    of_A: Any,
    of_B: Any,
    of_C: Any,
    of_start: Any,
    first: int,
    end: int,
) -> None:
    """Gradients of channels first to end - 1; those of B and C are this block's share of the sum over channels."""
    width, states, length = end - first, A.shape[0], step.shape[0]
    g = np.empty((states, width), x.dtype)
    rates = np.empty((states, width), x.dtype)
    rates_gradient = np.empty((states, width), x.dtype)
    history = np.empty((every + 1, states, width), x.dtype)
    decays = np.empty((every, states, width), x.dtype)
    through_decay = np.empty(width, x.dtype)
    step_gradient = np.empty(width, x.dtype)
    x_gradient = np.empty(width, x.dtype)
    for n in range(states):
        for e in range(width):
            g[n, e], rates[n, e], rates_gradient[n, e] = of_last[n, first + e], A[n, first + e], 0
    for chunk in range(len(kept) - 1, -1, -1):
        begin = chunk * every
        size = min(every, length - begin)
        for n in range(states):
            for e in range(width):
                history[0, n, e] = kept[chunk, n, first + e]
        for i in range(size):
            times, inputs = step[begin + i, first:end], x[begin + i, first:end]
            for n in range(states):
                b = B[begin + i, n]
                for e in range(width):
                    decays[i, n, e] = fast_exp(times[e] * rates[n, e])
                for e in range(width):
                    history[i + 1, n, e] = decays[i, n, e] * history[i, n, e] + inputs[e] * b
        for i in range(size - 1, -1, -1):
            t = begin + i
            times, inputs, outputs = step[t, first:end], x[t, first:end], of_y[t, first:end]
            for e in range(width):
                step_gradient[e], x_gradient[e] = 0, 0
            for n in range(states):
                b, c = B[t, n], C[t, n]
                of_b, of_c = b * 0, c * 0
                for e in range(width):
                    reaching = g[n, e] + c * outputs[e]
                    g[n, e] = reaching
                    of_b += reaching * inputs[e]
                    of_c += outputs[e] * history[i + 1, n, e]
                    x_gradient[e] += reaching * b
                of_B[t, n], of_C[t, n] = of_b, of_c
                for e in range(width):
                    earlier = g[n, e] * decays[i, n, e]
                    g[n, e] = earlier
                    through_decay[e] = earlier * history[i, n, e]
                for e in range(width):
                    step_gradient[e] += through_decay[e] * rates[n, e]
                    rates_gradient[n, e] += through_decay[e] * times[e]
            for e in range(width):
                of_step[t, first + e], of_x[t, first + e] = step_gradient[e], x_gradient[e]
    for n in range(states):
        for e in range(width):
            of_A[n, first + e], of_start[n, first + e] = rates_gradient[n, e], g[n, e]


class Kernels(NamedTuple):
    """The compiled loops."""

    scan: Callable[..., None]
    gradient: Callable[..., None]


@functools.cache
def kernels() -> Kernels:
    """The compiled loops.

    Raises:
        ImportError: numba is not installed.
    """
    return Kernels(compiled(_scan, {"contract"}), compiled(_scan_gradient, {"contract", "reassoc"}))
