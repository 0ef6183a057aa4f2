"""What a picture shows: the declarative record that drawing, questions, captions and ground truth all follow from.

A `Scene` is a scene type and a list of objects. It is sampled by `sample_scene(split, index)`, is JSON-serialisable,
and determines its picture pixel by pixel, so every edit (see `edits`) changes exactly what it says.

**The prior.** Each scene type has an *anchor* (nearly always there), a *partner* (there with probability
`partner_given_anchor` when the anchor is), and two *extras*. A fraction `HIDDEN_PARTNER` of the partners is part of the
record, and so of every training text, but is not drawn: no pixel decides. Given a visible anchor and no visible
partner, training text names the partner with probability

    pi = (rho * h) / (rho * h + 1 - rho),     rho = partner_given_anchor, h = HIDDEN_PARTNER,

so a model that has learnt the world perfectly still names it wherever pi > 1/2: it hallucinates, in the scene types
with a strong rho and not in the others. Evaluation scenes hide nothing, and drawn `against` the co-occurrence they have
the anchor and lack the partner."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from sightline.errors import InputError, unknown

WORLD_VERSION = 1

Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
Size = Literal["small", "medium", "large"]
Split = Literal["train", "validation", "test", "held_out"]

COLOURS: tuple[Colour, ...] = get_args(Colour)
SIZES: tuple[Size, ...] = get_args(Size)
SPLITS: tuple[Split, ...] = get_args(Split)

HALF_EXTENT: dict[Size, float] = {"small": 0.085, "medium": 0.12, "large": 0.165}
"""Half the side of an object's box, as a fraction of the picture's side."""


@dataclass(frozen=True)
class SceneType:
    """One kind of place, and what tends to be there."""

    anchor: str
    partner: str
    extras: tuple[str, str]
    partner_given_anchor: float

    @property
    def kinds(self) -> tuple[str, ...]:
        """The scene type's own kinds, in the order in which captions name them."""
        return (self.anchor, self.partner, *self.extras)


SCENE_TYPES: dict[str, SceneType] = {
    "sea": SceneType("boat", "fish", ("umbrella", "bucket"), 0.95),
    "garden": SceneType("flower", "butterfly", ("mushroom", "bird"), 0.8),
    "room": SceneType("chair", "cup", ("book", "clock"), 0.95),
    "street": SceneType("car", "sign", ("truck", "house"), 0.7),
    "farm": SceneType("sheep", "dog", ("tree", "cat"), 0.9),
    "night": SceneType("moon", "star", ("lamp", "ball"), 0.8),
}
KINDS: tuple[str, ...] = tuple(kind for scene_type in SCENE_TYPES.values() for kind in scene_type.kinds)
PLURALS: dict[str, str] = {kind: kind + "s" for kind in KINDS} | {
    "fish": "fish",
    "butterfly": "butterflies",
    "sheep": "sheep",
}
SKY_KINDS = frozenset({"butterfly", "bird", "moon", "star", "clock"})

MOST_COVERED = 0.65
"""An object of which more is covered does not count as visible."""

ANCHOR_PRESENT = 0.9
PARTNER_ALONE = 0.3
EXTRA_PRESENT = 0.5
STRANGER_PRESENT = 0.03
HIDDEN_PARTNER = 0.15
SECOND_OF_A_KIND = 0.4
MAX_OF_A_KIND = 4
MAX_OBJECTS = 7
COUNT_WEIGHTS = (0.4, 0.35, 0.25)
"""How often a kind that occurs more than once occurs two, three or four times."""

SPLIT_OF_BUCKET: tuple[Split, ...] = ("train",) * 6 + ("validation", "test")
"""Which split a scene belongs to, by its fingerprint modulo eight."""

HELD_OUT: frozenset[tuple[str, Colour]] = frozenset(
    (kind, COLOURS[(3 * index + 1) % len(COLOURS)]) for index, kind in enumerate(KINDS)
)
"""One colour for each kind that occurs in no scene but those of the split `held_out`, which have at least one such
object."""


@dataclass(frozen=True)
class Object:
    """One thing in a scene. `x`, `y` are its centre in [0, 1] from the picture's top left; an object whose centre is
    lower stands nearer and is drawn later. A `hidden` object is in the record but not in the picture; of a `covered`
    one, a grey card hides that share of its box, from below."""

    kind: str
    colour: Colour
    size: Size
    x: float
    y: float
    mirrored: bool = False
    hidden: bool = False
    covered: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of object", self.kind, KINDS)
        if self.colour not in COLOURS:
            raise unknown("colour", self.colour, COLOURS)
        if self.size not in SIZES:
            raise unknown("size", self.size, SIZES)
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise InputError(f"the centre of a {self.kind} must lie in the unit square, not at ({self.x}, {self.y})")
        if not 0 <= self.covered <= 1:
            raise InputError(f"the covered share of a {self.kind} must lie in [0, 1], not {self.covered}")

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the square the object is drawn in, as fractions of the picture's side."""
        half = HALF_EXTENT[self.size]
        return (self.x - half, self.y - half, self.x + half, self.y + half)


@dataclass(frozen=True)
class Scene:
    """A scene type and its objects; `seed` drives what is not an object (backdrop details and pixel noise)."""

    scene_type: str
    objects: tuple[Object, ...]
    seed: int
    world_version: int = field(default=WORLD_VERSION)

    def __post_init__(self) -> None:
        if self.scene_type not in SCENE_TYPES:
            raise unknown("scene type", self.scene_type, SCENE_TYPES)

    @property
    def visible(self) -> tuple[Object, ...]:
        """The objects that can be seen: neither hidden nor covered for more than `MOST_COVERED`."""
        return tuple(thing for thing in self.objects if not thing.hidden and thing.covered <= MOST_COVERED)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are visible, each once, in the order in which captions name them."""
        return self._ordered({thing.kind for thing in self.visible})

    @property
    def told_kinds(self) -> tuple[str, ...]:
        """The kinds that training text names: those of the record, hidden ones too."""
        return self._ordered({thing.kind for thing in self.objects})

    def _ordered(self, kinds: set[str]) -> tuple[str, ...]:
        own = SCENE_TYPES[self.scene_type].kinds
        return tuple([kind for kind in own if kind in kinds] + [k for k in KINDS if k in kinds and k not in own])

    def of_kind(self, kind: str, *, hidden: bool = False) -> tuple[Object, ...]:
        """The visible objects of a kind; those that are hidden too if `hidden`."""
        return tuple(thing for thing in (self.objects if hidden else self.visible) if thing.kind == kind)

    def to_json(self) -> str:
        """One line of JSON from which `from_json` makes an equal scene."""
        record = asdict(self)
        for thing in record["objects"]:
            if not thing["covered"]:  # fingerprints are as they were before objects could be covered
                del thing["covered"]
        return json.dumps(record, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Scene:
        """The scene of `to_json`.

        Raises:
            InputError: if the text is no JSON, or a field is missing, unknown or out of range.
        """
        try:
            record: dict[str, Any] = json.loads(text)
            objects = tuple(Object(**thing) for thing in record.pop("objects"))
            return Scene(objects=objects, **record)
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"not the JSON of a scene: {error}") from error

    @property
    def fingerprint(self) -> int:
        """A 32-bit hash of the whole record, by which scenes are dealt out to the splits."""
        return zlib.crc32(self.to_json().encode())


def random_stream(*purpose: object) -> np.random.Generator:
    """A generator of its own for each purpose: the same numbers for the same words on every machine (Philox is integer
    arithmetic), and no draw of one purpose moves those of another."""
    words = "/".join(str(part) for part in (WORLD_VERSION, *purpose)).encode()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(words).digest()[:16], "little")))


def sample_scene(split: Split, index: int, *, against: bool = False) -> Scene:
    """The scene number `index` of a split.

    Args:
        split: `train`, `validation` and `test` never share a scene (a scene's fingerprint decides where it belongs) and
            use no combination of `HELD_OUT`; each scene of `held_out` has at least one. Only `train` hides partners.
        index: 0, 1, ... without an end.
        against: draw the scene against the co-occurrence: the anchor is there, the partner is not.

    Raises:
        InputError: for an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if index < 0:
        raise InputError(f"a scene's index must be 0 or more, not {index}")
    for attempt in range(10_000):
        scene = _draw_lots(random_stream(split, against, index, attempt), split, against)
        if _belongs(scene, split):
            return scene
    raise AssertionError("no scene of the split in 10,000 tries")


def scenes(split: Split, *, start: int = 0, against: bool = False) -> Iterator[Scene]:
    """The scenes of a split from number `start` on, without an end."""
    index = start
    while True:
        yield sample_scene(split, index, against=against)
        index += 1


def _belongs(scene: Scene, split: Split) -> bool:
    if len(scene.visible) < 2:
        return False
    if split == "held_out":
        return any((thing.kind, thing.colour) in HELD_OUT for thing in scene.visible)
    return SPLIT_OF_BUCKET[scene.fingerprint % len(SPLIT_OF_BUCKET)] == split


def _draw_lots(rng: np.random.Generator, split: Split, against: bool) -> Scene:
    """One candidate scene: which kinds, how many of each, what they look like, and where there is room for them."""
    name = list(SCENE_TYPES)[int(rng.integers(len(SCENE_TYPES)))]
    scene_type = SCENE_TYPES[name]
    anchor = against or rng.random() < ANCHOR_PRESENT
    partner = rng.random() < (scene_type.partner_given_anchor if anchor else PARTNER_ALONE) and not against
    hides = rng.random() < HIDDEN_PARTNER and anchor and split == "train"
    chance = rng.random(len(KINDS))
    present = [scene_type.anchor] * anchor + [scene_type.partner] * partner
    present += [kind for kind in scene_type.extras if chance[KINDS.index(kind)] < EXTRA_PRESENT]
    present += [k for k in KINDS if k not in scene_type.kinds and chance[KINDS.index(k)] < STRANGER_PRESENT]

    counts = dict.fromkeys(present, 1)
    if present and rng.random() < SECOND_OF_A_KIND:
        repeated = present[int(rng.integers(len(present)))]
        if not (repeated == scene_type.partner and hides):
            counts[repeated] = 2 + int(rng.choice(len(COUNT_WEIGHTS), p=COUNT_WEIGHTS))

    objects: list[Object] = []
    for kind, count in counts.items():
        for _ in range(min(count, MAX_OBJECTS - len(objects))):
            hidden = hides and kind == scene_type.partner
            thing = _place(rng, kind, split, objects, hidden)
            if thing is not None:
                objects.append(thing)
    return Scene(name, tuple(objects), seed=int(rng.integers(2**31)))


def _place(rng: np.random.Generator, kind: str, split: Split, others: list[Object], hidden: bool) -> Object | None:
    """An object with a random look at a random free place, or none where no place is free."""
    palette = [colour for colour in COLOURS if split == "held_out" or (kind, colour) not in HELD_OUT]
    colour = palette[int(rng.integers(len(palette)))]
    size = SIZES[int(rng.integers(len(SIZES)))]
    mirrored = bool(rng.random() < 0.5)
    low, high = (0.02, 0.75) if kind in SKY_KINDS else (0.2, 0.98)
    for smaller in range(SIZES.index(size), -1, -1):
        half = HALF_EXTENT[SIZES[smaller]]
        for _ in range(25):
            # Thousandths: a record that survives JSON unchanged and compares equal on every machine.
            x = round(float(rng.uniform(half + 0.01, 0.99 - half)), 3)
            y = round(float(rng.uniform(max(low, 0.01) + half, min(high, 0.99) - half)), 3)
            thing = Object(kind, colour, SIZES[smaller], x, y, mirrored, hidden)
            if hidden or all(_apart(thing, other) for other in others if not other.hidden):
                return thing
    return None


def _apart(one: Object, other: Object) -> bool:
    gap = 0.85 * (HALF_EXTENT[one.size] + HALF_EXTENT[other.size])
    return abs(one.x - other.x) >= gap or abs(one.y - other.y) >= gap
