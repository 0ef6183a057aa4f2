"""How long the answers to clean, noisy and attacked pictures are: what `verbose_images` makes a model cost, what is
left of it when a method is switched on, and what a limit on an answer's tokens makes of it.

Each picture is measured in three versions, in 8 bits a channel and through the processor, as a user would give them:

- clean: as it is;
- noise: each channel of each pixel moved by epsilon up or down at random, the strongest noise in the attack's ball;
- attacked: what the attack on the unmodified model made of it.

The unmodified model also answers to the attacked pixels before rounding, and its answers are sampled too, as in the
paper, with draws that the attack has not chosen by. All other answers are greedy. The attack never saw the methods:
what they are tried on is how far it carries over to them.

An answer that reaches the longest length would have gone on: where many did, the growth is a lower bound.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sightline.bench import fingerprint
from sightline.benchmarks.item import SCENES_PER_SEED, check_draw, check_length
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.statistics import bootstrap_sums
from sightline.errors import InputError
from sightline.files import write_whole
from sightline.methods import attach, parse_methods
from sightline.models.answering import UNLIMITED, Budget, Reply, cut_off_mark, prepare, reply
from sightline.models.images import open_picture
from sightline.picturebook.draw import draw
from sightline.picturebook.scene import sample_scene
from sightline.probes.verbose_images import Attacked, Pixels, Step, VerboseImages, progress_bar

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

QUESTION = "Please describe this image in detail."
VERSIONS = ("clean", "noise", "attacked")
UNROUNDED = "attacked, not rounded"
GAP, ENLARGED = 4, 3


def first_scenes(n: int, seed: int = 0) -> dict[str, Image]:
    """The first pictures of a seed's test scenes, by name."""
    check_draw(n, seed)
    numbers = range(seed * SCENES_PER_SEED, seed * SCENES_PER_SEED + n)
    return {f"scene-{number}": draw(sample_scene("test", number)) for number in numbers}


def measure(
    model: Any,
    processor: Any,
    pictures: Mapping[str, Image],
    methods: Sequence[str],
    out: Path,
    *,
    attack: VerboseImages | None = None,
    question: str = QUESTION,
    max_new_tokens: int = 128,
    guard: Budget | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Attacks pictures and counts the tokens of the answers, with one line a result in `out`/answers.jsonl.

    Called again with the same arguments, it goes on where it stopped. `out`/pictures has each attacked picture as it
    was measured, and beside the clean one as the tower sees that.

    Args:
        model: the model, with no methods on it.
        processor: its processor.
        pictures: the pictures by name; the names are file names, too.
        methods: what is tried on the pictures, in short form; "none" comes first whether it is named or not.
        out: the run's folder.
        attack: the attack; by default the paper's, with answers of at most `max_new_tokens`.
        question: what is asked.
        max_new_tokens: the longest answer.
        guard: a budget; every answer is given a second time with it.
        quiet: draw no progress bar.

    Returns:
        The lines: id, method, picture (one of `VERSIONS` or `UNROUNDED`), guard (whether it was on), tokens, stopped,
        cut_off, text with the mark of a cut; for the unmodified model also sampled_tokens, and with `UNROUNDED` attack:
        what the attack did.

    Raises:
        InputError: for bad settings, a method that does not work on the model, a model that cuts pictures into tiles,
            and a folder that holds another run.
    """
    check_length(max_new_tokens)
    attack = VerboseImages(max_new_tokens=max_new_tokens) if attack is None else attack
    chosen = {spec: parse_methods(spec) for spec in dict.fromkeys(["none", *methods])}
    for own in chosen.values():
        with attach(model, *own, processor=processor):
            pass
    settings = {
        "probe": VerboseImages.paper,
        "attack": asdict(attack),
        "weights": fingerprint(model),
        "question": question,
        "max_new_tokens": max_new_tokens,
        "guard": None if guard is None else asdict(guard),
    }
    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }
    folder = RunFolder(out, "attack.json")  # it is no benchmark run
    with folder.opened(settings, machine, list(chosen)):
        rows = folder.rows()
        done = {_key(row) for row in rows}
        with progress_bar(quiet) as bar:
            task = bar.add_task("", total=len(pictures) * attack.iterations)
            for name, picture in pictures.items():
                bar.update(task, description=name)
                file = out / "pictures" / f"{name}.png"
                pixels = Pixels(model, processor, picture, question)
                if pixels.picture(pixels.zero()) is None:
                    raise InputError(
                        "the model cuts a picture into tiles: no picture can be made of what an attack finds"
                    )
                if ("none", name, UNROUNDED, False) in done:
                    bar.update(task, advance=attack.iterations)
                else:

                    def tell(step: Step) -> None:
                        bar.update(task, advance=1)

                    made = attack.attack(model, processor, picture, question, told=tell)
                    _keep(made, pixels, file)
                    inputs = {**pixels.inputs, "pixel_values": made.pixel_values}
                    answer = reply(model, processor, inputs, max_new_tokens)[0]
                    line = _line(name, "none", UNROUNDED, answer, UNLIMITED, guarded=False) | {"attack": _told(made)}
                    folder.append([line])
                    rows.append(line)
                versions = dict(zip(VERSIONS, (picture, _noisy(attack, pixels), open_picture(file)), strict=True))
                for spec, own in chosen.items():
                    for budget in (UNLIMITED, guard):
                        keys = [(spec, name, version, budget is guard) for version in VERSIONS]
                        if budget is None or all(key in done for key in keys):
                            continue
                        with attach(model, *own, processor=processor):
                            inputs = prepare(model, processor, list(versions.values()), [question] * len(versions))
                            replies = reply(model, processor, inputs, max_new_tokens, budget=budget)
                        new = [
                            _line(name, spec, version, one, budget, guarded=budget is guard)
                            for version, one in zip(versions, replies, strict=True)
                        ]
                        if spec == "none" and budget is not guard:
                            for line, shown in zip(new, versions.values(), strict=True):
                                alone = prepare(model, processor, [shown], [question])
                                line["sampled_tokens"] = attack.sampled(model, alone, attack.iterations + 1)[1]
                        new = [line for line in new if _key(line) not in done]
                        folder.append(new)
                        rows += new
    return [row for row in rows if row["id"] in pictures and row["method"] in chosen]


def _keep(made: Attacked, pixels: Pixels, file: Path) -> None:
    """Writes an attacked picture, and beside the clean one."""
    clean = pixels.picture(pixels.zero())
    assert made.picture is not None
    assert clean is not None
    write_whole(file, _png(made.picture))
    write_whole(file.with_name(f"{file.stem}.beside.png"), _png(side_by_side(clean, made.picture)))


def _told(made: Attacked) -> dict[str, Any]:
    """What an attack did, at the iterations after which answers were sampled."""
    return {
        "best": made.best,
        "sampled_clean": made.clean_length,
        "sampled_best": None if made.best is None else made.history[made.best].length,
        "steps": [asdict(step) for step in made.history if step.length is not None],
    }


def _noisy(attack: VerboseImages, pixels: Pixels) -> Image:
    radius, _ = attack.bounds(pixels)
    noisy = pixels.picture(pixels.project(pixels.signs(radius, attack.seed), radius))
    assert noisy is not None
    return noisy


def _line(name: str, spec: str, version: str, answer: Reply, budget: Budget, *, guarded: bool) -> dict[str, Any]:
    return {
        "id": name,
        "method": spec,
        "picture": version,
        "guard": guarded,
        "tokens": answer.n_tokens,
        "stopped": answer.stopped,
        "cut_off": answer.cut_off,
        "text": answer.text + cut_off_mark(answer, budget),
    }


def _key(line: Mapping[str, Any]) -> tuple[str, str, str, bool]:
    return line["method"], line["id"], line["picture"], line["guard"]


def side_by_side(clean: Image, attacked: Image) -> Image:
    """Two pictures of one size beside each other, enlarged without smoothing."""
    from PIL import Image

    width, height = (ENLARGED * side for side in clean.size)
    beside = Image.new("RGB", (2 * width + GAP, height), "white")
    for place, one in enumerate((clean, attacked)):
        beside.paste(one.resize((width, height), Image.Resampling.NEAREST), (place * (width + GAP), 0))
    return beside


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each method, with the guard and without: mean tokens of the answers to each version of the pictures,
    how many times those to the clean pictures the others are (with the 95 % interval of a bootstrap over pictures), and
    the share of answers that a limit cut off. The first line also has the means of what was measured for none alone."""
    lines = []
    for spec, guard in dict.fromkeys((row["method"], row["guard"]) for row in rows):
        own = [row for row in rows if (row["method"], row["guard"]) == (spec, guard)]
        by = {version: {r["id"]: r for r in own if r["picture"] == version} for version in (*VERSIONS, UNROUNDED)}
        shared = [name for name in by["clean"] if all(name in by[version] for version in VERSIONS)]
        if not shared:
            continue
        line: dict[str, Any] = {"method": spec, "guard": guard, "pictures": len(shared)}
        counts = {version: [by[version][name]["tokens"] for name in shared] for version in VERSIONS}
        line["tokens"] = {version: float(np.mean(own_counts)) for version, own_counts in counts.items()}
        line["cut_off"] = {version: float(np.mean([by[version][n]["cut_off"] for n in shared])) for version in VERSIONS}
        line["growth"] = {version: _growth(counts["clean"], counts[version], shared) for version in VERSIONS[1:]}
        if all(name in by[UNROUNDED] for name in shared):
            line["tokens"][UNROUNDED] = float(np.mean([by[UNROUNDED][name]["tokens"] for name in shared]))
        if all("sampled_tokens" in by[version][name] for version in VERSIONS for name in shared):
            line["sampled_tokens"] = {
                version: float(np.mean([by[version][name]["sampled_tokens"] for name in shared]))
                for version in VERSIONS
            }
        lines.append(line)
    return lines


def _growth(clean: Sequence[int], other: Sequence[int], names: Sequence[str]) -> dict[str, float] | None:
    """How many times as long, of the sums; None where it cannot be told."""

    def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        quotient: NDArray[np.float64] = sums[..., 1] / sums[..., 0]
        return quotient

    if min(clean) == 0:
        return None
    low, high = bootstrap_sums(np.array([clean, other]).T, ratio, names)
    return {"times": sum(other) / sum(clean), "low": float(low), "high": float(high)}


def table(summary: Sequence[Mapping[str, Any]]) -> Table:
    """The summary for the terminal."""
    shown = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title="Tokens an answer (growth: attacked / clean; cut off: of clean/attacked)",
    )
    shown.add_column("method", no_wrap=True)
    for column in (*VERSIONS, "growth", "95 %", "cut off"):
        shown.add_column(column, justify="right", no_wrap=True)
    for line in summary:
        growth = line["growth"]["attacked"]
        shown.add_row(
            line["method"] + (" + guard" if line["guard"] else ""),
            *(f"{line['tokens'][version]:.1f}" for version in VERSIONS),
            "" if growth is None else f"{growth['times']:.2f}",
            "" if growth is None else f"{growth['low']:.2f}-{growth['high']:.2f}",
            "/".join(f"{line['cut_off'][version]:.0%}" for version in ("clean", "attacked")),
        )
    return shown


def _png(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
