"""The one error that bad input raises: a sentence that names the input and says what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one clear sentence, ready to be shown."""


def unknown(what: str, name: str, allowed: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not one of `allowed`, with the nearest allowed name suggested.

    >>> str(unknown("benchmark", "poep", ["pope", "chair"]))
    "unknown benchmark 'poep' (did you mean 'pope'?); known: chair, pope"
    """
    names = sorted(allowed)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    known = ", ".join(names) if len(names) <= 40 else f"{', '.join(names[:10])} and {len(names) - 10} more"
    return InputError(f"unknown {what} {name!r}{hint}; known: {known}")
