"""A linear recurrence over any shape, three ways: what state space models, convolutional ones included, scan with.

In: a and b, time first, real or complex. Out: h, of b's shape.

    h_t = a_t h_{t-1} + b_t     elementwise;   h_0 = a_0 start + b_0

The steps compose: (a', b') after (a, b) is (a' a, a' b + b'), associatively. The forms differ in the order in which
they do: one after the other; by doubling (Hillis and Steele), log2 T times over all T; or in chunks, within all chunks
at once and then from each chunk to the next. None divides by a product of decays, which would overflow.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from sightline.errors import InputError, unknown

Mode = Literal["loop", "doubling", "chunked"]


def linear_recurrence(a: Tensor, b: Tensor, h0: Tensor | None = None, mode: Mode = "loop") -> Tensor:
    """All states of h_t = a_t h_{t-1} + b_t; differentiable in all arguments.

    Args:
        a: broadcasts to b; of one entry along time, or without the axis, where it does not change.
        b: [T, ...].
        h0: broadcasts to b[0]: the state before the first step, zeros if None.
        mode: `loop` works least and is the fastest on a CPU; `doubling` pays on wide hardware and small states;
            `chunked` does some 2 sqrt(T) operations, each sqrt(T) steps wide.

    Returns:
        [T, ...], in the dtype that those of the arguments promote to.

    Raises:
        InputError: shapes that do not broadcast, no step at all, or an unknown mode.
    """
    if mode not in get_args(Mode):
        raise unknown("mode of linear_recurrence", mode, get_args(Mode))
    if b.ndim == 0 or len(b) == 0:
        raise InputError(f"b of linear_recurrence must be [T, ...] with a step at least, not of shape {list(b.shape)}")
    _check_broadcast("a", a, b)
    a = a.reshape(*[1] * (b.ndim - a.ndim), *a.shape)
    dtype = torch.promote_types(a.dtype, b.dtype)
    if h0 is not None:
        _check_broadcast("h0", h0, b[0])
        dtype = torch.promote_types(dtype, h0.dtype)
        b = torch.cat([(a[0] * h0 + b[0])[None], b[1:]])
    a, b = a.to(dtype), b.to(dtype)
    return {"loop": _loop, "doubling": _doubling, "chunked": _chunked}[mode](a, b)


def _check_broadcast(name: str, given: Tensor, to: Tensor) -> None:
    if given.ndim > to.ndim or any(
        size not in (1, wanted) for size, wanted in zip(given.shape[::-1], to.shape[::-1], strict=False)
    ):
        raise InputError(
            f"{name} of linear_recurrence must broadcast to {list(to.shape)}, and has the shape {list(given.shape)}"
        )


def _loop(a: Tensor, b: Tensor) -> Tensor:
    factors = a.unbind(0) if len(a) == len(b) else [a[0]] * len(b)
    h, *rest = b.unbind(0)
    states = [h]
    for factor, value in zip(factors[1:], rest, strict=True):
        h = factor * h + value
        states.append(h)
    return torch.stack(states)


def _doubling(a: Tensor, b: Tensor) -> Tensor:
    length, reach = len(b), 1
    while reach < length:
        # Until here, b_t holds what the last `reach` steps brought, and a_t the product of their factors.
        b = torch.cat([b[:reach], a[-(length - reach) :] * b[:-reach] + b[reach:]])
        a = a * a if len(a) == 1 else torch.cat([a[:reach], a[reach:] * a[:-reach]])
        reach *= 2
    return b


def _chunked(a: Tensor, b: Tensor) -> Tensor:
    length = len(b)
    size = math.isqrt(length - 1) + 1
    chunks = math.ceil(length / size)
    spare = chunks * size - length
    a = a.expand(length, *a.shape[1:])
    # Steps that fill the last chunk bring nothing; what they hold is cut off.
    a = torch.cat([a, a.new_ones(spare, *a.shape[1:])]).unflatten(0, (chunks, size))
    b = torch.cat([b, b.new_zeros(spare, *b.shape[1:])]).unflatten(0, (chunks, size))
    within = _loop(a.transpose(0, 1), b.transpose(0, 1))
    products = a.cumprod(1).transpose(0, 1)
    ends = _loop(products[-1], within[-1])
    before = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    return (products * before + within).transpose(0, 1).flatten(0, 1)[:length]
