"""Measures the grounding methods on the picture world: settings chosen on validation scenes, results on test scenes.

    python scripts/measure_grounding.py --models picturebook-nano runs/pico-1/checkpoint --out runs/grounding

1. On the first model and validation scenes every method's main strength is swept. For yes/no questions the value is
   chosen that has the highest accuracy, mean of `random` and `adversarial`; for captions the one with the highest F1,
   mean of scenes with and against the co-occurrence.
2. On test scenes the published setting and the chosen one are run, each benchmark with the scenes that agree with the
   prior and those against it; on the other models with fewer questions and without the methods of `UNSWEPT`.
3. `--only costs`: times and memory of the published settings on the first model, on one thread of this machine.

Every step is a `sightline bench` run under `--out`, so that a killed measurement goes on where it was. The results go
to `docs/results`, where `scripts/write_docs.py` reads them: `<benchmark>.jsonl` of the first model,
`seeds/<model>_<benchmark>.jsonl` of the others, `chosen.json` the chosen settings, `costs.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
SWEPT = (
    "vhr",
    "vista",
    "ritual",
    "debiasing",
    "debiasing:mode=posthoc",
    "damro",
    "lacing",
    "imbalanced_attention",
    "agla",
    "vcd",
    "pai",
    "dola",
)
CAPTION = "Please describe this image in detail."
SHORT = "Describe the picture in one sentence."
UNSWEPT = (
    "lacing:mda=true,cfg_scale=1",
    f"vdgd:describe={CAPTION},prefix={{description}} {{question}}",
    f"mvp_reasoning:bottom_up={CAPTION},top_down={SHORT},regular={CAPTION},answer_prompt={{caption}} {{question}},"
    "lower_case=false,caption_tokens=128",
)
"""Without a strength to sweep, or too slow; the prompts are those that picturebook-nano was trained on."""
FIRST_ONLY = (
    "fastervlm:keep=0.25",
    "fastervlm:keep=0.25,positions=kept",
    "fastervlm:keep=0.05",
    "fastervlm:keep=0.25+vista",
)
"""Only on the first model."""


@dataclass(frozen=True)
class Bed:
    """A benchmark as it is run here."""

    name: str
    benchmark: str
    split: str
    options: tuple[tuple[str, Any], ...]
    items: int
    validation_items: int
    score: str
    seed_items: int = 500

    @property
    def captions(self) -> bool:
        return self.benchmark == "chair"


BEDS = (
    Bed("pope_random", "pope", "random", (), 1500, 600, "accuracy", 600),
    Bed("pope_adversarial", "pope", "adversarial", (), 1500, 600, "accuracy", 600),
    Bed("chair_natural", "chair", "test", (), 500, 200, "f1"),
    Bed("chair_against", "chair", "test", (("against", True),), 500, 200, "f1"),
)


@dataclass(frozen=True)
class Job:
    """One run: entries on a bed and a model."""

    model: str
    bed: Bed
    validation: bool
    items: int
    entries: tuple[str, ...]
    out: Path
    device: str
    batch_size: int
    cost_items: int = 0


def work(job: Job) -> list[dict[str, Any]]:
    """Runs the job and gives its lines."""
    import torch

    from sightline.bench import run
    from sightline.report.table import json_lines

    torch.set_num_threads(1)
    bed = job.bed
    summary = run(
        job.model,
        bed.benchmark,
        list(job.entries),
        job.out,
        split=bed.split,
        items=job.items,
        options=dict(bed.options) | ({"scenes": "validation"} if job.validation else {}),
        batch_size=job.batch_size,
        cost_items=job.cost_items,
        quiet=True,
        device=job.device,
    )
    return [json.loads(line) for line in json_lines(summary).splitlines()]


def named(model: str) -> str:
    """A short name for results: the built-in model's, or that of the folder that a training run wrote."""
    path = Path(model)
    return path.parent.name if path.name == "checkpoint" else path.name


def choose(lines: dict[str, list[dict[str, Any]]], captions: bool) -> dict[str, str]:
    """Swept method -> the entry with the best mean score over the beds of its kind; of equal ones the first swept."""
    from sightline.benchmarks.sweep import expand

    beds = [bed for bed in BEDS if bed.captions is captions]
    score = {bed.name: {line["method"]: line["scores"][bed.score] for line in lines[bed.name]} for bed in beds}
    chosen = {}
    for method in SWEPT:
        entries = [entry for entry in expand(method) if all(entry in score[bed.name] for bed in beds)]
        means = {entry: statistics.fmean(score[bed.name][entry] for bed in beds) for entry in entries}
        chosen[method] = max(entries, key=lambda entry: means[entry])
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["picturebook-nano"])
    parser.add_argument("--out", type=Path, default=Path("runs/grounding"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--only", choices=("quality", "costs"), default="quality")
    given = parser.parse_args()
    given.results.mkdir(parents=True, exist_ok=True)
    if given.only == "costs":
        out = given.out / "costs"
        entries = (*SWEPT, *UNSWEPT, *FIRST_ONLY)
        job = Job(given.models[0], BEDS[1], False, 24, entries, out, given.device, given.batch_size, cost_items=8)
        write(given.results / "costs.jsonl", work(job))
        return
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        test(pool, given, tune(pool, given))


def tune(pool: ProcessPoolExecutor, given: argparse.Namespace) -> dict[bool, dict[str, str]]:
    """The chosen entries for yes/no questions (False) and captions (True)."""
    from sightline.benchmarks.sweep import expand

    parts = [SWEPT[start : start + 3] for start in range(0, len(SWEPT), 3)]
    jobs = []
    for bed in BEDS:
        for number, part in enumerate(parts):
            entries = tuple(entry for method in part for entry in expand(method))
            out = given.out / "validation" / f"{bed.name}-{number}"
            jobs.append(
                Job(given.models[0], bed, True, bed.validation_items, entries, out, given.device, given.batch_size)
            )
    lines: dict[str, list[dict[str, Any]]] = {}
    for job, found in zip(jobs, pool.map(work, jobs), strict=True):
        lines.setdefault(job.bed.name, []).extend(found)
    chosen = {captions: choose(lines, captions) for captions in (False, True)}
    swept = [{"bed": bed, **line} for bed, found in lines.items() for line in unique(found)]
    write(given.results / "validation.jsonl", swept)
    text = json.dumps({"yes/no": chosen[False], "captions": chosen[True]}, indent=1)
    (given.results / "chosen.json").write_text(text + "\n")
    return chosen


def test(pool: ProcessPoolExecutor, given: argparse.Namespace, chosen: dict[bool, dict[str, str]]) -> None:
    """Runs the published and the chosen settings on test scenes."""
    jobs = []
    for model in given.models:
        first = model == given.models[0]
        for bed in BEDS:
            entries = [*SWEPT, *chosen[bed.captions].values()]
            if first:
                entries += [*FIRST_ONLY, UNSWEPT[0]]
            if first and not bed.captions:  # VDGD would describe before describing; MVP answers closed questions only
                entries += UNSWEPT[1:]
            out = given.out / named(model) / bed.name
            items = bed.items if first else bed.seed_items
            whole = tuple(dict.fromkeys(entries))
            jobs.append(Job(model, bed, False, items, whole, out, given.device, given.batch_size))
    jobs.sort(key=lambda job: job.model != given.models[0])
    for job, lines in zip(jobs, pool.map(work, jobs), strict=True):
        folder = given.results if job.model == given.models[0] else given.results / "seeds"
        prefix = "" if job.model == given.models[0] else f"{named(job.model)}_"
        folder.mkdir(parents=True, exist_ok=True)
        for line in lines:
            line["model"] = named(job.model)
        write(folder / f"{prefix}{job.bed.name}.jsonl", lines)


def unique(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({line["method"]: line for line in lines}.values())


def write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
