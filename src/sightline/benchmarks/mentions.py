"""From a caption to the objects that it mentions, as CHAIR defines it (Rohrbach et al., arXiv:1809.02156).

Text -> lemmas (`Lemmatiser`) -> two-word names merged from left to right -> names looked up in a `Lexicon`. The rules
for COCO's captions are those of the code of LisaAnne/Hallucination; lemmas come from NLTK as in its Python 3 copies
(OPERA, PAI, VISTA), or from `lemmas_by_rules` where NLTK is not installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sightline.errors import InputError

Lemmatiser = Callable[[str], list[str]]
"""Text -> the lemmas of its words and its punctuation marks, in order."""

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
COCO_PAIRS: dict[str, str] = {
    # Words for people that qualify an animal or a vehicle.
    **{f"{young_or_old} {animal}": animal for young_or_old in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    # What the singulariser of the original code makes of "wine glass".
    "wine glas": "wine glass",
    # No objects of COCO, but their second or first word alone would be.
    "home plate": "home plate",
    "train track": "train track",
}
"""Two words -> the word they count as, beside the two-word names of the synonym list, which count as themselves."""


@dataclass(frozen=True)
class Lexicon:
    """The names that are looked for: `node_of` maps each name to the object it stands for, `pairs` two words to the
    word they count as."""

    node_of: Mapping[str, str]
    pairs: Mapping[str, str]

    @staticmethod
    def of_coco(lines: Iterable[str], source: str) -> Lexicon:
        """From a synonym list: a line an object, its names separated by ", ", the first being the object's own.

        As in the original code a stray space stays part of the name (which then matches nothing, but its two words
        are still merged), and of a name on two lines the last counts.

        Raises:
            InputError: if names are separated in another way; `source` names the list.
        """
        node_of: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            names = line.strip().split(", ")
            if any("," in name for name in names):
                raise InputError(f"line {number} of {source}: names must be separated by a comma and a space")
            node_of.update((name, names[0]) for name in names if name)
        if not node_of:
            raise InputError(f"{source} holds no names")
        # The original code leaves "dining table" apart: "table" alone is the same mention, at one word more in length.
        pairs = {name.strip(): name.strip() for name in node_of if len(name.split()) == 2 and name != "dining table"}
        return Lexicon(node_of, pairs | COCO_PAIRS)

    @property
    def words(self) -> frozenset[str]:
        """All single words that names and pairs are made of."""
        return frozenset(word for name in (*self.node_of, *self.pairs) for word in name.split())

    def find(self, lemmas: Sequence[str]) -> tuple[list[str], int]:
        """The objects mentioned, in order and with repetition, and the number of words after merging."""
        words: list[str] = []
        i = 0
        while i < len(lemmas):
            merged = self.pairs.get(" ".join(lemmas[i : i + 2]))
            words.append(lemmas[i] if merged is None else merged)
            i += 1 if merged is None else 2
        length = len(words)
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [self.node_of[word] for word in words if word in self.node_of], length


_IRREGULAR = {"mice": "mouse", "geese": "goose", "children": "child", "oxen": "ox"}


def singular(word: str, words: Collection[str]) -> str:
    """The word itself if it is one of `words`; else its singular if that is; else the word.

    >>> [singular(word, {"glass", "horse", "knife", "bus"}) for word in ("glasses", "horses", "knives", "bus", "trees")]
    ['glass', 'horse', 'knife', 'bus', 'trees']
    """
    candidates = [word, _IRREGULAR.get(word, word)]
    if word.endswith("men"):
        candidates.append(word[:-3] + "man")
    if word.endswith("ies"):
        candidates += [word[:-3] + "y", word[:-1]]
    elif word.endswith("ves"):
        candidates += [word[:-3] + "f", word[:-3] + "fe", word[:-1]]
    elif word.endswith("s") and not word.endswith("ss"):
        if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            candidates.append(word[:-2])
        candidates.append(word[:-1])
    return next((candidate for candidate in candidates if candidate in words), word)


def lemmas_by_rules(text: str, words: Collection[str]) -> list[str]:
    """Lower-cased words (hyphens kept inside, a clitic such as 's apart) and punctuation marks, plurals of `words`
    undone."""
    tokens = re.findall(r"[^\W_]+(?:-[^\W_]+)*|'[a-z]+|[^\w\s]", text.lower())
    return [singular(token, words) for token in tokens]


def nltk_lemmatiser() -> Lemmatiser | None:
    """NLTK's tokeniser, tagger and WordNet lemmatiser (tags other than adjective, verb and adverb are nouns), or None
    unless NLTK is installed with the data that they need."""
    try:
        nltk = importlib.import_module("nltk")
        lemmatise = importlib.import_module("nltk.stem").WordNetLemmatizer().lemmatize
    except ImportError:
        return None

    def lemmas(text: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text.lower()))
        return [lemmatise(word, pos={"J": "a", "V": "v", "R": "r"}.get(tag[:1], "n")) for word, tag in tagged]

    try:
        lemmas("two dogs")
    except LookupError:
        return None
    return lemmas


@dataclass(frozen=True)
class Reader:
    """How captions are read: the names to look for, the way to lemmas, and what the metric may be called ("chair" for
    the standard number and "chair-lite" for what is not comparable with it)."""

    lexicon: Lexicon
    lemmatise: Lemmatiser
    metric: str

    def mentions(self, text: str) -> tuple[list[str], int]:
        """The objects mentioned, in order and with repetition, and the length in words and punctuation marks."""
        return self.lexicon.find(self.lemmatise(text))


@functools.lru_cache(maxsize=8)
def coco_reader(synonyms: str | None, lemmatiser: str) -> Reader:
    """The reader of COCO captions.

    Args:
        synonyms: the path of the original synonym list, or None for the package's own.
        lemmatiser: "nltk", "rules", or "auto": NLTK where it is installed with its data.

    Raises:
        InputError: if the list can't be read, or NLTK is asked for and not there.
    """
    if synonyms is None:
        own = importlib.resources.files(__package__).joinpath("coco_synonyms.txt")
        lexicon = Lexicon.of_coco(own.read_text(encoding="utf-8").splitlines(), "the package's own synonym list")
    else:
        try:
            lines = Path(synonyms).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the synonym list {synonyms}: {error}") from error
        lexicon = Lexicon.of_coco(lines, synonyms)
    by_nltk = None if lemmatiser == "rules" else nltk_lemmatiser()
    if lemmatiser == "nltk" and by_nltk is None:
        raise InputError(
            "lemmatiser=nltk needs NLTK with its data punkt_tab, averaged_perceptron_tagger_eng and wordnet"
        )
    metric = "chair-lite" if synonyms is None or by_nltk is None else "chair"
    return Reader(lexicon, by_nltk or partial(lemmas_by_rules, words=lexicon.words), metric)
