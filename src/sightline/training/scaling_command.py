"""`sightline scaling`. What takes seconds to import is imported inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sightline.command_options import MODEL, DeviceOption, JsonOption, ThreadsOption, prepare
from sightline.errors import InputError


def scaling(
    out: Annotated[
        Path, typer.Option(help="The grid's folder; the same command goes on where a run in it stopped.")
    ] = (Path("runs/scaling")),
    model: Annotated[str, typer.Option(help="picturebook-nano, or the checkpoint folder of a train nano run.")] = MODEL,
    shapes: Annotated[str | None, typer.Option(help="Decoders as WIDTHxLAYERS: 48x3,96x4,144x4,192x5.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of visual tokens: 1,4,25,100.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many grids, each of its own scenes and weights.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Steps of each model; 2000 by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Scenes a step; 16 by default.")] = None,
    scenes: Annotated[int | None, typer.Option(help="Different scenes to train on; 8000 by default.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Models that are trained at the same time.")] = 1,
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Train nothing: fit what the folder holds.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Train nothing: fit the tables that the paper's authors released.")
    ] = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """See whether larger decoders or more visual tokens do more: train a grid of small models, and fit the scaling law.

    Example: [bold]sightline scaling --published[/bold]
    """
    prepare(threads)
    from sightline.files import write_whole
    from sightline.report.scaling import as_dict, grid_results, notes, page, published_results, table
    from sightline.training.scaling_grid import GRID, ScalingRecipe, grid_cells, read_grid, scored, train_grid

    if published and fit_only:
        raise InputError("give --published or --fit-only, not both")
    lines: list[dict[str, Any]] = []
    if fit_only:
        lines = read_grid(out / GRID)
    elif not published:
        given: dict[str, Any] = {
            "shapes": None if shapes is None else tuple(_shape(one) for one in shapes.split(",")),
            "tokens": None if tokens is None else tuple(_whole(one, "--tokens", "1,4,25") for one in tokens.split(",")),
            "steps": steps,
            "batch": batch,
            "scenes": scenes,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        recipe = ScalingRecipe(model, seeds=tuple(range(seeds)), **changes)
        recipe.check_fit()
        lines = train_grid(recipe, out, jobs=jobs, threads=threads or 1, device=device or "cpu", quiet=as_json)
    results = published_results()
    if not published:
        kinds = ["all", *dict.fromkeys(task for line in lines for task in scored(line))]
        text = sum(line["text_tokens"] for line in lines) / max(1, len(lines))
        results += grid_results({kind: grid_cells(lines, kind) for kind in kinds}, text)
    file = out / "scaling.html"
    write_whole(file, page(results))
    if as_json:
        for result in results:
            typer.echo(json.dumps(as_dict(result), ensure_ascii=False))
        return
    console = Console()
    console.print(table(results))
    for note in notes(results):
        console.print(note, highlight=False)
    typer.echo(f"A page to look at: {file}")


def _shape(text: str) -> tuple[int, int]:
    width, cross, layers = text.partition("x")
    if not cross:
        raise InputError(f"--shapes takes WIDTHxLAYERS with commas between, such as 48x3,96x4, not {text!r}")
    return _whole(width, "--shapes", "48x3,96x4"), _whole(layers, "--shapes", "48x3,96x4")


def _whole(text: str, option: str, example: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option} takes whole numbers such as {example}, not {text!r}") from None
