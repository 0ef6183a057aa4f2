"""How results depend on a method's strength: entries of a run that differ in one number, and the curves they make.

`expand` turns a short form such as "vista" or "vista:strength=0.01..0.3" into the entries of a run; `curves` finds
among the entries of a run those that lie on a curve, however they came there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from sightline.errors import InputError, unknown
from sightline.methods import Method, describe, methods, parse_methods

POINTS = 6
"""How many values a range has that does not say it."""
WIDE = 10.0
"""A range of positive numbers whose ends are at least this many times apart is walked in equal ratios."""
FEWEST = 3
"""Fewer entries than this make no curve."""


def expand(spec: str) -> list[str]:
    """The short forms of a sweep.

    - "vista": the method's main strength, at the values that the method says and at its default;
    - "ritual:alpha": the same for this field, which must be the main strength;
    - "vista:strength=0.01..0.3": 6 values from end to end, "0.01..0.3..9": 9 values, in equal ratios where the ends are
      positive and ten times apart or more, else in equal steps ("0.01..0.3..9log" and "9lin" say which);
    - "vista:strength=0.01;0.1;0.3": these values.

    Further parameters are kept ("vista:gamma=0.3,strength=0.01..0.3"), and so are other methods with a + between, as
    long as one of them alone says what is swept ("fastervlm:keep=0.25+vista:strength").

    Raises:
        InputError: if it cannot be read, nothing or more than one thing is swept, or a value is refused by the method.
    """
    parts = [part.strip() for part in spec.split("+")]
    found = [_swept(part) for part in parts]
    places = [place for place, one in enumerate(found) if one is not None]
    if len(parts) == 1:
        places = [0]
    if len(places) != 1:
        raise InputError(f"a sweep changes one number, such as vista:strength=0.01..0.3; {spec!r} names {len(places)}")
    place = places[0]
    name, fixed = _fixed(parts[place])
    asked: str | None = None
    values: str | None = None
    if (swept := found[place]) is not None:
        name, fixed, asked, values = swept
    field, texts = _values(name, asked, values)
    if any(argument.startswith(f"{field}=") for argument in fixed):
        raise InputError(f"{spec!r} sets {field} to one value, so it cannot be swept")
    entries = []
    for text in texts:
        arguments = ",".join([*fixed, f"{field}={text}"])
        entries.append("+".join([*parts[:place], f"{name}:{arguments}", *parts[place + 1 :]]))
    for entry in entries:
        parse_methods(entry)  # refuses what the method refuses
    return entries


def _fixed(part: str) -> tuple[str, list[str]]:
    name, _, arguments = part.partition(":")
    return name, [argument for argument in arguments.split(",") if argument]


def _swept(part: str) -> tuple[str, list[str], str, str | None] | None:
    """Name, other parameters, swept field and its values (None: those of the method); None where nothing is swept."""
    name, arguments = _fixed(part)
    kinds = get_type_hints(_method(name))
    found = []
    for argument in arguments:
        field, equals, value = argument.partition("=")
        listed = ";" in value and "tuple" not in str(kinds.get(field))
        if not equals or ".." in value or listed:
            found.append((argument, field, value if equals else None))
    if not found:
        return None
    if len(found) > 1:
        raise InputError(f"a sweep changes one number; {part!r} names {len(found)}")
    argument, swept, values = found[0]
    return name, [other for other in arguments if other != argument], swept, values


def _method(name: str) -> type[Method]:
    known = methods()
    if name not in known:
        raise unknown("method", name, known)
    return known[name]


def _values(name: str, field: str | None, given: str | None) -> tuple[str, list[str]]:
    """The swept field, and its values as they are written."""
    method = _method(name)
    fields = {one.name: one for one in dataclasses.fields(method)}
    strength, usual = getattr(method, "main_strength", (None, ()))
    if field is None:
        field = strength
    if field is None:
        raise InputError(f"{name} has no main strength: say what is swept, as in {name}:FIELD=LOW..HIGH")
    if field not in fields:
        raise unknown(f"parameter of {name}", field, fields)
    kind = str(get_type_hints(method)[field])
    whole = "int" in kind
    if not (whole or "float" in kind) or "tuple" in kind:
        raise InputError(f"{field} of {name} is no number, so it cannot be swept")
    if given is None:
        if field != strength:
            raise InputError(f"say which values of {field} are swept, as in {name}:{field}=LOW..HIGH")
        values = list(usual)
        default = _default(fields[field])
        if default is not None and min(values) <= default <= max(values):
            values.append(default)
        return field, [_text(value) for value in sorted(set(values))]
    if ".." in given:
        values = _range(name, field, given)
        return field, list(dict.fromkeys(str(round(value)) if whole else _text(value) for value in values))
    return field, list(dict.fromkeys(value for value in given.split(";") if value))


def _text(value: float) -> str:
    """Four figures; never 1e+06, as a + parts methods."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _range(name: str, field: str, given: str) -> list[float]:
    low_text, high_text, *rest = given.split("..")
    count_text = rest[0] if rest else ""
    way = count_text[-3:] if count_text.endswith(("log", "lin")) else ""
    count_text = count_text.removesuffix(way)
    try:
        low, high = float(low_text), float(high_text)
        count = int(count_text) if count_text else POINTS
        if len(rest) > 1 or count < 2 or not -math.inf < low < high < math.inf or (way == "log" and low <= 0):
            raise ValueError
    except ValueError:
        raise InputError(
            f"the values of {field} of {name} must be LOW..HIGH or LOW..HIGH..N with LOW below HIGH and N at least 2 "
            f"(Nlog: LOW above 0), or a list with ; between, not {given!r}"
        ) from None
    if way == "log" or (not way and low > 0 and high / low >= WIDE):
        return [low * (high / low) ** (step / (count - 1)) for step in range(count)]
    return [low + (high - low) * step / (count - 1) for step in range(count)]


def _default(field: Any) -> float | None:
    value = field.default
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Curve:
    """Entries of a run that differ in one number alone.

    Attributes:
        label: the short form of what they share.
        method: the method whose number it is.
        field: its name.
        default: the method's default; None where it has none that is a number.
        points: (number, entry), from the smallest number on.
    """

    label: str
    method: str
    field: str
    default: float | None
    points: tuple[tuple[float, str], ...]


def curves(entries: Sequence[str]) -> tuple[Curve, ...]:
    """The curves among the entries of a run; an entry can lie on several. What is no short form of known methods lies
    on none."""
    found: dict[tuple[int, str, tuple[Method, ...]], dict[float, str]] = {}
    for entry in entries:
        try:
            chosen = parse_methods(entry)
        except InputError:
            continue
        for place, method in enumerate(chosen):
            for field in dataclasses.fields(method):
                value = getattr(method, field.name)
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    continue
                try:
                    shared = dataclasses.replace(method, **{field.name: field.default})
                except InputError:
                    continue
                key = (place, field.name, (*chosen[:place], shared, *chosen[place + 1 :]))
                found.setdefault(key, {}).setdefault(float(value), entry)
    made = []
    for (place, name, shared_by), points in found.items():
        if len(points) >= FEWEST:
            default = _default(next(field for field in dataclasses.fields(shared_by[place]) if field.name == name))
            made.append(
                Curve(describe(shared_by), shared_by[place].paper, name, default, tuple(sorted(points.items())))
            )
    return tuple(made)
