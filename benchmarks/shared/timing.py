"""What the speed measurements share: rounds that take turns, the clock of a generation, and how results are shown.

The cases of a comparison run one right after the other in every round, each round beginning with another one, and a
ratio is taken within its round: a machine that is busy for a while disturbs both sides alike. What is reported is a
median over rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from sightline.methods import Method, attach


@dataclass(frozen=True)
class Row:
    """One line of a result: what was measured, and how it stands to its target, if it has one."""

    name: str
    values: dict[str, float | int | str]
    target: str = ""
    met: bool | None = None


def arguments(
    description: str | None, rounds: int, more: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """The options that all measurements have, and those that `more` adds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds that are counted (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to measure (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line, instead of tables")
    if more is not None:
        more(parser)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return options


def in_turns(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What every case gives in each of `rounds` rounds, after one round that does not count."""
    names = list(cases)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            gc.disable()
            try:
                value = cases[name]()
            finally:
                gc.enable()
            if turn > 0:
                taken[name].append(value)
    return taken


def ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Clock(StoppingCriteria):
    """Never stops a generation; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def seconds_per_token(model: Any, inputs: Mapping[str, Any], methods: Sequence[Method] | None, tokens: int) -> float:
    """Time that `generate` takes from one token to the next: the median over `tokens`, the first not among them.

    With `methods` None nothing is attached at all; with an empty list, no method.
    """
    clock = _Clock()
    with nullcontext() if methods is None else attach(model, *methods):
        model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    return statistics.median(later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False))


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _processor() + f", {torch.get_num_threads()} thread(s)"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def show(title: str, note: str, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Prints a result: a table, or with `--json` an object with the same in it."""
    about = machine(options.device) | {"rounds": options.rounds}
    if options.json:
        lines = [
            {"name": row.name, **row.values} | ({"target": row.target, "met": row.met} if row.target else {})
            for row in rows
        ]
        print(json.dumps({"benchmark": title, "note": note, "machine": about, "rows": lines}))
        return
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in (*columns, "target", "met"):
        table.add_column(column, justify="right")
    for row in rows:
        met = {None: "", True: "yes", False: "no"}[row.met]
        table.add_row(row.name, *(_text(row.values.get(column, "")) for column in columns), row.target, met)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n" + note, highlight=False)


def _text(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
