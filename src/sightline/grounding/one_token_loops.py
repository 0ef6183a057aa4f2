"""What steering does to one token in one layer, as loops for the CPU in machine code.

On a small model a step of one token takes milliseconds, and a handful of tensor operations in every layer shows in it:
calling them takes longer than what they compute. One call of a compiled loop does the same. All arrays are float32 and
contiguous, and come in the shapes that they have in the decoder, as a view of a tensor costs as much as a loop; H query
heads, G key/value heads, k keys, d the width of a head, D that of the decoder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sightline.machine_code import compiled, has_numba


def in_loops(x: Tensor) -> bool:
    """Whether the loops are for tensors like this one."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not (x.requires_grad and torch.is_grad_enabled())
        and has_numba()
    )


def _boosted(query: Any, key: Any, value: Any, factors: Any, scaling: Any, output: Any) -> None:
    """Attention of one query [1, H, 1, d] with logits z + f |z|: key, value [1, G, k, d], f [1, 1, 1, k] -> output
    [1, 1, H, d]."""
    heads, width = query.shape[1], query.shape[3]
    groups, keys = key.shape[1], key.shape[2]
    weights = np.empty(keys, np.float32)
    for h in range(heads):
        q, k, v = query[0, h, 0], key[0, h // (heads // groups)], value[0, h // (heads // groups)]
        highest = np.float32(-np.inf)
        for j in range(keys):
            z = np.float32(0)
            for i in range(width):
                z += q[i] * k[j, i]
            z *= scaling
            z += factors[0, 0, 0, j] * abs(z)
            weights[j] = z
            highest = max(highest, z)
        total = np.float32(0)
        for j in range(keys):
            weights[j] = math.exp(weights[j] - highest)
            total += weights[j]
        of_head = output[0, 0, h]
        of_head[:] = 0
        for j in range(keys):
            weight = weights[j] / total
            for i in range(width):
                of_head[i] += weight * v[j, i]


def _tilted(m: Any, v: Any, strength: Any, unit: bool, output: Any) -> None:
    """m + a v at the length of m, vectors [1, 1, D]: a is `strength`, and with `unit`, where v has length 1 or 0,
    `strength` max(||m||, ||m|| - m.v)."""
    square, along = np.float32(0), np.float32(0)
    m, v, output = m[0, 0], v[0, 0], output[0, 0]
    for i in range(len(m)):
        square += m[i] * m[i]
        along += m[i] * v[i]
    length = math.sqrt(square)
    amount = strength
    if unit:
        amount *= max(length, length - along)
    after = np.float32(0)
    for i in range(len(m)):
        output[i] = m[i] + amount * v[i]
        after += output[i] * output[i]
    shrink = length / math.sqrt(after) if after > 1e-24 else length * 1e12
    for i in range(len(m)):
        output[i] *= shrink


class Loops(NamedTuple):
    """The compiled loops."""

    boosted: Callable[..., None]
    tilted: Callable[..., None]


@functools.cache
def loops() -> Loops:
    """The compiled loops.

    Raises:
        ImportError: numba is not installed.
    """
    # Sums may be reordered, or they could not be vectors; infinities and NaN keep their meaning.
    liberties = {"contract", "reassoc", "nsz"}
    return Loops(compiled(_boosted, liberties), compiled(_tilted, liberties))
