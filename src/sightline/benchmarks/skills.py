"""What the built-in model can do, skill by skill, on scenes of the picture world that it was not trained on.

Eight skills, one question a scene and skill:

- ``existence_random``, ``existence_popular``, ``existence_adversarial``: is there such a thing? Half of the answers are
  yes, about a kind that is there. The absent kind is any (random), one of the six that most scenes show (popular),
  or the one that its scene type makes likely: the partner where it is absent, else an extra (adversarial, on scenes
  drawn against the co-occurrence, whose partner is always absent).
- ``colour``: of a kind that occurs once. ``count``: one to four, each in a quarter of the items, so that a model that
  always answers "1" is right in a quarter. ``relation``: left or right, above or below, in turn. ``place``: the scene
  type.
- ``caption``: a long description of scenes drawn against the co-occurrence, scored by CHAIR (see `chair`).

A short answer is right if it equals the right one once both are in lower case without white space and full stop at the
ends; a number may be a word.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from sightline.benchmarks.chair import Chair
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
from sightline.benchmarks.statistics import wilson
from sightline.errors import InputError
from sightline.picturebook.draw import draw
from sightline.picturebook.questions import (
    NUMBER_WORDS,
    Question,
    above_below,
    colour,
    count,
    existence,
    left_right,
    long_caption,
    place,
    relation_pairs,
    singles,
)
from sightline.picturebook.scene import (
    ANCHOR_PRESENT,
    EXTRA_PRESENT,
    KINDS,
    MAX_OF_A_KIND,
    PARTNER_ALONE,
    SCENE_TYPES,
    Scene,
    Split,
    random_stream,
    sample_scene,
)

SHORT_ANSWER, CAPTION = 8, 128
"""The longest answers, in tokens."""

USUAL_ITEMS = 300
POPULAR = 6

_DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS) if number}
_CAPTIONS = Chair(against=True)


def normalised(text: str) -> str:
    """A short answer as it is compared.

    >>> normalised(" Two. "), normalised("Light  Blue")
    ('2', 'light blue')
    """
    words = " ".join(text.lower().strip().rstrip(".").split())
    return _DIGITS.get(words, words)


@register_benchmark("skills")
@dataclass(frozen=True)
class Skills(Benchmark):
    """The skills of the module's text. Splits: `test`, and `held_out`, whose scenes hold a kind in a colour that no
    other scene has it in."""

    splits: ClassVar[tuple[str, ...]] = ("test", "held_out")

    def items(self, split: str, n: int | None = None, seed: int = 0) -> list[Item]:
        """n items of each skill, 300 by default."""
        self.check_split(split)
        check_draw(n, seed)
        world: Split = "held_out" if split == "held_out" else "test"
        wanted = USUAL_ITEMS if n is None else n
        drawn: dict[bool, list[Scene]] = {False: [], True: []}  # shared by the skills, as drawing lots takes time
        items: list[Item] = []
        for skill in SKILLS.values():
            scenes = drawn[skill.against]

            def ask(seen: int, skill: Skill = skill, scenes: list[Scene] = scenes) -> tuple[int, Item] | None:
                index = seed * SCENES_PER_SEED + seen
                if seen == len(scenes):
                    scenes.append(sample_scene(world, index, against=skill.against))
                found = skill.ask(scenes[seen], index, random_stream("skills", skill.name, world, index))
                return found and (found[0], _item(skill, split, index, scenes[seen], found[1]))

            items += by_turns(wanted, skill.turns, ask)
        return items

    def item_score(self, item: Item, text: str) -> dict[str, Any]:
        """Short answers: hit, readable (it is one of the answers there are to such questions). Captions: the facts of
        CHAIR, and hit (nothing in it is hallucinated)."""
        if item.task == "caption":
            facts = _CAPTIONS.item_score(item, text)
            return {"hit": not facts["hallucinated"], **facts}
        given = normalised(text)
        return {"hit": given == item.answer, "readable": given in (item.answer, *item.meta["distractors"])}

    def scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """``all``, the share of answers that are right, a caption counting as right if nothing in it is hallucinated;
        then the skills that the rows hold, each with its Wilson interval, and for captions caption_chair_i,
        caption_chair_s and caption_recall with those of `Chair.scores`.

        Raises:
            InputError: if there are no rows.
        """
        if not rows:
            raise InputError("there are no answers to score")
        scores = {"all": share_of_hits(rows)}
        for skill in SKILLS:
            own = [row for row in rows if row["task"] == skill]
            if own and skill == "caption":
                chair = _CAPTIONS.scores(own)
                scores |= {f"caption_{name}": chair[name] for name in ("chair_i", "chair_s", "recall")}
            elif own:
                scores[skill] = share_of_hits(own)
        return scores

    def paired_others(self, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> dict[str, float]:
        """For each skill the test of `paired` on its items, for captions those of `Chair`."""
        both = matching(rows_a, rows_b)
        found: dict[str, float] = {}
        for skill in SKILLS:
            own = [pair for pair in both if pair[0]["task"] == skill]
            a, b = [row for row, _ in own], [row for _, row in own]
            if own and skill == "caption":
                others = _CAPTIONS.paired_others(a, b)
                found |= {"caption_chair_i": others["chair_i"], "caption_chair_s": _CAPTIONS.paired(a, b)}
                found["caption_recall"] = others["recall"]
            elif own:
                found[skill] = self.paired(a, b)
        return found

    def measure(self, row: Row) -> float:
        """1 for a right answer or a caption without hallucination, else 0."""
        return float(row["hit"])


def by_turns(wanted: int, turns: int, ask: Callable[[int], tuple[int, Item] | None]) -> Iterator[Item]:
    """So many items, of each of several kinds in turn. `ask` makes of the first thing that is seen, of the second, ...
    an item for one turn, or none; where nothing waits for a turn, more is seen."""
    waiting: list[list[Item]] = [[] for _ in range(turns)]
    seen = itertools.count()
    for number in range(wanted):
        own = waiting[number % turns]
        while not own:
            found = ask(next(seen))
            if found is not None:
                waiting[found[0]].append(found[1])
        yield own.pop(0)


def share_of_hits(rows: Sequence[Row]) -> Score:
    """The share of right answers, with its Wilson interval."""
    hits, n = sum(bool(row["hit"]) for row in rows), len(rows)
    return Score(hits / n, *wilson(hits, n), n)


def _item(skill: Skill, split: str, index: int, scene: Scene, question: Question) -> Item:
    world = f"{'against' if skill.against else 'natural'}-{index}"
    meta: dict[str, Any] = {"scene": index, "against": skill.against, "distractors": list(question.distractors)}
    caption = skill.name == "caption"
    if caption:
        meta["objects"] = list(scene.kinds)
    return Item(
        id=f"{split}/{skill.name}/{world}",
        question=question.text,
        answer=question.answer,
        picture=partial(draw, scene),
        group=world,
        task=skill.name,
        max_new_tokens=CAPTION if caption else SHORT_ANSWER,
        meta=meta,
    )


Ask = Callable[[Scene, int, np.random.Generator], tuple[int, Question] | None]
"""Scene, its number, randomness -> the turn that the scene suits and its question, or None if it suits none."""


@dataclass(frozen=True)
class Skill:
    """How a skill is asked about.

    Attributes:
        name: the skill.
        ask: its question on a scene.
        turns: items are of this many kinds (yes and no, 1 to 4), in turn.
        against: whether its scenes are drawn against the co-occurrence.
    """

    name: str
    ask: Ask
    turns: int = 1
    against: bool = False


def popular_kinds() -> tuple[str, ...]:
    """All kinds, from the one that most scenes show to the one that fewest do. A kind is a stranger equally often to
    the other scene types, so its own scene type decides."""

    def share(kind: str) -> float:
        own = next(scene_type for scene_type in SCENE_TYPES.values() if kind in scene_type.kinds)
        if kind == own.anchor:
            return ANCHOR_PRESENT
        if kind == own.partner:
            return ANCHOR_PRESENT * own.partner_given_anchor + (1 - ANCHOR_PRESENT) * PARTNER_ALONE
        return EXTRA_PRESENT

    return tuple(sorted(KINDS, key=lambda kind: -share(kind)))


def one_of(options: Sequence[Any], rng: np.random.Generator) -> Any:
    """Any of them."""
    return options[int(rng.integers(len(options)))]


def _existence(absent: Callable[[Scene, np.random.Generator], str]) -> Ask:
    def ask(scene: Scene, number: int, rng: np.random.Generator) -> tuple[int, Question]:
        turn = number % 2
        return turn, existence(scene, absent(scene, rng) if turn else one_of(scene.kinds, rng))

    return ask


def _any_absent(scene: Scene, rng: np.random.Generator) -> str:
    return str(one_of([kind for kind in KINDS if kind not in scene.kinds], rng))


def _popular_absent(scene: Scene, rng: np.random.Generator) -> str:
    return str(one_of([kind for kind in popular_kinds() if kind not in scene.kinds][:POPULAR], rng))


def likely_absent(scene: Scene, rng: np.random.Generator) -> str:
    """The scene type's partner if it is absent, else an extra, else the most popular absent kind."""
    own = SCENE_TYPES[scene.scene_type]
    return next(kind for kind in (own.partner, *own.extras, *popular_kinds()) if kind not in scene.kinds)


def _colour(scene: Scene, number: int, rng: np.random.Generator) -> tuple[int, Question] | None:
    kinds = singles(scene)
    return (0, colour(scene, one_of(kinds, rng))) if kinds else None


def _count(scene: Scene, number: int, rng: np.random.Generator) -> tuple[int, Question]:
    """About the kind that occurs most often: large numbers are rare."""
    kind = max(scene.kinds, key=lambda kind: len(scene.of_kind(kind)))
    return len(scene.of_kind(kind)) - 1, count(scene, kind)


def _relation(scene: Scene, number: int, rng: np.random.Generator) -> tuple[int, Question] | None:
    turn = number % 2
    ask, axis = ((left_right, "x"), (above_below, "y"))[turn]
    pairs = relation_pairs(scene, axis)
    return (turn, ask(scene, *one_of(pairs, rng))) if pairs else None


def _place(scene: Scene, number: int, rng: np.random.Generator) -> tuple[int, Question]:
    return 0, place(scene)


def _caption(scene: Scene, number: int, rng: np.random.Generator) -> tuple[int, Question]:
    return 0, long_caption(scene)


SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("existence_random", _existence(_any_absent), turns=2),
        Skill("existence_popular", _existence(_popular_absent), turns=2),
        Skill("existence_adversarial", _existence(likely_absent), turns=2, against=True),
        Skill("colour", _colour),
        Skill("count", _count, turns=MAX_OF_A_KIND),
        Skill("relation", _relation, turns=2),
        Skill("place", _place),
        Skill("caption", _caption, against=True),
    )
}
"""Skill by name, in the order in which they are asked and reported."""
