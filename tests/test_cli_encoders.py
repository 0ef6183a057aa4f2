"""The commands about encoders: `sightline encoders` and `sightline train encoder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import call, refused

from sightline.encoders.encoder import (
    count_macs,
    count_parameters,
    create_encoder,
    list_encoders,
    load_exactly,
    read_safetensors,
)
from sightline.training.encoder import EncoderRecipe


def test_encoders_lists_all_or_those_of_a_pattern() -> None:
    records = [json.loads(line) for line in call("encoders", "--json").stdout.splitlines()]
    assert [record["encoder"] for record in records] == list_encoders()
    assert {"encoder": "unet_3d", "inputs": "volumes", "paper": "xlstm_unet", "image_size": [48, 160, 224]} in records
    assert {"encoder": "vit_tiny", "inputs": "pictures", "paper": None, "image_size": [224, 224]} in records
    assert {"encoder": "ts_lstm", "inputs": "frame features", "paper": "ts_lstm", "image_size": None} in records
    # An encoder that builds on the plain one says so in its module.
    assert {record["paper"] for record in records if record["encoder"].startswith("vig_")} == {"vig"}
    shown = [line.split() for line in call("encoders", "ev*").stdout.splitlines()]
    assert shown == [
        ["encoder", "inputs", "paper", "image", "size"],
        ["evit_base", "pictures", "evit", "224"],
        ["evit_nano", "pictures", "evit", "32"],
        ["evit_small", "pictures", "evit", "224"],
    ]
    assert call("encoders", "unet_3d").stdout.splitlines()[1].rstrip().endswith("  48 x 160 x 224")
    assert "did you mean 'vit_tiny'" in refused("encoders", "vit_tinny")


def test_encoders_are_measured_where_asked() -> None:
    def measured(pattern: str) -> Any:
        result = call("encoders", pattern, "--measure", "--json")
        assert result.exit_code == 0, result.exception
        return json.loads(result.stdout)

    record = measured("vit_tiny")
    # DeiT-Ti: 5.7 M parameters, 1.25 G multiply-adds, 14 x 14 patches.
    assert (record["parameters"], record["tokens"]) == (5_717_416, 196)
    assert record["macs"] == count_macs("vit_tiny") == pytest.approx(1.254e9, rel=1e-3)
    for name in ("litv2_nano", "hyena_vit_nano"):
        record = measured(name)
        assert record["macs"] == count_macs(name)
        assert record["parameters"] == count_parameters(create_encoder(name, num_classes=1000))
    record = measured("unet_2d_nano")  # has no logits for the whole
    assert (record["macs"], record["tokens"]) == (None, 16)
    assert record["parameters"] == count_parameters(create_encoder("unet_2d_nano"))
    record = measured("convs5_nano")
    assert (record["macs"], record["tokens"]) == (None, None)
    result = call("encoders", "vit_[ts]*", "--measure")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["encoder", "inputs", "paper", "image", "size", "M", "parameters", "G", "multiply-adds", "tokens"],
        ["vit_small", "pictures", "-", "224", "22.05", "4.6", "196"],
        ["vit_tiny", "pictures", "-", "224", "5.72", "1.25", "196"],
    ]


def test_train_encoder_trains_and_tells_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sightline.training.encoder.TEST_EXAMPLES", 20)
    arguments = ["train", "encoder", "--task", "digits", "--steps", "2", "--examples", "8", "--batch", "4"]
    arguments += ["--set", "depth=1", "width=16", "num_heads=2", "--out", str(tmp_path), "--threads", "1"]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    told = result.stdout.splitlines()[-3:]
    assert told[0].split() == ["on", "the", "test", "split", "vit_nano"]
    assert told[1].startswith("accuracy")
    assert told[2] == f"The encoder is in {tmp_path / 'encoder.safetensors'}"
    record = json.loads((tmp_path / "recipe.json").read_text())
    assert record["overrides"] == {"depth": 1, "width": 16, "num_heads": 2}
    encoder = create_encoder("vit_nano", num_classes=10, **record["overrides"])
    load_exactly(encoder, read_safetensors(tmp_path / "encoder.safetensors"), "the run")
    again = call(*arguments, "--json")
    given = json.loads(again.stdout)
    assert given.pop("scores") == {"accuracy": pytest.approx(float(told[1].split()[1]), abs=1e-4)}
    assert given == {"encoder": "vit_nano", "task": "digits", "seed": 0, "out": str(tmp_path)}
    assert "holds a run of another recipe" in refused(*arguments, "--seed", "1", "--json")


def test_train_encoder_passes_its_recipe_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def train(recipe: EncoderRecipe, out: Path, **options: Any) -> Any:
        taken.append((recipe, out, options))
        return None, {"dice": 0.5, "dice_coin": 0.25}

    monkeypatch.setattr("sightline.training.encoder.train", train)
    command = ["train", "encoder"]
    assert call(*command).exit_code == 0
    assert taken.pop() == (
        EncoderRecipe("vit_nano"),
        Path("runs/encoder"),
        {"threads": 1, "device": "cpu", "quiet": False},
    )
    arguments = ["--encoder", "unet_2d_nano", "--task", "coins", "--seed", "3", "--examples", "9", "--steps", "5"]
    arguments += ["--batch", "2", "--learning-rate", "0.01", "--image-size", "48", "--out", str(tmp_path), "--json"]
    overrides = ["--set", "widths=[4,8]", "strides=[1, 2]", "--set", "vil=False", "--set=variant=bot", "blocks=NaN"]
    result = call(*command, *arguments, *overrides)
    recipe, out, options = taken.pop()
    assert recipe == EncoderRecipe(
        "unet_2d_nano",
        "coins",
        seed=3,
        examples=9,
        steps=5,
        batch=2,
        learning_rate=0.01,
        image_size=48,
        overrides={"widths": [4, 8], "strides": [1, 2], "vil": False, "variant": "bot", "blocks": "NaN"},
    )
    assert (out, options["quiet"]) == (tmp_path, True)
    assert json.loads(result.stdout)["scores"] == {"dice": 0.5, "dice_coin": 0.25}
    shown = call(*command, *arguments[:-1]).stdout
    assert [line.split() for line in shown.splitlines()[1:3]] == [["dice", "0.5"], ["dice_coin", "0.25"]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--encoder", "vit_nanoo"], "did you mean 'vit_nano'"),
        (["--task", "digit"], "did you mean 'digits'"),
        (["--task", "volumes"], "vit_nano takes pictures, but the task volumes gives volumes"),
        (["--task", "cells"], "needs one that segments"),
        (["--steps", "0"], "steps must be 1 or more"),
        (["--set", "depth"], "NAME=VALUE, not 'depth'"),
        (["--set", "=3"], "NAME=VALUE, not '=3'"),
        (["--set", "dept=3"], "did you mean 'depth'"),
        (["--set", "num_classes=3"], "follows from the recipe"),
        (["--image-size", "30"], "the nearest size is 32 x 32"),
    ],
)
def test_train_encoder_refuses_bad_input(tmp_path: Path, arguments: list[str], told: str) -> None:
    assert told in refused("train", "encoder", "--out", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()
