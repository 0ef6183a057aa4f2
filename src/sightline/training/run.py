"""What all training runs share: whose folder it is, the log, the bar, and a state that a killed run goes on from."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn

from sightline.errors import InputError
from sightline.files import read_json, write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def claim(recipe: DataclassInstance, out: Path) -> None:
    """Makes `out` the folder of this recipe's run, with `recipe.json` in it.

    Raises:
        InputError: if it holds a run of another recipe, or the file cannot be read.
    """
    file = out / "recipe.json"
    record = json.loads(json.dumps(asdict(recipe)))
    if file.exists() and read_json(file) != record:
        raise InputError(f"{out} holds a run of another recipe; give another folder, or delete it")
    write_json(file, record)


def append_log(out: Path, line: dict[str, Any]) -> None:
    """Adds a line to the run's `log.jsonl`."""
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


@contextmanager
def checkpoint_folder(out: Path) -> Iterator[Path]:
    """A folder to write a finished checkpoint into, which becomes `out/checkpoint` at the end of the block, so that a
    half-written one is never seen."""
    final, scratch = out / "checkpoint", out / "checkpoint.partial"
    for folder in (scratch, final):
        shutil.rmtree(folder, ignore_errors=True)
    yield scratch
    scratch.rename(final)


def progress_bar(quiet: bool) -> Progress:
    """The bar that a run shows, unless it is to be quiet."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=quiet
    )


class State:
    """Weights, optimiser moments and the step reached, in one safetensors file that is replaced atomically."""

    def __init__(self, file: Path, modules: nn.Module) -> None:
        self.file, self.modules = file, modules

    def resume(self, phase: str, optimizer: torch.optim.Optimizer) -> int:
        """Loads what the file holds; the step at which `phase` goes on (beyond its end if it is over)."""
        if not self.file.exists():
            return 0
        tensors = load_file(self.file)
        saved_phase = "joint" if tensors["joint"].item() else "warm-up"
        named = dict(self.modules.named_parameters())
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[f"parameter/{name}"])
            for name, buffer in self.modules.named_buffers():  # running statistics
                if f"buffer/{name}" in tensors:
                    buffer.copy_(tensors[f"buffer/{name}"])
        if saved_phase != phase:
            return 0 if phase == "joint" else sys.maxsize  # not begun yet, or long over
        for name, parameter in named.items():
            if f"exp_avg/{name}" in tensors:
                optimizer.state[parameter] = {
                    "step": tensors[f"step/{name}"],
                    "exp_avg": tensors[f"exp_avg/{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(parameter.device),
                }
        return int(tensors["step"].item())

    def save(self, phase: str, step: int, optimizer: torch.optim.Optimizer) -> None:
        tensors = {"step": torch.tensor(step), "joint": torch.tensor(phase == "joint")}
        for name, parameter in self.modules.named_parameters():
            tensors[f"parameter/{name}"] = parameter.detach().clone()
            moments = optimizer.state.get(parameter, {})
            # Also the step: a parameter that a batch does not reach is not stepped.
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                if moment in moments:
                    tensors[f"{moment}/{name}"] = moments[moment].clone()
        saved = self.modules.state_dict()
        tensors |= {f"buffer/{n}": b.detach().clone() for n, b in self.modules.named_buffers() if n in saved}
        partial = self.file.with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, self.file)
