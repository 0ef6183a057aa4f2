"""Words or Vision: does an answer follow the picture or a text beside it? (Deng et al., CVPR 2025, arXiv:2503.02199)

In: questions on pictures, each with up to three texts: one that supports the right answer (match), one that supports a
wrong one (corruption), and one on something else (irrelevant). Out, with 95 % intervals: accuracies, and how often the
text wins where the two disagree.

**Seven ways of asking.** With Q a question, I its picture and T a text, a model answers (greedily)

    Y_img = f(I, Q)        once: `base`
    Y_mix = f(I, T, Q)     for each text: `match`, `corruption`, `irrelevant`
    Y_txt = f(T, Q)        for each text, the same prompt without the picture: `match_alone`, ...

**Scores**, with c one of the three conditions; shares are fractions:

- macro (headline): the mean of the accuracies under match, corruption and irrelevant text (base is not in it);
- base and c: the accuracy of Y_img, and of Y_mix under c;
- tpr_c: the text preference ratio p_txt / (p_txt + p_img), of the questions with Y_img != Y_txt those with
  Y_mix = Y_txt, divided by those and the ones with Y_mix = Y_img. Its n counts both kinds; it is missing if there are
  none. (Under match text a high ratio does no harm: the bias shows where it is as high under corruption.)
- c_text, c_picture, c_neither: the shares p_txt, p_img, p_other of the questions with Y_img != Y_txt. The ratio is
  unsteady where the first two are small, so they are given beside it;
- norm_c: the accuracy under c, divided by that of base;
- heard (not in the paper): how often Y_txt is what a match or corruption text says. A model that cannot read the text
  at all has a low ratio for a reason that is no virtue.

Answers are equal here if they are so in lower case, without white space around them and full stops at their end.

**Accuracy** is by `matcher`: `exact`, as in `skills`; `contains`, the right answer is part of the answer once case,
punctuation and articles are gone (the official rule for documents and charts); `vqa`, the official soft accuracy for
VQAv2: a human answer counts as given if the answer *contains* it, and each question's accuracy is the mean over its
human answers of min(1, how many of the others are given / 3). The official code spells contractions out by a table;
here apostrophes are ignored, which makes the same words equal. Where all human answers are the same it leaves them as
they are and normalises the model's alone, so that "a cat" is never given; here both are normalised.

**Prompt.** What the official code says about the text, with the text, a line of ten dashes, the question, and an
instruction (`suffix`) to answer briefly. The picture stands before all of it, as the processor's template has it.

**From the picture world** the texts are single sentences on exactly what is asked: the truth, the same sentence with a
wrong answer, or a sentence that has nothing to do with pictures. The paper has its texts written by GPT-4o, longer
ones, and takes Wikipedia passages for irrelevant ones. The paper's measure of certainty is left out: run files hold
no probabilities of answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sightline.benchmarks.item import (
    SCENES_PER_SEED,
    Benchmark,
    Item,
    Row,
    Score,
    check_draw,
    check_length,
    read_json_lines,
    register_benchmark,
)
from sightline.benchmarks.skills import SKILLS, normalised
from sightline.benchmarks.statistics import cluster_bootstrap, wilson
from sightline.errors import InputError, unknown
from sightline.models.images import open_picture
from sightline.picturebook.draw import draw
from sightline.picturebook.questions import NUMBER_WORDS, Question, article
from sightline.picturebook.scene import PLURALS, Split, random_stream, sample_scene

if TYPE_CHECKING:
    import PIL.Image
    from numpy.typing import NDArray

USUAL_QUESTIONS = 150

CONDITIONS = ("match", "corruption", "irrelevant")
ALONE = "_alone"
"""Added to a condition: the same prompt without the picture."""

CONTEXT = (
    "Here are some additional information which are text descriptions based on the image to assist you for answering "
    "the later question. Note, the information could be irrelevant, missing some information or inaccurate, please "
    "use it with caution: {text}"
)
"""The official wording (`custom-25`)."""
SEPARATOR = "-" * 10
FOCUS = {
    "none": "",
    "image": "Please focus on the image to answer the question: ",
    "text": "Please focus on the textual information to answer the question: ",
}
"""What stands before the question; the official `custom-25`, `custom-26` and `custom-27`."""
BRIEFLY = " Please only output the answer with a single word or phrase."

ASKED = ("existence_random", "colour", "count", "relation", "place")
"""Skills of the built-in model that are asked about, in turn."""

IRRELEVANT = (
    "The parliament voted on the budget late in the evening.",
    "Copper conducts electricity better than iron does.",
    "The orchestra rehearsed the slow movement again.",
    "Bread rises because yeast gives off gas.",
    "The treaty was signed after long negotiations.",
    "Prime numbers were studied in antiquity.",
    "The novel was translated from Portuguese.",
    "Water expands when it freezes.",
    "The company moved its office to another city.",
    "Her grandmother taught mathematics for decades.",
    "The alphabet came to Greece from Phoenicia.",
    "Prices rose faster than wages did.",
)
"""Texts that say nothing about any picture of the picture world."""


@register_benchmark("words-or-vision")
@dataclass(frozen=True)
class WordsOrVision(Benchmark):
    """Texts that agree and disagree with the picture, from the picture world (the default) or from a file.

    Attributes:
        source: "picturebook" or "files".
        questions: for files: a file of JSON lines, one a question: question_id, image, question; answer or answers
            (the latter a list, for the matcher `vqa` at least four); one or more of the texts match, corruption and
            irrelevant; and if it is known wrong_answer, what the corruption text says.
        images: for files: the folder of the images.
        matcher: the rule for accuracy, one of `MATCHERS`. By default `exact`.
        context: what the text is put into. "{text}" is the bare text, for models that take no instructions, such as
            picturebook-nano, which the paper's wording alone leads astray.
        focus: a request before the question, one of `FOCUS`.
        text_position: whether the text stands "before" the question, as in the paper, or "after" it.
        suffix: what is appended to each question. By default nothing for the picture world, the official
            instruction for VQAv2 for files (" Please only output the answer directly." for documents and charts).
        max_new_tokens: the longest answer.
    """

    paper: ClassVar[str] = "words_or_vision"
    splits: ClassVar[tuple[str, ...]] = ("test", "validation")

    source: str = "picturebook"
    questions: str | Path | None = None
    images: str | Path | None = None
    matcher: str = "exact"
    context: str = CONTEXT
    focus: str = "none"
    text_position: str = "before"
    suffix: str | None = None
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        for name, allowed in (
            ("source", ("picturebook", "files")),
            ("matcher", tuple(MATCHERS)),
            ("focus", tuple(FOCUS)),
            ("text_position", ("before", "after")),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(f"{name} of words-or-vision", getattr(self, name), allowed)
        if "{text}" not in self.context:
            raise InputError(f"context of words-or-vision must hold {{text}}, and {self.context!r} does not")
        given = [name for name in ("questions", "images") if getattr(self, name) is not None]
        if self.source == "files" and len(given) < 2:
            raise InputError("words-or-vision with source=files needs questions= (JSON lines) and images= (a folder)")
        if self.source == "picturebook" and given:
            raise InputError(f"{given[0]}= only has a meaning with source=files")
        if self.source == "picturebook" and self.matcher == "vqa":
            raise InputError("the matcher vqa needs several human answers, which pictures of the picture world lack")
        check_length(self.max_new_tokens)

    def items(self, split: str, n: int | None = None, seed: int = 0) -> list[Item]:
        """The items of n questions, seven each. By default 150 from the picture world, all from a file."""
        self.check_split(split)
        check_draw(n, seed)
        asked = self._from_file(n, seed) if self.source == "files" else _from_world(split, n or USUAL_QUESTIONS, seed)
        return [item for one in asked for item in self._items(split, one)]

    def prompt(self, question: str, text: str | None) -> str:
        """A question as a model is asked it, with a text beside the picture or without."""
        suffix = (BRIEFLY if self.source == "files" else "") if self.suffix is None else self.suffix
        asked = question + suffix
        if text is None:
            return asked
        # Not str.format: a text from a file may hold braces.
        context, asked = self.context.replace("{text}", text), FOCUS[self.focus] + asked
        parts = (context, asked) if self.text_position == "before" else (asked, context)
        return f"\n{SEPARATOR}\n".join(parts)

    def item_score(self, item: Item, text: str) -> dict[str, Any]:
        """condition; of, the question's name; correct, in [0, 1]; given, the answer as it is compared; says, what the
        text beside the picture says the answer is, where it says one."""
        says = item.meta["says"]
        return {
            "condition": item.meta["condition"],
            "of": item.meta["of"],
            "correct": MATCHERS[self.matcher](text, item.meta["answers"]),
            "given": plain(text),
            "says": None if says is None else plain(says),
        }

    def scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """The scores of the module's text, those that the rows allow.

        Where each picture has one question, the intervals of accuracies, ratios and shares are Wilson's (of accuracies
        only if each answer is right or wrong); all others are cluster-bootstrapped by picture.

        Raises:
            InputError: if no row has a text beside a picture.
        """
        if not any(row["condition"] in CONDITIONS for row in rows):
            raise InputError("there are no answers to score")
        table, groups = _table(rows)
        values = _metrics(table)
        names = [name for place, name in enumerate(METRICS) if not np.isnan(values[place])]
        wanted = [METRICS.index(name) for name in names]
        low, high = cluster_bootstrap(table, lambda drawn: _metrics(drawn)[wanted], groups)
        one_each = len(set(groups)) == len(groups)
        scores = {}
        for place, name in enumerate(names):
            value, n = float(values[wanted[place]]), _count(table, name)
            ends = float(low[place]), float(high[place])
            if one_each and _is_proportion(table, name):
                ends = wilson(round(value * n), n)
            scores[name] = Score(value, *ends, n)
        return scores

    def measure(self, row: Row) -> float:
        """How right an answer is, in [0, 1]. The headline is its mean over the rows with a text beside a picture."""
        return float(row["correct"])

    def paired(self, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> float:
        """As in `Benchmark.paired`, on the rows that the headline is made of: those with a text beside a picture."""
        a, b = ([row for row in rows if row["condition"] in CONDITIONS] for rows in (rows_a, rows_b))
        return super().paired(a, b)

    def _items(self, split: str, asked: _Asked) -> list[Item]:
        def item(condition: str, text: str | None, says: str | None, *, alone: bool = False) -> Item:
            return Item(
                id=f"{split}/{asked.id}/{condition}",
                question=self.prompt(asked.question, text),
                answer=asked.answers[0],
                picture=None if alone else asked.picture,
                group=asked.group,
                task=condition,
                max_new_tokens=self.max_new_tokens,
                meta={
                    "condition": condition,
                    "of": f"{split}/{asked.id}",
                    "answers": list(asked.answers),
                    "says": says,
                    **asked.meta,
                },
            )

        items = [item("base", None, None)]
        for condition, (text, says) in asked.texts.items():
            items += [item(condition, text, says), item(condition + ALONE, text, says, alone=True)]
        return items

    def _from_file(self, n: int | None, seed: int) -> list[_Asked]:
        path = Path(str(self.questions))
        records = read_json_lines(path, ("question_id", "image", "question"))
        twice, count = Counter(str(record["question_id"]) for record in records).most_common(1)[0]
        if count > 1:
            raise InputError(f"question_id {twice} occurs more than once in {path}")
        if n is not None and n < len(records):
            chosen = np.random.default_rng(seed).permutation(len(records))[:n]
            records = [records[i] for i in sorted(chosen.tolist())]
        return [self._asked(record, path) for record in records]

    def _asked(self, record: Mapping[str, Any], path: Path) -> _Asked:
        where = f"question {record['question_id']} of {path}"
        answers = record.get("answers", record.get("answer"))
        answers = [answers] if isinstance(answers, str | int | float) else answers
        if not isinstance(answers, list) or not answers:
            raise InputError(f"{where} needs answer, or answers, a list of them")
        if self.matcher == "vqa" and len(answers) < 4:
            raise InputError(f"the matcher vqa needs four answers or more, and {where} has {len(answers)}")
        says = {"match": str(answers[0]), "corruption": record.get("wrong_answer")}
        texts = {c: (str(record[c]), says.get(c)) for c in CONDITIONS if record.get(c) is not None}
        if not texts:
            raise InputError(f"{where} has no text: it needs one of {', '.join(CONDITIONS)}")
        folder, name = Path(str(self.images)), str(record["image"])
        picture = folder / name
        if not picture.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"the image {name!r} lies outside {folder}")
        if not picture.is_file():
            raise InputError(f"there is no image {name} in {folder}")
        return _Asked(
            id=str(record["question_id"]),
            question=str(record["question"]),
            answers=tuple(str(answer) for answer in answers),
            texts=texts,
            picture=partial(open_picture, picture),
            group=name,
            meta={"image": name},
        )


@dataclass(frozen=True)
class _Asked:
    """A question before it is asked in seven ways. `texts` has, by condition, a text and the answer that it supports
    (None where that is not known, or it supports none)."""

    id: str
    question: str
    answers: tuple[str, ...]
    texts: Mapping[str, tuple[str, str | None]]
    picture: Callable[[], PIL.Image.Image]
    group: str
    meta: Mapping[str, Any]


# --- The picture world ---


def statement(question: Question, answer: str) -> str:
    """The sentence that gives an answer, right or wrong, to a question on the picture world."""
    kind, other = (*question.about, "", "")[:2]
    if question.task == "existence":
        return f"There is {article(kind) if answer == 'yes' else f'no {kind}'} in the picture."
    if question.task == "colour":
        return f"The {kind} is {answer}."
    if question.task == "count":
        number = NUMBER_WORDS[int(answer)]
        return f"There is {number} {kind}." if answer == "1" else f"There are {number} {PLURALS[kind]}."
    if question.task == "place":
        return f"This is the {answer}."
    if question.task == "left_right":
        return f"The {kind} is to the {answer} of the {other}."
    assert question.task == "above_below", question.task
    return f"The {kind} is {answer} the {other}."


def _from_world(split: str, n: int, seed: int) -> list[_Asked]:
    """Questions of each of `ASKED` in turn, each on a scene of its own; of a skill's kinds of questions (yes and no, 1
    to 4) each in turn."""
    world: Split = "validation" if split == "validation" else "test"
    asked: list[_Asked] = []
    index = seed * SCENES_PER_SEED
    while len(asked) < n:
        skill = SKILLS[ASKED[len(asked) % len(ASKED)]]
        turn = len(asked) // len(ASKED) % skill.turns
        scene, rng = sample_scene(world, index), random_stream("words or vision", world, index)
        found = skill.ask(scene, index, rng)
        if found is not None and found[0] == turn:
            question = found[1]
            wrong = question.distractors[int(rng.integers(len(question.distractors)))]
            texts = {
                "match": (statement(question, question.answer), question.answer),
                "corruption": (statement(question, wrong), wrong),
                "irrelevant": (IRRELEVANT[int(rng.integers(len(IRRELEVANT)))], None),
            }
            picture, name = partial(draw, scene), f"natural-{index}"
            meta = {"scene": index, "skill": skill.name}
            asked.append(_Asked(name, question.text, (question.answer,), texts, picture, name, meta))
        index += 1
    return asked


# --- Comparing answers ---


def plain(text: str) -> str:
    """An answer as it is compared with another answer of the model.

    >>> plain(" Two boats. ")
    'two boats'
    """
    return text.lower().strip().rstrip(".")


def _exact(text: str, answers: Sequence[str]) -> float:
    return float(normalised(text) in {normalised(answer) for answer in answers})


def _bare(text: str) -> str:
    """Lower case, without punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _contains(text: str, answers: Sequence[str]) -> float:
    return float(any(_bare(answer) in _bare(text) for answer in answers))


_VQA_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_VQA_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _vqa_words(text: str) -> str:
    """VQAv2's own normal form: number words as digits, no articles, punctuation gone or a space."""
    text = text.replace("\n", " ").replace("\t", " ").strip().lower().replace("'", "")
    made = text
    for mark in _VQA_PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text) is not None
        made = made.replace(mark, "" if beside_space else " ")
    made = re.sub(r"\.(?!\d)", "", made)
    words = (_VQA_NUMBERS.get(word, word) for word in made.split())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _vqa(text: str, answers: Sequence[str]) -> float:
    given = _vqa_words(text.lower().split("the answer is ")[-1].strip().removesuffix("."))
    found = [_vqa_words(answer) in given for answer in answers]
    return float(np.mean([min(1.0, (sum(found) - own) / 3) for own in found]))


MATCHERS: dict[str, Callable[[str, Sequence[str]], float]] = {"exact": _exact, "contains": _contains, "vqa": _vqa}
"""Rule name -> function of the answer and the right answers; how right it is, in [0, 1]."""


# --- Scores ---

COLUMNS: tuple[str, ...] = (
    "base correct",
    *(f"{condition} {what}" for condition in CONDITIONS for what in ("correct", "text", "picture", "neither", "heard")),
)
"""What is known of a question, numbers that are nan where an answer is missing. text, picture and neither: which of
its answers alone the answer to both equals; nan also where these two are equal."""

METRICS: tuple[str, ...] = (
    "macro",
    "base",
    *CONDITIONS,
    *(f"tpr_{condition}" for condition in CONDITIONS),
    *(f"norm_{condition}" for condition in CONDITIONS),
    *(f"{condition}_{share}" for condition in CONDITIONS for share in ("text", "picture", "neither")),
    "heard",
)


def _table(rows: Sequence[Row]) -> tuple[NDArray[np.float64], list[str]]:
    """One line a question, with `COLUMNS`, and the questions' groups."""
    questions: dict[str, dict[str, Row]] = {}
    for row in rows:
        questions.setdefault(str(row["of"]), {})[str(row["condition"])] = row
    return np.array([_line(own) for own in questions.values()]), [
        str(next(iter(own.values()))["group"]) for own in questions.values()
    ]


def _line(own: Mapping[str, Row]) -> list[float]:
    nan = float("nan")
    base = own.get("base")
    line = [nan if base is None else float(base["correct"])]
    for condition in CONDITIONS:
        mix, alone = own.get(condition), own.get(condition + ALONE)
        follows = [nan] * 3
        if base is not None and mix is not None and alone is not None and base["given"] != alone["given"]:
            text, picture = mix["given"] == alone["given"], mix["given"] == base["given"]
            follows = [float(text), float(picture), float(not (text or picture))]
        heard = nan
        if alone is not None and alone["says"] is not None:
            heard = float(normalised(alone["given"]) == normalised(alone["says"]))
        line += [nan if mix is None else float(mix["correct"]), *follows, heard]
    return line


def _metrics(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values of `METRICS`, nan where a question is open."""
    known = ~np.isnan(table)
    with np.errstate(divide="ignore", invalid="ignore"):
        counts = known.sum(axis=0)
        sums = np.where(known, table, 0).sum(axis=0)
        mean = dict(zip(COLUMNS, np.where(counts > 0, sums / counts, np.nan), strict=True))
        total = dict(zip(COLUMNS, sums, strict=True))
        texts = [total[f"{c} text"] / (total[f"{c} text"] + total[f"{c} picture"]) for c in CONDITIONS]
        accuracy = [mean[f"{condition} correct"] for condition in CONDITIONS]
        heard = [COLUMNS.index(f"{condition} heard") for condition in CONDITIONS]
        values = [
            np.nanmean(accuracy) if not np.isnan(accuracy).all() else np.nan,
            mean["base correct"],
            *accuracy,
            *texts,
            *(np.where(mean["base correct"] > 0, np.array(accuracy) / mean["base correct"], np.nan)),
            *(mean[f"{c} {share}"] for c in CONDITIONS for share in ("text", "picture", "neither")),
            sums[heard].sum() / counts[heard].sum(),
        ]
    return np.array(values, dtype=np.float64)


def _is_proportion(table: NDArray[np.float64], name: str) -> bool:
    """Whether a score is a share of its questions, each of which counts or does not."""
    if name in ("base", *CONDITIONS):
        own = table[:, COLUMNS.index(f"{name} correct")]
        return bool(np.isin(own[~np.isnan(own)], (0, 1)).all())
    return name.startswith("tpr_") or name.endswith(("_text", "_picture", "_neither"))


def _count(table: NDArray[np.float64], name: str) -> int:
    """From how many answers a score is made."""

    def known(*columns: str) -> int:
        return int((~np.isnan(table[:, [COLUMNS.index(column) for column in columns]])).sum())

    kind, _, condition = name.partition("_")
    if name == "macro":
        return known(*(f"{c} correct" for c in CONDITIONS))
    if name == "heard":
        return known(*(f"{c} heard" for c in CONDITIONS))
    if kind == "tpr":
        return int(np.nansum(table[:, [COLUMNS.index(f"{condition} {share}") for share in ("text", "picture")]]))
    if kind == "norm":
        return known(f"{condition} correct")
    return known(f"{kind} {condition or 'correct'}")
