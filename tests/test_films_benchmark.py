"""The benchmark of films, and the runner on items that show several pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bench_runs import Tints, lines
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from sightline.bench import run
from sightline.benchmarks import costs
from sightline.benchmarks import films as films_module
from sightline.benchmarks import item as items_module
from sightline.benchmarks.costs import measure
from sightline.benchmarks.films import TASKS, Films
from sightline.benchmarks.item import Answer, Item, get_benchmark, register_benchmark
from sightline.benchmarks.statistics import wilson
from sightline.errors import InputError
from sightline.methods import attach, parse_methods
from sightline.models.answering import pictures_of, prepare
from sightline.models.conversation import answer
from sightline.models.loading import load
from sightline.picturebook.films import draw_film, sample_film
from sightline.report.examples import MOST_FRAMES, sheet
from sightline.report.page import write_report

N = 12
films = Films()


@pytest.fixture(scope="module")
def items() -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in films.items("test", N):
        found.setdefault(item.task, []).append(item)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))


# --- Items and scores ---


def test_every_task_has_its_items_each_on_a_film_of_its_own(items: dict[str, list[Item]]) -> None:
    assert list(items) == list(TASKS) == ["order", "motion", "count", "flash", "appearance"]
    for task, own in items.items():
        assert len(own) == N
        assert len({item.group for item in own}) == N
        assert {item.task for item in own} == {task}
    everything = [item for own in items.values() for item in own]
    assert len({item.id for item in everything}) == len(everything)


def test_an_item_shows_the_frames_of_its_film_in_their_order(items: dict[str, list[Item]]) -> None:
    for task in ("order", "flash"):
        asked = items[task][1]
        drawn = draw_film(sample_film("test", asked.meta["film"]))
        assert [frame.tobytes() for frame in asked.picture()] == [frame.tobytes() for frame in drawn]


def test_the_answers_are_balanced(items: dict[str, list[Item]]) -> None:
    assert Counter(item.answer for item in items["motion"]) == dict.fromkeys(("left", "right", "up", "down"), N / 4)
    named_first = [item.question.index(item.answer) < len("Which came first, ") + 1 for item in items["order"]]
    assert sum(named_first) == N / 2
    counts = Counter((item.answer, "objects" in item.question) for item in items["count"])
    kinds = {(str(times), False): N / 6 for times in (1, 2, 3)}
    assert counts == kinds | {(str(objects), True): N / 6 for objects in (2, 3, 4)}


def test_items_are_the_same_films_whatever_frames_show_them() -> None:
    few, many = Films().items("test", 6), Films(frames=40).items("test", 6)
    assert [replace(item, picture=None) for item in few] == [replace(item, picture=None) for item in many]
    assert [len(items[7].picture()) for items in (few, many)] == [16, 40]


def test_fewer_items_are_the_first_of_more_and_seeds_share_none(items: dict[str, list[Item]]) -> None:
    fewer: dict[str, list[str]] = {}
    for item in films.items("test", 5):
        fewer.setdefault(item.task, []).append(item.id)
    assert fewer == {task: [item.id for item in own[:5]] for task, own in items.items()}
    other = {item.group for item in films.items("test", 3, seed=1)}
    assert not other & {item.group for own in items.values() for item in own}
    held_out = films.items("held_out", 3)
    assert all(item.id.startswith("held_out/") for item in held_out)
    assert held_out[0].picture()[3].tobytes() != items["order"][0].picture()[3].tobytes()


def test_an_answer_is_right_in_any_usual_form(items: dict[str, list[Item]]) -> None:
    first = items["order"][0]
    (wrong,) = first.meta["distractors"]
    for text in (first.answer, first.answer.removeprefix("the ").capitalize() + ".", f" {first.answer} "):
        assert films.item_score(first, text) == {"hit": True, "readable": True}
    assert films.item_score(first, wrong.removeprefix("the ")) == {"hit": False, "readable": True}
    assert films.item_score(first, "both") == {"hit": False, "readable": False}
    two = next(item for item in items["count"] if item.answer == "2")
    assert films.item_score(two, "Two")["hit"]


def test_scores_are_shares_a_task(items: dict[str, list[Item]]) -> None:
    rows = []
    for task, own in items.items():
        for place, item in enumerate(own):
            wrong = item.meta["distractors"][0]
            right = place < {"order": 6, "motion": 3, "count": 12, "flash": 0, "appearance": 9}[task]
            rows.append(films.row(Answer(item, item.answer if right else wrong, 1)))
    scores = films.scores(rows)
    assert list(scores) == ["all", *TASKS]
    assert scores["all"].value == 30 / 60
    assert (scores["motion"].value, scores["motion"].low, scores["motion"].high) == (0.25, *wilson(3, 12))
    assert films.measure(rows[0]) == 1.0
    best = [films.row(Answer(item, item.answer, 1)) for own in items.values() for item in own]
    others = films.paired_others(rows, best)
    assert list(others) == list(TASKS)
    assert others["count"] == 1.0
    assert others["flash"] == pytest.approx(2 * 0.5**12)
    with pytest.raises(InputError, match="no answers"):
        films.scores([])


@pytest.mark.parametrize("frames", [8, 4096, "many", 16.5])
def test_a_bad_number_of_frames_is_refused(frames: Any) -> None:
    with pytest.raises(InputError, match="frames must be a whole number from 16 to 2048"):
        get_benchmark("films", frames=frames)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="unknown split of films 'train'"):
        films.items("train")


# --- Several pictures a question ---


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), (60 * place, 200, 90)) for place in range(count)]


def test_the_frames_of_each_question_are_in_its_own_prompt(checkpoint: str) -> None:
    model, processor = load(checkpoint)
    three, one = pictures(3), pictures(4)[3]
    inputs = prepare(model, processor, [three, None, one, [one]], ["What?", "What?", "What is it?", "What is it?"])
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    assert visual == [3 * visual[2], 0, visual[2], visual[2]]
    assert inputs["pixel_values"].shape[0] == 5
    alone = processor(images=[*three, one, one], text="<image>" * 5, return_tensors="pt")["pixel_values"]
    assert (inputs["pixel_values"] == alone).all()
    with pytest.raises(InputError, match="no picture in the list"):
        prepare(model, processor, [[]], ["What?"])


def test_the_order_of_the_frames_reaches_the_model(checkpoint: str) -> None:
    model, processor = load(checkpoint)
    shown = pictures(3)
    both = [prepare(model, processor, [own], ["What?"]) for own in (shown, shown[::-1])]
    first, second = (model(**inputs).logits[0, -1] for inputs in both)
    assert (first - second).abs().max() > 0


def test_strategies_look_at_one_picture(checkpoint: str) -> None:
    model, processor = load(checkpoint)
    chosen = parse_methods("mvp_reasoning:k=1,caption_tokens=2,path_tokens=2")
    with pytest.raises(InputError, match="mvp_reasoning looks at one picture a question, not at 2"):
        answer(model, processor, pictures(2), "What?", chosen, 2)
    (only,) = pictures(1)
    assert answer(model, processor, [only], "What?", chosen, 2) == answer(model, processor, only, "What?", chosen, 2)


def film_run(checkpoint: str, out: Path, **options: Any) -> Any:
    wanted: dict[str, Any] = dict(items=1, batch_size=2, max_new_tokens=3, cost_items=0)
    return run(checkpoint, "films", ["none", "fastervlm:keep=0.1"], out, quiet=True, **(wanted | options))


def test_a_run_answers_as_plain_generate_does_and_resumes(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(films_module, "TASKS", {name: TASKS[name] for name in ("order", "flash")})  # it takes time
    summary = film_run(checkpoint, tmp_path / "run")
    rows = lines(tmp_path / "run")
    assert summary.headline == "all"
    assert [row["task"] for row in rows] == ["order", "flash"] * 2
    model, processor = load(checkpoint)
    asked = {item.id: item for item in films.items("test", 1)}
    for row in rows:
        item = asked[row["id"]]
        inputs = prepare(model, processor, [item.picture()], [item.question])
        with attach(model, *parse_methods(row["method"]), processor=processor) as attached:
            new = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            left = attached.visual_tokens
        assert row["text"] == processor.decode(new, skip_special_tokens=True).strip()
        given = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert row["visual_tokens_given"] == given
        assert row["visual_tokens"] == (left[0] if left else given)
        assert row["visual_tokens"] == (given if row["method"] == "none" else given / 10)
        assert "kept" not in row  # which patches of which frame: not told yet
    whole = (tmp_path / "run" / "answers.jsonl").read_text()
    (tmp_path / "run" / "answers.jsonl").write_text("".join(whole.splitlines(keepends=True)[:3]))
    film_run(checkpoint, tmp_path / "run")
    assert lines(tmp_path / "run") == rows
    with pytest.raises(InputError):
        film_run(checkpoint, tmp_path / "run", options={"frames": 20})
    page = write_report(tmp_path / "run").read_text()
    assert "Which came first" in page


def test_costs_of_items_with_several_pictures_are_measured(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "LONGEST_EXTRA", 0.0)
    model, processor = load(checkpoint)
    item = Item("one", "What?", "red", lambda: pictures(2), "one", "tint", 2)
    chosen = {name: parse_methods(name) for name in ("none", "fastervlm:keep=0.1")}
    read = [
        cost["prefill_tokens"] for cost in measure(model, processor, chosen, [item], new_tokens=2)["methods"].values()
    ]
    assert read[0] - read[1] == 2 * 90


@dataclass(frozen=True)
class Strips(Tints):
    """As `Tints`; the second item of each three shows three pictures."""

    splits: ClassVar[tuple[str, ...]] = ("test",)

    def _item(self, index: int) -> Item:
        own = super()._item(index)
        return replace(own, picture=lambda: pictures(3)) if index % 3 == 1 else own


def test_items_with_one_and_with_several_pictures_share_a_batch(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items_module.list_benchmarks()
    monkeypatch.setattr(items_module, "_registry", dict(items_module._registry))
    register_benchmark("strips")(Strips)
    run(checkpoint, "strips", ["none", "fastervlm:keep=0.1"], tmp_path, items=6, batch_size=6, cost_items=0, quiet=True)
    rows = {(row["method"], row["id"]): row for row in lines(tmp_path)}
    for method in ("none", "fastervlm:keep=0.1"):
        tokens = [rows[method, f"tint-{index}"]["visual_tokens"] for index in range(6)]
        assert tokens == [tokens[0], 3 * tokens[0], tokens[0]] * 2
    model, processor = load(checkpoint)
    for index in range(6):
        row = rows["fastervlm:keep=0.1", f"tint-{index}"]
        assert ("kept" in row) == ("grid" in row) == (index % 3 != 1)
        if "kept" in row:
            item = Strips()._item(index)
            with attach(model, *parse_methods("fastervlm:keep=0.1"), processor=processor) as attached:
                model.generate(**prepare(model, processor, [item.picture()], [item.question]), max_new_tokens=1)
                assert row["kept"] == attached.kept[0][0].tolist()


def test_a_report_shows_frames_side_by_side() -> None:
    three = pictures(3)
    whole = sheet(three)
    assert whole.size == (80, 60)
    for place, frame in enumerate(three):
        corner = (40 * (place % 2), 30 * (place // 2))
        assert whole.crop((*corner, corner[0] + 40, corner[1] + 30)).tobytes() == frame.tobytes()
    assert sheet(three[0]) is three[0]
    assert sheet(pictures(40)).size == (4 * 40, MOST_FRAMES // 4 * 30)
    assert pictures_of(None) == []
