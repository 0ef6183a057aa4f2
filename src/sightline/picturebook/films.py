"""Films of the picture world: objects come and go one after another, and what is asked about them needs time.

A film has a scene type, one or two objects that stand still all the time, and two to four *events* that do not overlap:
an object appears, stays for a while, may move meanwhile, and is gone. One event of each film is brief, the others are
long. Times are shares of the film and not numbers of frames, so film number i is the same story however many frames
show it: what was learnt on films of 16 frames can be asked about films of 128.

A single frame does not decide which of two objects came first, which way one moved, or how many there were: it shows
one event at most, and a film played backwards is as likely as the film itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import numpy as np

from sightline.errors import InputError, unknown
from sightline.picturebook.clips import Actor, Clip, Sighting, draw_clip
from sightline.picturebook.questions import Question, article
from sightline.picturebook.scene import COLOURS, HELD_OUT, KINDS, SCENE_TYPES, SPLITS, Colour, Split, random_stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
Way = Literal["left", "right", "up", "down"]
WAYS: tuple[Way, ...] = get_args(Way)
STEPS: dict[Way, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

EVENTS = (2, 3, 4)
"""So many objects come and go."""

FILM_FRAMES = (16, 2048)
"""From the least number of frames that shows every event and every pause on."""

BEATS, TICKS = 16, 256
"""A film has 16 beats of 256 ticks. Brief events and the shortest pauses last a beat, so that each has a frame of its
own where there are 16 frames."""

SHORTEST_LONG = 5 * TICKS // 2
"""Of two frames or more where there are 16, so that a movement shows."""

MOVES = 0.7
"""The share of long events that move; one of each film does in any case."""

REPEATS = 0.5
"""The share of films with two or more long events in which some of them are of one kind."""

FILM_TEMPLATES: dict[str, tuple[str, ...]] = {
    "order": (
        "Which came first, {one} or {other}?",
        "What came first, {one} or {other}?",
        "Which did you see first, {one} or {other}?",
        "Of {one} and {other}, which came first?",
    ),
    "motion": (
        "Which way did {one} move?",
        "In which direction did {one} move?",
        "Did {one} move left, right, up or down?",
        "Tell me which way {one} moved.",
    ),
    "count_objects": (
        "How many objects came and went?",
        "How many things came and went?",
        "What is the number of objects that came and went?",
        "Count the objects that came and went.",
    ),
    "count_kind": (
        "How many times did {one} appear?",
        "How many times did you see {one} come and go?",
        "What is the number of times that {one} appeared?",
        "Count how many times {one} appeared.",
    ),
    "flash": (
        "What colour was {one}?",
        "What was the colour of {one}?",
        "Which colour did {one} have?",
        "Tell me the colour that {one} had.",
    ),
    "appearance": (
        "What colour is {one}?",
        "What is the colour of {one}?",
        "Which colour does {one} have?",
        "Tell me the colour of {one}.",
    ),
}
"""Four wordings of each question; the first is the one that the benchmark uses."""

WORDINGS = 4


@dataclass(frozen=True)
class Event:
    """An object that comes and goes; `way` is where it moves, None where it does not."""

    actor: Actor
    way: Way | None
    brief: bool

    @property
    def name(self) -> str:
        """'red boat'."""
        return f"{self.actor.colour} {self.actor.kind}"


@dataclass(frozen=True)
class Film:
    """A scene type, what stands still, and what comes and goes, in the order in which it comes."""

    scene_type: str
    still: tuple[Actor, ...]
    events: tuple[Event, ...]
    seed: int

    @property
    def frames(self) -> int:
        """How many."""
        return len(self.still[0].path)

    def of_kind(self, kind: str) -> tuple[Event, ...]:
        """The events of a kind."""
        return tuple(event for event in self.events if event.actor.kind == kind)

    def thing(self, event: Event) -> str | None:
        """'the boat'; 'the red boat' where several boats come and go; None where several are red."""
        of_kind = self.of_kind(event.actor.kind)
        if len(of_kind) == 1:
            return f"the {event.actor.kind}"
        alike = [other for other in of_kind if other.actor.colour == event.actor.colour]
        return f"the {event.name}" if len(alike) == 1 else None


def sample_film(split: Split, index: int, *, frames: int = 16) -> Film:
    """Film number `index` of a split: the same story whatever the number of frames. Objects of the split `held_out`
    have colours that the other splits never show them in.

    Raises:
        InputError: an unknown split, a negative index, or a number of frames outside `FILM_FRAMES`.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if index < 0:
        raise InputError(f"a film's index must be 0 or more, not {index}")
    low, high = FILM_FRAMES
    if not low <= frames <= high:
        raise InputError(f"a film has {low} to {high} frames, not {frames}")
    rng = random_stream("film", split, index)
    scene_type = _one(tuple(SCENE_TYPES), rng)
    count = _one(EVENTS, rng)
    brief = int(rng.integers(count))
    long = [number for number in range(count) if number != brief]
    kinds = [KINDS[place] for place in rng.permutation(len(KINDS))]
    still = _still(rng, split, [kinds.pop() for _ in range(1 + int(rng.integers(2)))], frames)
    cast = [kinds.pop() for _ in range(count)]
    if len(long) > 1 and rng.random() < REPEATS:
        alike = rng.permutation(long)[: 2 + int(rng.integers(len(long) - 1))]
        for number in alike[1:]:
            cast[number] = cast[alike[0]]
    colours = _colours(rng, split, cast)
    moving = {number for number in long if rng.random() < MOVES} or {_one(long, rng)}
    spans = _spans(rng, count, brief)
    events = []
    for number, (start, end) in enumerate(spans):
        way = _one(WAYS, rng) if number in moving else None
        path = _path(rng, way, _frame(start, frames), _frame(end, frames), frames)
        actor = Actor(cast[number], colours[number], bool(rng.random() < 0.5), path)
        events.append(Event(actor, way, number == brief))
    return Film(scene_type, still, tuple(events), int(rng.integers(2**31)))


def draw_film(film: Film, size: int = 80) -> NDArray[np.uint8]:
    """The frames, uint8 [T, size, size, 3]. What comes and goes is in front of what stands still.

    Raises:
        InputError: a size outside the range of pictures.
    """
    actors = (*film.still, *(event.actor for event in film.events))
    return draw_clip(Clip(film.scene_type, actors, None, film.seed), size)


# --- Questions ---


def order(film: Film, one: Event, other: Event, *, wording: int = 0) -> Question:
    """Which of two events came first; each must be the only one of its kind and colour."""
    first, second = (one, other) if film.events.index(one) < film.events.index(other) else (other, one)
    options = [f"the {first.name}", f"the {second.name}"]
    about = (one.actor.kind, other.actor.kind)
    return _ask("order", "order", options[0], options, about, wording, f"the {one.name}", f"the {other.name}")


def motion(film: Film, event: Event, *, wording: int = 0) -> Question:
    """Which way an object moved; the film must have a name for it (see `Film.thing`)."""
    thing = film.thing(event)
    assert thing is not None
    assert event.way is not None
    return _ask("motion", "motion", event.way, WAYS, (event.actor.kind,), wording, thing)


def count_objects(film: Film, *, wording: int = 0) -> Question:
    """How many objects came and went."""
    return _ask("count", "count_objects", str(len(film.events)), [str(n) for n in EVENTS], (), wording)


def count_kind(film: Film, kind: str, *, wording: int = 0) -> Question:
    """How many times objects of a kind that came at all did so."""
    options = [str(n) for n in range(1, EVENTS[-1])]
    return _ask("count", "count_kind", str(len(film.of_kind(kind))), options, (kind,), wording, article(kind))


def flash(film: Film, *, wording: int = 0) -> Question:
    """The colour of what appeared briefly."""
    (event,) = (event for event in film.events if event.brief)
    kind = event.actor.kind
    return _ask("flash", "flash", event.actor.colour, COLOURS, (kind,), wording, f"the {kind}")


def appearance(film: Film, actor: Actor, *, wording: int = 0) -> Question:
    """The colour of something that stands still all the time."""
    return _ask("appearance", "appearance", actor.colour, COLOURS, (actor.kind,), wording, f"the {actor.kind}")


def orderable(film: Film) -> tuple[Event, ...]:
    """The events that are the only ones of their kind and colour."""
    often = Counter(event.name for event in film.events)
    return tuple(event for event in film.events if often[event.name] == 1)


def movers(film: Film) -> tuple[Event, ...]:
    """The events that move and have a name."""
    return tuple(event for event in film.events if event.way is not None and film.thing(event) is not None)


def film_questions(film: Film, rng: np.random.Generator) -> list[Question]:
    """Up to eight questions of all tasks, in any of their wordings.

    Of the two objects of an `order` question each is named first equally often; of kinds, one that came several times
    is asked about where there is one.
    """

    def wording() -> int:
        return int(rng.integers(WORDINGS))

    pairs = [(one, other) for one in orderable(film) for other in orderable(film) if one is not other]
    asked = [pairs[place] for place in rng.permutation(len(pairs))[:2]]
    questions = [order(film, one, other, wording=wording()) for one, other in asked]
    moved = movers(film)
    questions += [motion(film, moved[place], wording=wording()) for place in rng.permutation(len(moved))[:2]]
    questions.append(count_objects(film, wording=wording()))
    kinds = sorted({event.actor.kind for event in film.events}, key=KINDS.index)
    repeated = [kind for kind in kinds if len(film.of_kind(kind)) > 1]
    questions.append(count_kind(film, _one(repeated or kinds, rng), wording=wording()))
    questions.append(flash(film, wording=wording()))
    questions.append(appearance(film, _one(film.still, rng), wording=wording()))
    return questions


def _ask(
    task: str, template: str, answer: str, options: Sequence[str], about: tuple[str, ...], wording: int, *things: str
) -> Question:
    one, other = (*things, "", "")[:2]
    text = FILM_TEMPLATES[template][wording].format(one=one, other=other)
    return Question(task, text, answer, tuple(option for option in options if option != answer), about)


# --- What a film is made of ---


def _one(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _spans(rng: np.random.Generator, count: int, brief: int) -> list[tuple[int, int]]:
    """(first tick, end tick) of each event: a pause before each and after the last, and what time is left beyond the
    shortest pauses and events given out at random, so that a film backwards is as likely."""
    pauses = [TICKS] * (count + 1)
    events = [TICKS if number == brief else SHORTEST_LONG for number in range(count)]
    spare = BEATS * TICKS - sum(pauses) - sum(events)
    weights = rng.random(2 * count + 1) * ([1.0] * (count + 1) + [0.0 if n == brief else 3.0 for n in range(count)])
    extra = np.floor(spare * weights / weights.sum()).astype(int).tolist()
    spans, now = [], 0
    for number in range(count):
        now += pauses[number] + extra[number]
        end = now + events[number] + extra[count + 1 + number]
        spans.append((now, end))
        now = end
    return spans


def _frame(tick: int, frames: int) -> int:
    """The number of the frame that begins nearest to a tick."""
    return (2 * tick * frames + BEATS * TICKS) // (2 * BEATS * TICKS)


def _path(rng: np.random.Generator, way: Way | None, first: int, end: int, frames: int) -> tuple[Sighting | None, ...]:
    """Where an object is in each frame: within the picture, and as likely here as there."""
    half = float(rng.uniform(0.11, 0.16))
    dx, dy = STEPS[way] if way is not None else (0, 0)
    far = float(rng.uniform(0.3, 0.45))
    x, y = (float(rng.uniform(edge, 1 - edge)) for edge in (half + abs(dx) * far / 2, half + abs(dy) * far / 2))
    path: list[Sighting | None] = [None] * frames
    for number, time in enumerate(np.linspace(-0.5, 0.5, end - first).tolist(), start=first):
        path[number] = Sighting(x + dx * far * time, y + dy * far * time, half)
    return tuple(path)


def _still(rng: np.random.Generator, split: Split, kinds: Sequence[str], frames: int) -> tuple[Actor, ...]:
    """Objects that stand still, side by side where there are two."""
    actors = []
    for number, kind in enumerate(kinds):
        half = float(rng.uniform(0.09, 0.13))
        left, right = number / len(kinds), (number + 1) / len(kinds)
        seen = Sighting(float(rng.uniform(left + half, right - half)), float(rng.uniform(half, 1 - half)), half)
        (colour,) = _colours(rng, split, [kind])
        actors.append(Actor(kind, colour, bool(rng.random() < 0.5), (seen,) * frames))
    return tuple(actors)


def _colours(rng: np.random.Generator, split: Split, kinds: Sequence[str]) -> list[Colour]:
    """A colour for each: of equal kinds different ones where the split has several."""
    left: dict[str, list[Colour]] = {}
    for kind in kinds:
        allowed = [colour for colour in COLOURS if ((kind, colour) in HELD_OUT) == (split == "held_out")]
        left.setdefault(kind, [allowed[place] for place in rng.permutation(len(allowed))])
    return [left[kind].pop() if len(left[kind]) > 1 else left[kind][0] for kind in kinds]
