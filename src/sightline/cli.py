"""The command line. What takes seconds to import is imported inside the commands, so that `--help` is there at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from sightline.command_options import (
    MODEL,
    AttentionOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ManyMethods,
    MethodsOption,
    ModelOption,
    RemoteCodeOption,
    RevisionOption,
    SecondsOption,
    ThreadsOption,
    prepare,
)
from sightline.errors import InputError
from sightline.files import FULL
from sightline.training.commands import train_app
from sightline.training.scaling_command import scaling

BAD_INPUT = 2


class Commands(TyperGroup):
    """Ends in one sentence and exit code 2 where the input is bad, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            sentence = " ".join(str(error).split())
        except OSError as error:
            if error.errno not in FULL:
                raise
            sentence = "the disk is full; free some space and give the same command again"
        typer.echo(f"sightline: {sentence}", err=True)
        raise typer.Exit(BAD_INPUT)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="See what vision-language methods buy and cost, on one model and one machine, side by side.",
)
picturebook_app = typer.Typer(no_args_is_help=True, help="The generated picture world.")
app.add_typer(picturebook_app, name="picturebook")
app.add_typer(train_app, name="train")
app.command()(scaling)


@app.command(cls=ManyMethods)
def bench(
    model: ModelOption = MODEL,
    benchmark: Annotated[str, typer.Option(help="Which: pope, chair, skills, words-or-vision...")] = "pope",
    split: Annotated[str | None, typer.Option(help="One of the benchmark's splits; its first by default.")] = None,
    methods: MethodsOption = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Run every two of the methods together too, and note which do not compose.")
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD[:FIELD=LOW..HIGH]",
            help="Run methods at several strengths: vista, vista:strength=0.01..0.3, 'ritual:alpha=0.5;1;2'.",
        ),
    ] = None,
    items: Annotated[int | None, typer.Option(help="How many items (skills: of each skill).")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; the same command goes on where a run in it stopped.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Items a batch.")] = 16,
    seed: Annotated[int, typer.Option(help="Which items are drawn.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(help="The longest answer.")] = None,
    max_seconds: SecondsOption = None,
    cost_items: Annotated[int, typer.Option(help="On how many items times are measured; 0 leaves them out.")] = 8,
    source: Annotated[str | None, typer.Option(help="pope: picturebook or files; chair: picturebook or coco.")] = None,
    images: Annotated[Path | None, typer.Option(help="pope, chair: the folder of the images.")] = None,
    questions: Annotated[Path | None, typer.Option(help="pope: the JSON-lines file or their folder.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="chair: the folder of COCO's annotation files.")] = None,
    synonyms: Annotated[Path | None, typer.Option(help="chair: the original synonym list.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any further option of the benchmark.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    attention: AttentionOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare methods on a benchmark: quality with intervals, tokens, times, memory.

    The unmodified model, none, is always run too, because all are compared with it.

    Example: [bold]sightline bench --benchmark pope --split adversarial --methods none fastervlm:keep=0.25 vhr
    --items 500 --out runs/x[/bold]
    """
    prepare(threads)
    from sightline.bench import run
    from sightline.benchmarks.pairs import pairs as planned
    from sightline.benchmarks.sweep import expand
    from sightline.report.table import json_lines, tables

    named = {
        "source": source,
        "images": images,
        "questions": questions,
        "annotations": annotations,
        "synonyms": synonyms,
    }
    options = {name: str(value) for name, value in named.items() if value is not None}
    entries = planned(methods or []).entries if pairs else methods or ["none"]
    summary = run(
        model,
        benchmark,
        [*entries, *(entry for spec in sweep or [] for entry in expand(spec))],
        out,
        split=split,
        items=items,
        options=options | _options(benchmark, option or []),
        batch_size=batch_size,
        seed=seed,
        max_new_tokens=max_new_tokens,
        max_seconds=max_seconds,
        cost_items=cost_items,
        skip_refused=pairs,
        dtype=dtype,
        device=device,
        attn_implementation=attention,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        typer.echo(json_lines(summary), nl=False)
    else:
        Console().print(tables(summary))
        typer.echo(f"\nThe run is in {summary.folder}; a page to look at: sightline report {summary.folder}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A folder that `sightline bench` has written.", metavar="RUN")],
) -> None:
    """Write a run's report: one HTML file with tables, plots and example pictures.

    Example: [bold]sightline report runs/x[/bold]
    """
    from sightline.report.page import write_report

    typer.echo(write_report(run))


@app.command(cls=ManyMethods)
def ask(
    pictures: Annotated[
        list[Path],
        typer.Argument(help="A picture (PNG, JPEG, WEBP, BMP, GIF, TIFF or PPM), several, or a video file."),
    ],
    question: Annotated[str, typer.Argument(help="What to ask about it or them.")],
    model: ModelOption = MODEL,
    methods: MethodsOption = None,
    frames: Annotated[int, typer.Option(help="How many frames of a video are shown.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    max_seconds: SecondsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    attention: AttentionOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Ask a model about a picture, several or a video, with any methods on; several --methods give an answer each.

    Example: [bold]sightline ask picture.png "What is there?" --methods none fastervlm:keep=0.25[/bold]
    """
    if not question.strip():
        raise InputError("the question is empty: ask something about the picture")
    from sightline.models.images import open_picture
    from sightline.models.videos import is_video, read_video

    shown = []
    for file in pictures:
        shown += read_video(file, frames=frames) if is_video(file) else [open_picture(file)]
    prepare(threads)
    from sightline.methods import describe, parse_methods
    from sightline.models.answering import Budget, cut_off_mark
    from sightline.models.conversation import answer, strategy_of
    from sightline.models.loading import load

    chosen = [parse_methods(spec) for spec in methods or ["none"]]
    for own in chosen:
        strategy_of(own)  # refuses what does not compose before the model is loaded
    budget = Budget(seconds=max_seconds)
    loaded, processor = load(
        model,
        dtype=dtype,
        device=device,
        attn_implementation=attention,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    for own in chosen:
        given = answer(loaded, processor, shown, question, own, max_new_tokens, budget=budget)
        told = given.text + cut_off_mark(given, budget)
        typer.echo(told if len(chosen) == 1 else f"{describe(own)}: {told}")


@app.command(cls=ManyMethods)
def attack(
    model: ModelOption = MODEL,
    methods: MethodsOption = None,
    items: Annotated[int, typer.Option(min=1, help="How many pictures of the picture world.")] = 8,
    out: Annotated[Path, typer.Option(help="The run's folder; the same command goes on where a run in it stopped.")] = (
        Path("runs/attack")
    ),
    iterations: Annotated[int, typer.Option(help="Steps of the attack on each picture.")] = 1000,
    epsilon: Annotated[float, typer.Option(help="How far a pixel may move, of its range [0, 1].")] = 8 / 255,
    sample_every: Annotated[int, typer.Option(help="Sample answers after every so many steps.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Which pictures are drawn.")] = 0,
    question: Annotated[str | None, typer.Option(help="What is asked; a detailed caption by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    guard_tokens: Annotated[int, typer.Option(min=1, help="The guard: the most tokens that an answer may use.")] = 64,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    attention: AttentionOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """See how far a picture can be changed unseen so that the answer grows long, and what holds against it.

    Example: [bold]sightline attack --items 8 --iterations 200 --sample-every 5 --methods none vhr
    --out runs/attack[/bold]
    """
    prepare(threads)
    from sightline.models.answering import Budget
    from sightline.models.loading import load
    from sightline.probes import answer_lengths
    from sightline.probes.verbose_images import VerboseImages

    settings = VerboseImages(
        epsilon=epsilon, iterations=iterations, sample_every=sample_every, max_new_tokens=max_new_tokens
    )
    pictures = answer_lengths.first_scenes(items, seed)
    loaded, processor = load(
        model,
        dtype=dtype,
        device=device,
        attn_implementation=attention,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    lines = answer_lengths.measure(
        loaded,
        processor,
        pictures,
        methods or ["none"],
        out,
        attack=settings,
        question=answer_lengths.QUESTION if question is None else question,
        max_new_tokens=max_new_tokens,
        guard=Budget(tokens=guard_tokens),
    )
    summary = answer_lengths.summarise(lines)
    if as_json:
        asked = {"model": model, "iterations": iterations, "epsilon": epsilon, "sample_every": sample_every}
        asked |= {"seed": seed, "max_new_tokens": max_new_tokens, "guard_tokens": guard_tokens}
        for line in summary:
            typer.echo(json.dumps(line | asked, ensure_ascii=False))
    else:
        Console().print(answer_lengths.table(summary))
        typer.echo(f"The run is in {out}; its pictures are in {out / 'pictures'}")


@app.command()
def papers(
    stretch: Annotated[str | None, typer.Option(help="Only one stretch of the road: reduction, grounding...")] = None,
    as_json: JsonOption = False,
) -> None:
    """List all papers, and what implements each; below them the peers, known methods that serve as yardsticks.

    Example: [bold]sightline papers --stretch grounding[/bold]
    """
    from sightline.papers import as_dict, peers
    from sightline.papers import papers as catalogue

    entries = catalogue(stretch)
    if as_json:
        for entry in entries:
            typer.echo(json.dumps(as_dict(entry), ensure_ascii=False))
        return
    beside = tuple(entry for entry in peers() if stretch in (None, entry.stretch))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("paper", "stretch", "year", "status", "idea"):
        table.add_column(column, no_wrap=column != "idea")
    for part in (entries, beside):
        for entry in part:
            style = "bold" if entry.object else "dim"
            status = f"{entry.status}, peer" if entry.peer else entry.status
            table.add_row(entry.slug, entry.stretch, str(entry.year), status, entry.idea, style=style)
        if part is entries and beside:
            table.add_row()
    console = Console()
    console.print(table)
    for part, what in ((entries, "papers"), (beside, "peers")):
        if part:
            done = sum(entry.object is not None for entry in part)
            console.print(f"{done} of {len(part)} {what} implemented", style="bold")


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the methods, with their parameters and defaults.

    Example: [bold]sightline methods[/bold]
    """
    prepare(None)
    from sightline.methods import methods as registered
    from sightline.papers import paper

    described = [
        {
            "method": name,
            "title": paper(name).title,
            "peer": paper(name).peer,
            "parameters": {field.name: _plain(field.default) for field in dataclasses.fields(kind)},
        }
        for name, kind in registered().items()
    ]
    if as_json:
        for entry in described:
            typer.echo(json.dumps(entry, ensure_ascii=False))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("method", "parameters and defaults", "paper"):
        table.add_column(column, no_wrap=column == "method", overflow="fold")
    for entry in described:
        parameters = entry["parameters"]
        assert isinstance(parameters, dict)
        shown = ", ".join(f"{key}={value}" for key, value in parameters.items())
        table.add_row(str(entry["method"]), shown, str(entry["title"]) + " (a peer)" * bool(entry["peer"]))
    Console().print(table)


@app.command()
def encoders(
    pattern: Annotated[str, typer.Argument(help="Only those whose names match, such as 'vi*'.")] = "*",
    measure: Annotated[
        bool, typer.Option("--measure", help="Count parameters, multiply-adds and tokens; all take some 30 seconds.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the encoders: what goes in, the paper, and the size of the input that each was published with.

    Classifiers of pictures are measured with 1000 classes.

    Example: [bold]sightline encoders 'vig*' --measure[/bold]
    """
    prepare(None)
    from rich.progress import track

    from sightline.encoders import catalogue
    from sightline.encoders.encoder import list_encoders
    from sightline.errors import unknown

    names = list_encoders(pattern)
    if not names:
        raise unknown("encoder", pattern, list_encoders())
    lines = (catalogue.record(name, measure=measure) for name in names)
    if as_json:
        for line in lines:
            typer.echo(json.dumps(line))
        return
    told = Console(stderr=True)
    watched = track(lines, "measuring", total=len(names), console=told, transient=True, disable=not measure)
    Console().print(catalogue.table(watched))


@picturebook_app.command("draw")
def picturebook_draw(
    out: Annotated[Path, typer.Argument(help="The folder to write to.")],
    n: Annotated[int, typer.Option("-n", help="How many scenes.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Which scenes.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation, test or held_out.")] = "train",
    against: Annotated[bool, typer.Option("--against", help="Scenes against the co-occurrence.")] = False,
    size: Annotated[int, typer.Option(help="The pictures' side in pixels.")] = 320,
) -> None:
    """Draw scenes of the picture world: a PNG file each, a sheet of them all, and their records.

    Example: [bold]sightline picturebook draw --seed 7 -n 12 out/[/bold]
    """
    from sightline.errors import unknown
    from sightline.picturebook.album import write_album
    from sightline.picturebook.scene import SPLITS

    for known in SPLITS:
        if split == known:
            typer.echo(write_album(out, n, split=known, start=1_000_000 * seed, against=against, size=size))
            return
    raise unknown("split", split, SPLITS)


def _options(benchmark: str, given: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs, each value in the type of the benchmark's option of that name."""
    from sightline.benchmarks.item import get_benchmark

    hints = get_type_hints(type(get_benchmark(benchmark)))
    options: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"give an option of the benchmark as NAME=VALUE, not {pair!r}")
        kind = hints.get(name)
        kinds = get_args(kind) or (kind,)
        try:
            if bool in kinds:
                options[name] = {"true": True, "false": False}[value.lower()]
            else:
                options[name] = int(value) if int in kinds else value
        except (KeyError, ValueError):
            what = "true or false" if bool in kinds else "a whole number"
            raise InputError(f"{name} must be {what}, not {value!r}") from None
    return options


def _plain(value: object) -> Any:
    return value if isinstance(value, (int, float, str, type(None))) else str(value)
