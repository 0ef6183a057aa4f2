"""Training a soft image: what it stands for in a prompt, that nothing else is trained, that a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint
from torch import nn
from typer.testing import CliRunner

import sightline as sl
from sightline.cli import app
from sightline.errors import InputError
from sightline.grounding.lacing import untrained
from sightline.picturebook.questions import training_questions
from sightline.picturebook.scene import random_stream, sample_scene
from sightline.training import nano, soft_image
from sightline.training.nano import Packer, answer_loss, joint_step
from sightline.training.run import State
from sightline.training.soft_image import SoftImageRecipe, compare, showing, train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("pico") / "checkpoint")


def recipe_of(checkpoint: Path, **changes: Any) -> SoftImageRecipe:
    return SoftImageRecipe(**{"model": str(checkpoint), "steps": 5, "batch": 2, "length": 200, **changes})


@torch.no_grad()
def test_a_soft_image_that_is_a_pictures_features_is_that_picture(checkpoint: Path) -> None:
    model, processor = sl.load(checkpoint)
    scene = sample_scene("train", 4)
    rng = random_stream("test soft image")
    questions = [training_questions(scene, rng) for _ in range(3)]
    batch = Packer(processor.tokenizer, 220).batch([scene] * 3, questions, with_picture=True)
    expected, logits, _ = answer_loss(model, batch)
    features = model.model.get_image_features(pixel_values=batch.pop("pixel_values")[:1]).pooler_output[0]
    with showing(model, features):
        loss, shown, seen = answer_loss(model, batch)
    torch.testing.assert_close(shown, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, expected)
    assert seen is None  # the tower was not run
    with showing(model, torch.zeros_like(features)):
        assert (answer_loss(model, batch)[0] - loss).abs() > 1e-4
    assert not model.get_input_embeddings()._forward_hooks


def test_only_the_soft_image_is_trained_and_against_its_gradient(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = sl.load(checkpoint, dtype="float32")
    recipe = recipe_of(checkpoint, steps=1)
    start = nn.Parameter(untrained(100, 96, seed=0))
    _, questions = joint_step(0, recipe.batch, recipe.seed)
    with showing(model, start):
        loss, _, _ = answer_loss(model, Packer(processor.tokenizer, recipe.length).packed(questions, True))
    loss.backward()
    assert start.grad is not None
    before = (checkpoint / "model.safetensors").read_bytes()
    trained = load_file(train(recipe, tmp_path, quiet=True, validation_batches=1))["soft_image"]
    # The first step of Adam is the learning rate, whatever the gradient's size.
    rate = recipe.learning_rate * nano.schedule(0, 1)
    large = start.grad.abs() > start.grad.abs().median()
    step = (trained - start.detach())[large]
    torch.testing.assert_close(step, -rate * start.grad[large].sign(), atol=0.01 * rate, rtol=0)
    assert (checkpoint / "model.safetensors").read_bytes() == before
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == round(loss.item(), 4)
    assert set(log[-1]["validation"]) == {"picture", "soft_image", "no_picture"}


def test_the_losses_that_are_compared_are_of_the_same_answers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = sl.load(checkpoint)
    seen = []

    def noted(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        seen.append((batch["labels"][batch["labels"] != nano.IGNORED].tolist(), batch["input_ids"].shape[1]))
        return answer_loss(model, batch)

    monkeypatch.setattr(soft_image, "answer_loss", noted)
    recipe = recipe_of(checkpoint)
    compare(model, Packer(processor.tokenizer, recipe.length), untrained(100, 96, seed=0), recipe, 2)
    assert [length for _, length in seen] == [200, 200, 100] * 2
    for step in (seen[:3], seen[3:]):
        assert step[0][0] == step[1][0] == step[2][0]
        assert len(step[0][0]) > 5


def test_a_stopped_run_ends_like_an_uninterrupted_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(checkpoint)
    whole = train(recipe, tmp_path / "whole", quiet=True, validation_batches=1)
    save: Callable[..., None] = State.save
    stops = {2, 4}

    def save_and_stop(self: State, phase: str, step: int, optimizer: Any) -> None:
        save(self, phase, step, optimizer)
        if step in stops:
            stops.remove(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "save", save_and_stop)
    options: dict[str, Any] = dict(checkpoint_every=2, quiet=True, validation_batches=1)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "stopped", **options)
        assert not (tmp_path / "stopped" / "soft_image.safetensors").exists()
    resumed = train(recipe, tmp_path / "stopped", **options)
    assert resumed.read_bytes() == whole.read_bytes()
    lines = (tmp_path / "stopped" / "log.jsonl").read_text()
    train(recipe, tmp_path / "stopped", **options)  # what is finished is finished
    assert resumed.read_bytes() == whole.read_bytes()
    assert (tmp_path / "stopped" / "log.jsonl").read_text() == lines
    with pytest.raises(InputError, match="another recipe"):
        train(recipe_of(checkpoint, seed=1), tmp_path / "stopped", quiet=True)


def test_the_command_trains_what_the_method_then_finds(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["train", "soft-image", "--model", str(checkpoint), "--out", str(tmp_path), "--steps", "1"]
    done = CliRunner().invoke(app, [*arguments, "--batch", "1", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == str(tmp_path / "soft_image.safetensors")
    with sl.attach(sl.load(checkpoint)[0], sl.Lacing(soft_image=str(tmp_path / "soft_image.safetensors"))):
        pass
    refused = CliRunner().invoke(app, [*arguments[:-1], "0"])
    assert refused.exit_code == 2
    assert "steps must be 1 or more, not 0" in refused.output


def test_a_model_of_another_form_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model, processor = sl.load(checkpoint)
    model.config.image_seq_length = 16
    model.save_pretrained(other)
    processor.save_pretrained(other)
    with pytest.raises(InputError, match="is not of the built-in model's form"):
        train(recipe_of(other), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="batch must be 1 or more, not 0"):
        SoftImageRecipe(batch=0)
