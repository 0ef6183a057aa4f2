"""Measures what fewer visual tokens cost in quality, on the picture world's test scenes.

    python scripts/measure_reduction.py                                     training-free methods on picturebook-nano
    python scripts/measure_reduction.py --trained runs/mqt runs/voco        what `sightline train reduce` made

Each method is swept over the share of the tokens that it keeps, with the positions of the survivors as they were (what
the decoder has seen of a picture is then where it always was) and, for one share, numbered anew. Every entry answers
the same questions as the unmodified model and as random dropping of as many tokens. A line of
`docs/results/reduction.jsonl` is one entry; of `trained_reduction.jsonl` one entry on a checkpoint that was trained
with the method. Both are `sightline bench` runs under `--out`, so that a killed measurement goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sightline.files import read_json

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
KEEPS = (0.5, 0.25, 0.1, 0.05)
SWEPT = (
    "random_dropping",
    "grid_dropping",
    "fastervlm",
    "fastervlm:important_ratio=0.5",
    "fopru",
    "fopru:strategy=row",
)
SWEPT += ("simvlg", "visionzip", "tome", "fastv")
B_VLLM = "b_vllm:selected=8,queries=16,order=time,width=128"
BLIND = f"{B_VLLM},qformer_text_input=False"
RANDOM_16 = ["random_dropping:keep=0.16,positions=kept"]
SETTINGS = {
    "mqt": [f"mqt:max_tokens=100,num_heads=8,tokens={tokens}" for tokens in (100, 36, 16, 4, 1)] + RANDOM_16,
    "voco_llama": ["voco_llama:tokens=2", "random_dropping:keep=0.02,positions=kept"],
    "inference_optimal": ["inference_optimal:num_heads=8,stride=2", "random_dropping:keep=0.25,positions=kept"],
    BLIND: [BLIND, *RANDOM_16],
    "b_vllm": [B_VLLM, *RANDOM_16],
    "videollm_mod": ["videollm_mod", "random_dropping:keep=0.68,positions=kept"],
    "atp_llava": [f"atp_llava:strictness={strictness}" for strictness in (0, -1, 1)],
}
"""By a recipe's whole setting or a method's name: what it is asked with, and dropping about as many tokens at random on
the same checkpoint."""


def training_free() -> Iterator[str]:
    yield "none"
    for keep in KEEPS:
        for method in SWEPT:
            name, _, more = method.partition(":")
            settings = [f"keep={keep:g}", *filter(None, [more]), *([] if name == "fastv" else ["positions=kept"])]
            yield f"{name}:{','.join(settings)}"
    for method in SWEPT[:5]:
        name, _, more = method.partition(":")
        yield f"{name}:{','.join(['keep=0.25', *filter(None, [more])])}"


def measure(model: str, entries: Sequence[str], out: Path, items: int) -> list[dict[str, Any]]:
    """Runs the entries on the skills benchmark and gives their lines."""
    import torch

    from sightline.bench import run
    from sightline.report.table import json_lines

    torch.set_num_threads(1)
    summary = run(model, "skills", list(entries), out, items=items, batch_size=32, cost_items=0, quiet=True)
    return [json.loads(line) for line in json_lines(summary).splitlines()]


def trained(folder: Path, out: Path, items: int) -> list[dict[str, Any]]:
    """The lines of one checkpoint, with what it was trained by."""
    recipe = recipe_of(folder)
    settings = SETTINGS.get(recipe["method"]) or SETTINGS[recipe["method"].partition(":")[0]]
    lines = measure(str(folder / "checkpoint"), ["none", *settings], out / folder.name, items)
    return [{**line, "model": folder.name, "recipe": recipe} for line in lines]


def recipe_of(folder: Path) -> dict[str, Any]:
    """What made a checkpoint, with the run that it started from by its name."""
    recipe: dict[str, Any] = read_json(folder / "recipe.json")
    started_from = Path(recipe["model"]).parent.name or recipe["model"]
    return recipe | {"model": started_from, "method": recipe["method"].partition(",weights")[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reduction"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--items", type=int, default=75, help="questions of each skill")
    parser.add_argument("--trained", type=Path, nargs="+", default=[], help="run folders of `sightline train reduce`")
    given = parser.parse_args()
    if not given.trained:
        write(
            given.results / "reduction.jsonl",
            measure("picturebook-nano", list(training_free()), given.out, given.items),
        )
        return
    file = given.results / "trained_reduction.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for folder in given.trained:
        lines = [line for line in lines if line["model"] != folder.name] + trained(folder, given.out, given.items)
        write(file, lines)


def write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
