"""What there is of encoders, as records and as a table: `sightline encoders`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from rich.table import Table

from sightline.encoders.encoder import MacCounter, as_pair, count_parameters, create_encoder, encoders


def record(name: str, *, measure: bool = False) -> dict[str, Any]:
    """One encoder as it was published.

    Args:
        name: one of `list_encoders()`.
        measure: whether to make it, without weights, and count.

    Returns:
        `encoder`, `inputs`, `paper`, `image_size` (sides in pixels, of volumes the slices first); where measured also
        `parameters`, those of classifiers of pictures with 1000 classes and of the others without a head, and
        `macs` and `tokens` of one picture. None for what an encoder of these inputs does not have.
    """
    kind = encoders()[name]
    config = kind.configs[name]
    paper = getattr(kind, "paper", None) or getattr(importlib.import_module(kind.__module__), "PAPER", None)
    side = config.get("image_size") or inspect.signature(kind.__init__).parameters["image_size"].default
    slices = [config["slices"]] if "slices" in config else []
    size = None if kind.inputs == "frame features" else [*slices, *as_pair(side)]
    line: dict[str, Any] = {"encoder": name, "inputs": kind.inputs, "paper": paper, "image_size": size}
    return line | _counted(name) if measure else line


def _counted(name: str) -> dict[str, int | None]:
    kind = encoders()[name]
    classifies = kind.inputs == "pictures" and not hasattr(kind, "segment")
    macs = tokens = None
    with torch.device("meta"), torch.no_grad():
        encoder = create_encoder(name, num_classes=1000 if classifies else 0).eval()
        if kind.inputs == "pictures":
            with MacCounter(encoder) as counter:
                features = encoder(torch.empty(encoder.example_shape()))
                tokens = features.tokens.shape[1]
                if classifies:
                    encoder.classify(features)
                    macs = counter.macs
    return {"parameters": count_parameters(encoder), "macs": macs, "tokens": tokens}


def table(lines: Iterable[dict[str, Any]]) -> Table:
    """A table of records; its columns are those that the first one has."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for line in lines:
        sides = line["image_size"] or ["-"]
        row = {
            "encoder": line["encoder"],
            "inputs": line["inputs"],
            "paper": line["paper"] or "-",
            "image size": str(sides[0]) if len(set(sides)) == 1 else " x ".join(map(str, sides)),
        }
        if "parameters" in line:
            row["M parameters"] = f"{line['parameters'] / 1e6:.2f}"
            row["G multiply-adds"] = "-" if line["macs"] is None else f"{line['macs'] / 1e9:.3g}"
            row["tokens"] = str(line["tokens"] or "-")
        if not shown.columns:
            for number, column in enumerate(row):
                shown.add_column(column, no_wrap=number < 4, justify="left" if number < 4 else "right")
        shown.add_row(*row.values())
    return shown
