"""What a benchmark is: items with pictures and a question, facts about each answer, and scores over all answers.

A benchmark is a frozen dataclass whose fields are its options. It lives in a module of its own in this package and
is registered by the decorator alone::

    @register_benchmark("pope")
    @dataclass(frozen=True)
    class Pope(Benchmark): ...

A run goes `items` -> a model's `Answer`s -> `row` (one JSON-able dict an answer, which is what run files hold) ->
`scores`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from sightline.benchmarks.statistics import mcnemar_exact, sign_flip_test
from sightline.errors import InputError, unknown

if TYPE_CHECKING:
    from sightline.models.answering import Shown

Row = Mapping[str, Any]
"""One line of a run file."""

SCENES_PER_SEED = 1_000_000
"""Items from the picture world show the scenes from number seed * SCENES_PER_SEED on, so that seeds share no scene."""


@dataclass(frozen=True)
class Item:
    """One question on one picture, or on several that are shown together.

    Attributes:
        id: unique in the benchmark's split; the same settings give the same ids.
        question: the text that the model is asked.
        answer: the right answer.
        picture: opens or draws the picture, each time it is called, or the list of the pictures in their order (the
            frames of a clip); None: the question is asked without a picture.
        group: the cluster for the statistics: the picture.
        task: which of the benchmark's tasks this is.
        max_new_tokens: the longest answer allowed.
        meta: JSON-able facts that scoring or a report needs.
    """

    id: str
    question: str
    answer: str
    picture: Callable[[], Shown] | None
    group: str
    task: str
    max_new_tokens: int
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a model answered. `facts` are further JSON-able measurements of the runner (times, logits) for the row."""

    item: Item
    text: str
    n_tokens: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A value with its 95 % interval, from n answers. Shares are fractions, not per cent."""

    value: float
    low: float
    high: float
    n: int


class Benchmark(ABC):
    """Items, a scoring rule for one answer, and the aggregate. Subclasses are frozen dataclasses of their options."""

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]

    @abstractmethod
    def items(self, split: str, n: int | None = None, seed: int = 0) -> list[Item]:
        """The first n items of a split (the benchmark's usual number if n is None); the seed says which are drawn.

        Raises:
            InputError: for an unknown split, or where files that are needed are missing or malformed.
        """

    @abstractmethod
    def item_score(self, item: Item, text: str) -> dict[str, Any]:
        """JSON-able facts about one answer: all that `scores` and `measure` need, but for `group`."""

    @abstractmethod
    def scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """The aggregate; the first key is the headline.

        Raises:
            InputError: if there are no rows.
        """

    @abstractmethod
    def measure(self, row: Row) -> float:
        """The headline's per-item measure, of which the headline is the mean."""

    def row(self, answer: Answer) -> dict[str, Any]:
        """One answer as a line of a run file: the item's id, group, task and right answer, the text, and the facts."""
        item = answer.item
        return {
            "id": item.id,
            "group": item.group,
            "task": item.task,
            "answer": item.answer,
            "text": answer.text,
            "n_tokens": answer.n_tokens,
            **answer.facts,
            **self.item_score(item, answer.text),
        }

    def paired(self, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> float:
        """The two-sided p-value of a difference in the headline between two runs on the same items.

        Exact McNemar where each picture has one item that is hit or missed; else the sign-flip test on the pictures'
        differences.

        Raises:
            InputError: if the runs do not hold the same items, each once.
        """
        matched = matching(rows_a, rows_b)
        measured = [(self.measure(a), self.measure(b)) for a, b in matched]
        groups = [a["group"] for a, _ in matched]
        if len(set(groups)) == len(groups) and all(value in (0, 1) for both in measured for value in both):
            return mcnemar_exact(sum(a > b for a, b in measured), sum(b > a for a, b in measured))
        difference = dict.fromkeys(groups, 0.0)
        for group, (a, b) in zip(groups, measured, strict=True):
            difference[group] += b - a
        return sign_flip_test(list(difference.values()))

    def paired_others(self, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> dict[str, float]:
        """Score -> the two-sided p-value of its difference between two runs on the same items, for the scores besides
        the headline that can be compared; none of them by default.

        Raises:
            InputError: if the runs do not hold the same items, each once.
        """
        return {}

    def check_split(self, split: str) -> None:
        """Raises InputError, with the nearest name, unless the benchmark has such a split."""
        if split not in self.splits:
            raise unknown(f"split of {self.name}", split, self.splits)


def matching(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The two runs' rows of each item, in the order of the first.

    Raises:
        InputError: if the runs do not hold the same items, each once.
    """
    by_id: list[dict[str, Row]] = []
    for rows in (rows_a, rows_b):
        ids = Counter(str(row["id"]) for row in rows)
        if len(ids) < len(rows):
            raise InputError(f"item {ids.most_common(1)[0][0]!r} occurs more than once in a run")
        by_id.append({str(row["id"]): row for row in rows})
    a, b = by_id
    if a.keys() != b.keys():
        raise InputError(f"the runs cannot be compared: {len(a.keys() ^ b.keys())} items are in one of them only")
    return [(row, b[name]) for name, row in a.items()]


BenchmarkClass = TypeVar("BenchmarkClass", bound=type[Benchmark])

_registry: dict[str, type[Benchmark]] = {}


def register_benchmark(name: str) -> Callable[[BenchmarkClass], BenchmarkClass]:
    """The class decorator that makes a `Benchmark` known by name; this is the whole registration."""

    def register(cls: BenchmarkClass) -> BenchmarkClass:
        known = _registry.get(name)
        assert known is None or known.__qualname__ == cls.__qualname__, f"two benchmarks are called {name!r}"
        cls.name = name
        _registry[name] = cls
        return cls

    return register


def list_benchmarks() -> list[str]:
    """The names of all benchmarks, found by importing the modules of this package."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__, prefix=f"{package.__name__}."):
        importlib.import_module(module.name)
    return sorted(_registry)


def get_benchmark(name: str, **options: Any) -> Benchmark:
    """The benchmark of that name with its options set.

    Raises:
        InputError: for an unknown name or option (the nearest is suggested), or a value that the benchmark refuses.
    """
    names = list_benchmarks()
    if name not in names:
        raise unknown("benchmark", name, names)
    cls = _registry[name]
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]  # subclasses are dataclasses
    for option in options:
        if option not in known:
            raise unknown(f"option of benchmark {name!r}", option, known)
    return cls(**options)


def check_draw(n: int | None, seed: int) -> None:
    """Raises InputError unless n is None or at least 1, and the seed at least 0."""
    if n is not None and n < 1:
        raise InputError(f"the number of items must be 1 or more, not {n}")
    if seed < 0:
        raise InputError(f"the seed must be 0 or more, not {seed}")


def check_length(max_new_tokens: object) -> None:
    """Raises InputError unless the longest answer is a whole number of tokens, at least 1."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be a whole number from 1 on, not {max_new_tokens!r}")


def read_json_lines(path: str | Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, blank lines left out.

    Raises:
        InputError: if the file cannot be read or is empty, or a line is no JSON object with the needed keys (the line
        is named).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} of {path} is not JSON: {error}") from error
        missing = [key for key in needed if not isinstance(record, dict) or key not in record]
        if missing:
            raise InputError(f"line {number} of {path} lacks {', '.join(missing)}")
        records.append(record)
    if not records:
        raise InputError(f"{path} is empty")
    return records
