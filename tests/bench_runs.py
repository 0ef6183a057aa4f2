"""Small runs of the runner, and a benchmark of seven one-coloured pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from sightline.bench import run
from sightline.benchmarks.item import Benchmark, Item, Row, Score
from sightline.benchmarks.statistics import wilson
from sightline.errors import InputError

TOKENS = 5
THREE = ["none", "fastervlm:keep=0.1", "ritual"]


@dataclass(frozen=True)
class Tints(Benchmark):
    """Which colour is the whole picture? That of the items in `broken` is gone, those in `blind` are asked without."""

    splits: ClassVar[tuple[str, ...]] = ("test",)
    broken: ClassVar[set[str]] = set()
    blind: ClassVar[set[str]] = set()

    def items(self, split: str, n: int | None = None, seed: int = 0) -> list[Item]:
        self.check_split(split)
        return [self._item(index) for index in range(n or 7)]

    def _item(self, index: int) -> Item:
        def picture() -> Image.Image:
            if f"tint-{index}" in self.broken:
                raise InputError(f"picture {index} is gone")
            return Image.new("RGB", (40 + index, 50), (37 * index % 256, 200, 90))

        question = "What colour" + " is it" * (index % 3) + f", number {index}?"
        name, answer = f"tint-{index}", "yes" if index % 2 else "green"
        return Item(name, question, answer, None if name in self.blind else picture, name, "tint", 3)

    def item_score(self, item: Item, text: str) -> dict[str, Any]:
        return {"hit": item.answer in text, "readable": len(text) % 2 == 0}

    def scores(self, rows: Any) -> dict[str, Score]:
        hits = sum(row["hit"] for row in rows)
        return {"accuracy": Score(hits / len(rows), *wilson(hits, len(rows)), len(rows))}

    def measure(self, row: Row) -> float:
        return float(row["hit"])


def small_run(checkpoint: str, out: Path, methods: list[str] = THREE, **options: Any) -> Any:
    wanted: dict[str, Any] = dict(split="adversarial", items=8, batch_size=3, max_new_tokens=TOKENS, cost_items=0)
    return run(checkpoint, "pope", methods, out, quiet=True, **(wanted | options))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
