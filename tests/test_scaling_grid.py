"""A grid of small models: what they read, that every cell is asked the same, that a stopped grid goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, refused
from tiny_checkpoint import save_tiny_checkpoint

import sightline as sl
from sightline.errors import InputError
from sightline.probes.scaling_law import fit
from sightline.training import scaling_grid
from sightline.training.nano import IGNORED, Packer, validation_step
from sightline.training.scaling_grid import (
    GRID,
    Cell,
    ScalingRecipe,
    SmallVLM,
    Source,
    TextPacker,
    asked,
    grid_cells,
    pooled,
    source,
    train_cell,
    train_grid,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("pico") / "checkpoint"))


def recipe_of(checkpoint: str, **changes: Any) -> ScalingRecipe:
    small: dict[str, Any] = {"shapes": ((24, 1),), "tokens": (1, 25), "steps": 3, "batch": 2, "scenes": 4}
    return ScalingRecipe(checkpoint, **(small | {"validation_batches": 1, "text_length": 120} | changes))


@pytest.fixture(scope="module")
def given(checkpoint: str) -> Source:
    return source(recipe_of(checkpoint), 0, "cpu", quiet=True)


@pytest.mark.parametrize("tokens", [1, 4, 25, 100])
def test_features_are_means_over_squares(tokens: int) -> None:
    features = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
    side = int(tokens**0.5)
    size = 10 // side
    found = pooled(features, tokens)
    assert found.shape == (2, tokens, 3)
    for token in range(tokens):
        top, left = token // side * size, token % side * size
        square = [
            features[:, 10 * row + column] for row in range(top, top + size) for column in range(left, left + size)
        ]
        torch.testing.assert_close(found[:, token], torch.stack(square).mean(dim=0))


@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_rows_are_those_of_the_built_in_model_but_for_the_pictures_places(given: Source, tokens: int) -> None:
    packer = TextPacker(given.tokenizer, 150)
    _, questions = validation_step(0, 3, 0)
    found = packer.widened(packer.texts(questions), tokens)
    assert (found["input_ids"] == packer.image).sum(dim=1).tolist() == [tokens] * 3
    if tokens == 100:
        expected = Packer(given.tokenizer, 250).packed(questions, with_picture=True)
        assert {name: value.tolist() for name, value in found.items()} == {
            name: value.tolist() for name, value in expected.items()
        }
    one = packer.widened(packer.texts(questions), 1)
    text, text_of_one = found["input_ids"] != packer.image, one["input_ids"] != packer.image
    for part in ("input_ids", "labels", "branch"):
        assert found[part][text].tolist() == one[part][text_of_one].tolist(), "the same questions whatever is seen"
    assert int((found["labels"] != IGNORED).sum()) > 20


def test_a_model_reads_its_features_and_nothing_of_other_questions(given: Source) -> None:
    packer = TextPacker(given.tokenizer, 150)
    _, (questions, _) = validation_step(0, 2, 0)
    model = SmallVLM(Cell(24, 2, 4, 0), len(given.tokenizer), 96).eval()
    features = pooled(given.validation[:1], 4)

    def logits(asked: Any, features: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(features, packer.widened(packer.texts([asked]), 4), packer.first)

    both = logits(questions[:2], features)
    alone = [logits([question], features) for question in questions[:2]]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-4)
    for token in range(4):
        other = features.clone()
        other[0, token] = other[0, token].flip(0)
        assert (logits(questions[:1], other) - alone[0]).abs().max() > 1e-5
    shape = model.decoder.layers
    assert sum(p.numel() for p in shape.parameters()) == Cell(24, 2, 4, 0).parameters


def test_scenes_come_again_with_other_questions(checkpoint: str, given: Source) -> None:
    recipe = recipe_of(checkpoint)
    assert recipe.period == 2
    assert asked(recipe, 0, 0)[0] == asked(recipe, 0, 2)[0]
    assert asked(recipe, 0, 0)[1] != asked(recipe, 0, 2)[1]
    assert given.train.shape == (4, 100, 96)
    assert given.texts.shape == (3, 2, 4, 121)
    model, _ = sl.load(checkpoint)
    scenes, _ = asked(recipe, 0, 1)
    values = torch.stack([torch.from_numpy(scaling_grid.pixels(scene)) for scene in scenes])
    with torch.no_grad():
        expected = torch.stack(tuple(model.model.get_image_features(pixel_values=values).pooler_output))
    torch.testing.assert_close(given.train[2:].float(), expected.float(), atol=1e-2, rtol=1e-2)


def test_training_lowers_the_loss_and_is_the_same_each_time(checkpoint: str, given: Source) -> None:
    recipe, cell = recipe_of(checkpoint), Cell(24, 1, 4, 0)
    first, again = train_cell(recipe, cell, given), train_cell(recipe, cell, given)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    longer = recipe_of(checkpoint, steps=60, scenes=8)
    trained = train_cell(longer, cell, source(longer, 0, "cpu", quiet=True))
    assert trained["loss"] < first["loss"] - 0.5
    assert first["parameters"] == 4 * 24**2 + 6 * 24**2 + 48
    assert set(first["accuracy"]) == set(first["n"]) > {"colour", "existence"}


def test_a_stopped_grid_goes_on_and_ends_the_same(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(checkpoint)
    whole = train_grid(recipe, tmp_path / "whole", quiet=True)
    assert [(line["width"], line["tokens"]) for line in whole] == [(24, 25), (24, 1)]
    assert [json.loads(line) for line in (tmp_path / "whole" / GRID).read_text().splitlines()] == whole

    def stop(line: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_grid(recipe, tmp_path / "stopped", quiet=True, told=stop)
    taken: list[Cell] = []
    real = train_cell
    monkeypatch.setattr(scaling_grid, "train_cell", lambda r, cell, *more: taken.append(cell) or real(r, cell, *more))
    lines = train_grid(recipe, tmp_path / "stopped", quiet=True)
    assert taken == [Cell(24, 1, 1, 0)]
    assert [{**line, "seconds": 0} for line in lines] == [{**line, "seconds": 0} for line in whole]
    assert train_grid(recipe, tmp_path / "stopped", quiet=True) == lines
    with pytest.raises(InputError, match="run of another recipe"):
        train_grid(recipe_of(checkpoint, steps=4), tmp_path / "stopped", quiet=True)


def test_two_jobs_make_the_same_grid(checkpoint: str, tmp_path: Path) -> None:
    recipe = recipe_of(checkpoint)
    two = train_grid(recipe, tmp_path / "two", jobs=2, quiet=True)
    given = source(recipe, 0, "cpu", quiet=True)
    one = {cell.tokens: train_cell(recipe, cell, given) for cell in recipe.cells}
    assert {line["tokens"]: {**line, "seconds": 0} for line in two} == {
        tokens: {**line, "seconds": 0} for tokens, line in one.items()
    }


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 0}, "steps must be 1 or more"),
        ({"shapes": ((50, 2),)}, "multiple of 24"),
        ({"shapes": ()}, "shapes must hold one"),
        ({"tokens": (9,)}, "1, 4, 25 or 100, not 9"),
        ({"tokens": (-1,)}, "1, 4, 25 or 100, not -1"),
    ],
)
def test_grids_that_cannot_be(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        ScalingRecipe(**changes)


def line_of(width: int, tokens: int, accuracy: dict[str, float]) -> dict[str, Any]:
    about = {"width": width, "layers": 1, "tokens": tokens, "seed": 0, "text_tokens": 15.0}
    return about | {"parameters": width**2, "accuracy": accuracy}


def test_errors_are_those_of_the_kinds_without_captions() -> None:
    lines = [line_of(24, 4, {"count": 0.5, "colour": 0.75, "long_caption": 0.0}), line_of(48, 1, {"colour": 0.25})]
    assert grid_cells(lines, "colour") == [(576, 4, 0.25), (2304, 1, 0.75)]
    assert grid_cells(lines, "count") == [(576, 4, 0.5)]
    assert grid_cells(lines, "all") == [(576, 4, 0.375), (2304, 1, 0.75)]


def test_the_command_fits_a_grid_and_the_published_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sightline.report.scaling.fit", lambda cells, repeats: fit(cells, repeats=5))
    lines = [
        line_of(width, tokens, {"colour": 1 - 2 * width**-0.5 * tokens**-0.1})
        for width in (24, 48, 96)
        for tokens in (1, 4, 25)
    ]
    (tmp_path / GRID).write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = call("scaling", "--fit-only", "--out", str(tmp_path), "--json").stdout
    found = {record["errors_of"]: record for record in map(json.loads, printed.splitlines())}
    assert set(found) == {"paper: reasoning", "paper: ocr", "all", "colour"}
    assert found["colour"]["alpha"] == pytest.approx(0.25, abs=1e-3)
    assert found["paper: reasoning"]["alpha"] == pytest.approx(0.0709, abs=1e-4)
    assert found["paper: reasoning"]["given_exponents"] == [0.077, 0.015]
    assert "<svg" in (tmp_path / "scaling.html").read_text()
    (tmp_path / GRID).write_text('{"width": 3}\n')
    assert "no grid of" in refused("scaling", "--fit-only", "--out", str(tmp_path))
    (tmp_path / GRID).write_text("{")
    assert "is damaged" in refused("scaling", "--fit-only", "--out", str(tmp_path))


def test_what_the_command_refuses(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "x"))
    assert "not both" in refused("scaling", "--fit-only", "--published", *out)
    assert "WIDTHxLAYERS" in refused("scaling", "--shapes", "48", *out)
    assert "whole numbers such as 1,4,25" in refused("scaling", "--tokens", "1,four", *out)
    assert "more than 4 cells" in refused("scaling", "--tokens", "1,4", "--shapes", "24x1,48x1", *out)
    assert "cannot read" in refused("scaling", "--fit-only", *out)
    assert not (tmp_path / "x").exists()
