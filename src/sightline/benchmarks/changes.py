"""What a method changes, told from the paired tests of all its scores.

A method of yes/no questions can gain accuracy in two ways that differ much: it says yes more or less often (anybody can
have that, by another threshold on the same logits), or it tells yes from no better. AUROC and calibrated accuracy look
at the second alone, so together with accuracy and yes-rate they say which it was. Captions have a pair of their own:
objects that are not there against objects that are there and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sightline.benchmarks.item import Score

SHOWN = 0.05
"""A difference is shown when its adjusted p-value lies below this."""

NO_DIFFERENCE = "no difference shown"

WITHOUT_DIRECTION = frozenset({"yes_rate", "length"})
"""Scores of which neither more nor less is better."""
_WHATEVER_THE_THRESHOLD = ("auroc", "calibrated_accuracy")
FEW_RULED_OUT = 0.01
"""Where a method rules out yes or no on more questions than this, their margins tie at the end of the scale, and AUROC
falls by the ties alone."""


def lower_is_better(name: str) -> bool:
    """Whether a score is the better the lower it is (CHAIR, and what could not be read)."""
    return name == "unparsed" or ("chair" in name and not name.endswith("recall"))


@dataclass(frozen=True)
class Change:
    """What changed against the unmodified model.

    Attributes:
        kind: in a few words, such as "threshold shift" or "no difference shown".
        better, worse, moved: the scores whose difference is shown; moved are those without a direction.
        level: the compared scores of which no difference is shown.
    """

    kind: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    moved: tuple[str, ...]
    level: tuple[str, ...]


def change(
    scores: Mapping[str, Score], base: Mapping[str, Score], p_values: Mapping[str, float], ruled_out: float = 0.0
) -> Change:
    """What changed, by the adjusted p-values of the scores that were compared.

    A lower AUROC does not count where yes or no was ruled out on more than a few questions (`ruled_out`: their share).

    - With margins of yes and no: "separation better" or "separation worse" where AUROC or else calibrated accuracy
      differs ("separation changed" where they contradict each other), "threshold shift" where only scores differ that
      depend on the threshold.
    - Captions: fewer or more hallucinations (CHAIR_i, CHAIR_s), lower or higher recall, or both at once.
    - Else better, worse, or better and worse.
    """
    found: dict[str, list[str]] = {"better": [], "worse": [], "moved": [], "level": []}
    for name, p in p_values.items():
        gain = (scores[name].value - base[name].value) * (-1 if lower_is_better(name) else 1)
        tied = name == "auroc" and gain < 0 and ruled_out > FEW_RULED_OUT
        if p >= SHOWN or tied:
            found["level"].append(name)
        elif name in WITHOUT_DIRECTION:
            found["moved"].append(name)
        else:
            found["better" if gain > 0 else "worse"].append(name)
    kind = _kind(found["better"], found["worse"], found["moved"], set(p_values))
    return Change(kind, *(tuple(found[part]) for part in ("better", "worse", "moved", "level")))


def _kind(better: list[str], worse: list[str], moved: list[str], compared: set[str]) -> str:
    if not (better or worse or moved):
        return NO_DIFFERENCE
    if compared.issuperset(_WHATEVER_THE_THRESHOLD):
        ups = [name for name in _WHATEVER_THE_THRESHOLD if name in better]
        downs = [name for name in _WHATEVER_THE_THRESHOLD if name in worse]
        if ups or downs:
            return f"separation {'changed' if ups and downs else 'better' if ups else 'worse'}"
        return "threshold shift"
    if any("chair" in name for name in compared):
        fewer, more = (any("chair" in name for name in names) for names in (better, worse))
        higher, lower = (any(name.endswith("recall") for name in names) for names in (better, worse))
        told = []
        if fewer or more:
            told.append(f"{'fewer and more' if fewer and more else 'fewer' if fewer else 'more'} hallucinations")
        if higher or lower:
            told.append(f"{'higher' if higher else 'lower'} recall")
        if told:
            return ", ".join(told)
    return "better and worse" if better and worse else "better" if better else "worse" if worse else "changed"
