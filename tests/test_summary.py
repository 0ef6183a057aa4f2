"""What a run says about each method: scores that see a shift of the threshold and scores that do not, and words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sightline.bench import _options
from sightline.benchmarks.chair import Chair
from sightline.benchmarks.changes import NO_DIFFERENCE, change, lower_is_better
from sightline.benchmarks.item import Answer, Benchmark, Score
from sightline.benchmarks.pope import Pope
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.statistics import holm
from sightline.benchmarks.summary import Summary, summarise
from sightline.errors import InputError
from sightline.models.answering import FARTHEST

PICTURES = 60


def write_run(folder: Path, benchmark: Benchmark, split: str, rows: Mapping[str, list[dict[str, Any]]]) -> Path:
    """A run as the runner writes it, whose rows are given."""
    settings = {"model": "m", "benchmark": benchmark.name, "options": _options(benchmark), "split": split}
    run = RunFolder(folder)
    with run.opened(settings, {}, list(rows)):
        for method, own in rows.items():
            run.append({"method": method, **row} for row in own)
    return folder


def pope_rows(margins: np.ndarray) -> list[dict[str, Any]]:
    """Answers to the questions on `PICTURES` pictures: yes where the margin is above 0."""
    pope = Pope()
    items = pope.items("random", len(margins))
    return [
        pope.row(Answer(item, "yes" if margin > 0 else "no", 1, {"yes_logit_margin": float(margin)}))
        for item, margin in zip(items, margins, strict=True)
    ]


def own_margins(seed: int = 0, gap: float = 2.0) -> np.ndarray:
    """Margins of the questions, yes and no in turn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(6 * PICTURES) % 2 == 0
    return rng.normal(size=6 * PICTURES) + gap * labels - gap / 2


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """The unmodified model, one with its threshold moved, one that separates better on another scale, one that adds
    noise to the order, and the same one again."""
    margins = own_margins()
    labels = np.arange(len(margins)) % 2 == 0
    rows = {
        "none": pope_rows(margins),
        "shifted": pope_rows(margins + 1.5),
        "better": pope_rows(3 * (margins + 1.2 * labels - 0.6)),
        "noisy": pope_rows(margins + 2 * np.random.default_rng(9).normal(size=len(margins))),
        "same": pope_rows(margins),
    }
    return summarise(write_run(tmp_path_factory.mktemp("run"), Pope(), "random", rows))


def test_a_planted_threshold_shift_is_called_one(planted: Summary) -> None:
    none, shifted, *_ = planted.methods
    for name in ("auroc", "calibrated_accuracy"):
        assert shifted.scores[name] == none.scores[name]
        assert shifted.p_values[name] == 1.0
    assert shifted.scores["accuracy"].value < none.scores["accuracy"].value - 0.05
    assert shifted.scores["yes_rate"].value > none.scores["yes_rate"].value + 0.1
    assert shifted.p_values["accuracy"] == shifted.p_value
    assert max(shifted.p_values["accuracy"], shifted.p_values["yes_rate"]) < 0.05
    assert shifted.change is not None
    assert shifted.change.kind == "threshold shift"
    assert "accuracy" in shifted.change.worse
    assert "recall" in shifted.change.better
    assert shifted.change.moved == ("yes_rate",)
    assert shifted.change.level == ("auroc", "calibrated_accuracy")


def test_a_planted_separation_is_called_one_whatever_its_scale(planted: Summary) -> None:
    better, noisy, same = planted.methods[2:]
    assert [method.change.kind for method in (better, noisy, same) if method.change] == [
        "separation better",
        "separation worse",
        NO_DIFFERENCE,
    ]
    assert better.change is not None
    assert {"accuracy", "auroc", "calibrated_accuracy"} <= set(better.change.better)
    assert same.no_difference_shown
    assert set(same.p_values.values()) == {1.0}
    assert planted.methods[0].change is None
    assert planted.methods[0].p_values == {}


def test_p_values_are_adjusted_for_each_score_by_itself(planted: Summary) -> None:
    none = pope_rows(own_margins())
    labels = np.arange(6 * PICTURES) % 2 == 0
    noise = 2 * np.random.default_rng(9).normal(size=len(labels))
    others = [own_margins() + 1.5, 3 * (own_margins() + 1.2 * labels - 0.6), own_margins() + noise, own_margins()]
    raw = [Pope().paired_others(none, pope_rows(margins)) for margins in others]
    for name in raw[0]:
        assert [method.p_values[name] for method in planted.methods[1:]] == holm([own[name] for own in raw])


def test_a_ruled_out_answer_is_counted(tmp_path: Path) -> None:
    margins = own_margins()
    masked = np.where(np.abs(margins) > 1, np.sign(margins) * FARTHEST, margins)
    summary = summarise(write_run(tmp_path, Pope(), "random", {"none": pope_rows(margins), "m": pope_rows(masked)}))
    none, method = summary.methods
    assert none.ruled_out == 0
    assert method.ruled_out == pytest.approx((np.abs(margins) > 1).mean())
    assert method.scores["auroc"].value < none.scores["auroc"].value, "what ties cannot be told apart"
    assert method.scores["accuracy"] == none.scores["accuracy"]


def test_without_margins_there_is_no_word_on_the_threshold(tmp_path: Path) -> None:
    rows = {"none": pope_rows(own_margins()), "shifted": pope_rows(own_margins() + 1.5)}
    for row in rows["shifted"]:
        del row["yes_logit_margin"]
    shifted = summarise(write_run(tmp_path, Pope(), "random", rows)).methods[1]
    assert "auroc" not in shifted.p_values
    assert "auroc" not in shifted.scores
    assert shifted.change is not None
    assert shifted.change.kind == "better and worse"
    assert shifted.ruled_out is None


def test_what_failed_everywhere_is_refused_and_the_rest_is_told(tmp_path: Path) -> None:
    failed = [{"id": row["id"], "group": row["group"], "error": "no memory"} for row in pope_rows(own_margins()[:12])]
    folder = write_run(tmp_path, Pope(), "random", {"none": pope_rows(own_margins()[:12]), "vhr": failed})
    run = RunFolder(folder)
    run.update(run.info() | {"refused": {"fastervlm": "it needs a [CLS] token"}})
    summary = summarise(folder)
    assert [method.method for method in summary.methods] == ["none"]
    assert summary.refused == {"fastervlm": "it needs a [CLS] token", "vhr": "every item failed with vhr: no memory"}
    only = write_run(tmp_path / "only", Pope(), "random", {"none": failed})
    with pytest.raises(InputError, match="every item failed with none: no memory"):
        summarise(only)


# --- Captions ---


def caption_rows(texts: list[str], objects: list[list[str]]) -> list[dict[str, Any]]:
    chair = Chair()
    return [
        {"id": f"{i}", "group": f"{i}", "text": text, "cut_off": False, **chair._facts(there, text)}
        for i, (text, there) in enumerate(zip(texts, objects, strict=True))
    ]


def test_fewer_hallucinations_paid_for_with_recall_are_told_with_their_price(tmp_path: Path) -> None:
    there = [["boat", "cup", "dog"]] * 40
    wordy = ["A boat, a cup, a dog and a truck."] * 30 + ["A boat, a cup, a dog."] * 10
    rows = {
        "none": caption_rows(wordy, there),
        "terse": caption_rows(["A boat."] * 40, there),
        "clean": caption_rows(["A boat, a cup, a dog."] * 40, there),
        "same": caption_rows(wordy, there),
    }
    _, terse, clean, same = summarise(write_run(tmp_path, Chair(), "test", rows)).methods
    assert [method.change.kind for method in (terse, clean, same) if method.change] == [
        "fewer hallucinations, lower recall",
        "fewer hallucinations",
        NO_DIFFERENCE,
    ]
    assert terse.change is not None
    assert set(terse.change.better) >= {"chair_s", "chair_i", "precision"}
    assert terse.change.moved == ("length",)
    assert list(terse.p_values) == ["chair_s", "chair_i", "recall", "precision", "f1", "length"]


# --- Words ---


def words_of(gains: Mapping[str, float], p_values: Mapping[str, float]) -> str:
    base = {name: Score(0.5, 0.4, 0.6, 9) for name in gains}
    scores = {name: Score(0.5 + gain, 0.4, 0.6, 9) for name, gain in gains.items()}
    return change(scores, base, p_values).kind


@pytest.mark.parametrize(
    ("gains", "shown", "kind"),
    [
        ({"accuracy": 0.1, "auroc": 0.1, "calibrated_accuracy": 0.1}, {"auroc"}, "separation better"),
        ({"accuracy": 0.1, "auroc": 0.1, "calibrated_accuracy": -0.1}, {"calibrated_accuracy"}, "separation worse"),
        (
            {"accuracy": 0.1, "auroc": 0.1, "calibrated_accuracy": -0.1},
            {"auroc", "calibrated_accuracy"},
            "separation changed",
        ),
        ({"accuracy": 0.1, "auroc": 0.1, "calibrated_accuracy": 0.1}, {"accuracy"}, "threshold shift"),
        ({"accuracy": 0.1, "auroc": 0.1, "calibrated_accuracy": 0.1}, set(), NO_DIFFERENCE),
        ({"chair_s": 0.1, "chair_i": 0.0, "recall": 0.1}, {"chair_s", "recall"}, "more hallucinations, higher recall"),
        ({"chair_s": 0.0, "chair_i": -0.1, "recall": 0.1}, {"chair_i"}, "fewer hallucinations"),
        ({"chair_s": 0.0, "chair_i": -0.1, "recall": -0.1}, {"recall"}, "lower recall"),
        ({"all": 0.1, "colour": 0.1, "count": -0.1}, {"colour"}, "better"),
        ({"all": 0.1, "colour": 0.1, "count": -0.1}, {"colour", "count"}, "better and worse"),
        ({"all": 0.1, "length": 0.1}, {"length"}, "changed"),
    ],
)
def test_kinds_of_change(gains: dict[str, float], shown: set[str], kind: str) -> None:
    assert words_of(gains, {name: 0.01 if name in shown else 0.05 for name in gains}) == kind


def test_scores_fall_into_better_worse_moved_and_level() -> None:
    base = {name: Score(0.5, 0.4, 0.6, 9) for name in ("chair_i", "recall", "length", "f1")}
    scores = {name: Score(0.6, 0.4, 0.6, 9) for name in base}
    found = change(scores, base, {"chair_i": 0.01, "recall": 0.01, "length": 0.01, "f1": 0.9})
    assert (found.better, found.worse, found.moved, found.level) == (("recall",), ("chair_i",), ("length",), ("f1",))
    assert lower_is_better("caption_chair_i")
    assert not lower_is_better("caption_recall")


def test_a_lower_auroc_is_not_held_against_a_method_that_rules_answers_out() -> None:
    """Ruled-out answers tie at the end of the scale; a higher AUROC, and calibrated accuracy, count all the same."""

    def scores(auroc: float, accuracy: float = 0.9) -> dict[str, Score]:
        values = {"accuracy": accuracy, "yes_rate": 0.5, "auroc": auroc, "calibrated_accuracy": 0.9}
        return {name: Score(value, 0.0, 1.0, 100) for name, value in values.items()}

    only_auroc = {"accuracy": 1.0, "yes_rate": 1.0, "auroc": 0.001, "calibrated_accuracy": 1.0}
    base = scores(0.95)
    assert change(scores(0.90), base, only_auroc).kind == "separation worse"
    assert change(scores(0.90), base, only_auroc, ruled_out=0.3).kind == NO_DIFFERENCE
    assert change(scores(0.99), base, only_auroc, ruled_out=0.3).kind == "separation better"
    shifted = only_auroc | {"accuracy": 0.001}
    assert change(scores(0.90, accuracy=0.95), base, shifted, ruled_out=0.3).kind == "threshold shift"
    calibrated = only_auroc | {"calibrated_accuracy": 0.001}
    worse = scores(0.90) | {"calibrated_accuracy": Score(0.8, 0.0, 1.0, 100)}
    assert change(worse, base, calibrated, ruled_out=0.3).kind == "separation worse"
