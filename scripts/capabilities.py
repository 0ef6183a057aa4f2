"""Writes docs/capabilities.md: which method works on which family, and how; nothing in it is typed by hand.

Every method of the catalogue, at its default settings (with random weights where it has its own), is attached to a tiny
random-weight model of every family
(`tests/families.py`) and tried. A cell says `yes` where the answer was the one that it has to be, and `refused` where
the method, or the engine, said that it cannot do this, with the reason below. Anything else is a defect: it is written
down as `FAILS` and the script ends with 1. `--check` writes nothing and exits with 1 where the file is stale.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.methods import Method, attach, methods
from sightline.reduction.trained_reducer import TrainedReducer

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "capabilities.md"
NEW_TOKENS = 4
YES, REFUSED = "yes", "refused"
SIZES: dict[str, dict[str, Any]] = {
    "b_vllm": {"selected": 4, "queries": 4, "width": 16, "heads": 2},
    "inference_optimal": {"stride": 2},
    "mqt": {"tokens": 5, "max_tokens": 16},
}
"""Of the tiny models' pictures, which have sixteen visual tokens."""


def tiny_families() -> ModuleType:
    """`tests/families.py`, which is no part of a package."""
    known = sys.modules.get("families")
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location("families", ROOT / "tests" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


class Trial:
    """One tiny model, and the answers that it gives with methods attached."""

    def __init__(self, family: str) -> None:
        self.family, self.tiny = family, tiny_families()
        self.model = self.tiny.tiny_model(family)

    def batch(self, images: int | Sequence[int] = 1) -> dict[str, Any]:
        """Three rows of different lengths."""
        made: dict[str, Any] = self.tiny.inputs(self.family, self.model, images_per_row=images)
        return made

    def answer(self, inputs: dict[str, Any], **options: Any) -> Tensor:
        """The new tokens of each row; greedy unless told otherwise."""
        torch.manual_seed(0)
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
        tokens: Tensor = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return tokens

    def rows_alone(self, images: int | Sequence[int]) -> Tensor:
        """The greedy answers of the batch's rows, one at a time and without padding."""
        single = self.tiny.single
        rows = [self.answer(single(self.family, self.model, row, images_per_row=images)) for row in range(3)]
        return torch.cat(rows)


def greedy(trial: Trial) -> bool:
    """The likeliest token each time: twice the same."""
    first = trial.answer(trial.batch())
    return first.shape == (3, NEW_TOKENS) and torch.equal(first, trial.answer(trial.batch()))


def sampled(trial: Trial) -> bool:
    """Several samples a row, which follow torch's seed."""
    options: dict[str, Any] = dict(do_sample=True, temperature=2.0, top_k=20, num_return_sequences=2)
    first = trial.answer(trial.batch(), **options)
    return first.shape == (6, NEW_TOKENS) and torch.equal(first, trial.answer(trial.batch(), **options))


def beam_search(trial: Trial) -> bool:
    """Three beams over a cache that is reordered: those that are found by reading everything anew."""
    cached = trial.answer(trial.batch(), num_beams=3)
    return torch.equal(cached, trial.answer(trial.batch(), num_beams=3, use_cache=False))


def padded_batch(trial: Trial) -> bool:
    """Each row of a left-padded batch as if it were alone."""
    return torch.equal(trial.answer(trial.batch()), trial.rows_alone(1))


def several_images(trial: Trial) -> bool:
    """Two images, none, and one in the rows of a batch: each row as if it were alone."""
    return torch.equal(trial.answer(trial.batch([2, 0, 1])), trial.rows_alone([2, 0, 1]))


def without_cache(trial: Trial) -> bool:
    """The same answer when everything is read anew for each token."""
    return torch.equal(trial.answer(trial.batch()), trial.answer(trial.batch(), use_cache=False))


BEHAVIOURS: dict[str, Callable[[Trial], bool]] = {
    "greedy": greedy,
    "sampled": sampled,
    "beam search": beam_search,
    "padded batch": padded_batch,
    "several images": several_images,
    "without a cache": without_cache,
}


def tried(trial: Trial, chosen: Sequence[Method], behaviour: Callable[[Trial], bool]) -> str:
    """`yes`, `refused: <reason>`, or `FAILS: <what happened>`."""
    try:
        with attach(trial.model, *chosen):
            return YES if behaviour(trial) else "FAILS: another answer than it has to be"
    except InputError as error:
        return f"{REFUSED}: {error}"
    except Exception as error:  # whatever else a method does wrong belongs into the table
        return f"FAILS: {type(error).__name__}: {error}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown lines of a table, then the reasons of its refusals (and failures), each once."""
    reasons = list(dict.fromkeys(cell for row in rows for cell in row if ": " in cell))

    def short(cell: str) -> str:
        return cell if cell not in reasons else f"{cell.partition(':')[0]} ({reasons.index(cell) + 1})"

    yield f"| {' | '.join(head)} |"
    yield "| --- " * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(map(short, row))} |"
    yield ""
    for number, reason in enumerate(reasons, start=1):
        yield f"{number}. {reason}"
    if reasons:
        yield ""


def attachable() -> list[str]:
    """The methods that attach to a model; a strategy asks it several times instead."""
    return [name for name, kind in methods().items() if kind.attaches]


def small(name: str) -> Method:
    """The method at its default settings; one with weights of its own has random ones, of a size that fits."""
    kind = methods()[name]
    return kind(**SIZES.get(name, {}), weights="untrained") if issubclass(kind, TrainedReducer) else kind()


def method_rows(name: str, trials: dict[str, Trial]) -> list[list[str]]:
    """For each family, what the method does there."""
    method = small(name)
    return [
        [family, *(tried(trial, [method], behaviour) for behaviour in BEHAVIOURS.values())]
        for family, trial in trials.items()
    ]


def pair_rows(trials: dict[str, Trial]) -> list[list[str]]:
    """For each ordered pair of methods, whether both at once give the same answer with a cache and without."""
    pairs = [(first, second) for first in attachable() for second in attachable() if first != second]
    return [
        [
            f"{first}+{second}",
            *(tried(trial, [small(first), small(second)], without_cache) for trial in trials.values()),
        ]
        for first, second in pairs
    ]


def capabilities() -> str:
    """The text of the file."""
    trials = {family: Trial(family) for family in tiny_families().FAMILIES}
    lines = [
        "# What works where",
        "",
        "Written by `python scripts/capabilities.py`, which tries every method, at its default settings, on a tiny",
        "random-weight model of every family (methods with weights of their own have random ones too, and sizes that",
        "fit). `yes`: it ran, and the answer was the one that it has to be. `refused`:",
        "it is not possible, and one clear error says why.",
        "",
        "| tried | what has to hold |",
        "| --- | --- |",
        *(f"| {name} | {behaviour.__doc__} |" for name, behaviour in BEHAVIOURS.items()),
        "",
    ]
    for name in attachable():
        lines += [f"## {name}", "", *table(["family", *BEHAVIOURS], method_rows(name, trials))]
    lines += [
        "## Two methods at once",
        "",
        "In the order given, tried with a cache and without.",
        "",
        *table(["methods", *trials], pair_rows(trials)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the file, or checks it; the exit code."""
    parser = argparse.ArgumentParser(description="Probe every method on every family and write docs/capabilities.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the file is stale")
    options = parser.parse_args(arguments)
    text = capabilities()
    if options.check:
        if not FILE.exists() or FILE.read_text(encoding="utf-8") != text:
            print(f"stale: {FILE.name}; run scripts/capabilities.py", file=sys.stderr)
            return 1
        return 0
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text, encoding="utf-8")
    if "FAILS" in text:
        print(f"some methods fail; see {FILE.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
