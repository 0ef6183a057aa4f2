"""CHAIR: which objects a caption names that are not in the picture (Rohrbach et al., EMNLP 2018, arXiv:1809.02156).

In: captions, and for each picture the names of the objects in it. Out, as fractions (papers print them times 100):

- ``chair_s`` (headline): captions with at least one hallucinated mention / captions;
- ``chair_i``: hallucinated mentions / all mentions, a name that is repeated counting each time;
- recall and precision: sum of |there and named| / sum of |there|, and / sum of |named|, each name once a caption;
  their f1;
- length: words and punctuation marks a caption, two merged words being one.

**From a caption to mentions.** Lower case, words, lemmas; two-word names are merged from left to right ("hot dog" is
no dog, "baby bird" no person, "toilet seat" a toilet); if "toilet" and "seat" both occur, "seat" is dropped; then
every word of the synonym list is a mention of its line's first name. A mention is hallucinated if the picture's
objects lack that name.

**COCO.** The objects of an image are those of its instance annotations and those that its human captions mention. The
standard number needs NLTK with its data (tokeniser, tagger, WordNet) and the synonym list of the original code
(data/synonyms.txt of LisaAnne/Hallucination, given as ``synonyms=``), which is read as that code reads it. Without
either of them the scores are called ``chair_lite_s`` and ``chair_lite_i``: plurals are then undone by rules without a
tagger, or the list is this package's own shorter one. Captions cut at 64 tokens, as some papers have them, are not
comparable with the usual 512: the length is reported beside the score.

**Picture world.** The vocabulary is the world's kinds with their plurals, the truth is what is visible; no lemmatiser
is involved.

Where paper and code differ: the original code singularises with the library pattern, the later Python 3 copies
(OPERA, PAI, VISTA) tag and lemmatise with NLTK; this follows the latter, as the papers measured with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from sightline.benchmarks.coco import coco_annotations
from sightline.benchmarks.item import (
    SCENES_PER_SEED,
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
from sightline.benchmarks.mentions import Lexicon, Reader, coco_reader, lemmas_by_rules
from sightline.benchmarks.statistics import bootstrap_sums, group_sums, swap_test, wilson
from sightline.errors import InputError, unknown
from sightline.models.images import open_picture
from sightline.picturebook.draw import draw
from sightline.picturebook.scene import KINDS, PLURALS, sample_scene

if TYPE_CHECKING:
    import PIL.Image
    from numpy.typing import NDArray

USUAL_PICTURES = 500

_kinds = Lexicon({name: kind for kind in KINDS for name in (kind, PLURALS[kind])}, {})
PICTUREBOOK_READER = Reader(_kinds, partial(lemmas_by_rules, words=_kinds.words), "chair")
"""Reads captions of the picture world, whose kinds and plurals are all listed."""


@register_benchmark("chair")
@dataclass(frozen=True)
class Chair(Benchmark):
    """CHAIR from the picture world (the default) or from COCO 2014.

    Attributes:
        source: "picturebook" or "coco".
        against: for the picture world: draw scenes against the co-occurrence, with a scene type's anchor and without
            its partner.
        scenes: for the picture world: "test", or "validation" to choose settings on.
        annotations: for COCO: the folder of instances_{val,train}2014.json and captions_{val,train}2014.json; those
            of train are only needed, and only read, for images of train.
        images: for COCO: a folder of images whose file names end in the image's id, as COCO's do; only `items` needs
            it.
        synonyms: for COCO: the original synonym list, needed for the standard number; the package's own list by
            default.
        lemmatiser: for COCO: "nltk", "rules", or "auto" (NLTK where it is installed with its data).
        prompt: what the model is asked (OPERA, PAI and VISTA have "Please help me describe the image in detail.").
        max_new_tokens: the longest caption; by default 512 for COCO, 128 for the picture world.
    """

    splits: ClassVar[tuple[str, ...]] = ("test",)

    source: str = "picturebook"
    against: bool = False
    scenes: Literal["test", "validation"] = "test"
    annotations: str | Path | None = None
    images: str | Path | None = None
    synonyms: str | Path | None = None
    lemmatiser: str = "auto"
    prompt: str = "Please describe this image in detail."
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.source not in ("picturebook", "coco"):
            raise unknown("source of CHAIR", self.source, ("picturebook", "coco"))
        if self.scenes not in ("test", "validation"):
            raise unknown("scenes of CHAIR", str(self.scenes), ("test", "validation"))
        if self.lemmatiser not in ("auto", "nltk", "rules"):
            raise unknown("lemmatiser of CHAIR", self.lemmatiser, ("auto", "nltk", "rules"))
        if not isinstance(self.against, bool):
            raise InputError(f"against must be True or False, not {self.against!r}")
        given = [name for name in ("annotations", "images", "synonyms") if getattr(self, name) is not None]
        if self.source == "picturebook" and given:
            raise InputError(f"CHAIR takes {' and '.join(given)} only with source=coco")
        if self.source == "coco" and self.annotations is None:
            raise InputError("CHAIR with source=coco needs annotations=, the folder of COCO's annotation files")
        if self.source == "coco" and self.against:
            raise InputError("CHAIR takes against only with source=picturebook")
        if self.max_new_tokens is not None:
            check_length(self.max_new_tokens)

    def items(self, split: str, n: int | None = None, seed: int = 0) -> list[Item]:
        """Pictures to be described, 500 by default. From COCO they are drawn by the seed from the image folder, in
        order of id."""
        self.check_split(split)
        check_draw(n, seed)
        wanted = USUAL_PICTURES if n is None else n
        return self._from_coco(wanted, seed) if self.source == "coco" else self._from_scenes(wanted, seed)

    def item_score(self, item: Item, text: str) -> dict[str, Any]:
        """objects, mentions and hallucinated (both with repetition), length, metric ("chair" or "chair-lite")."""
        return self._facts(item.meta["objects"], text)

    def measure(self, row: Row) -> float:
        """1 for a caption with a hallucinated mention, else 0."""
        return float(len(row["hallucinated"]) > 0)

    def scores(self, rows: Sequence[Row]) -> dict[str, Score]:
        """The scores of the module's text, 0/0 taken as 0. Intervals: Wilson for chair_s, cluster bootstrap over
        pictures for the rest.

        Raises:
            InputError: if there are no rows, or some are of CHAIR and some of CHAIR-lite.
        """
        if not rows:
            raise InputError("there are no captions to score")
        label = _label(rows)
        n = len(rows)
        caught = sum(len(row["hallucinated"]) > 0 for row in rows)
        counts = _counts(rows)
        values = _ratios(counts.sum(axis=0))
        low, high = bootstrap_sums(counts, _ratios, [row["group"] for row in rows])
        scores = {f"{label}_s": Score(caught / n, *wilson(caught, n), n)}
        for i, name in enumerate((f"{label}_i", *RATIOS)):
            scores[name] = Score(float(values[i]), float(low[i]), float(high[i]), n)
        return scores

    def paired_others(self, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> dict[str, float]:
        """Permutation tests that exchange the two methods' captions of a picture (`swap_test`), for all scores besides
        chair_s."""
        both = matching(rows_a, rows_b)
        label = _label([row for pair in both for row in pair])
        groups = [row["group"] for row, _ in both]
        a, b = (group_sums(_counts([pair[side] for pair in both]), groups) for side in (0, 1))
        return dict(zip((f"{label}_i", *RATIOS), swap_test(a, b, _ratios).tolist(), strict=True))

    def caption_rows(self, path: str | Path) -> list[dict[str, Any]]:
        """Rows for captions made elsewhere: JSON lines of image_id (COCO's, or the number of the test scene) and
        caption.

        Raises:
            InputError: if the file is malformed, an image has two captions, or an image is not known.
        """
        captions: dict[int, str] = {}
        for record in read_json_lines(path, ("image_id", "caption")):
            try:
                image = int(record["image_id"])
            except (TypeError, ValueError) as error:
                raise InputError(f"image_id must be a whole number in {path}, not {record['image_id']!r}") from error
            if image in captions:
                raise InputError(f"image {image} has more than one caption in {path}")
            captions[image] = str(record["caption"])
        truth = self._truth(list(captions))
        return [
            {"id": self._name(image), "group": self._name(image), "text": text, **self._facts(truth[image], text)}
            for image, text in captions.items()
        ]

    def score_captions(self, path: str | Path) -> dict[str, Score]:
        """The scores of captions made elsewhere; see `caption_rows` for the file."""
        return self.scores(self.caption_rows(path))

    def _facts(self, objects: Sequence[str], text: str) -> dict[str, Any]:
        mentions, length = self._reader.mentions(text)
        return {
            "objects": list(objects),
            "mentions": mentions,
            "hallucinated": [name for name in mentions if name not in objects],
            "length": length,
            "metric": self._reader.metric,
        }

    @property
    def _reader(self) -> Reader:
        if self.source == "picturebook":
            return PICTUREBOOK_READER
        return coco_reader(None if self.synonyms is None else str(self.synonyms), self.lemmatiser)

    def _truth(self, images: Sequence[int]) -> dict[int, list[str]]:
        """Image -> the names of the objects in it."""
        if self.source == "picturebook":
            return {image: list(sample_scene(self.scenes, image, against=self.against).kinds) for image in images}
        reader = self._reader
        node_of = reader.lexicon.node_of
        truth = {}
        for image, (categories, captions) in coco_annotations(Path(str(self.annotations)), images).items():
            strange = [name for name in categories if name not in node_of]
            if strange:
                raise InputError(f"the synonym list lacks COCO's category {strange[0]!r}")
            told = {name for caption in captions for name in reader.mentions(caption)[0]}
            truth[image] = sorted({node_of[name] for name in categories} | told)
        return truth

    def _name(self, image: int) -> str:
        """The id and group of an image's item."""
        return f"coco-{image}" if self.source == "coco" else f"{'against' if self.against else 'natural'}-{image}"

    def _from_scenes(self, n: int, seed: int) -> list[Item]:
        start = seed * SCENES_PER_SEED
        items = []
        for index in range(start, start + n):
            scene = sample_scene(self.scenes, index, against=self.against)
            meta = {"objects": list(scene.kinds), "scene": index, "against": self.against}
            items.append(self._item(index, partial(draw, scene), self.max_new_tokens or 128, meta))
        return items

    def _from_coco(self, n: int, seed: int) -> list[Item]:
        if self.images is None:
            raise InputError("CHAIR with source=coco needs images=, the folder of the images to be described")
        folder = Path(self.images)
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}")
        files: dict[int, Path] = {}
        for file in sorted(folder.iterdir()):
            number = re.search(r"\d+$", file.stem)
            if number and file.suffix.lower() in (".jpg", ".jpeg", ".png"):
                files[int(number[0])] = file
        if not files:
            raise InputError(f"{folder} holds no image whose name ends in a COCO image id")
        ids = sorted(files)
        if n < len(ids):
            ids = sorted(ids[i] for i in np.random.default_rng(seed).choice(len(ids), size=n, replace=False))
        truth = self._truth(ids)
        return [
            self._item(
                image,
                partial(open_picture, files[image]),
                self.max_new_tokens or 512,
                {"objects": truth[image], "image": files[image].name},
            )
            for image in ids
        ]

    def _item(self, image: int, picture: Callable[[], PIL.Image.Image], tokens: int, meta: Mapping[str, Any]) -> Item:
        name = self._name(image)
        return Item(name, self.prompt, ", ".join(meta["objects"]), picture, name, "caption", tokens, meta)


RATIOS = ("recall", "precision", "f1", "length")


def _label(rows: Sequence[Row]) -> str:
    """What the scores are called: chair or chair_lite."""
    metrics = {str(row["metric"]) for row in rows}
    if len(metrics) > 1:
        raise InputError("some captions were read by CHAIR and some by CHAIR-lite: score them anew, all in one way")
    return metrics.pop().replace("-", "_")


def _counts(rows: Sequence[Row]) -> NDArray[np.float64]:
    """Of each row: hallucinated mentions, mentions, |there and named|, |there|, |named|, length, 1."""

    def counts(row: Row) -> tuple[int, ...]:
        there, named = set(row["objects"]), set(row["mentions"])
        mentions = (len(row["hallucinated"]), len(row["mentions"]))
        return (*mentions, len(there & named), len(there), len(named), int(row["length"]), 1)

    return np.array([counts(row) for row in rows], dtype=np.float64)


def _ratios(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """CHAIR_i and `RATIOS` from sums of `_counts`."""
    hallucinated, mentions, right, there, named, length, n = np.moveaxis(sums, -1, 0)
    parts = (
        hallucinated / np.maximum(mentions, 1),
        right / np.maximum(there, 1),
        right / np.maximum(named, 1),
        2 * right / np.maximum(there + named, 1),
        length / n,
    )
    return np.stack(parts, axis=-1)
