"""Short clips of the picture world: one object moves in a scene, and what it does is the clip's action.

A frame by itself, its number unknown, does not decide between `moves left` and `moves right`, `comes closer` and `goes
away`, `appears` and `vanishes`: the order of the frames does. A *bouncing* clip has an object that flies with constant
speed and is thrown back by the edges, without an end: what comes next follows from what has been seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sightline.errors import InputError, unknown
from sightline.picturebook.backdrops import backdrop
from sightline.picturebook.draw import NOISE, SUPERSAMPLING, canvas_side
from sightline.picturebook.kinds import palette, sprite
from sightline.picturebook.scene import COLOURS, HELD_OUT, KINDS, SCENE_TYPES, SPLITS, Colour, Split, random_stream

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

ACTIONS = (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "comes closer",
    "goes away",
    "appears",
    "vanishes",
)
"""What the moving object does."""

FRAMES_RANGE = (2, 2048)


@dataclass(frozen=True)
class Sighting:
    """Where an object is in one frame: its centre and half its box as fractions of the side, None where it is not
    there."""

    x: float
    y: float
    half: float


@dataclass(frozen=True)
class Actor:
    """An object of a clip, and where it is in each frame."""

    kind: str
    colour: Colour
    mirrored: bool
    path: tuple[Sighting | None, ...]


@dataclass(frozen=True)
class Clip:
    """A scene type, its actors (later ones in front) and, unless it bounces, the action of the last one."""

    scene_type: str
    actors: tuple[Actor, ...]
    action: str | None
    seed: int

    @property
    def frames(self) -> int:
        """How many."""
        return len(self.actors[-1].path)

    @property
    def label(self) -> int:
        """The action's number in `ACTIONS`."""
        assert self.action is not None
        return ACTIONS.index(self.action)


def sample_clip(split: Split, index: int, *, frames: int = 8) -> Clip:
    """Clip number `index` of a split: up to two objects stand still, one acts.

    Raises:
        InputError: an unknown split, a negative index, or a number of frames outside `FRAMES_RANGE`.
    """
    rng = _stream("action", split, index, frames)
    action = ACTIONS[int(rng.integers(len(ACTIONS)))]
    name = list(SCENE_TYPES)[int(rng.integers(len(SCENE_TYPES)))]
    still = tuple(_still(rng, split, frames) for _ in range(int(rng.integers(3))))
    half = float(rng.uniform(0.12, 0.17))
    x, y = (float(rng.uniform(0.35, 0.65)) for _ in range(2))
    way = float(rng.uniform(0.15, 0.3))
    time = np.linspace(0, 1, frames)
    steps = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
    path: tuple[Sighting | None, ...]
    if action in steps:
        dx, dy = steps[action]
        path = tuple(Sighting(x + dx * way * (t - 0.5), y + dy * way * (t - 0.5), half) for t in time)
    elif action in ("comes closer", "goes away"):
        growth = time if action == "comes closer" else time[::-1]
        path = tuple(Sighting(x, y, half * (0.6 + 0.8 * float(g))) for g in growth)
    else:
        turn = int(rng.integers(1, frames))
        there = [(number >= turn) is (action == "appears") for number in range(frames)]
        path = tuple(Sighting(x, y, half) if shown else None for shown in there)
    return Clip(name, (*still, _actor(rng, split, path)), action, int(rng.integers(2**31)))


def bouncing_clip(split: Split, index: int, *, frames: int = 60, objects: int = 1) -> Clip:
    """Clip number `index` of a split in which objects fly and bounce off the edges, whatever is in their way.

    Raises:
        InputError: as `sample_clip`, and fewer objects than one.
    """
    if objects < 1:
        raise InputError(f"a clip in which objects bounce has 1 of them or more, not {objects}")
    rng = _stream("bounce", split, index, frames, objects)
    name = list(SCENE_TYPES)[int(rng.integers(len(SCENE_TYPES)))]
    actors = []
    for _ in range(objects):
        half = float(rng.uniform(0.14, 0.2))
        start = rng.uniform(half, 1 - half, size=2)
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.04, 0.09)
        steps = np.arange(frames)[:, None] * speed * np.array([np.cos(angle), np.sin(angle)])
        room = 1 - 2 * half
        folded = np.abs((start - half + steps + room) % (2 * room) - room) + half  # a billiard table, unfolded
        actors.append(_actor(rng, split, tuple(Sighting(float(x), float(y), half) for x, y in folded)))
    return Clip(name, tuple(actors), None, int(rng.integers(2**31)))


def draw_clip(clip: Clip, size: int = 32) -> NDArray[np.uint8]:
    """The frames, uint8 [T, size, size, 3]. The pixel noise of a frame is that of its number.

    Raises:
        InputError: a size outside the range of pictures.
    """
    side = canvas_side(size)
    behind = backdrop(clip.scene_type, clip.seed, side)
    drawn = np.empty((clip.frames, size, size, 3), dtype=np.uint8)
    noise = random_stream("clip noise", clip.seed, size).integers(-NOISE, NOISE + 1, (clip.frames, size, size, 1))
    for number in range(clip.frames):
        canvas = behind.copy()
        for actor in clip.actors:
            seen = actor.path[number]
            if seen is not None:
                _paste(canvas, actor, seen, clip.seed, side)
        clean = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.int64)
        drawn[number] = np.clip(clean + noise[number], 0, 255)
    return drawn


def _paste(canvas: Image.Image, actor: Actor, seen: Sighting, seed: int, side: int) -> None:
    half = max(2, round(seen.half * side))
    shape = sprite(actor.kind, half, actor.mirrored)
    fills = shape.fills.copy()
    fills.putpalette(palette(actor.colour, seed, 0.0, 0.0))  # the same shade wherever it is
    canvas.paste(fills.convert("RGB"), (round(seen.x * side) - half, round(seen.y * side) - half), shape.mask)


def _still(rng: np.random.Generator, split: Split, frames: int) -> Actor:
    half = float(rng.uniform(0.08, 0.13))
    x, y = (float(rng.uniform(half, 1 - half)) for _ in range(2))
    return _actor(rng, split, (Sighting(x, y, half),) * frames)


def _actor(rng: np.random.Generator, split: Split, path: tuple[Sighting | None, ...]) -> Actor:
    kind = KINDS[int(rng.integers(len(KINDS)))]
    colours = [colour for colour in COLOURS if ((kind, colour) in HELD_OUT) == (split == "held_out")]
    return Actor(kind, colours[int(rng.integers(len(colours)))], bool(rng.random() < 0.5), path)


def _stream(purpose: str, split: Split, index: int, frames: int, *more: int) -> np.random.Generator:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if index < 0:
        raise InputError(f"a clip's index must be 0 or more, not {index}")
    low, high = FRAMES_RANGE
    if not low <= frames <= high:
        raise InputError(f"a clip has {low} to {high} frames, not {frames}")
    return random_stream(purpose, split, index, frames, *more)
