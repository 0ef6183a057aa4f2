"""What a model makes of films of the picture world (see `picturebook.films`): one question a film and task.

The frames of a film are the pictures of one prompt, in their order. Five tasks:

- ``order``: which of two objects came first; the right one is the first named in half of the items.
- ``motion``: which way an object moved: left, right, up and down in a quarter each.
- ``count``: how many objects came and went, two to four, and how many times a kind appeared, one to three, each answer
  in a sixth of the items.
- ``flash``: the colour of what appeared in a few frames only.
- ``appearance``: the colour of what is there all the time, for which any frame would do.

An answer is right if it equals the right one once both are in lower case without white space and full stop at the
ends; a number may be a word, and a leading "the" is optional. With one frame a model can be right about ``order``
half of the time, about ``motion`` a quarter, and about ``count`` a third.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from sightline.benchmarks.item import (
    SCENES_PER_SEED,
    Benchmark,
    Item,
    Row,
    Score,
    check_draw,
    matching,
    register_benchmark,
)
from sightline.benchmarks.skills import SHORT_ANSWER, by_turns, normalised, one_of, share_of_hits
from sightline.errors import InputError
from sightline.picturebook.films import (
    EVENTS,
    FILM_FRAMES,
    WAYS,
    Film,
    appearance,
    count_kind,
    count_objects,
    draw_film,
    flash,
    motion,
    movers,
    order,
    orderable,
    sample_film,
)
from sightline.picturebook.questions import Question
from sightline.picturebook.scene import KINDS, Split, random_stream

USUAL_ITEMS = 100
SIDE = 80
"""The frames' side in pixels."""


@register_benchmark("films")
@dataclass(frozen=True)
class Films(Benchmark):
    """The tasks of the module's text. Splits: `test`, and `held_out`, whose objects have colours that no other film
    shows them in.

    Args:
        frames: how many show each film, 16 to 2048; the films and questions are the same whatever it is.
    """

    frames: int = 16
    splits: ClassVar[tuple[str, ...]] = ("test", "held_out")

    def __post_init__(self) -> None:
        low, high = FILM_FRAMES
        if not isinstance(self.frames, int) or not low <= self.frames <= high:
            raise InputError(f"frames must be a whole number from {low} to {high}, not {self.frames!r}")

    def items(self, split: str, n: int | None = None, seed: int = 0) -> list[Item]:
        """n items of each task, 100 by default."""
        self.check_split(split)
        check_draw(n, seed)
        world: Split = "held_out" if split == "held_out" else "test"
        wanted = USUAL_ITEMS if n is None else n
        films: list[Film] = []  # shared by the tasks
        items: list[Item] = []
        for task in TASKS.values():

            def ask(seen: int, task: Task = task) -> tuple[int, Item] | None:
                index = seed * SCENES_PER_SEED + seen
                if seen == len(films):
                    films.append(sample_film(world, index, frames=self.frames))
                found = task.ask(films[seen], index, random_stream("films", task.name, world, index))
                return found and (found[0], _item(task.name, split, index, films[seen], found[1]))

            items += by_turns(wanted, task.turns, ask)
        return items

    def item_score(self, item: Item, text: str) -> dict[str, Any]:
        """hit, and readable: it is one of the answers there are to such questions."""
        given, right = _plain(text), _plain(item.answer)
        return {"hit": given == right, "readable": given in (right, *map(_plain, item.meta["distractors"]))}

    def scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """``all``, the share of answers that are right; then those of the tasks that the rows hold, each with its
        Wilson interval.

        Raises:
            InputError: if there are no rows.
        """
        if not rows:
            raise InputError("there are no answers to score")
        scores = {"all": share_of_hits(rows)}
        for task in TASKS:
            own = [row for row in rows if row["task"] == task]
            if own:
                scores[task] = share_of_hits(own)
        return scores

    def paired_others(self, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> dict[str, float]:
        """For each task the test of `paired` on its items."""
        both = matching(rows_a, rows_b)
        found: dict[str, float] = {}
        for task in TASKS:
            own = [pair for pair in both if pair[0]["task"] == task]
            if own:
                found[task] = self.paired([row for row, _ in own], [row for _, row in own])
        return found

    def measure(self, row: Row) -> float:
        """1 for a right answer, else 0."""
        return float(row["hit"])


def _plain(text: str) -> str:
    return normalised(text).removeprefix("the ")


def _item(task: str, split: str, index: int, film: Film, question: Question) -> Item:
    return Item(
        id=f"{split}/{task}/{index}",
        question=question.text,
        answer=question.answer,
        picture=partial(_frames, film),
        group=str(index),
        task=task,
        max_new_tokens=SHORT_ANSWER,
        meta={"film": index, "distractors": list(question.distractors)},
    )


def _frames(film: Film) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in draw_film(film, SIDE)]


# --- The tasks ---

Ask = Callable[[Film, int, np.random.Generator], tuple[int, Question] | None]
"""Film, its number, randomness -> the turn that the film suits and its question, or None if it suits none."""


@dataclass(frozen=True)
class Task:
    """How a task is asked about; items are of `turns` kinds, in turn."""

    name: str
    ask: Ask
    turns: int = 1


def _order(film: Film, number: int, rng: np.random.Generator) -> tuple[int, Question] | None:
    events = orderable(film)
    if len(events) < 2:
        return None
    first, second = (events[place] for place in sorted(rng.permutation(len(events))[:2]))
    turn = number % 2
    return turn, order(film, second, first) if turn else order(film, first, second)


def _motion(film: Film, number: int, rng: np.random.Generator) -> tuple[int, Question] | None:
    moved = movers(film)
    if not moved:
        return None
    question = motion(film, one_of(moved, rng))
    return [str(way) for way in WAYS].index(question.answer), question


def _count(film: Film, number: int, rng: np.random.Generator) -> tuple[int, Question]:
    """Objects and kinds in turn."""
    if number % 2:
        question = count_objects(film)
        return EVENTS.index(int(question.answer)), question
    kinds = sorted({event.actor.kind for event in film.events}, key=KINDS.index)
    question = count_kind(film, one_of(kinds, rng))
    return len(EVENTS) + int(question.answer) - 1, question


def _flash(film: Film, number: int, rng: np.random.Generator) -> tuple[int, Question]:
    return 0, flash(film)


def _appearance(film: Film, number: int, rng: np.random.Generator) -> tuple[int, Question]:
    return 0, appearance(film, one_of(film.still, rng))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("order", _order, turns=2),
        Task("motion", _motion, turns=len(WAYS)),
        Task("count", _count, turns=2 * len(EVENTS)),
        Task("flash", _flash),
        Task("appearance", _appearance),
    )
}
"""Task by name, in the order in which they are asked and reported."""
