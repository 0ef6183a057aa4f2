"""Loops in machine code for the CPU: numba compiles them where it is installed (`pip install 'sightline[cpu]'`)."""

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
    """The function in machine code, which holds no interpreter lock and is kept in a folder from run to run where there
    is one to write to.

    Args:
        loops: a function of arrays and numbers.
        fastmath: the liberties that may be taken with its arithmetic, by LLVM's names.

    Raises:
        ImportError: numba is not installed.
    """
    from numba import njit

    options: dict[str, Any] = dict(nogil=True, fastmath=set(fastmath), error_model="numpy")
    try:
        function: Callable[..., None] = njit(cache=True, **options)(loops)
    except RuntimeError:  # no folder can be written to
        function = njit(**options)(loops)
    return function
