"""What can be asked about a scene, with the answers that follow from its record, and the captions that describe it.

Each function turns a scene into `Question`s whose answer is executed on the record, never typed. A question is only
asked where the record decides it: attributes of a kind that occurs once, relations with a clear margin, and, where what
is *seen* counts, nothing about hidden objects. Captions come in the two styles of NanoVLMs (arXiv:2502.07838): one
short sentence, and a long description in a child's plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sightline.errors import unknown
from sightline.picturebook.scene import (
    COLOURS,
    KINDS,
    MAX_OF_A_KIND,
    PLURALS,
    SCENE_TYPES,
    SIZES,
    Object,
    Scene,
)

if TYPE_CHECKING:
    import numpy as np

RELATION_MARGIN = 0.15
"""Two centres must be at least this far apart, in picture sides, before left/right or above/below is asked about."""

FAR_APART = 0.4
"""Pairs at least this far apart are asked about more often in training."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "existence": (
        "Is there {a} in the image?",
        "Is there {a} in this picture?",
        "Do you see {a}?",
        "Can you see {a} in the picture?",
        "Does the picture show {a}?",
    ),
    "colour": (
        "What colour is the {kind}?",
        "What is the colour of the {kind}?",
        "Which colour does the {kind} have?",
        "Tell me the colour of the {kind}.",
        "The {kind} has which colour?",
    ),
    "count": (
        "How many {kinds} are there?",
        "How many {kinds} do you see?",
        "What is the number of {kinds}?",
        "Count the {kinds}.",
        "How many {kinds} are in the picture?",
    ),
    "left_right": (
        "Is the {kind} to the left or to the right of the {other}?",
        "Is the {kind} left or right of the {other}?",
        "Do you see the {kind} left or right of the {other}?",
        "The {kind} is on the left or the right of the {other}?",
        "Left or right: where is the {kind} seen from the {other}?",
    ),
    "where": (
        "Where is the {kind}?",
        "On which side is the {kind}?",
        "In which part of the picture is the {kind}?",
        "Tell me where the {kind} is.",
        "The {kind} is where?",
    ),
    "above_below": (
        "Is the {kind} above or below the {other}?",
        "Is the {kind} higher or lower than the {other}, above or below?",
        "The {kind} is above or below the {other}?",
        "Above or below: where is the {kind} seen from the {other}?",
        "Where is the {kind}, above or below the {other}?",
    ),
    "place": (
        "What place is this?",
        "Where was this picture made?",
        "Which place does the picture show?",
        "What kind of place do you see?",
        "Name the place.",
    ),
    "size": (
        "How big is the {kind}?",
        "What size is the {kind}?",
        "What is the size of the {kind}?",
        "Is the {kind} small, medium or large?",
        "Tell me how big the {kind} is.",
    ),
    "short_caption": (
        "Describe the picture in one sentence.",
        "What is there?",
        "What do you see?",
        "Give a short caption.",
        "What does the picture show?",
    ),
    "long_caption": (
        "Please describe this image in detail.",
        "Describe everything in the picture.",
        "Tell me all that you see.",
        "Please help me describe the image in detail.",
        "Describe the picture in detail.",
    ),
}
"""Five wordings of each question; the first is the one that benchmarks use."""

THIRDS = ("on the left", "in the middle", "on the right")
NUMBER_WORDS = ("no", "one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """A question about a scene. `distractors` are wrong answers of the same type; `about` are the kinds it names."""

    task: str
    text: str
    answer: str
    distractors: tuple[str, ...]
    about: tuple[str, ...] = ()


def article(kind: str) -> str:
    """The kind with its indefinite article: 'a boat', 'an umbrella'."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _ask(task: str, answer: object, options: Sequence[object], wording: int, *kinds: str) -> Question:
    if task not in TEMPLATES:
        raise unknown("kind of question", task, TEMPLATES)
    kind, other = (*kinds, "", "")[:2]
    text = TEMPLATES[task][wording].format(
        kind=kind, other=other, a=article(kind) if kind else "", kinds=PLURALS.get(kind, "")
    )
    wrong = tuple(str(option) for option in options if str(option) != str(answer))
    return Question(task, text, str(answer), wrong, kinds)


def existence(scene: Scene, kind: str, *, wording: int = 0, told: bool = False) -> Question:
    """Is there such a thing? By what is visible, or, with `told`, by the record as training text tells it."""
    answer = kind in (scene.told_kinds if told else scene.kinds)
    return _ask("existence", "yes" if answer else "no", ("yes", "no"), wording, kind)


def colour(scene: Scene, kind: str, *, wording: int = 0) -> Question:
    """The colour of the only object of a kind."""
    return _ask("colour", _only(scene, kind).colour, COLOURS, wording, kind)


def size(scene: Scene, kind: str, *, wording: int = 0) -> Question:
    """The size of the only object of a kind."""
    return _ask("size", _only(scene, kind).size, SIZES, wording, kind)


def count(scene: Scene, kind: str, *, wording: int = 0) -> Question:
    """How many objects of a kind are visible (one to four)."""
    return _ask("count", len(scene.of_kind(kind)), range(1, MAX_OF_A_KIND + 1), wording, kind)


def place(scene: Scene, *, wording: int = 0) -> Question:
    """Which scene type this is."""
    return _ask("place", scene.scene_type, tuple(SCENE_TYPES), wording)


def left_right(scene: Scene, kind: str, other: str, *, wording: int = 0) -> Question:
    """On which side of the only `other` the only `kind` is."""
    answer = "left" if _only(scene, kind).x < _only(scene, other).x else "right"
    return _ask("left_right", answer, ("left", "right"), wording, kind, other)


def where(scene: Scene, kind: str, *, wording: int = 0) -> Question:
    """In which third of the picture the only object of a kind has its centre: left, middle or right."""
    sides = [third.split()[-1] for third in THIRDS]
    return _ask("where", sides[third(_only(scene, kind))], sides, wording, kind)


def above_below(scene: Scene, kind: str, other: str, *, wording: int = 0) -> Question:
    """Whether the only `kind` is above the only `other`."""
    answer = "above" if _only(scene, kind).y < _only(scene, other).y else "below"
    return _ask("above_below", answer, ("above", "below"), wording, kind, other)


def _only(scene: Scene, kind: str) -> Object:
    (thing,) = scene.of_kind(kind)
    return thing


def singles(scene: Scene) -> tuple[str, ...]:
    """The kinds of which exactly one object is visible: those whose attributes can be asked about."""
    return tuple(kind for kind in scene.kinds if len(scene.of_kind(kind)) == 1)


def relation_pairs(scene: Scene, axis: str, margin: float = RELATION_MARGIN) -> list[tuple[str, str]]:
    """Ordered pairs of single kinds that differ by the margin, in picture sides, along `axis`, "x" or "y"."""
    kinds = singles(scene)
    where = {kind: getattr(_only(scene, kind), axis) for kind in kinds}
    return [(a, b) for a in kinds for b in kinds if a != b and abs(where[a] - where[b]) >= margin]


def short_caption(scene: Scene, *, told: bool = False, wording: int = 0) -> Question:
    """One sentence that names each kind with its colour or number, and the place."""
    kinds = scene.told_kinds if told else scene.kinds
    names = [_name(scene.of_kind(kind, hidden=told), with_size=False) for kind in kinds]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return _ask("short_caption", f"{listed} in the {scene.scene_type}.", (), wording)


def long_caption(scene: Scene, *, told: bool = False, wording: int = 0) -> Question:
    """A sentence for the place and one for each kind: number, size, colour, and where it is."""
    kinds = scene.told_kinds if told else scene.kinds
    sentences = [f"This is the {scene.scene_type}."]
    for kind in kinds:
        things = scene.of_kind(kind, hidden=told)
        verb = "is" if len(things) == 1 else "are"
        place = THIRDS[third(things[0])] if len(things) == 1 else "around"
        sentences.append(f"There {verb} {_name(things, with_size=True)} {place}.")
    return _ask("long_caption", " ".join(sentences), (), wording)


def third(thing: Object) -> int:
    """Which third of the picture an object's centre is in: 0 on the left, 1 in the middle, 2 on the right."""
    return min(int(3 * thing.x), 2)


def _name(things: Sequence[Object], *, with_size: bool) -> str:
    """'a small red boat', 'an orange cat', 'two fish'."""
    if len(things) > 1:
        return f"{NUMBER_WORDS[len(things)]} {PLURALS[things[0].kind]}"
    first = things[0]
    words = f"{first.size} {first.colour} {first.kind}" if with_size else f"{first.colour} {first.kind}"
    return article(words)


def training_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """About a dozen questions of all kinds on one scene, answered as training text answers them (hidden objects are
    told).

    Existence is balanced, half yes and half no, but for the partner of a scene type whose anchor is there: it is asked
    about in half of such scenes, however the answer falls, which is how the prior gets into the yes/no answers."""

    def pick(options: Sequence[str], n: int) -> list[str]:
        return [options[i] for i in rng.permutation(len(options))[:n]]

    def wording() -> int:
        return int(rng.integers(len(TEMPLATES["place"])))

    own = SCENE_TYPES[scene.scene_type]
    told = scene.told_kinds
    asked: list[str] = []
    if own.anchor in told and rng.random() < 0.5:
        asked.append(own.partner)
    yes = pick([k for k in scene.kinds if k not in asked], 2 - sum(k in told for k in asked))
    absent = [k for k in KINDS if k not in told and k not in asked and k != own.partner]
    likely = [k for k in absent if k in own.kinds]
    no = pick(likely, int(rng.random() < 0.5))
    no += pick([k for k in absent if k not in no], 2 - len(no) - sum(k not in told for k in asked))
    questions = [existence(scene, kind, wording=wording(), told=True) for kind in asked + yes + no]

    alone = singles(scene)
    questions += [colour(scene, kind, wording=wording()) for kind in pick(alone, 2)]
    questions += [size(scene, kind, wording=wording()) for kind in pick(alone, 1)]
    questions += [where(scene, kind, wording=wording()) for kind in pick(alone, 1)]
    several = [kind for kind in scene.kinds if len(scene.of_kind(kind)) > 1]
    # Most kinds occur once, and "1" would be the safe answer: ask above all about those that occur more often.
    countable = 4 * several + pick(alone, int(rng.random() < (0.75 if several else 0.25)))
    questions += [count(scene, kind, wording=wording()) for kind in countable]
    for ask, axis in ((left_right, "x"), (above_below, "y")):
        pairs = relation_pairs(scene, axis)
        # Of pairs that lie far apart the place of either tells the answer; from these the comparison is learnt first.
        far = relation_pairs(scene, axis, FAR_APART)
        asked_pairs = [far[i] for i in rng.permutation(len(far))[:1]] + [
            pairs[i] for i in rng.permutation(len(pairs))[:1]
        ]
        questions += [ask(scene, *pair, wording=wording()) for pair in asked_pairs]
    if rng.random() < 0.5:
        questions.append(place(scene, wording=wording()))
    if rng.random() < 0.7:
        caption = short_caption if rng.random() < 0.5 else long_caption
        questions.append(caption(scene, told=True, wording=wording()))
    return questions
