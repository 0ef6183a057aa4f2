"""The rules by which benchmarks read yes or no from an answer.

Published yes/no scores differ by the rule as much as by the model, so each rule has a name and is kept as its code
has it:

- ``pope``, the official evaluate.py of POPE: the text before the first full stop, commas removed, split at spaces;
  "no" if one of the words is exactly No, no or not; everything else is "yes", also an empty answer, "isn't", "No!"
  and "NO".
- ``opera``, of the code of OPERA, PAI, VISTA and RITUAL: full stops and commas removed from the whole answer; "no" if
  a word is No, no, NO or not or ends in n't; else "yes".
- ``llava``, of the code of VCD and AGLA: the right answer counts as given if it is a substring of the lower-cased
  answer (so "I do not know" is a right "no", and "yes and no" is always right); else the opposite counts as given.
- ``strict``: the first word must be yes or no, in any case; anything else is unparsed: wrong, and neither a yes nor a
  no.
"""

from __future__ import annotations

import re
from collections.abc import Callable


def _read_pope(text: str, label: str) -> str:
    return "no" if {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split(" ")) else "yes"


def _read_opera(text: str, label: str) -> str:
    words = text.replace(".", "").replace(",", "").split(" ")
    return "no" if any(word in {"No", "no", "NO", "not"} or word.endswith("n't") for word in words) else "yes"


def _read_llava(text: str, label: str) -> str:
    return label if label in text.lower() else {"yes": "no", "no": "yes"}[label]


def _read_strict(text: str, label: str) -> str | None:
    found = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return found[1].lower() if found else None


MATCHERS: dict[str, Callable[[str, str], str | None]] = {
    "pope": _read_pope,
    "opera": _read_opera,
    "llava": _read_llava,
    "strict": _read_strict,
}
"""Rule name -> function of the answer and the right answer; "yes", "no", or None for what the rule can't read."""


def is_plain(text: str) -> bool:
    """Whether the strict rule can read the answer."""
    return _read_strict(text, "") is not None
