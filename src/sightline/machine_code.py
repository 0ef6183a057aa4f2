"""Loops in machine code for the CPU: numba compiles them where it is installed (`pip install 'sightline[cpu]'`).

What is compiled holds no interpreter lock, and is kept in a folder from run to run where there is one to write to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from typing import Any


@functools.cache
def has_numba() -> bool:
    """Whether loops can be compiled here."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def compiled(loops: Callable[..., None], fastmath: Set[str]) -> Callable[..., None]:
    """The function in machine code.

    Args:
        loops: a function of arrays and numbers.
        fastmath: the liberties that may be taken with its arithmetic, by LLVM's names.

    Raises:
        ImportError: numba is not installed.
    """
    from numba import njit

    return _kept(njit, loops, fastmath)


def called_with_addresses(loops: Callable[..., None], signature: str, fastmath: Set[str]) -> Callable[..., None]:
    """The function in machine code, for calls that are to take no more than a microsecond.

    Args:
        loops: a function of addresses, of which it makes arrays by numba's `carray`, and numbers.
        signature: the types of its arguments, in numba's words.
        fastmath: as for `compiled`.

    Returns:
        A function of whole numbers in the place of addresses. Nothing checks what is there.

    Raises:
        ImportError: numba is not installed.
    """
    from numba import cfunc

    function: Callable[..., None] = _kept(functools.partial(cfunc, signature), loops, fastmath).ctypes
    return function


def _kept(compiler: Callable[..., Any], loops: Callable[..., None], fastmath: Set[str]) -> Any:
    options: dict[str, Any] = dict(nogil=True, fastmath=set(fastmath), error_model="numpy")
    try:
        return compiler(cache=True, **options)(loops)
    except RuntimeError:  # no folder can be written to
        return compiler(**options)(loops)
