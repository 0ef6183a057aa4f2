"""POPE: yes/no questions on whether an object is in the picture (Li et al., EMNLP 2023, arXiv:2305.10355).

In: the official question files with an image folder, or the picture world. Out: accuracy (headline), precision,
recall, F1 and yes-rate with "yes" as the positive class, the share of answers without a plain yes or no, and two scores
that no shift towards yes or no changes: AUROC and calibrated accuracy.

**Questions.** A picture gives three questions on objects that are there and three on objects that are not, in turn
yes, no, yes, no... The absent object is drawn uniformly (`random`), is the one that most pictures show (`popular`),
or the one that most often stands beside the object just asked about (`adversarial`). See `build_pope_questions`.

**Reading answers.** Published POPE numbers differ by the rule that reads the answer, so the rule is an option
(`matcher`; see `yes_no`). The share that the strict rule can't read is reported under every rule, as `unparsed`, and
lowers the score only under the strict one.

Departures from the official builder: it writes "an imange" before a vowel (it replaces each "a" of the template),
here the article alone changes; it loops for ever where no absent object is left, here that is an error. Its files are
read as they are, typo included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np

from sightline.benchmarks.item import (
    SCENES_PER_SEED,
    Answer,
    Benchmark,
    Item,
    Row,
    Score,
    check_draw,
    check_length,
    matching,
    read_json_lines,
    register_benchmark,
)
from sightline.benchmarks.statistics import (
    auroc,
    auroc_test,
    bootstrap_ranking,
    bootstrap_sums,
    calibrated_accuracy,
    calibrated_hits,
    group_sums,
    sign_flip_test,
    swap_test,
    wilson,
)
from sightline.benchmarks.yes_no import MATCHERS, is_plain
from sightline.errors import InputError, unknown
from sightline.models.images import open_picture
from sightline.picturebook.draw import draw
from sightline.picturebook.questions import article
from sightline.picturebook.scene import KINDS, Scene, sample_scene

if TYPE_CHECKING:
    import PIL.Image
    from numpy.typing import NDArray

PopeSplit = Literal["random", "popular", "adversarial"]
POPE_SPLITS: tuple[PopeSplit, ...] = get_args(PopeSplit)

USUAL_PICTURES = 500
QUESTIONS_PER_PICTURE = 6


@dataclass(frozen=True)
class PopeQuestion:
    """A question on picture number `picture` of the list that the questions were built from; `label` is yes or no."""

    picture: int
    object: str
    text: str
    label: str


def build_pope_questions(
    objects_per_picture: Sequence[tuple[str, ...]],
    split: str,
    seed: int,
    vocabulary: Sequence[str] | None = None,
    questions_per_picture: int = QUESTIONS_PER_PICTURE,
    counted_on: Sequence[tuple[str, ...]] | None = None,
) -> list[PopeQuestion]:
    """POPE's questions from the names of the objects that each picture shows.

    The objects asked about as present are the first half-of-`questions_per_picture` of a picture's list; after each
    comes an absent one, never one that this picture has been asked about before:

    - random: uniform over the vocabulary;
    - popular: the one that most pictures show;
    - adversarial: the one that most pictures show together with the present object just asked about;

    ties go to the object seen first, and where no counted object is left the draw is random. As in the official
    builder, pictures with fewer objects than are needed are left out, of the counts too.

    Args:
        objects_per_picture: the names, each picture's own; a name that is repeated counts once.
        split: random, popular or adversarial.
        seed: of the random draws.
        vocabulary: what absent objects are drawn from at random; the objects of the pictures by default, which is the
            official rule.
        questions_per_picture: even, half of them on present objects.
        counted_on: other pictures' objects to count popularity and company on. By default the same pictures, which is
            the official rule.

    Returns:
        The questions, picture by picture, yes and no in turn.

    Raises:
        InputError: for an unknown split, an odd number of questions, no picture with enough objects, or a picture
            for which the vocabulary holds too few absent objects.
    """
    if split not in POPE_SPLITS:
        raise unknown("split of POPE", split, POPE_SPLITS)
    if questions_per_picture < 2 or questions_per_picture % 2:
        raise InputError(f"the number of questions a picture must be even and at least 2, not {questions_per_picture}")
    half = questions_per_picture // 2
    distinct = [tuple(dict.fromkeys(objects)) for objects in objects_per_picture]
    pictures = {index: objects for index, objects in enumerate(distinct) if len(objects) >= half}
    if not pictures:
        raise InputError(f"no picture shows {half} objects or more")
    counted = list(pictures.values()) if counted_on is None else [tuple(dict.fromkeys(names)) for names in counted_on]
    popularity = Counter(name for objects in counted for name in objects)
    company: dict[str, Counter[str]] = {}
    for objects in counted:
        for name in objects:
            company.setdefault(name, Counter()).update(other for other in objects if other != name)
    names = list(dict.fromkeys(vocabulary or (name for objects in pictures.values() for name in objects)))

    rng = np.random.default_rng(seed)
    questions = []
    for index, objects in pictures.items():
        used = set(objects)
        for present in objects[:half]:
            ranking: Counter[str] = Counter()
            if split == "popular":
                ranking = popularity
            elif split == "adversarial":
                ranking = company.get(present, ranking)
            absent = next((name for name, _ in ranking.most_common() if name not in used), None)
            if absent is None:
                free = [name for name in names if name not in used]
                if not free:
                    raise InputError(
                        f"the vocabulary of {len(names)} objects has too few that picture {index} does not show"
                    )
                absent = free[int(rng.integers(len(free)))]
            used.add(absent)
            for name, label in ((present, "yes"), (absent, "no")):
                questions.append(PopeQuestion(index, name, f"Is there {article(name)} in the image?", label))
    return questions


@register_benchmark("pope")
@dataclass(frozen=True)
class Pope(Benchmark):
    """POPE from the picture world (the default) or from the official files.

    Attributes:
        source: "picturebook" or "files".
        questions: for files: a file of JSON lines (question_id, image, text, label); a path in which ``{split}``
            stands for the split's name; a folder that holds one ``*_{split}.json`` or ``.jsonl``; or a mapping from
            split to file.
        images: for files: the folder of the images.
        scenes: for the picture world: "test", or "validation" to choose settings on.
        matcher: the rule that reads the answers, one of `yes_no.MATCHERS`.
        suffix: what is appended to each question (" Please answer this question with one word." in VCD, AGLA, DAMRO
            and VDD).
        max_new_tokens: the longest answer.

    From the picture world, `random` and `popular` ask about test scenes as they come. `adversarial` asks about test
    scenes drawn against the co-occurrence, in which a scene type's anchor is there and its partner is not; popularity
    and company are then counted on as many scenes of the natural kind, because on these scenes the partner would
    never be anyone's company.
    """

    splits: ClassVar[tuple[str, ...]] = POPE_SPLITS

    source: str = "picturebook"
    questions: str | Path | Mapping[str, str | Path] | None = None
    images: str | Path | None = None
    scenes: Literal["test", "validation"] = "test"
    matcher: str = "pope"
    suffix: str = ""
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.source not in ("picturebook", "files"):
            raise unknown("source of POPE", self.source, ("picturebook", "files"))
        if self.scenes not in ("test", "validation"):
            raise unknown("scenes of POPE", str(self.scenes), ("test", "validation"))
        if self.matcher not in MATCHERS:
            raise unknown("matcher of POPE", self.matcher, MATCHERS)
        given = [name for name in ("questions", "images") if getattr(self, name) is not None]
        if self.source == "files" and len(given) < 2:
            raise InputError(
                "POPE with source=files needs questions= (its JSON-lines files) and images= (their folder)"
            )
        if self.source == "picturebook" and given:
            raise InputError(f"POPE takes {' and '.join(given)} only with source=files")
        check_length(self.max_new_tokens)

    def items(self, split: str, n: int | None = None, seed: int = 0) -> list[Item]:
        """Questions, whole pictures at a time (the last may be cut at n).

        From the picture world 500 pictures of six questions by default. From files all questions by default, else
        those of pictures drawn by the seed, in the file's order.
        """
        self.check_split(split)
        check_draw(n, seed)
        return self._from_files(split, n, seed) if self.source == "files" else self._from_scenes(split, n, seed)

    def item_score(self, item: Item, text: str) -> dict[str, Any]:
        """label, parsed (yes, no or None), hit, readable (by the strict rule), matcher."""
        parsed = MATCHERS[self.matcher](text, item.answer)
        return {
            "label": item.answer,
            "parsed": parsed,
            "hit": parsed == item.answer,
            "readable": is_plain(text),
            "matcher": self.matcher,
        }

    def row(self, answer: Answer) -> dict[str, Any]:
        """As in `Benchmark`; a fact `yes_logit_margin` (logit of yes minus logit of no) adds p_yes =
        sigmoid(margin)."""
        row = super().row(answer)
        margin = row.get("yes_logit_margin")
        return row if margin is None else row | {"p_yes": 0.5 * (1 + math.tanh(float(margin) / 2))}

    def measure(self, row: Row) -> float:
        """1 for a right answer, else 0."""
        return float(row["hit"])

    def scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """Scores with "yes" as the positive class; TP, FP, TN, FN as usual, 0/0 taken as 0.

            accuracy = hits / n        precision = TP / (answers yes)        recall = TP / (labels yes)
            f1 = 2 TP / (answers yes + labels yes) = 2 precision recall / (precision + recall)
            yes_rate = answers yes / n        unparsed = answers without a plain yes or no / n

        An unparsed answer (only `strict` has them) stays in n and in the labels. If every row has a
        `yes_logit_margin`, two scores tell how well it separates yes from no wherever the threshold lies: `auroc`, and
        `calibrated_accuracy`, the accuracy at the threshold at which the yes-rate is the share of labels yes (of
        answers that tie there, as many as are needed are a yes, each equally likely). Intervals: Wilson for accuracy
        and unparsed, cluster bootstrap over pictures for the rest.
        """
        if not rows:
            raise InputError("there are no answers to score")
        n = len(rows)
        groups = [row["group"] for row in rows]
        hits = sum(bool(row["hit"]) for row in rows)
        unreadable = sum(not row["readable"] for row in rows)
        counts = _counts(rows)
        values = _ratios(counts.sum(axis=0))
        low, high = bootstrap_sums(counts, _ratios, groups)
        scores = {"accuracy": Score(hits / n, *wilson(hits, n), n)}
        for i, name in enumerate(RATIOS):
            scores[name] = Score(float(values[i]), float(low[i]), float(high[i]), n)
        scores["unparsed"] = Score(unreadable / n, *wilson(unreadable, n), n)
        ranked = _ranked(rows)
        if ranked is not None:
            low, high = bootstrap_ranking(*ranked, groups)
            for i, (name, score) in enumerate((("auroc", auroc), ("calibrated_accuracy", calibrated_accuracy))):
                scores[name] = Score(score(*ranked), float(low[i]), float(high[i]), n)
        return scores

    def paired_others(self, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> dict[str, float]:
        """Permutation tests that exchange the two methods' answers to all questions on a picture: `swap_test` for
        precision, recall, F1 and yes-rate, `auroc_test`, and for calibrated accuracy the sign-flip test on the hits of
        each method at its own threshold."""
        both = matching(rows_a, rows_b)
        a, b = [row for row, _ in both], [row for _, row in both]
        groups = [row["group"] for row in a]
        p_values = swap_test(group_sums(_counts(a), groups), group_sums(_counts(b), groups), _ratios)
        found = dict(zip(RATIOS, p_values.tolist(), strict=True))
        ranked_a, ranked_b = _ranked(a), _ranked(b)
        if ranked_a is not None and ranked_b is not None:
            labels = ranked_a[1]
            found["auroc"] = auroc_test(ranked_a[0], ranked_b[0], labels, groups)
            gained = calibrated_hits(*ranked_b) - calibrated_hits(*ranked_a)
            found["calibrated_accuracy"] = sign_flip_test(group_sums(gained[:, None], groups))
        return found

    def _from_scenes(self, split: str, n: int | None, seed: int) -> list[Item]:
        against = split == "adversarial"
        half = QUESTIONS_PER_PICTURE // 2
        wanted = USUAL_PICTURES if n is None else -(-n // QUESTIONS_PER_PICTURE)
        rng = np.random.default_rng(seed)
        scenes: dict[int, Scene] = {}
        shown: list[tuple[str, ...]] = []
        index = seed * SCENES_PER_SEED
        while len(scenes) < wanted:
            scene = sample_scene(self.scenes, index, against=against)
            if len(scene.kinds) >= half:
                scenes[index] = scene
                # Kinds are listed anchor first: in that order a scene's strangers would hardly ever be asked about.
                shown.append(tuple(scene.kinds[i] for i in rng.permutation(len(scene.kinds))))
            index += 1
        natural = [sample_scene(self.scenes, i).kinds for i in scenes] if against else None
        world = "against" if against else "natural"
        indices = list(scenes)
        items = []
        for question in build_pope_questions(shown, split, seed, KINDS, counted_on=natural):
            index = indices[question.picture]
            items.append(
                self._item(
                    # Which absent object is asked about depends on n, so an id without it could name two questions.
                    f"{split}/{world}-{index}/{question.object}",
                    question.text,
                    question.label,
                    partial(draw, scenes[index]),
                    f"{world}-{index}",
                    {"object": question.object, "scene": index, "against": against},
                )
            )
        return items[:n]

    def _from_files(self, split: str, n: int | None, seed: int) -> list[Item]:
        path = self._question_file(split)
        records = read_json_lines(path, ("question_id", "image", "text", "label"))
        ids = Counter(str(record["question_id"]) for record in records)
        if len(ids) < len(records):
            raise InputError(f"question_id {ids.most_common(1)[0][0]} occurs more than once in {path}")
        pictures = list(dict.fromkeys(str(record["image"]) for record in records))
        if n is not None and n < len(records):
            size = Counter(str(record["image"]) for record in records)
            order = np.random.default_rng(seed).permutation(len(pictures))
            taken = [pictures[i] for i in order]
            total = np.cumsum([size[picture] for picture in taken])
            chosen = set(taken[: int(np.searchsorted(total, n)) + 1])
            records = list(islice((record for record in records if str(record["image"]) in chosen), n))
        items = []
        for record in records:
            label = str(record["label"]).strip().lower()
            if label not in ("yes", "no"):
                raise InputError(
                    f"question {record['question_id']} of {path} is labelled {record['label']!r}, not yes or no"
                )
            picture = self._image_file(str(record["image"]))
            items.append(
                self._item(
                    f"{split}/{record['question_id']}",
                    str(record["text"]),
                    label,
                    partial(open_picture, picture),
                    str(record["image"]),
                    {"image": str(record["image"])},
                )
            )
        return items

    def _item(
        self,
        name: str,
        question: str,
        label: str,
        picture: Callable[[], PIL.Image.Image],
        group: str,
        meta: Mapping[str, Any],
    ) -> Item:
        return Item(name, question + self.suffix, label, picture, group, "existence", self.max_new_tokens, meta)

    def _question_file(self, split: str) -> Path:
        """The file of a split, by whichever way `questions` names it."""
        questions = self.questions
        if isinstance(questions, Mapping):
            if split not in questions:
                raise InputError(f"questions= names no file for the split {split!r}")
            return Path(questions[split])
        path = Path(str(questions).replace("{split}", split))
        if path.is_dir():
            found = sorted([*path.glob(f"*_{split}.json"), *path.glob(f"*_{split}.jsonl")])
            if len(found) != 1:
                many = f"several: {', '.join(file.name for file in found)}" if found else "none"
                raise InputError(f"{path} must hold one file *_{split}.json or *_{split}.jsonl, and holds {many}")
            return found[0]
        others = [other for other in POPE_SPLITS if other != split and path.stem.endswith(f"_{other}")]
        if others:
            raise InputError(f"{path.name} is the file of the split {others[0]!r}, not of {split!r}")
        return path

    def _image_file(self, name: str) -> Path:
        """The image in the folder; a name that leads out of the folder is refused."""
        folder = Path(str(self.images))
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"the image {name!r} lies outside {folder}")
        if not path.is_file():
            raise InputError(f"there is no image {name} in {folder}")
        return path


RATIOS = ("precision", "recall", "f1", "yes_rate")


def _counts(rows: Sequence[Row]) -> NDArray[np.float64]:
    """Of each row: answered yes, label yes, both, 1."""
    said = np.array([row["parsed"] == "yes" for row in rows], dtype=np.float64)
    label = np.array([row["label"] == "yes" for row in rows], dtype=np.float64)
    return np.stack([said, label, said * label, np.ones(len(rows))], axis=1)


def _ratios(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """`RATIOS` from sums of `_counts`."""
    yes, gold, hit, n = np.moveaxis(sums, -1, 0)
    precision, recall = hit / np.maximum(yes, 1), hit / np.maximum(gold, 1)
    return np.stack([precision, recall, 2 * hit / np.maximum(yes + gold, 1), yes / n], axis=-1)


def _ranked(rows: Sequence[Row]) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """Margins and labels; None where a margin or one of the labels is missing."""
    margins = [row.get("yes_logit_margin") for row in rows]
    labels = np.array([row["label"] == "yes" for row in rows])
    if any(margin is None for margin in margins) or not 0 < labels.sum() < len(labels):
        return None
    return np.array(margins, dtype=np.float64), labels
