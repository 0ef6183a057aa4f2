"""Films of the picture world: answers are what the frames show, and only the order of the frames gives some of them."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sightline.errors import InputError
from sightline.picturebook.clips import Actor
from sightline.picturebook.films import (
    EVENTS,
    FILM_FRAMES,
    FILM_TEMPLATES,
    WAYS,
    WORDINGS,
    Event,
    Film,
    appearance,
    count_kind,
    count_objects,
    draw_film,
    film_questions,
    flash,
    motion,
    movers,
    order,
    orderable,
    sample_film,
)
from sightline.picturebook.questions import Question
from sightline.picturebook.scene import COLOURS, HELD_OUT, SPLITS, Split, random_stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLED = [sample_film("train", index) for index in range(300)]
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
GOLDEN = {("test", 0, 16, 32): 0xDD02F669, ("train", 1, 21, 32): 0xEEAD9B60, ("held_out", 2, 40, 48): 0x89F0D1F4}


def shown(actor: Actor) -> list[int]:
    """The frames that show an actor."""
    return [number for number, seen in enumerate(actor.path) if seen is not None]


def backwards(film: Film) -> Film:
    def turned(event: Event) -> Event:
        way = None if event.way is None else OPPOSITE[event.way]
        return replace(event, actor=replace(event.actor, path=event.actor.path[::-1]), way=way)

    return replace(film, events=tuple(turned(event) for event in reversed(film.events)))


def questions_of(film: Film) -> list[Question]:
    return film_questions(film, random_stream("questions", film.seed))


def seen_answer(film: Film, asked: Question) -> str:
    """The answer, from where things are in the frames alone."""
    if asked.task == "appearance":
        (thing,) = (actor for actor in film.still if actor.kind == asked.about[0])
        return thing.colour
    if asked.task == "flash":
        kind = asked.about[0]
        return next(event.actor.colour for event in film.events if event.actor.kind == kind)
    if asked.task == "order":
        firsts = {f"the {e.actor.colour} {e.actor.kind}": shown(e.actor)[0] for e in film.events}
        both = [name for name in firsts if f"{name} " in asked.text.replace("?", " ").replace(",", " ")]
        assert len(both) == 2
        return min(both, key=firsts.__getitem__)
    if asked.task == "motion":
        (mover,) = (
            e.actor
            for e in film.events
            if e.actor.kind in asked.about and (f"the {e.actor.kind}" in asked.text or e.actor.colour in asked.text)
        )
        seen = [spot for spot in mover.path if spot is not None]
        across, down = seen[-1].x - seen[0].x, seen[-1].y - seen[0].y
        if abs(across) > abs(down):
            return "right" if across > 0 else "left"
        return "down" if down > 0 else "up"
    # Of each frame, whether something (of the kind) comes or goes in it: the number of times that this begins.
    counted = [e.actor for e in film.events if not asked.about or e.actor.kind in asked.about]
    there = [any(actor.path[number] for actor in counted) for number in range(film.frames)]
    return str(sum(now and not before for before, now in pairwise([False, *there])))


@pytest.mark.parametrize(("split", "index", "frames", "size"), GOLDEN)
def test_films_are_pinned(split: Split, index: int, frames: int, size: int) -> None:
    drawn = draw_film(sample_film(split, index, frames=frames), size)
    assert (drawn.shape, drawn.dtype) == ((frames, size, size, 3), np.uint8)
    assert zlib.crc32(drawn.tobytes()) == GOLDEN[split, index, frames, size]


def test_another_process_makes_the_same_film() -> None:
    code = (
        "import zlib; from sightline.picturebook.films import sample_film, draw_film; "
        "film = sample_film('test', 3); print(zlib.crc32(draw_film(film, 32).tobytes() + repr(film).encode()))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    film = sample_film("test", 3)
    assert int(there) == zlib.crc32(draw_film(film, 32).tobytes() + repr(film).encode())


def test_splits_and_numbers_share_no_film() -> None:
    made = [sample_film(split, index) for split in SPLITS for index in range(50)]
    assert len({repr(replace(film, seed=0)) for film in made}) == len(made)
    assert len({film.seed for film in made}) == len(made)


@pytest.mark.parametrize("frames", [17, 32, 100, 128])
def test_a_film_is_the_same_story_whatever_the_number_of_frames(frames: int) -> None:
    for index in range(40):
        few, many = sample_film("train", index), sample_film("train", index, frames=frames)
        assert questions_of(few) == questions_of(many)
        assert [(e.name, e.way, e.brief) for e in few.events] == [(e.name, e.way, e.brief) for e in many.events]
        for one, other in zip(few.events, many.events, strict=True):
            near = 0.5 / 16 + 0.5 / frames  # what rounding to frames may move either by
            assert shown(one.actor)[0] / 16 == pytest.approx(shown(other.actor)[0] / frames, abs=near)
            assert (shown(one.actor)[-1] + 1) / 16 == pytest.approx((shown(other.actor)[-1] + 1) / frames, abs=near)


@pytest.mark.parametrize("frames", [16, 23, 64])
def test_events_come_and_go_one_after_another(frames: int) -> None:
    for index in range(60):
        film = sample_film("train", index, frames=frames)
        assert film.frames == frames
        assert len(film.events) in EVENTS
        stays = [shown(event.actor) for event in film.events]
        for stay in stays:
            assert stay == list(range(stay[0], stay[-1] + 1))
        for before, after in pairwise([[-1], *stays, [frames]]):
            assert after[0] - before[-1] >= 2  # nothing comes or goes between them
        (brief,) = (stay for stay, event in zip(stays, film.events, strict=True) if event.brief)
        assert len(brief) <= -(-frames // 16)
        assert all(len(stay) > len(brief) for stay in stays if stay is not brief)
        assert any(event.way for event in film.events)
        kinds = [actor.kind for actor in film.still]
        assert len(set(kinds)) == len(kinds)
        assert not {event.actor.kind for event in film.events} & set(kinds)


def test_the_pixels_show_an_event_in_its_frames_and_nowhere_else() -> None:
    for film in SAMPLED[:25]:
        whole = draw_film(film, 48).astype(int)
        for place, event in enumerate(film.events):
            gone = replace(event.actor, path=(None,) * film.frames)
            others = (*film.events[:place], replace(event, actor=gone), *film.events[place + 1 :])
            changed: NDArray[np.bool_] = np.abs(whole - draw_film(replace(film, events=others), 48)).max(axis=-1) > 0
            assert np.flatnonzero(changed.any(axis=(1, 2))).tolist() == shown(event.actor)
            first, last = shown(event.actor)[0], shown(event.actor)[-1]
            y, x = np.mean(np.nonzero(changed[last]), axis=1) - np.mean(np.nonzero(changed[first]), axis=1)
            far = {"left": -x, "right": x, "up": -y, "down": y}
            if event.way is None:
                assert max(far.values()) == 0
            else:
                assert max(far, key=far.__getitem__) == event.way
                assert far[event.way] > 0.2 * 48


def test_questions_have_the_answers_that_the_frames_show() -> None:
    tasks: Counter[str] = Counter()
    for film in SAMPLED:
        asked = questions_of(film)
        for question in asked:
            assert question.answer == seen_answer(film, question), question
            assert question.answer not in question.distractors
            assert "{" not in question.text
            assert question.text[0].isupper()
            tasks[question.task] += 1
        assert len({question.text for question in asked}) == len(asked)
    assert set(tasks) == {"order", "motion", "count", "flash", "appearance"}
    assert all(count >= len(SAMPLED) for count in tasks.values())


def test_played_backwards_order_and_motion_flip_and_nothing_else() -> None:
    for film in SAMPLED[:100]:
        turned = backwards(film)
        for one, other in zip(orderable(film), orderable(turned)[::-1], strict=True):
            assert one.name == other.name
        first, second = orderable(film)[:2]
        second_now, first_now = orderable(turned)[-2:]
        there, back = order(film, first, second), order(turned, first_now, second_now)
        assert (there.text, back.text) == (back.text, there.text)
        assert back.answer == seen_answer(turned, back) == there.distractors[0]
        for event in movers(film):
            (same,) = (other for other in movers(turned) if other.name == event.name)
            assert motion(turned, same).text == motion(film, event).text
            assert motion(turned, same).answer == OPPOSITE[motion(film, event).answer]
        for ask in (count_objects, flash):
            assert ask(turned) == ask(film)
        assert count_kind(turned, film.events[0].actor.kind) == count_kind(film, film.events[0].actor.kind)
        assert appearance(turned, film.still[0]) == appearance(film, film.still[0])


def test_a_frame_does_not_tell_backwards_from_forwards() -> None:
    """Each frame shows one event at most, and the frames of a film backwards are those of the film: what flips cannot
    be read off one of them. And backwards is as likely."""
    for film in SAMPLED[:50]:
        for number in range(film.frames):
            assert sum(event.actor.path[number] is not None for event in film.events) <= 1
        turned = {e.name: e.actor.path[::-1] for e in backwards(film).events}
        assert turned == {e.name: e.actor.path for e in film.events}
    slots = Counter((len(f.events), [e.brief for e in f.events].index(True)) for f in SAMPLED)
    for count in EVENTS:
        own = [slots[count, place] for place in range(count)]
        assert min(own) > 0.6 * sum(own) / count
    before = [shown(film.events[0].actor)[0] for film in SAMPLED]
    after = [film.frames - 1 - shown(film.events[-1].actor)[-1] for film in SAMPLED]
    assert np.mean(before) == pytest.approx(np.mean(after), abs=0.2)
    ways = Counter(e.way for f in SAMPLED for e in f.events if e.way)
    assert min(ways[way] for way in WAYS) > 0.8 * ways.total() / 4
    for way in WAYS:  # where a moving object is says nothing of where it goes
        axis = "x" if way in ("left", "right") else "y"
        places = [getattr(s, axis) for f in SAMPLED for e in f.events if e.way == way for s in e.actor.path if s]
        assert np.mean(places) == pytest.approx(0.5, abs=0.03)
    assert min(Counter(len(film.events) for film in SAMPLED).values()) > 0.7 * len(SAMPLED) / 3


def test_answers_are_balanced() -> None:
    asked = [question for film in SAMPLED for question in questions_of(film)]
    orders = [question for question in asked if question.task == "order"]
    named_first = [
        question.text.index(question.answer) < question.text.index(question.distractors[0]) for question in orders
    ]
    assert 0.45 < np.mean(named_first) < 0.55
    motions = Counter(question.answer for question in asked if question.task == "motion")
    assert min(motions[way] for way in WAYS) > 0.8 * motions.total() / 4
    for task in ("flash", "appearance"):
        colours = Counter(question.answer for question in asked if question.task == task)
        assert min(colours[colour] for colour in COLOURS) > 0.5 * colours.total() / len(COLOURS)
    times = Counter(question.answer for question in asked if question.task == "count" and question.about)
    assert set(times) == {"1", "2", "3"}


def test_of_several_of_a_kind_each_is_named_by_its_colour() -> None:
    film = next(film for film in SAMPLED if len(movers(film)) and len(film.of_kind(movers(film)[0].actor.kind)) > 1)
    event = movers(film)[0]
    assert f"the {event.actor.colour} {event.actor.kind}" in motion(film, event).text
    colours = [other.actor.colour for other in film.of_kind(event.actor.kind)]
    assert len(set(colours)) == len(colours)
    held_out = [sample_film("held_out", index) for index in range(40)]
    twins = [film for film in held_out if len(orderable(film)) < len(film.events)]
    assert twins  # where a kind has one colour, two of it cannot be told apart in words, and are not asked about
    for film in twins:
        (kind, *_) = (e.actor.kind for e in film.events if e not in orderable(film))
        assert film.thing(film.of_kind(kind)[0]) is None
        assert all(f"{kind} move" not in question.text for question in questions_of(film))


def test_the_split_held_out_has_its_own_colours() -> None:
    for split in SPLITS:
        for index in range(40):
            film = sample_film(split, index)
            looks = [(a.kind, a.colour) for a in (*film.still, *(e.actor for e in film.events))]
            assert all((look in HELD_OUT) == (split == "held_out") for look in looks)


def test_everything_stays_in_the_picture() -> None:
    for film in SAMPLED:
        for actor in (*film.still, *(event.actor for event in film.events)):
            for seen in actor.path:
                if seen is not None:
                    assert seen.half - 1e-9 <= min(seen.x, seen.y)
                    assert max(seen.x, seen.y) <= 1 - seen.half + 1e-9


def test_every_wording_asks_the_same() -> None:
    assert all(len(set(wordings)) == WORDINGS for wordings in FILM_TEMPLATES.values())
    film = SAMPLED[0]
    first, second = orderable(film)[:2]
    for wording in range(WORDINGS):
        asked = order(film, second, first, wording=wording)
        assert f"the {second.name}" in asked.text
        assert asked.answer == f"the {first.name}"
        assert count_kind(film, first.actor.kind, wording=wording).answer == count_kind(film, first.actor.kind).answer
    assert order(film, second, first).text == f"Which came first, the {second.name} or the {first.name}?"


@pytest.mark.parametrize(
    ("arguments", "frames", "message"),
    [
        (("tset", 0), 16, "unknown split 'tset'"),
        (("test", -1), 16, "index must be 0 or more, not -1"),
        (("test", 0), 15, f"{FILM_FRAMES[0]} to {FILM_FRAMES[1]} frames, not 15"),
        (("test", 0), 2049, f"{FILM_FRAMES[0]} to {FILM_FRAMES[1]} frames, not 2049"),
    ],
)
def test_bad_input_is_refused(arguments: tuple[Split, int], frames: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample_film(*arguments, frames=frames)


def test_a_bad_size_is_refused() -> None:
    with pytest.raises(InputError, match="size must be from"):
        draw_film(SAMPLED[0], 8)
