"""Methods in pairs: the plan of a run, what a pair adds, and runs that go on past what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_runs import small_run
from test_summary import PICTURES, own_margins, pope_rows, write_run
from tiny_checkpoint import save_tiny_checkpoint

from sightline.benchmarks.pairs import pair_effects, pairs, parted
from sightline.benchmarks.pope import Pope
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.statistics import holm
from sightline.benchmarks.summary import summarise
from sightline.errors import InputError
from sightline.grounding.ritual import Ritual
from sightline.grounding.vhr import VHR


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))


def test_the_plan_holds_singles_and_all_pairs_in_the_order_given() -> None:
    plan = pairs(["none", "vista", " ritual ", "fastervlm:keep=0.25", "vista"])
    assert plan.singles == ("vista", "ritual", "fastervlm:keep=0.25")
    assert plan.pairs == ("vista+ritual", "vista+fastervlm:keep=0.25", "ritual+fastervlm:keep=0.25")
    assert plan.refused == {}
    assert plan.entries == ["none", *plan.singles, *plan.pairs]


def test_a_pair_that_is_given_is_there_besides_in_its_own_order() -> None:
    plan = pairs(["vista", "ritual + vista"])
    assert plan.singles == ("vista", "ritual")
    assert plan.pairs == ("vista+ritual", "ritual+vista")


def test_pairs_that_do_not_compose_are_in_the_plan_with_the_reason() -> None:
    plan = pairs(["vista", "fastervlm:keep=0.25", "fastervlm:keep=0.5"])
    assert list(plan.refused) == ["fastervlm:keep=0.25+fastervlm:keep=0.5"]
    assert "given twice" in plan.refused["fastervlm:keep=0.25+fastervlm:keep=0.5"]
    assert plan.entries[-1] == "fastervlm:keep=0.25+fastervlm:keep=0.5"


def test_what_methods_change_alone_does_not_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Ritual, VHR):
        monkeypatch.setattr(kind, "changes", frozenset({"the weather"}))
    plan = pairs(["ritual", "vista", "vhr"])
    assert plan.pairs == ("ritual+vista", "vista+vhr")
    assert plan.refused == {"ritual+vhr": "ritual and vhr do not compose: both change the weather"}


@pytest.mark.parametrize(
    ("specs", "match"),
    [
        (["vista"], "two methods or more"),
        (["none"], "two methods or more"),
        (["vista", "ritual+vhr+vista"], "run in pairs"),
        (["vista", "vhs"], "did you mean"),
        (["vista", "fastervlm:keep=2"], "keep of fastervlm"),
    ],
)
def test_plans_that_cannot_be_made(specs: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        pairs(specs)


def test_parts_of_a_pair() -> None:
    assert parted("vista+fastervlm:keep=0.25") == ("vista", "fastervlm:keep=0.25")
    assert parted("vista") is None
    assert parted("a+b+c") is None


# --- What a pair adds ---


def test_a_pair_is_compared_with_the_better_of_its_methods(tmp_path: Path) -> None:
    margins = own_margins(gap=1.5)
    gain = own_margins(seed=5, gap=1.5)
    # Of two readings of the same question the sum separates better than the better of the two.
    rows = {
        "none": pope_rows(margins),
        "vista": pope_rows(margins + 0.4),
        "ritual": pope_rows(gain),
        "vista+ritual": pope_rows(margins + gain),
        "ritual+vista": pope_rows(gain),
        "vhr+vista": pope_rows(margins),
    }
    summary = summarise(write_run(tmp_path, Pope(), "random", rows))
    both, back = summary.pairs
    assert (both.pair, both.first, both.second) == ("vista+ritual", "vista", "ritual")
    accuracy = {method.method: method.scores["accuracy"].value for method in summary.methods}
    assert both.better == max(("vista", "ritual"), key=accuracy.__getitem__)
    assert both.difference == pytest.approx(accuracy["vista+ritual"] - accuracy[both.better])
    raw = [Pope().paired(rows[both.better], rows[name]) for name in ("vista+ritual", "ritual+vista")]
    assert [both.p_value, back.p_value] == holm(raw)
    assert both.difference > 0.03
    assert not both.no_difference_shown
    assert (back.difference, back.p_value, back.no_difference_shown) == (0.0, 1.0, True)


def test_only_items_that_all_three_answered_count() -> None:
    rows = {name: pope_rows(own_margins(seed)) for seed, name in enumerate(("a", "b", "a+b"))}
    short = {"a": rows["a"][: 6 * PICTURES - 60], "b": rows["b"][60:], "a+b": rows["a+b"]}
    inner = {name: own[60 : 6 * PICTURES - 60] for name, own in rows.items()}
    assert pair_effects(Pope(), "accuracy", short) == pair_effects(Pope(), "accuracy", inner)
    assert pair_effects(Pope(), "accuracy", short | {"a": rows["a"][:60]}) == ()


def test_the_better_of_two_has_the_lower_score_where_low_is_good() -> None:
    class Low(Pope):
        def measure(self, row: Any) -> float:
            return 1.0 - row["hit"]

    answers = {name: pope_rows(own_margins(gap=gap)) for name, gap in (("a", 0.5), ("b", 3.0), ("a+b", 1.0))}
    (effect,) = pair_effects(Low(), "chair_s", answers)
    assert effect.better == "b"
    assert effect.difference > 0


# --- Runs ---


def test_a_run_of_pairs_goes_on_past_what_is_refused_and_notes_why(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Ritual, anatomy: Any) -> None:
        raise InputError("ritual cannot work on this model")

    monkeypatch.setattr(Ritual, "check", refuse)
    entries = pairs(["vista", "ritual", "fastervlm:keep=0.5"]).entries
    summary = small_run(checkpoint, tmp_path, entries, items=6, skip_refused=True)
    assert [method.method for method in summary.methods] == [
        "none",
        "vista",
        "fastervlm:keep=0.5",
        "vista+fastervlm:keep=0.5",
    ]
    assert [effect.pair for effect in summary.pairs] == ["vista+fastervlm:keep=0.5"]
    wanted = dict.fromkeys(("ritual", "vista+ritual", "ritual+fastervlm:keep=0.5"), "ritual cannot work on this model")
    assert RunFolder(tmp_path).info()["refused"] == wanted
    assert summary.refused == wanted
    with pytest.raises(InputError, match="cannot work on this model"):
        small_run(checkpoint, tmp_path, entries, items=6)
    monkeypatch.undo()
    again = small_run(checkpoint, tmp_path, entries, items=6, skip_refused=True)
    assert again.refused == {}, "what works by now is no longer refused"
    assert len(again.methods) == 7
