"""The runner with strategies, with items that have no picture, and with a limit on time."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bench_runs import TOKENS, Tints, lines, small_run
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from sightline import bench
from sightline.bench import run
from sightline.benchmarks import costs, item
from sightline.benchmarks.item import Item, get_benchmark, register_benchmark
from sightline.errors import InputError
from sightline.files import write_json
from sightline.methods import _REGISTERED, parse_methods
from sightline.models import answering
from sightline.models.conversation import Request, Steps, Strategy, Talk
from sightline.models.loading import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))


@pytest.fixture
def tints(monkeypatch: pytest.MonkeyPatch) -> type[Tints]:
    item.list_benchmarks()  # imports them, so that they are registered for good
    monkeypatch.setattr(item, "_registry", dict(item._registry))
    register_benchmark("tints")(Tints)
    monkeypatch.setattr(Tints, "broken", set())
    return Tints


def test_items_without_a_picture_have_batches_of_their_own() -> None:
    def made(name: str, shown: bool, limit: int = 8) -> Item:
        return Item(name, "?", "a", (lambda: Image.new("RGB", (1, 1))) if shown else None, name, "t", limit)

    items = [made("a", True), made("b", False), made("c", True), made("d", False, 4), made("e", False), made("f", True)]
    named = [[one.id for one in batch] for batch in bench._batches(items, 2)]
    assert named == [["a", "c"], ["f"], ["b", "e"], ["d"]]


def test_items_without_a_picture_are_answered_without_methods(
    checkpoint: str, tmp_path: Path, tints: type[Tints], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tints, "blind", {"tint-1", "tint-4", "tint-5"})
    run(checkpoint, "tints", ["vista", "ask_again"], tmp_path, batch_size=2, cost_items=2, quiet=True)
    rows = {(row["method"], row["id"]): row for row in lines(tmp_path)}
    assert len(rows) == 21
    model, processor = load(checkpoint)
    for (method, name), row in rows.items():
        assert row.get("text_only", False) == (name in Tints.blind)
        assert ("visual_tokens" in row) == (name not in Tints.blind and method != "ask_again")
        if name in Tints.blind:
            assert "calls" not in row
            inputs = processor.tokenizer(f"USER: {row['question']} ASSISTANT:", return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert row["text"] == processor.decode(output, skip_special_tokens=True).strip()


@dataclass(frozen=True)
class AskAgain(Strategy):
    """Asks about the picture, and then the question with what was said before it."""

    paper: ClassVar[str] = "ask_again"
    first: str = "What is there?"
    crooked: bool = False

    @property
    def is_identity(self) -> bool:
        return not self.first and not self.crooked

    def identity(self) -> AskAgain:
        return replace(self, first="")

    def steps(self, picture: Any, question: str, max_new_tokens: int, talk: Talk) -> Steps:
        (said,) = yield [Request(picture, self.first or "And?", 4, temperature=1.0, seed=3)]
        begin = (9,) if self.crooked else ()
        (last,) = yield [Request(picture, f"{said.text} {question}", max_new_tokens, begin=begin)]
        return last


@pytest.fixture(autouse=True)
def ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "LONGEST_EXTRA", 0.0)
    monkeypatch.setitem(_REGISTERED, "ask_again", AskAgain)


def test_strategies_are_run_like_any_method(checkpoint: str, tmp_path: Path) -> None:
    summary = small_run(checkpoint, tmp_path, ["ask_again", "vista+ask_again"], cost_items=1)
    whole = (tmp_path / "answers.jsonl").read_bytes()
    rows = lines(tmp_path)
    assert len(rows) == 24
    model, processor = load(checkpoint)
    items = {one.id: one for one in get_benchmark("pope").items("adversarial", 8)}
    for row in rows[8:]:
        one = items[row["id"]]
        assert one.picture is not None
        own = parse_methods("vista") if "vista" in row["method"] else ()
        made = AskAgain().answer(model, processor, one.picture(), one.question, TOKENS, own)
        assert (row["text"], row["n_tokens"], row["cut_off"]) == (made.text, made.n_tokens, made.cut_off)
        assert (row["calls"], row["generated"]) == (2, made.generated)
        assert "yes_logit_margin" in row
    assert all("calls" not in row for row in rows[:8])
    for method, calls in zip(summary.methods, (1, 2, 2), strict=True):
        assert method.cost is not None
        assert method.cost.calls == calls
        assert (method.cost.time_to_first_token is None) == (calls == 2)
    (tmp_path / "answers.jsonl").write_bytes(whole[: len(whole) * 3 // 5])
    small_run(checkpoint, tmp_path, ["ask_again", "vista+ask_again"], cost_items=1)
    assert (tmp_path / "answers.jsonl").read_bytes() == whole


def test_a_strategy_that_is_no_identity_at_its_identity_setting_is_refused(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ask_again:crooked=true changes the answers .* identity setting"):
        small_run(checkpoint, tmp_path, ["ask_again:crooked=true"])
    assert lines(tmp_path) == []


def test_answers_end_at_the_time_that_they_are_given(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count()
    monkeypatch.setattr(answering, "clock", lambda: float(next(looks)))  # a second later at each look
    small_run(checkpoint, tmp_path / "run", ["none", "ask_again"], max_seconds=2.5)
    rows = lines(tmp_path / "run")
    assert {row["n_tokens"] for row in rows if row["method"] == "none"} == {3}
    assert {(row["cut_off"], row["stopped"]) for row in rows} == {(True, "seconds")}
    assert {(row["text"], row["calls"]) for row in rows[8:]} == {("", 1)}
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["max_seconds"] == 2.5
    with pytest.raises(InputError, match=r"max_seconds: 2\.5, now not given"):
        small_run(checkpoint, tmp_path / "run", ["none"])


def test_a_folder_from_before_there_was_a_limit_on_time_is_gone_on_with(checkpoint: str, tmp_path: Path) -> None:
    small_run(checkpoint, tmp_path, ["none"], items=3)
    info = json.loads((tmp_path / "run.json").read_text())
    del info["settings"]["max_seconds"]
    write_json(tmp_path / "run.json", info)
    small_run(checkpoint, tmp_path, ["fastervlm"], items=3)
    assert len(lines(tmp_path)) == 6


def test_two_strategies_are_refused_before_anything_is_written(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both change the course of the conversation"):
        small_run(checkpoint, tmp_path / "run", ["ask_again+mvp_reasoning"])
    assert not (tmp_path / "run").exists()
