"""Loops in machine code for the CPU: numba compiles them where it is installed (`pip install 'sightline[cpu]'`).

What is compiled holds no interpreter lock, and is kept in a folder from run to run where there is one to write to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOG2_E = np.float32(1.4426950408889634)
# 2^f = 1 + f (P1 + f (P2 + ...)) on [-1/2, 1/2]: least largest relative error, 2e-9, under the value 1 at 0.
P1, P2, P3 = np.float32(0.6931472028550301), np.float32(0.2402264791359347), np.float32(0.05550332471154005)
P4, P5, P6 = np.float32(0.009618437361395598), np.float32(0.0013398874409193244), np.float32(0.00015353360970534987)
ONE, LOWEST, HIGHEST = np.float32(1), np.float32(-127), np.float32(128)
ROUNDER = np.float32(3 << 22)
"""1.5 * 2^23: a float32 of this size has no bits behind the point; adding it rounds, and leaves the whole number in the
low bits."""
EXPONENT_BIAS, MANTISSA_BITS = np.int32(127), np.int32(23)


def fast_exp(x: Any) -> Any:
    """exp inside compiled loops; in float32 a polynomial that vectors can be made of, accurate to 1e-7 (1 + |x|)."""
    raise NotImplementedError("only inside compiled code")


def _exp_of(x: Any) -> Callable[[Any], Any]:
    """What `fast_exp` is for an argument of numba's type x."""
    from numba import float64

    if x == float64:

        def exact(x: Any) -> Any:
            return math.exp(x)

        return exact

    def exp(x: Any) -> Any:
        power = x * LOG2_E
        power = LOWEST if power < LOWEST else power
        power = HIGHEST if power > HIGHEST else power
        shifted = power + ROUNDER
        f = power - (shifted - ROUNDER)
        fraction = ONE + f * (P1 + f * (P2 + f * (P3 + f * (P4 + f * (P5 + f * P6)))))
        whole = np.int32(np.int32(np.float32(shifted).view(np.int32) + EXPONENT_BIAS) << MANTISSA_BITS)
        return fraction * np.int32(whole).view(np.float32)

    return exp


def array_at(address: Any, shape: Any) -> Any:
    """The float32 numbers at an address as an array, inside compiled loops; `shape` is a number or a tuple of them."""
    raise NotImplementedError("only inside compiled code")


def _array_of(address: Any, shape: Any) -> Callable[..., Any]:
    """What `array_at` is."""
    from numba.np.numpy_support import carray

    def array(address: Any, shape: Any) -> Any:
        return carray(address, shape, np.float32)

    return array


@functools.cache
def _know_names() -> None:
    """Makes what only compiled loops can call known to the compiler."""
    from numba.extending import overload

    # Only fused multiply-adds are let through: with sums reordered, (x + ROUNDER) - ROUNDER would be x.
    overload(fast_exp, jit_options=dict(fastmath={"contract"}))(_exp_of)
    overload(array_at)(_array_of)


@functools.cache
def has_numba() -> bool:
    """Whether loops can be compiled here."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def in_loops(*tensors: Tensor) -> bool:
    """Whether loops of float32 arrays can be for these tensors, of which no gradient is wanted."""
    grad = torch.is_grad_enabled()
    for x in tensors:
        if not (x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()) or (grad and x.requires_grad):
            return False
    return has_numba()


def compiled(loops: Callable[..., Any], fastmath: Set[str]) -> Callable[..., Any]:
    """The function in machine code.

    Args:
        loops: a function of arrays and numbers.
        fastmath: the liberties that may be taken with its arithmetic, by LLVM's names.

    Raises:
        ImportError: numba is not installed.
    """
    from numba import njit

    return _kept(njit, loops, fastmath)


def called_with_addresses(loops: Callable[..., Any], signature: str, fastmath: Set[str]) -> Callable[..., Any]:
    """The function in machine code, for calls that are to take no more than a microsecond.

    Args:
        loops: a function of addresses, of which it makes arrays by `array_at`, and numbers.
        signature: the types of its arguments, in numba's words.
        fastmath: as for `compiled`.

    Returns:
        A function of whole numbers in the place of addresses. Nothing checks what is there.

    Raises:
        ImportError: numba is not installed.
    """
    from numba import cfunc

    function: Callable[..., Any] = _kept(functools.partial(cfunc, signature), loops, fastmath).ctypes
    return function


def _kept(compiler: Callable[..., Any], loops: Callable[..., Any], fastmath: Set[str]) -> Any:
    # What is kept is compiled anew when the file of `loops` changes, but not for a change in this one.
    _know_names()
    options: dict[str, Any] = dict(nogil=True, fastmath=set(fastmath), error_model="numpy")
    try:
        return compiler(cache=True, **options)(loops)
    except RuntimeError:  # no folder can be written to
        return compiler(**options)(loops)
