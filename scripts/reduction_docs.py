"""What `write_docs.py` writes about fewer visual tokens: `docs/reduction.md`, from `docs/results`.

`reduction.jsonl` and `trained_reduction.jsonl` are what `scripts/measure_reduction.py` wrote, `positions.jsonl` what
`scripts/measure_positions.py` wrote, `films.jsonl` what `scripts/measure_films.py` wrote, `scaling.jsonl` a line with
the command and what `sightline scaling --json` printed, `prefill_speed.jsonl` what `benchmarks/prefill.py --json`
printed.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sightline.training.reduce import ReduceRecipe

HEAD = """# Fewer visual tokens, measured

Made by `scripts/write_docs.py` from `docs/results`. The skills are the questions of `sightline bench --benchmark
skills` on test scenes of the picture world; *all* is the share of right answers to yes/no, colour, count, relation and
place questions together. A method is compared with the unmodified model on the same items, and with random dropping of
as many tokens (paired tests, adjusted for the number of comparisons; in bold where a difference is shown).

## Without training, on picturebook-nano

`python scripts/measure_reduction.py`. `positions=kept` leaves the positions of the tokens that stay as they were.

| method | tokens | FLOPs | all % | of stock | beyond random | colour | count | relation | place | CHAIR_i | recall |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
CHECKPOINTS_HEAD = """| checkpoint | made by |
| --- | --- |"""
TRAINED_HEAD = """## Trained with the decoder

{checkpoints}

`python scripts/measure_reduction.py --trained` measures each method on the checkpoint that was trained with it; *off*
is that checkpoint without it. Tokens are the mean over layers while the prompt is read; of VoCo's the text sees its own
alone, and they are all that the cache holds of the picture afterwards. ATP was trained for a mean of 25 behind its
modules, MoD and B-VLLM on single pictures. B-VLLM's Q-Formers start from nothing, the paper's from InstructBLIP. Asked
from the first step, with one question a row, they learn little in 2,200 steps (`bpic`). Without a text, as BLIP-2's
learn before InstructBLIP's, all questions on a picture share a row, and 2,000 steps teach them to see (`bblind`); after
1,500 more with the question (`bask`) they answer as well, and no better: of one picture 16 tokens hold what is asked
about anyway. On one quiet core the commands take from a quarter of an hour (MoD) to an hour and a quarter (QueCC).
Shares are of the unmodified picturebook-nano's {stock} %.

| checkpoint | method | tokens | all % | share | beyond random | colour | count | relation | place | CHAIR_i | recall |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
POSITIONS_HEAD = """## Visual positions in long prompts (V2PE)

`python scripts/measure_positions.py`: a decoder of two layers reads prompts of pictures and finds a needle; trained on
up to 7 pictures, asked at 1, 4 and 8 times that length with visual steps of the given size. Accuracy in %, mean (lowest
to highest seed).

| trained with | asked with | {times} |
| --- | --- |{rule}"""
FILMS_HEAD = """## Films

{checkpoints}

`python scripts/measure_films.py`: one question a film, answered after reading all its frames. `whole` keeps all tokens
(MoD with r = 1), and is what the others are compared with; `whole`, `mod` and `storm` have seen the same films, the
first two on an H200 in two minutes each, the others on one core of a CPU in 80 to 85, `redc` in 45. Accuracy in %,
brackets: 95 % interval. With one frame a model can be right about order half of the time, about motion a quarter, about
count a third. *Operations* are the decoder's for the prompt, as a share of what the same frames cost it with all their
tokens; *p* is of the paired test of the temporal questions against the first row of as many frames, on the films that
both were asked about; seconds are of a whole answer on one thread, drawing and vision tower included. V2PE with a step
of 1/8 gives 128 frames the positions that 16 had in training.

RED-VILLM as published (`red`) learns nothing of time here: nine tenths of its temporal tokens are what all frames
share. `redc` differs in `centred=True` alone. Of 128 frames `most_frames=16` reads every eighth, and the briefest event
lasts eight. B-VLLM, asked one question a film, learns nothing of time in 1,500 steps (`bfilmq`): without noise its rows
are one mean frame. `bfilms` learns, after the pictures of `bblind`: without a text, with all questions on a film in a
row, the selection shown what differs between frames (`centred`), sharp (`temperature=0.1`) and without noise. At the
usual learning rate its rows grew alike within 500 steps, and 33 tokens were left; at this one they stay apart. What it
has not learned is to select by the question.

| checkpoint | method | frames | tokens | operations | temporal questions | {tasks} | n | p | s |
| --- | --- | --- | --- | --- | --- |{rule} --- | --- | --- |"""
SCALING_HEAD = """## Larger decoders or more visual tokens?

`{command}`: decoders of several sizes trained from nothing on picturebook-nano's frozen tower, its visual tokens
averaged to T; error = A / N^alpha / T^beta + D, as in Inference Optimal VLMs. Brackets: 95 % interval of a residual
bootstrap; the exponents were searched from -1 to 4, and an interval that wide says that the grid does not determine
them. {note}

| errors of | cells | alpha | beta | alpha / beta |
| --- | --- | --- | --- | --- |"""
SPEED_HEAD = """## Reading a prompt faster

`benchmarks/prefill.py`: how much sooner the decoder has read a prompt with what is left of its visual tokens, over the
ratio of the counted operations; the target is four fifths. At batch 1 a short prompt leaves a processor waiting for the
weights, all the more on several cores; on a GPU it leaves the GPU waiting for the launches, whatever its length.
*First token* is the time of the whole prompt, tower included; memory is the peak beside the weights."""
SPEED_TABLE = """**Batch {batch}, {device}**: {about}; the stock model reads {tokens} visual tokens in {seconds:.3g} s.

| method | tokens | first token (s) | speed-up | operations, times fewer | share | met |{memory}
| --- | --- | --- | --- | --- | --- | --- |{rule}"""
SKILLS = ("colour", "count", "relation", "place")


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    file = folder / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def page(folder: Path) -> str:
    """The whole page."""
    parts = [HEAD, *free_rows(results(folder, "reduction")), ""]
    for rows in (part(folder) for part in (trained_rows, film_rows, position_rows, scaling_rows, speed_rows)):
        lines = list(rows)
        parts += [*lines, ""] if lines else []
    return "\n".join(parts).rstrip() + "\n"


def measured(folder: Path, slug: str) -> Iterator[str]:
    """What a method's own page says of it."""
    lines = results(folder, "reduction")
    own = [line for line in lines if line["method"].partition(":")[0] in (slug, "none")]
    if len(own) > 1:
        yield "Skills on the picture world, share of right answers in % ([all methods](../reduction.md)):\n"
        yield "| setting | visual tokens | all | " + " | ".join(SKILLS) + " |"
        yield "| --- | --- | --- |" + " --- |" * len(SKILLS)
        for line in own:
            cells = [f"`{line['method']}`", f"{line['visual_tokens']:.0f}", all_of(line), *skills(line)[: len(SKILLS)]]
            yield f"| {' | '.join(cells)} |"
        yield ""
    if any(line["method"].partition(":")[0] == slug for line in results(folder, "trained_reduction")):
        yield "Trained with the decoder: see [the page on fewer visual tokens](../reduction.md).\n"


def free_rows(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A row a method and share, those with most tokens first."""
    stock = next((line["scores"]["all"] for line in lines if line["method"] == "none"), None)
    for line in sorted(lines, key=lambda line: -line["visual_tokens"]):
        counted = line["counted"]["prefill_flops_ratio"]
        cells = [
            f"`{line['method']}`",
            f"{mean_tokens(line):.0f}",
            "" if counted is None else f"{percent(counted)} %",
            all_of(line),
            f"{percent(line['scores']['all'] / stock)} %",
            beyond_random(line),
        ]
        yield f"| {' | '.join([*cells, *skills(line)])} |"


def all_of(line: dict[str, Any]) -> str:
    """The share of right answers, in bold where it differs from the unmodified model's."""
    shown = line["method"] != "none" and (line["p_value"] or 1.0) < 0.05
    return f"**{percent(line['scores']['all'])}**" if shown else percent(line["scores"]["all"])


def mean_tokens(line: dict[str, Any]) -> float:
    """Visual tokens, the mean over the decoder's layers."""
    return line["counted"]["layer_visual_tokens"] or line["visual_tokens"]


def beyond_random(line: dict[str, Any]) -> str:
    """By how many points it is better than dropping as many tokens at random, where both were measured."""
    random = line["against_random"]
    if random is None:
        return ""
    points = f"{100 * random['difference']:+.1f}"
    return f"**{points}**" if random["p_value"] < 0.05 else points


def skills(line: dict[str, Any]) -> list[str]:
    names = (*SKILLS, "caption_chair_i", "caption_recall")
    return [percent(line["scores"][name]) if name in line["scores"] else "" for name in names]


def trained_rows(folder: Path) -> Iterator[str]:
    lines = results(folder, "trained_reduction")
    stock = next((line["scores"]["all"] for line in results(folder, "reduction") if line["method"] == "none"), None)
    if not lines or stock is None:
        return
    yield TRAINED_HEAD.format(stock=percent(stock), checkpoints=commands({line["model"]: line for line in lines}))
    for line in lines:
        name = "off" if line["method"] == "none" else f"`{line['method']}`"
        cells = [line["model"], name, f"{mean_tokens(line):.0f}", percent(line["scores"]["all"])]
        cells += [f"{percent(line['scores']['all'] / stock)} %", beyond_random(line)]
        yield f"| {' | '.join([*cells, *skills(line)])} |"


def commands(of_checkpoint: dict[str, dict[str, Any]]) -> str:
    """A table of how each checkpoint was trained, from a line that has its recipe."""
    usual = {field.name: field.default for field in dataclasses.fields(ReduceRecipe)}
    rows = [CHECKPOINTS_HEAD]
    for name, line in of_checkpoint.items():
        recipe = line["recipe"]
        words = ["sightline train reduce --method", recipe["method"]]
        if recipe["model"] != usual["model"]:
            folder = f"runs/{recipe['model']}/checkpoint"
            words[1] += f"{',' if ':' in recipe['method'] else ':'}weights={folder}"
            words += ["--model", folder]
        words += ["--steps", str(recipe["steps"]), "--batch", str(recipe["batch"])]
        for option in ("learning_rate", "module_learning_rate", "frames", "seed"):
            if recipe[option] != usual[option]:
                words += [f"--{option.replace('_', '-')}", f"{recipe[option]:g}"]
        rows.append(f"| {name} | `{' '.join([*words, '--out', f'runs/{name}'])}` |")
    return "\n".join(rows)


def film_rows(folder: Path) -> Iterator[str]:
    lines = results(folder, "films")
    if not lines:
        return
    tasks = [name for name in lines[0]["scores"] if name != "temporal"]
    checkpoints = commands({line["checkpoint"]: line for line in lines})
    yield FILMS_HEAD.format(checkpoints=checkpoints, tasks=" | ".join(tasks), rule=" --- |" * len(tasks))
    frames = [line["frames"] for line in lines]
    for place, line in enumerate(lines):
        scores, is_first = line["scores"], line["frames"] not in frames[:place]
        value, low, high = (percent(one) for one in scores["temporal"])
        cells = [line["checkpoint"]]
        cells += [f"`{line['method']}`", str(line["frames"]), f"{line['visual_tokens']:,.0f}"]
        cells += [f"{100 * line['flops'] / line['all_tokens_flops']:.3g} %", f"{value} [{low}, {high}]"]
        cells += [percent(scores[task][0]) for task in tasks]
        cells += [str(line["n"]), "" if is_first else f"{line['p_value']:.2g}", f"{line['seconds']:.1f}"]
        yield f"| {' | '.join(cells)} |"


def position_rows(folder: Path) -> Iterator[str]:
    lines = results(folder, "positions")
    if not lines:
        return
    times = sorted({line["times"] for line in lines})
    yield POSITIONS_HEAD.format(times=" | ".join(f"x {one}" for one in times), rule=" --- |" * len(times))
    for trained, step in dict.fromkeys((line["trained_with"], line["step"]) for line in lines):
        cells = []
        for one in times:
            of_seeds = [
                line["accuracy"]
                for line in lines
                if (line["trained_with"], line["step"], line["times"]) == (trained, step, one)
            ]
            low, high = percent(min(of_seeds)), percent(max(of_seeds))
            cells.append(f"{percent(statistics.fmean(of_seeds))} ({low} to {high})")
        yield f"| {trained} | {step:g} | {' | '.join(cells)} |"


def scaling_rows(folder: Path) -> Iterator[str]:
    lines = results(folder, "scaling")
    if not lines:
        return
    yield SCALING_HEAD.format(**lines[0])
    for line in lines[1:]:
        cells = [line["errors_of"], str(line["cells"])]
        for name in ("alpha", "beta", "ratio"):
            value, interval = line[name], line["intervals"].get(name)
            known = interval is not None and None not in interval
            bounds = f" [{interval[0]:.3g}, {interval[1]:.3g}]" if known else ""
            cells.append("" if value is None else f"{value:.3g}{bounds}")
        yield f"| {' | '.join(cells)} |"


def speed_rows(folder: Path) -> Iterator[str]:
    lines = results(folder, "prefill_speed")
    if not lines:
        return
    yield SPEED_HEAD
    for line in lines:
        stock, *rows = line["rows"]
        yield ""
        yield SPEED_TABLE.format(
            batch=line["benchmark"].rpartition(" ")[2],
            device=line["machine"]["device"],
            about=line["note"].partition(";")[0],
            tokens=stock["visual tokens"],
            seconds=stock["first token s"],
            memory=f" memory (GB; stock {stock['peak MB'] / 1000:.2f}) |" if "peak MB" in stock else "",
            rule=" --- |" if "peak MB" in stock else "",
        )
        for row in rows:
            cells = [f"`{row['name']}`", f"{row['visual tokens']:g}", f"{row['first token s']:.3g}"]
            cells += [f"{row['speed-up']:.2f}", f"{row['operations / fewer']:.2f}", f"{100 * row['share']:.0f} %"]
            cells.append("yes" if row["met"] else "no")
            if "peak MB" in row:
                cells.append(f"{row['peak MB'] / 1000:.2f}")
            yield f"| {' | '.join(cells)} |"
