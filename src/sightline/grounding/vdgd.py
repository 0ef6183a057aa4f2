"""VDGD: prefer what a description of the picture finds likely (Ghosh et al., ICLR 2025, arXiv:2405.15683).

In: a picture and a question. Out: an answer, after two calls of the model.

**Describe.** The model is asked for a description d_1..d_L, greedily. Its next-token logits z_j [V] at each step (the
step that ends it included) are kept:

    D_j = log_softmax(z_j)

**Answer.** The question is asked with the description before it and the picture still there. At each step, with
next-token logits l [V],

    C       = the plausible tokens under l                          (`candidates`)
    K(w)    = KL(onehot(w) || p_j), reduced over j  =  min_j, mean_j or sum_j of -D_j[w]
    l'_w    = -K(w) on C,   -inf elsewhere;   the token is drawn from softmax(l')

K does not depend on the step. It is one vector [V], computed once an answer, so a step costs a sort of its logits for
the nucleus and a look-up, and no memory beyond 4 V bytes an answer; while the description is read, its L x V logits
are held (128 MB for 1024 tokens of 32 thousand).

**Plausible** tokens are, by the official code (Sreyan88/VDGD, `vdgd.py`), the nucleus of softmax(l / temperature) that
holds `top_p`, at least one token (`nucleus`); as a later paper restates the method, those before the largest gap
between neighbours of the sorted probabilities (`knee`); or those at least `alpha` times as likely as the likeliest
(`alpha`; the constant stands in the official code for a variant).

Where the official code differs:

- it takes the divergence with the mean over the V entries of the one-hot vector, and so divides K by V: l' is the
  same for all of C but for some thousandths, and the token is drawn uniformly from C. `official_scale` does that; the
  default is the formula of the paper.
- it scores the end token like any other. A description's last step makes it likely by `min`; by `avg` it stands no
  chance beside another candidate. `protect_eos` gives it the place among the candidates that the model gave it.
- its prompt has the picture inside the instruction to describe, after the words "described as:"; here the picture comes
  first, where the processor's template has it.
- it can decode the description against a language model of its own (`use_dd`), which is left out, as are the paper's
  analyses of token shifts and of hallucinated phrases.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from sightline.errors import InputError, unknown
from sightline.grounding.contrastive_decoding import implausible
from sightline.methods import in_range, register
from sightline.models.answering import end_tokens
from sightline.models.conversation import Request, Steps, Strategy, Talk

if TYPE_CHECKING:
    from PIL.Image import Image

DESCRIBE = (
    "I have been given an image to complete the task described as: {question}.\n\nTo help me complete the task, "
    "describe the given image in detail. In case of real-world scenes, please include all foreground and background "
    "objects in the description, their properties (like color, shape, etc.), their relations with other objects, their "
    "count, and all other components in the image. In case of non-real-world scenes, like charts, graphs, tables, "
    "etc., please describe the table, mention all numbers (if any), mention the written text, and all other details."
)
"""The official request for a description."""
PREFIX = "The input image is described as follows: {description} {question}"

CANDIDATES = ("nucleus", "knee", "alpha")
REDUCTIONS = ("min", "avg", "sum")
NEVER = -1e30
"""The score of a token that a description step has ruled out: lower than any other, and finite, so that a step whose
candidates were all ruled out still has a distribution."""


@register
@dataclass(frozen=True)
class Vdgd(Strategy):
    """Re-scores the plausible tokens of an answer by the distributions from which the model described the picture.

    Args:
        top_p: for `nucleus`: the probability that the candidates hold, in [0, 1]; 0 leaves the likeliest token.
        temperature: for `nucleus`: of the distribution that the nucleus is taken from, above 0.
        alpha: for `alpha`: share of the likeliest token's probability that a candidate needs, in [0, 1]; 0 lets all
            tokens through.
        candidates: the rule for the plausible tokens: `nucleus` (official), `knee` or `alpha`.
        reduction: of the divergences to the description's steps: `min` (official default), `avg` or `sum`.
        official_scale: divide the divergences by the size of the vocabulary.
        protect_eos: leave the end token where the model has it among the candidates.
        sample: draw tokens (official); else the best candidate is taken.
        seed: of the drawing.
        description_tokens: the longest description; 0 is the stock model, asked once and greedily.
        describe: the request for a description; {question} stands for the question and may be left out. A model that
            knows only its own wordings needs one of them: "Describe the picture in one sentence." for picturebook-nano.
        prefix: how {description} and {question} make the second prompt.
    """

    paper: ClassVar[str] = "vdgd"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("top_p", (0.1, 0.25, 0.5, 0.75, 0.9))

    top_p: float = 0.5
    temperature: float = 0.5
    alpha: float = 0.1
    candidates: str = "nucleus"
    reduction: str = "min"
    official_scale: bool = False
    protect_eos: bool = False
    sample: bool = True
    seed: int = 0
    description_tokens: int = 1024
    describe: str = DESCRIBE
    prefix: str = PREFIX

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "top_p", 0, 1)
        in_range(self, "temperature", 0, 100, low_open=True)
        in_range(self, "alpha", 0, 1)
        in_range(self, "seed", 0, 2**32 - 1, whole=True)
        in_range(self, "description_tokens", 0, 2**20, whole=True)
        for name, allowed in (("candidates", CANDIDATES), ("reduction", REDUCTIONS)):
            if getattr(self, name) not in allowed:
                raise unknown(f"{name} of vdgd", getattr(self, name), allowed)
        if not self.describe.strip():
            raise InputError("describe of vdgd is empty: it must ask for a description")
        for part in ("{description}", "{question}"):
            if part not in self.prefix:
                raise InputError(f"prefix of vdgd must hold {part}, and {self.prefix!r} does not")

    @property
    def is_identity(self) -> bool:
        return self.description_tokens == 0

    def identity(self) -> Self:
        return replace(self, description_tokens=0)

    def steps(self, picture: Image | None, question: str, max_new_tokens: int, talk: Talk) -> Steps:
        if self.is_identity or picture is None:
            (plain,) = yield [Request(picture, question, max_new_tokens)]
            return plain
        asked = _filled(self.describe, question=question)
        (seen,) = yield [Request(picture, asked, self.description_tokens, wants_logits=True)]
        assert seen.logits is not None
        rescoring = Rescoring(self, description_scores(seen.logits, self.reduction), tuple(end_tokens(talk.model)))
        (answer,) = yield [
            Request(
                picture,
                _filled(self.prefix, description=seen.text, question=question),
                max_new_tokens,
                temperature=1.0 if self.sample else 0.0,
                seed=self.seed,
                rescore=rescoring,
            )
        ]
        return answer


def _filled(template: str, **parts: str) -> str:
    """The template with its parts put in, all at once: what is put in may itself hold braces."""
    return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), template)


def description_scores(logits: Tensor, reduction: str) -> Tensor:
    """-K: how likely the description's steps, with next-token logits [L, V], found each token; [V].

    `min` is the largest log-probability over the steps (the least divergence), `avg` their mean, `sum` their sum.
    """
    log_p = logits.float().log_softmax(dim=-1)
    reduce: dict[str, Callable[..., Tensor]] = {"min": log_p.amax, "avg": log_p.mean, "sum": log_p.sum}
    return reduce[reduction](dim=0).clamp(min=NEVER)


@dataclass(frozen=True, eq=False)
class Rescoring:
    """The new logits of one answer's steps.

    Attributes:
        settings: the method.
        scores: -K [V] of the description, see `description_scores`.
        ends: the tokens that end an answer.
    """

    settings: Vdgd
    scores: Tensor
    ends: Sequence[int] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        """-K on the candidates and -inf elsewhere, for next-token logits [V], float32."""
        settings = self.settings
        scores = self.scores / len(self.scores) if settings.official_scale else self.scores
        plausible = candidates(logits, settings)
        if settings.protect_eos:
            scores = keep_place(scores, logits, plausible, self.ends)
        return scores.to(logits).masked_fill(~plausible, -math.inf)


def candidates(logits: Tensor, settings: Vdgd) -> Tensor:
    """bool [V]: the plausible tokens by next-token logits [V]; never none."""
    if settings.candidates == "alpha":
        return ~implausible(logits[None], settings.alpha)[0] & ~torch.isneginf(logits)
    if settings.candidates == "knee":
        ordered, order = logits.softmax(dim=-1).sort(descending=True, stable=True)
        first = int((ordered[:-1] - ordered[1:]).argmax()) + 1
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        chosen[order[:first]] = True
        return chosen
    ordered, order = (logits / settings.temperature).sort(stable=True)
    unlikely = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - settings.top_p
    unlikely[-1] = False
    return torch.zeros_like(unlikely).scatter(0, order, ~unlikely)


def keep_place(scores: Tensor, logits: Tensor, plausible: Tensor, kept: Sequence[int]) -> Tensor:
    """Scores [V] in which the tokens `kept`, where plausible, stand among the other candidates where `logits` has them.

    Such a token gets the mean score of the two candidates that it stands between. Before the first and behind the last
    it is twice and half as likely as that one: for a token the model likes best, a greedy answer takes it.
    """
    others = plausible.clone()
    others[list(kept)] = False
    ranked = scores[others].sort(descending=True).values
    changed = scores.clone()
    for token in kept:
        if not plausible[token] or len(ranked) == 0:
            continue
        place = int((logits[others] > logits[token]).sum())
        above = ranked[place - 1] if place > 0 else ranked[0] + 2 * math.log(2)
        below = ranked[place] if place < len(ranked) else ranked[-1] - 2 * math.log(2)
        changed[token] = (above + below) / 2
    return changed
