"""MVP: describe a picture from several views, answer along several paths, and trust the sure ones (Qu et al., COLING
2025, arXiv:2408.17150).

In: a picture and a closed question, one that is answered by one of a few class words (yes or no by default). Out: the
class word with the highest score; a question that no path answers with a class word gets the model's plain answer.

**Look.** The model describes the picture once for each view u: from its low-level evidence up (`bottom_up`), from the
scene as a whole down (`top_down`), and without either hint (`regular`). Each description is sampled, and goes into a
prompt of its own, before the question.

**Compare.** With pi the next-token distribution after the prompt of view u, the k likeliest first tokens v_1..v_k each
begin a path, but for those with pi_i < theta. A path that begins with a class word ends there, and is sure: c_i = 1.
Any other is continued freely, and read at the free token n_i in which its first class word a_i begins:

    c_i = p^(1)_{n_i} - p^(2)_{n_i},      the two largest probabilities at that token

**Decide.** With w_u the weight of a view, the answer is the class with the largest

    S(a) = sum over u of w_u * s_u(a),      s_u(a) = sum over i with a_i = a of pi_i * c_i

and of classes that are equal the last one: no, rather than yes.

The released code (GasolSun36/MVP) cannot run, and is followed in what it means to do: the sums of certainties, which
it never initialises and never adds, are added; the views, which its evaluation cannot unpack, are weighted and summed.
Besides, and unlike it:

- a path without a class word is left out; the code counts it as yes (`undecided_is_yes` does that);
- class words are compared without case and punctuation; the code misses "Yes," and "no.";
- a path is begun with the token itself; the code appends its text and tokenises the prompt anew;
- special tokens (the end, the picture's placeholder) begin no path;
- where all scores are zero the model answers plainly, which costs one more call; the code answers no.

As in the code, paths are sampled at a temperature, and c_i is read off the distribution that was sampled from, which
the temperature has sharpened; `temper_certainty=False` reads it off the model's own. The requests for descriptions say
in other words what the official ones say. A model that knows only its own wording needs that: on picturebook-nano,
which has learnt neither hints nor prompts with a description in them, set `bottom_up`, `top_down` and `regular` to
"Please describe this image in detail.", `answer_prompt` to "{caption} {question}", and `lower_case` to False.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from sightline.errors import InputError, unknown
from sightline.methods import in_range, register
from sightline.models.conversation import Request, Response, Steps, Strategy, Talk

if TYPE_CHECKING:
    from PIL.Image import Image

VIEWS = ("bottom_up", "top_down", "regular")


@register
@dataclass(frozen=True)
class MvpReasoning(Strategy):
    """Answers a closed question by the certainty of several decoding paths after several descriptions of the picture.

    Args:
        k: how many first tokens begin a path, 1 or more.
        theta: first tokens less probable than this begin none, in [0, 1].
        views: which descriptions are made, of `bottom_up`, `top_down` and `regular`, each at most once; with none the
            stock model is asked, once and greedily.
        weights: of the views, one for each, none below 0.
        classes: the words that answer the question; single letters are compared with their case.
        bottom_up: the request for a description from details.
        top_down: the request for a description from the whole scene.
        regular: the request for a description as it comes.
        answer_prompt: how {caption} and {question} make the prompt.
        lower_case: put the question in lower case.
        caption_tokens: the longest description.
        caption_temperature: of the descriptions; 0 takes the likeliest token at each step.
        caption_top_p: draw a description's tokens from the likeliest that together have this probability.
        path_tokens: how far a path is followed after its first token.
        path_temperature: of the paths; 0 takes the likeliest token at each step.
        temper_certainty: read certainties after the temperature.
        undecided_is_yes: count a path without a class word, as if sure, for the first class.
        seed: of all that is drawn.
    """

    paper: ClassVar[str] = "mvp_reasoning"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("k", (1, 2, 3, 5, 10))

    k: int = 3
    theta: float = 0.001
    views: tuple[str, ...] = VIEWS
    weights: tuple[float, ...] = (0.4, 0.4, 0.2)
    classes: tuple[str, ...] = ("yes", "no")
    bottom_up: str = (
        "Go through this image detail by detail, from its pixels up: look at shapes, colours and textures, detect the "
        "objects, and then describe the image in detail."
    )
    top_down: str = (
        "Start from the scene that this image shows as a whole: consider its context, its surroundings and every "
        "relevant visual cue, and then describe the image in detail."
    )
    regular: str = "Describe this image in detail."
    answer_prompt: str = "Here is the caption of the image:\n{caption}\nQuestion: {question}"
    lower_case: bool = True
    caption_tokens: int = 512
    caption_temperature: float = 0.7
    caption_top_p: float = 0.95
    path_tokens: int = 50
    path_temperature: float = 0.7
    temper_certainty: bool = True
    undecided_is_yes: bool = False
    seed: int = 336

    def __post_init__(self) -> None:
        for name, most in (("k", 1000), ("caption_tokens", 2**20), ("path_tokens", 2**20)):
            in_range(self, name, 1, most, whole=True)
        in_range(self, "theta", 0, 1)
        in_range(self, "caption_top_p", 0, 1, low_open=True)
        in_range(self, "caption_temperature", 0, 100)
        in_range(self, "path_temperature", 0, 100)
        in_range(self, "seed", 0, 2**32 - 1, whole=True)
        for view in self.views:
            if view not in VIEWS:
                raise unknown("view of mvp_reasoning", view, VIEWS)
            if not getattr(self, view).strip():
                raise InputError(f"{view} of mvp_reasoning is empty: it must ask for a description")
        if len(set(self.views)) < len(self.views):
            raise InputError(f"views of mvp_reasoning must be different, and {self.views!r} are not")
        numbers = all(isinstance(one, Real) and 0 <= one < math.inf for one in self.weights)
        if len(self.weights) != len(self.views) or not numbers or (self.views and not sum(self.weights)):
            raise InputError(
                f"weights of mvp_reasoning must be {len(self.views)} numbers from 0 on, one for each view and not all "
                f"0, not {self.weights!r}"
            )
        folded = {_folded(word) for word in self.classes}
        if len(folded) < max(2, len(self.classes)) or not all(re.fullmatch(r"\w+", word) for word in self.classes):
            raise InputError(
                f"classes of mvp_reasoning must be two or more different words of letters and digits, not "
                f"{self.classes!r}"
            )
        for part in ("{caption}", "{question}"):
            if part not in self.answer_prompt:
                raise InputError(
                    f"answer_prompt of mvp_reasoning must hold {part}, and {self.answer_prompt!r} does not"
                )

    @property
    def is_identity(self) -> bool:
        return not self.views

    def identity(self) -> Self:
        return replace(self, views=(), weights=())

    def steps(self, picture: Image | None, question: str, max_new_tokens: int, talk: Talk) -> Steps:
        plain = [Request(picture, question, max_new_tokens)]
        if self.is_identity or picture is None:
            (answer,) = yield plain
            return answer
        captions = yield [self._caption(picture, place) for place in range(len(self.views))]
        prompts = [self._prompt(caption.text, question) for caption in captions]
        beginnings = yield [Request(picture, prompt, 1, wants_logits=True) for prompt in prompts]

        votes: list[tuple[str, float]] = []
        begun: list[tuple[Request, float]] = []
        for weight, prompt, beginning in zip(self.weights, prompts, beginnings, strict=True):
            for token, probability in self._first_tokens(beginning, talk):
                word = self._class_of(talk.decode([token]).strip())
                if word is not None:
                    votes.append((word, weight * probability))
                else:
                    path = Request(
                        picture,
                        prompt,
                        1 + self.path_tokens,
                        temperature=self.path_temperature,
                        seed=self.seed + len(begun),
                        begin=(token,),
                        wants_logits=True,
                    )
                    begun.append((path, weight * probability))
        paths = yield [path for path, _ in begun]
        for (_, share), response in zip(begun, paths, strict=True):
            found = self.certainty(response, talk)
            if found is not None:
                votes.append((found[0], share * found[1]))
            elif self.undecided_is_yes:
                votes.append((self.classes[0], share))
        if not any(weight for _, weight in votes):
            (answer,) = yield plain
            return answer
        return self.decide(vote([word for word, _ in votes], [weight for _, weight in votes]))

    def certainty(self, path: Response, talk: Talk) -> tuple[str, float] | None:
        """The first class word of a path after its first token, and how certain the path is there; None without one."""
        assert path.logits is not None
        lengths = [len(talk.decode(path.tokens[:count])) for count in range(1, len(path.tokens) + 1)]
        whole = talk.decode(path.tokens)
        for word in re.finditer(r"\w+", whole):
            answer = self._class_of(word.group())
            if answer is None or word.end() <= lengths[0]:
                continue
            # The token that takes the text beyond the word's first letter; the token that was forced chose nothing.
            place = max(1, next(index for index, length in enumerate(lengths) if length > word.start()))
            logits = path.logits[place]
            if self.temper_certainty and self.path_temperature > 0:
                logits = logits / self.path_temperature
            best = logits.softmax(dim=-1).topk(2).values
            return answer, float(best[0] - best[1])
        return None

    def decide(self, shares: Mapping[str, float]) -> str:
        """The class with the largest share, the last of those that are equal."""
        best = max(reversed(self.classes), key=lambda word: shares.get(word, 0.0))
        return best.capitalize() if len(best) > 1 else best

    def _caption(self, picture: Image, place: int) -> Request:
        return Request(
            picture,
            getattr(self, self.views[place]),
            self.caption_tokens,
            temperature=self.caption_temperature,
            top_p=self.caption_top_p,
            seed=self.seed + place,
        )

    def _prompt(self, caption: str, question: str) -> str:
        filled = {"{caption}": caption, "{question}": question.lower() if self.lower_case else question}
        return re.sub(r"\{caption\}|\{question\}", lambda part: filled[part.group()], self.answer_prompt)

    def _first_tokens(self, beginning: Response, talk: Talk) -> list[tuple[int, float]]:
        assert beginning.logits is not None
        probabilities = beginning.logits[0].softmax(dim=-1)
        special = sorted(token for token in talk.special_tokens if token < len(probabilities))
        text_only = probabilities.index_fill(0, torch.tensor(special, device=probabilities.device), -1.0)
        values, tokens = text_only.topk(min(self.k, len(text_only)))
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        return [(token, value) for token, value in pairs if value >= self.theta and value > 0]

    def _class_of(self, word: str) -> str | None:
        stripped = _folded(re.sub(r"^\W+|\W+$", "", word))
        return next((name for name in self.classes if _folded(name) == stripped), None)


def vote(answers: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """The share of the weight that each answer got; shares sum to one.

    Raises:
        InputError: when there are no answers, or the weights do not fit.
    """
    if not answers or len(weights) != len(answers) or min(weights) < 0 or sum(weights) <= 0:
        raise InputError("a vote needs answers, and one weight that is not negative for each, not all zero")
    tally: Counter[str] = Counter()
    for answer, weight in zip(answers, weights, strict=True):
        tally[answer] += weight  # type: ignore[assignment]
    return {answer: weight / sum(weights) for answer, weight in tally.most_common()}


def _folded(word: str) -> str:
    return word if len(word) == 1 else word.lower()
