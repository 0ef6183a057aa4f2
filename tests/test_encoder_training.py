"""Training an encoder on a task: that a killed run goes on, what is refused, and the scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sightline as sl
from sightline.encoders.encoder import Encoder, create_encoder, encoders
from sightline.errors import InputError
from sightline.training import encoder as training
from sightline.training.encoder import EncoderRecipe, evaluate, segmented, train
from sightline.training.encoder_tasks import TASKS, Examples

TINY = {"depth": 1, "width": 16, "num_heads": 2, "patch_size": 8}


def tiny(**changes: Any) -> EncoderRecipe:
    given = {"encoder": "vit_nano", "examples": 16, "steps": 6, "batch": 4, "warm_up": 2, "overrides": TINY, **changes}
    return EncoderRecipe(**given)


@pytest.fixture(scope="module")
def pictures() -> tuple[Examples, Examples]:
    return TASKS["picturebook"].examples("train", 16, 32), TASKS["picturebook"].examples("test", 10, 32)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- A run, and what is left of it ---


def test_a_run_leaves_recipe_log_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TEST_EXAMPLES", 10)
    recipe, out = tiny(steps=60), tmp_path / "deep" / "run"
    encoder, scores = train(recipe, out, quiet=True)
    assert not encoder.training
    record = json.loads((out / "recipe.json").read_text())
    assert EncoderRecipe(**record) == recipe
    log = lines(out)
    assert [line["step"] for line in log] == [50, 60, 60]
    assert log[-1]["test"] == scores
    assert all(math.isfinite(line["loss"]) and line["seconds"] >= 0 for line in log[:-1])
    again = recipe.build().eval()
    again.load_state_dict(load_file(out / "encoder.safetensors"))
    tested = TASKS["picturebook"].examples("test", 10, 32)
    assert evaluate(again, tested, TASKS["picturebook"]) == scores
    with torch.no_grad():
        assert torch.equal(again.logits(tested.pixels), encoder.logits(tested.pixels))


def test_without_a_folder_nothing_is_written_and_the_recipe_decides_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: tuple[Examples, Examples]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        encoder, _ = train(tiny(seed=seed, overrides={**TINY, "drop_path": 0.3}), quiet=True, data=pictures)
        assert torch.equal(torch.get_rng_state(), before)  # what others draw is not moved
        weights.append(encoder.state_dict())
        torch.manual_seed(5)
        torch.rand(7)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


RUNS: dict[str, dict[str, Any]] = {
    "drop path": {"overrides": {**TINY, "depth": 2, "drop_path": 0.5}},
    "two phases": {"encoder": "lgvit_nano", "overrides": {}},
    "running statistics": {"encoder": "dhvt_nano", "overrides": {}},
}


@pytest.mark.parametrize("which", RUNS)
def test_a_killed_run_ends_like_one_that_ran_through(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: tuple[Examples, Examples]
) -> None:
    recipe = tiny(**RUNS[which])
    whole, scores = train(recipe, tmp_path / "whole", quiet=True, data=pictures)
    names = [name for name, _ in whole.named_buffers() if "running" in name]
    assert bool(names) == (which != "drop path")
    kind: Any = encoders()[recipe.encoder]
    loss: Callable[..., Tensor] = kind.training_loss
    stops, seen = [3, 5], []

    def loss_or_stop(self: Encoder, pixels: Tensor, targets: Tensor, step: int, steps: int) -> Tensor:
        seen.append(step)
        if step in stops:
            stops.remove(step)
            raise KeyboardInterrupt
        return loss(self, pixels, targets, step, steps)

    monkeypatch.setattr(kind, "training_loss", loss_or_stop)
    options: dict[str, Any] = dict(checkpoint_every=2, quiet=True, data=pictures)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "killed", **options)
        assert not (tmp_path / "killed" / "encoder.safetensors").exists()
    _, resumed = train(recipe, tmp_path / "killed", **options)
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5]  # checkpoints after the second and the fourth
    assert resumed == scores
    for name in ("encoder.safetensors", "state.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_is_finished_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: tuple[Examples, Examples]
) -> None:
    _, scores = train(tiny(), tmp_path, quiet=True, data=pictures)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(encoders()["vit_nano"], "training_loss", lambda *_: pytest.fail("there is no step left"))
    again, told = train(tiny(), tmp_path, quiet=True, data=pictures)
    assert told == scores
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    assert all(
        torch.equal(value, again.state_dict()[name])
        for name, value in load_file(tmp_path / "encoder.safetensors").items()
    )


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path, pictures: tuple[Examples, Examples]) -> None:
    train(tiny(steps=1), tmp_path, quiet=True, data=pictures)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for changes in ({"seed": 1}, {"steps": 2}, {"overrides": {**TINY, "mlp_ratio": 2.0}}, {"task": "digits"}):
        with pytest.raises(InputError, match="holds a run of another recipe; give another folder, or delete it"):
            train(tiny(**{"steps": 1, **changes}), tmp_path, quiet=True, data=pictures)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    (tmp_path / "recipe.json").write_text('{"encoder": ')
    with pytest.raises(InputError, match="is damaged"):
        train(tiny(steps=1), tmp_path, quiet=True, data=pictures)


def test_what_cannot_be_built_leaves_no_folder_behind(tmp_path: Path, pictures: tuple[Examples, Examples]) -> None:
    for overrides, says in (
        ({"dept": 3}, "unknown argument of vit_nano 'dept'.*did you mean 'depth'"),
        ({"num_heads": 5}, "cannot be shared by 5 heads"),
        ({"depth": "many"}, "vit_nano cannot be made with {'depth': 'many'}"),
    ):
        with pytest.raises(InputError, match=says):
            train(tiny(overrides=overrides), tmp_path / "run", quiet=True, data=pictures)
    with pytest.raises(InputError, match="nearest size is 32 x 32"):
        train(tiny(image_size=35), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder": "vit_nanno"}, "did you mean 'vit_nano'"),
        ({"task": "picturebok"}, "did you mean 'picturebook'"),
        ({"task": "clips"}, "vit_nano takes pictures, but the task clips gives clips"),
        ({"task": "volumes"}, "vit_nano takes pictures, but the task volumes gives volumes"),
        ({"encoder": "ts_lstm_nano"}, "ts_lstm_nano takes frame features, but the task picturebook gives pictures"),
        ({"task": "cells"}, "vit_nano gives one class, but the task cells needs one that segments; xlstm_unet_"),
        ({"encoder": "unet_2d_nano"}, "unet_2d_nano segments, but the task picturebook needs one that gives one class"),
        ({"encoder": "lrcn_nano", "task": "bouncing"}, "needs one that predicts frames; convs5_"),
        ({"encoder": "convs5_nano", "task": "clips"}, "convs5_nano predicts frames, but the task clips needs"),
        ({"steps": 0}, "steps must be 1 or more, not 0"),
        ({"examples": 0}, "examples must be 1 or more, not 0"),
        ({"batch": -2}, "batch must be 1 or more, not -2"),
        ({"image_size": 0}, "image_size must be 1 or more, not 0"),
        ({"seed": -1}, "seed must be 0 or more, not -1"),
        ({"warm_up": -1}, "warm_up must be 0 or more, not -1"),
        ({"learning_rate": 0.0}, "learning_rate and clip must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate and clip must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay 0 or more, not 0.001, 1.0 and -0.1"),
        ({"overrides": {"num_classes": 3}}, "num_classes follows from the recipe and its task"),
        ({"overrides": {"image_size": 64}}, "image_size follows from the recipe and its task"),
    ],
)
def test_bad_recipes_are_refused_in_a_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        tiny(**changes)


# --- What a step does ---


def test_the_loss_falls_where_it_is_easy(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(32) % 2
    pixels = 0.3 * torch.randn(32, 3, 32, 32, generator=random) + (labels - 0.5)[:, None, None, None]
    easy = Examples(pixels.clamp(-1, 1), labels)
    _, scores = train(tiny(steps=100, batch=16, learning_rate=3e-3), tmp_path, quiet=True, data=(easy, easy))
    first, last, _ = lines(tmp_path)
    assert last["loss"] < first["loss"] - 0.5
    assert scores == {"accuracy": 1.0}


def test_an_epoch_sees_each_example_once_in_an_order_of_its_own() -> None:
    recipe = tiny(batch=5)
    seen = torch.cat([training._batch(step, recipe, 16) for step in range(16)]).tolist()
    epochs = [seen[16 * epoch : 16 * (epoch + 1)] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    other = torch.cat([training._batch(step, replace(recipe, seed=1), 16) for step in range(16)]).tolist()
    assert other != seen
    # A batch that is larger than an epoch goes through it several times.
    counts = Counter(training._batch(3, tiny(batch=40), 16).tolist())
    assert sum(counts.values()) == 40
    assert set(counts.values()) <= {2, 3}


def test_the_learning_rate_rises_in_a_line_and_falls_by_a_cosine() -> None:
    recipe = tiny(steps=110, warm_up=10)
    assert training._rate(0, recipe) == 0.1
    assert training._rate(4, recipe) == 0.5
    assert training._rate(9, recipe) == training._rate(10, recipe) == 1
    assert training._rate(35, recipe) == pytest.approx(0.5 * (1 + 0.5**0.5))
    assert training._rate(60, recipe) == pytest.approx(0.5)
    assert 0 < training._rate(109, recipe) < 0.001
    assert training._rate(0, tiny(warm_up=0)) == 1


def test_a_step_is_adamws_with_a_clipped_gradient(pictures: tuple[Examples, Examples]) -> None:
    recipe = tiny(steps=1, warm_up=4, clip=1e-3, weight_decay=0.5)
    learnt, _ = train(recipe, quiet=True, data=pictures)
    by_hand = recipe.build().train()
    groups = training._groups(by_hand, 0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.25e-3, betas=(0.9, 0.98))
    chosen = training._batch(0, recipe, 16)
    pixels = training._augmented(pictures[0].pixels[chosen], TASKS["picturebook"], 0, recipe)
    by_hand.training_loss(pixels, pictures[0].targets[chosen], 0, 1).backward()
    norm = torch.stack(
        [parameter.grad.norm() for parameter in by_hand.parameters() if parameter.grad is not None]
    ).norm()
    assert norm > 1e-3
    for parameter in by_hand.parameters():
        assert parameter.grad is not None
        parameter.grad *= 1e-3 / norm
    optimizer.step()
    for name, value in learnt.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], atol=2e-5, rtol=1e-4)


def test_pictures_of_one_object_are_shifted_and_others_are_not(pictures: tuple[Examples, Examples]) -> None:
    recipe, pixels = tiny(), pictures[0].pixels
    for name in TASKS:
        moved = training._augmented(pixels, TASKS[name], 3, recipe)
        assert torch.equal(moved, pixels) == (name not in ("picturebook", "digits"))
    moved = training._augmented(pixels, TASKS["digits"], 3, recipe)
    assert torch.equal(moved, training._augmented(pixels, TASKS["picturebook"], 3, recipe))
    assert not torch.equal(moved, training._augmented(pixels, TASKS["digits"], 4, recipe))
    shifts = set()
    for before, after in zip(pixels, moved, strict=True):
        found = [
            (down, right)
            for down in range(-4, 5)
            for right in range(-4, 5)
            if torch.equal(before.roll((down, right), dims=(1, 2)), after)
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 8


def test_matrices_decay_and_vectors_do_not() -> None:
    encoder = create_encoder("vit_nano", num_classes=3, **TINY)  # type: ignore[arg-type]
    decayed, still = training._groups(encoder, 0.05)
    assert (decayed["weight_decay"], still["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    first, second = ({names[id(parameter)] for parameter in group["params"]} for group in (decayed, still))
    assert {"head.weight", "blocks.0.attn.qkv.weight", "pos_embed"} <= first
    assert {"head.bias", "norm.weight", "norm.bias"} <= second
    assert first | second == set(names.values())
    assert not first & second


def test_what_an_encoder_names_does_not_decay_and_what_is_frozen_is_left_out() -> None:
    encoder = create_encoder("vit_nano", num_classes=3, **TINY)  # type: ignore[arg-type]
    encoder.no_weight_decay = lambda: {"pos_embed"}  # type: ignore[assignment]
    encoder.head.requires_grad_(False)
    decayed, still = training._groups(encoder, 0.05)
    assert any(parameter is encoder.pos_embed for parameter in still["params"])
    assert not any(parameter is encoder.pos_embed for parameter in decayed["params"])
    held = {id(parameter) for group in (decayed, still) for parameter in group["params"]}
    assert not held & {id(parameter) for parameter in encoder.head.parameters()}
    assert len(held) == len(list(encoder.parameters())) - 2
    assert sl.create_encoder("path_ensemble_nano").no_weight_decay()  # type: ignore[operator]


# --- Scores ---


def saying(**answers: Callable[[Tensor], Any]) -> Any:
    """Stands for an encoder that answers from the pixels."""
    return SimpleNamespace(name="by hand", **answers)


def test_accuracy_by_hand() -> None:
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    said = torch.tensor([0, 1, 2, 2, 0, 1, 2]).float()[:, None, None, None]  # five of seven
    examples = Examples(said, labels)
    encoder = saying(logits=lambda pixels: -(pixels[:, 0, 0] - torch.arange(3)).abs())
    for batch in (2, 50):
        assert evaluate(encoder, examples, TASKS["digits"], batch=batch) == {"accuracy": pytest.approx(5 / 7)}


def test_dice_by_hand() -> None:
    """Two pictures of four pixels; all pixels together, the first class apart."""
    truth = torch.tensor([[[0, 1], [1, 2]], [[0, 0], [2, 4]]])
    said = torch.tensor([[[0, 1], [2, 2]], [[0, 1], [0, 4]]])
    encoder = saying(segment=lambda pixels: (-(pixels - torch.arange(5)[:, None, None]).abs(), None))
    for batch in (1, 50):
        scores = evaluate(encoder, Examples(said[:, None].float(), truth), TASKS["cells"], batch=batch)
        assert scores == {
            "dice_medium": pytest.approx(2 * 2 / (3 + 3)),
            "dice_resting body": pytest.approx(2 * 1 / (2 + 2)),
            "dice_reactive body": pytest.approx(2 * 1 / (2 + 2)),
            "dice_nucleus": 0.0,  # there is none, and none is seen
            "dice_bead": 1.0,
            "dice": pytest.approx((0.5 + 0.5 + 0 + 1) / 4),
        }
        assert next(iter(scores)) == "dice"


def test_errors_of_next_frames_by_hand() -> None:
    """One pixel; the frames of two clips, and a prediction that is the frame before and one more."""
    clips = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 5.0]])[:, :, None, None, None]
    encoder = saying(predict=lambda pixels: pixels + 1)
    expected = {"mse": (0 + 1 + 1 + 4) / 4, "copy_mse": (1 + 4 + 0 + 9) / 4}
    for batch in (1, 2):
        assert evaluate(encoder, Examples(clips, torch.zeros(2)), TASKS["bouncing"], batch=batch) == expected


def test_encoders_that_cannot_answer_are_named(pictures: tuple[Examples, Examples]) -> None:
    encoder = tiny().build()
    with pytest.raises(InputError, match="vit_nano does not segment; xlstm_unet_"):
        segmented(encoder, pictures[0].pixels)
    clips = Examples(torch.zeros(1, 3, 3, 32, 32), torch.zeros(1))
    with pytest.raises(InputError, match="vit_nano does not predict frames; convs5_"):
        evaluate(encoder, clips, TASKS["bouncing"])


# --- Other answers than classes ---


@pytest.mark.parametrize(
    ("encoder", "task", "overrides", "size", "main"),
    [
        ("unet_2d_nano", "cells", {"widths": [4, 8], "strides": [1, 2]}, 32, "dice"),
        ("xlstm_unet_bot_3d_nano", "volumes", {"widths": [4, 8], "strides": [1, 4]}, 16, "dice"),
        ("convs5_nano", "bouncing", {"depths": [4, 4], "d_model": 8, "ssm_size": 8, "layers": 1}, 32, "mse"),
    ],
)
def test_masks_and_frames_are_learnt_and_their_runs_go_on(
    encoder: str, task: str, overrides: dict[str, Any], size: int, main: str, tmp_path: Path
) -> None:
    recipe = EncoderRecipe(encoder, task, examples=2, steps=2, batch=2, warm_up=0, image_size=size, overrides=overrides)
    data = (TASKS[task].examples("train", 2, size), TASKS[task].examples("test", 2, size))
    _, scores = train(recipe, tmp_path, quiet=True, data=data, checkpoint_every=1)
    assert 0 <= scores[main] < math.inf
    assert lines(tmp_path)[-1]["test"] == scores
    again = recipe.build().eval()
    again.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    assert evaluate(again, data[1], TASKS[task]) == scores
    (tmp_path / "encoder.safetensors").unlink()
    assert train(recipe, tmp_path, quiet=True, data=data)[1] == scores
