"""Measures what fewer visual tokens of a film cost in quality: checkpoints that `sightline train reduce` made, on the
same films and questions.

    python scripts/measure_films.py --ask runs/all storm:temporal_pool=1 16 60 \
        --ask runs/storm storm:temporal_pool=8 128 60

Each `--ask` is the folder of a training run, the method in its short form, how many frames show a film, and how many
questions of each task; the first one of as many frames is the reference that the others are compared with, by the
benchmark's paired tests on the questions that both were asked. Answers are appended under `--out` as they come, so that
a killed measurement goes on where it was, and entries can be asked by several processes. A line of
`docs/results/films.jsonl` is one entry.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure_reduction import RESULTS, recipe_of, write
from rich.progress import track

from sightline.benchmarks.flops import DecoderShape, costs_of, stock_cost
from sightline.benchmarks.item import Answer, get_benchmark
from sightline.methods import attach, parse_methods
from sightline.models.answering import prepare, reply
from sightline.models.loading import load

METAVAR = ("FOLDER", "METHOD", "FRAMES", "QUESTIONS")
TEMPORAL = ("order", "motion", "count", "flash")


def answers(folder: Path, method: str, frames: int, items: int, out: Path) -> list[dict[str, Any]]:
    """The rows of one entry, those that are missing asked for and written to `out`."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {row["id"] for row in rows}
    benchmark = get_benchmark("films", frames=frames)
    # Question by question of all tasks in turn, so that an unfinished measurement is one of fewer films.
    asked = sorted(benchmark.items("test", items), key=lambda item: int(item.meta["film"]))
    missing = [item for item in asked if item.id not in done]
    if not missing:
        return rows
    loaded: Any
    loaded, processor = load(str(folder / "checkpoint"), dtype="float32")
    with out.open("a") as log, attach(loaded, *parse_methods(method), processor=processor) as attached:
        shape = DecoderShape.of(loaded.config.text_config)
        for item in track(missing, description=f"{folder.name} {method}"):
            started = time.perf_counter()
            inputs = prepare(loaded, processor, [item.picture()], [item.question])
            (answer,) = reply(loaded, processor, inputs, item.max_new_tokens)
            seconds = time.perf_counter() - started
            given = int((inputs["input_ids"] == loaded.config.image_token_id).sum())
            cost = stock = stock_cost(shape, inputs["input_ids"].shape[1], given, loaded.dtype.itemsize)
            if attached.call is not None:
                (cost,) = costs_of(attached.call, shape, loaded.dtype.itemsize)
            told = {"seconds": round(seconds, 2), "visual_tokens": cost.visual_tokens, "flops": cost.flops}
            told["all_tokens_flops"] = stock.flops
            row = benchmark.row(Answer(item, answer.text, answer.n_tokens, told))
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
    return rows


def line(
    folder: Path, method: str, frames: int, rows: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What is kept of an entry."""
    benchmark = get_benchmark("films", frames=frames)
    temporal, known = ([row for row in some if row["task"] in TEMPORAL] for some in (rows, reference))
    scores = benchmark.scores(temporal)
    both = {row["id"] for row in temporal} & {row["id"] for row in known}
    pair = [[row for row in some if row["id"] in both] for some in (known, temporal)]
    return {
        "checkpoint": folder.name,
        "recipe": recipe_of(folder),
        "method": method,
        "frames": frames,
        "n": len(temporal),
        "scores": {
            "temporal" if name == "all" else name: [score.value, score.low, score.high]
            for name, score in scores.items()
        },
        "appearance": benchmark.scores([row for row in rows if row["task"] == "appearance"])["all"].value,
        "visual_tokens": mean(rows, "visual_tokens"),
        "flops": mean(rows, "flops"),
        "all_tokens_flops": mean(rows, "all_tokens_flops"),
        "seconds": mean(rows, "seconds"),
        "p_value": benchmark.paired(*pair),
        "p_values": benchmark.paired_others(*pair),
    }


def mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", nargs=4, action="append", required=True, metavar=METAVAR)
    parser.add_argument("--out", type=Path, default=Path("runs/films"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    references: dict[int, list[dict[str, Any]]] = {}
    for name, method, frames, items in given.ask:
        folder = Path(name)
        file = given.out / f"{folder.name}-{method.replace(':', '-').replace('/', '_')}-{frames}.jsonl"
        rows = answers(folder, method, int(frames), int(items), file)
        lines.append(line(folder, method, int(frames), rows, references.setdefault(int(frames), rows)))
    write(given.results / "films.jsonl", lines)


if __name__ == "__main__":
    main()
