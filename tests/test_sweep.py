"""Sweeps over a method's strength: the entries of a run, and the curves found among them."""

from __future__ import annotations

import dataclasses

import pytest

from sightline.benchmarks.sweep import Curve, curves, expand
from sightline.errors import InputError
from sightline.grounding.vista import Vista
from sightline.methods import methods, parse_methods
from sightline.reduction.fastervlm import FasterVLM


def values(spec: str) -> list[float]:
    """The values of the last number of each entry."""
    return [float(entry.rpartition("=")[2]) for entry in expand(spec)]


def test_a_method_alone_is_swept_over_its_main_strength_with_its_default() -> None:
    field, usual = Vista.main_strength
    assert expand("vista") == expand(f"vista:{field}")
    assert values("vista") == sorted({*usual, Vista().strength})
    assert all(entry.startswith(f"vista:{field}=") for entry in expand("vista"))
    assert values("fastervlm:keep") == sorted({*FasterVLM.main_strength[1], FasterVLM().keep})


def test_every_method_can_be_swept() -> None:
    for name, kind in methods().items():
        entries = expand(name)
        assert len(entries) >= 3
        field = kind.main_strength[0]
        found = [getattr(parse_methods(entry)[0], field) for entry in entries]
        assert found == sorted(found)
        assert found[-1] > found[0]
        (curve,) = [one for one in curves(entries) if one.field == field]
        assert [entry for _, entry in curve.points] == entries


def test_ranges_are_walked_in_equal_steps_or_equal_ratios() -> None:
    assert values("vista:strength=0.01..0.3") == pytest.approx([0.01 * 30 ** (step / 5) for step in range(6)], rel=1e-3)
    assert values("fastervlm:keep=0.1..0.9..5") == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert values("vista:strength=0.1..0.4..3log") == [0.1, 0.2, 0.4]
    assert values("vista:strength=0.01..0.3..3lin") == [0.01, 0.155, 0.3]
    assert values("vista:strength=0..0.3..4") == [0, 0.1, 0.2, 0.3]


def test_a_share_is_swept_down_to_little_with_the_stock_model_at_its_end() -> None:
    for spec in ("fastervlm:keep=0.05..1.0", "fastervlm:keep=0.05..1"):
        entries = expand(spec)
        assert len(entries) == 6
        assert entries[0] == "fastervlm:keep=0.05"
        assert parse_methods(entries[-1])[0].is_identity


def test_whole_numbers_stay_whole_and_come_once() -> None:
    assert expand("vista:window=1..3..9") == ["vista:window=1", "vista:window=2", "vista:window=3"]


def test_listed_values_are_taken_as_they_are_written() -> None:
    assert expand("vista:strength=0.30;0.1") == ["vista:strength=0.30", "vista:strength=0.1"]


def test_other_parameters_and_other_methods_are_kept() -> None:
    assert expand("vista:gamma=0.2,strength=0.1;0.2") == [
        "vista:gamma=0.2,strength=0.1",
        "vista:gamma=0.2,strength=0.2",
    ]
    assert expand("fastervlm:keep=0.25 + vista:strength=0.1;0.2+ritual") == [
        "fastervlm:keep=0.25+vista:strength=0.1+ritual",
        "fastervlm:keep=0.25+vista:strength=0.2+ritual",
    ]
    # A list of layers is no sweep over layers.
    assert expand("vhr:layers=1;2,alpha=2;3") == ["vhr:layers=1;2,alpha=2", "vhr:layers=1;2,alpha=3"]


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("vist", "did you mean 'vista'"),
        ("none", "unknown method 'none'"),
        ("vista:strenth", "did you mean 'strength'"),
        ("vista:gamma", "which values of gamma"),
        ("vista:strength=0.1", "sets strength to one value"),
        ("vista:site=a;b", "site of vista is no number"),
        ("vhr:layers=1..4", "layers of vhr is no number"),
        ("vista:strength=0.3..0.1", "LOW below HIGH"),
        ("vista:strength=0..0.1..4log", "LOW above 0"),
        ("vista:strength=0.1..0.3..1", "N at least 2"),
        ("vista:strength=..", "LOW..HIGH"),
        ("vista:strength=0.1..0.2..3..4", "LOW..HIGH"),
        ("vista:strength=0.1;x", "must be a number"),
        ("vista:strength=0.1;-5", "must lie in"),
        ("vista:strength=0.1;0.2,gamma=0.1;0.2", "names 2"),
        ("vista+ritual", "names 0"),
        ("vista:strength+ritual:alpha", "names 2"),
    ],
)
def test_sweeps_that_cannot_be_read(spec: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        expand(spec)


# --- Curves among the entries of a run ---


def test_entries_that_differ_in_one_number_make_a_curve() -> None:
    entries = ["none", "vista:strength=0.3", "vista", "ritual", "vista:strength=0.05", "vista:strength=0.1,gamma=0.2"]
    assert curves(entries) == (
        Curve(
            "vista",
            "vista",
            "strength",
            Vista().strength,
            ((0.05, "vista:strength=0.05"), (Vista().strength, "vista"), (0.3, "vista:strength=0.3")),
        ),
    )
    assert curves(entries[:3]) == (), "two points are no curve"


def test_curves_of_a_method_with_others_are_their_own() -> None:
    alone = expand("vista:strength=0.1;0.2;0.3")
    fewer = expand("fastervlm:keep=0.1+vista:strength=0.1;0.2;0.3")
    other = expand("fastervlm:keep=0.5+vista:strength=0.1;0.2;0.3")
    found = {curve.label: [entry for _, entry in curve.points] for curve in curves([*alone, *fewer, *other])}
    assert found == {"vista": alone, "fastervlm:keep=0.1+vista": fewer, "fastervlm:keep=0.5+vista": other}


def test_what_is_no_method_lies_on_no_curve() -> None:
    assert curves(["none", "gone:strength=1", "gone:strength=2", "gone:strength=3", "<script>"]) == ()


def test_the_default_of_a_curve_is_the_methods_own() -> None:
    default = next(field.default for field in dataclasses.fields(FasterVLM) if field.name == "keep")
    (curve,) = curves(expand("fastervlm:keep=0.3;0.6;0.9"))
    assert curve.default == default
