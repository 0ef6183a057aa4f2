"""What steering does to one token in one layer, as loops for the CPU in machine code.

On a small model a step of one token takes milliseconds, and a handful of tensor operations in every layer shows in it:
calling them takes longer than what they compute. One call of a compiled loop does the same. It is given addresses, as
views of the tensors as arrays would cost more than the loop. H query heads, G key/value heads, k keys, d the width of a
head, D that of the decoder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sightline.machine_code import array_at, called_with_addresses


def boosted(query: Tensor, key: Tensor, value: Tensor, factors: Tensor, scaling: float) -> Tensor:
    """Attention of one query with logits z + f |z|, for tensors that are `in_loops`.

    Args:
        query: [1, H, 1, d]
        key: [1, G, k, d]; all are seen.
        value: the same.
        factors: f, [1, 1, 1, k]

    Returns:
        Head outputs [1, 1, H, d].
    """
    heads, width = query.shape[1], query.shape[3]
    output = query.new_empty(1, 1, heads, width)
    addresses = (query.data_ptr(), key.data_ptr(), value.data_ptr(), factors.data_ptr(), output.data_ptr())
    loops().boosted(*addresses, heads, *key.shape[1:], scaling)
    return output


def tilted(m: Tensor, v: Tensor, strength: float, unit: bool) -> Tensor:
    """m + a v at the length of m, for vectors [1, 1, D] that are `in_loops`: a is `strength`, and with `unit`, where v
    has length 1 or 0, `strength` max(||m||, ||m|| - m.v)."""
    output = torch.empty_like(m)
    loops().tilted(m.data_ptr(), v.data_ptr(), output.data_ptr(), m.shape[2], strength, unit)
    return output


def _boosted(
    query_at: Any,
    key_at: Any,
    value_at: Any,
    factors_at: Any,
    output_at: Any,
    heads: int,
    groups: int,
    keys: int,
    width: int,
    scaling: float,
) -> None:
    query = array_at(query_at, (heads, width))
    key = array_at(key_at, (groups, keys, width))
    value = array_at(value_at, (groups, keys, width))
    factors = array_at(factors_at, keys)
    output = array_at(output_at, (heads, width))
    weights = np.empty(keys, np.float32)
    for h in range(heads):
        q, k, v, of_head = query[h], key[h // (heads // groups)], value[h // (heads // groups)], output[h]
        highest = np.float32(-np.inf)
        for j in range(keys):
            z = np.float32(0)
            for i in range(width):
                z += q[i] * k[j, i]
            z *= scaling
            z += factors[j] * abs(z)
            weights[j] = z
            highest = max(highest, z)
        total = np.float32(0)
        for j in range(keys):
            weights[j] = math.exp(weights[j] - highest)
            total += weights[j]
        of_head[:] = 0
        for j in range(keys):
            weight = weights[j] / total
            for i in range(width):
                of_head[i] += weight * v[j, i]


def _tilted(m_at: Any, v_at: Any, output_at: Any, width: int, strength: Any, unit: bool) -> None:
    m, v = array_at(m_at, width), array_at(v_at, width)
    output = array_at(output_at, width)
    square, along = np.float32(0), np.float32(0)
    for i in range(width):
        square += m[i] * m[i]
        along += m[i] * v[i]
    length = math.sqrt(square)
    amount = strength
    if unit:
        amount *= max(length, length - along)
    after = np.float32(0)
    for i in range(width):
        output[i] = m[i] + amount * v[i]
        after += output[i] * output[i]
    shrink = length / math.sqrt(after) if after > 1e-24 else length * 1e12
    for i in range(width):
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
    boosted_as = "void(voidptr, voidptr, voidptr, voidptr, voidptr, intp, intp, intp, intp, float32)"
    tilted_as = "void(voidptr, voidptr, voidptr, intp, float32, boolean)"
    return Loops(
        called_with_addresses(_boosted, boosted_as, liberties), called_with_addresses(_tilted, tilted_as, liberties)
    )
