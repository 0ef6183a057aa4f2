"""The commands of `sightline train`. What takes seconds to import is imported inside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sightline.command_options import MODEL, DeviceOption, JsonOption, ManyMethods, ThreadsOption, prepare
from sightline.errors import InputError

train_app = typer.Typer(
    no_args_is_help=True, help="Train the built-in model, a soft image, a method with weights, or an encoder."
)


@train_app.command("nano")
def train_nano(
    out: Annotated[Path, typer.Option(help="The run's folder; the same command goes on where a run in it stopped.")] = (
        Path("runs/train-nano")
    ),
    size: Annotated[str, typer.Option(help="nano, or pico for minutes instead of hours.")] = "nano",
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the scenes.")] = 0,
    warm_up_steps: Annotated[int | None, typer.Option(help="Steps of the vision tower alone.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the whole model.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures a step.")] = None,
    compile_layers: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the layers first.")] = True,
    device: DeviceOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that draw the pictures.")] = 1,
    threads: ThreadsOption = None,
) -> None:
    """Train the built-in model from nothing, on scenes drawn as it goes.

    Example: [bold]sightline train nano --size pico --seed 1 --out runs/pico-1[/bold]
    """
    prepare(threads)
    from sightline.training.nano import Recipe, train

    given: dict[str, Any] = {"warm_up_steps": warm_up_steps, "steps": steps, "batch": batch}
    changes = {name: value for name, value in given.items() if value is not None}
    recipe = Recipe.of(size, seed=seed, compile=compile_layers, **changes)
    typer.echo(train(recipe, out, threads=threads or 1, device=device or "cpu", workers=workers))


@train_app.command("soft-image")
def train_soft_image(
    model: Annotated[str, typer.Option(help="picturebook-nano, or the checkpoint folder of a train nano run.")] = MODEL,
    out: Annotated[Path, typer.Option(help="The run's folder; the same command goes on where a run in it stopped.")] = (
        Path("runs/soft-image")
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the soft image and of the scenes.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps; 400 by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of questions a step; 8 by default.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train the soft image that the method lacing guides away from; the model stays as it is.

    Laid beside the weights of its model, it is found by itself; else give it as lacing:soft_image=FILE.

    Example: [bold]sightline train soft-image --model picturebook-nano --out runs/soft-image[/bold]
    """
    prepare(threads)
    from sightline.training.soft_image import SoftImageRecipe, train

    given: dict[str, Any] = {"steps": steps, "batch": batch}
    changes = {name: value for name, value in given.items() if value is not None}
    recipe = SoftImageRecipe(model, seed=seed, **changes)
    typer.echo(train(recipe, out, threads=threads or 1, device=device or "cpu"))


@train_app.command("reduce")
def train_reduce(
    method: Annotated[
        str, typer.Option(help="A method that reduces visual tokens and is trained: mqt:max_tokens=64, voco_llama...")
    ],
    model: Annotated[
        str, typer.Option(help="picturebook-nano, or the checkpoint folder of a train nano or train reduce run.")
    ] = MODEL,
    out: Annotated[Path, typer.Option(help="The run's folder; the same command goes on where a run in it stopped.")] = (
        Path("runs/reduce")
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the method's first weights and of the scenes.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps; 2000 by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures, or films, a step; 16 by default.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The decoder's highest; 0.0003 by default.")] = None,
    module_learning_rate: Annotated[
        float | None, typer.Option(help="The method's own weights' highest; 0.001 by default.")
    ] = None,
    train_decoder: Annotated[
        bool, typer.Option("--decoder/--no-decoder", help="Train connector and decoder together with the method.")
    ] = True,
    frames: Annotated[
        int | None, typer.Option(help="Frames of a film, for methods of video; 16 by default, 1 for pictures.")
    ] = None,
    device: DeviceOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that draw the pictures.")] = 1,
    threads: ThreadsOption = None,
) -> None:
    """Train a method that reduces visual tokens, and the decoder with it.

    The checkpoint that it leaves holds both: load it, attach the method, and it finds its weights.

    Example: [bold]sightline train reduce --method mqt:max_tokens=64 --steps 1000 --out runs/mqt[/bold]
    """
    prepare(threads)
    from sightline.training.reduce import ReduceRecipe, train

    given: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "module_learning_rate": module_learning_rate,
        "frames": frames,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    recipe = ReduceRecipe(method, model, seed=seed, train_decoder=train_decoder, **changes)
    typer.echo(train(recipe, out, threads=threads or 1, device=device or "cpu", workers=workers))


@train_app.command("encoder", cls=ManyMethods)
def train_encoder(
    encoder: Annotated[str, typer.Option(help="One of the names that `sightline encoders` lists.")] = "vit_nano",
    task: Annotated[
        str, typer.Option(help="picturebook, digits, cells, coins, volumes, clips or bouncing.")
    ] = "picturebook",
    out: Annotated[Path, typer.Option(help="The run's folder; the same command goes on where a run in it stopped.")] = (
        Path("runs/encoder")
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the order of the examples.")] = 0,
    examples: Annotated[int | None, typer.Option(help="How many are trained on; 2000 by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; 1000 by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples a step; 32 by default.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest; 0.001 by default.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels; the task's by default.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any argument of the encoder: depth=2 drop_path=0.1."),
    ] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an encoder from nothing on a small task, and score it on the task's test split.

    Example: [bold]sightline train encoder --encoder vig_nano --task digits --steps 300 --out runs/vig-digits[/bold]
    """
    prepare(threads)
    from sightline.training.encoder import EncoderRecipe, train

    given: dict[str, Any] = {"examples": examples, "steps": steps, "batch": batch, "learning_rate": learning_rate}
    changes = {name: value for name, value in given.items() if value is not None}
    recipe = EncoderRecipe(encoder, task, seed=seed, image_size=image_size, overrides=_overrides(set_ or []), **changes)
    _, scores = train(recipe, out, threads=threads or 1, device=device or "cpu", quiet=as_json)
    if as_json:
        asked = {"encoder": encoder, "task": task, "seed": seed, "out": str(out)}
        typer.echo(json.dumps({**asked, "scores": scores}, ensure_ascii=False))
        return
    table = Table("on the test split", encoder, box=None, padding=(0, 2, 0, 0))
    for name, value in scores.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    typer.echo(f"The encoder is in {out / 'encoder.safetensors'}")


def _overrides(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs, each value as JSON or as Python writes it where it is that, else as text."""
    words = {"True": True, "False": False, "None": None}
    overrides: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise InputError(f"give an argument of the encoder as NAME=VALUE, not {pair!r}")
        try:
            overrides[name] = json.loads(value, parse_constant=str)
        except ValueError:
            overrides[name] = words.get(value, value)
    return overrides
