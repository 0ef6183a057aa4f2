"""VDD and post-hoc debias: take out what the model would say without a picture (Zhang et al. 2024, arXiv:2403.05262).

What is said to the same prompt with nothing to see in it is the prior of the language model. It is measured on
content-free branches, and subtracted from every token's logits or divided out of the probabilities of a few answers.

In: next-token logits l [V] of the prompt and l_cf [V] of each content-free branch. Out: logits [V].

Sampling (VDD), at every step, l_cf being the mean over the branches:

    C  = { w : l_w >= log(beta) + max l }
    l' = l + alpha (l - l_cf)   on C,   -inf elsewhere

Post-hoc, at the first token only, for the K labels of a closed question (yes, no):

    p    = softmax(l) summed over the spellings of each label, normalised to 1
    p_cf = the same of softmax(l_cf), added up over the branches, normalised to 1, plus eps
    diagonal:  q = p / p_cf^alpha         (W = diag(1 / p_cf), b = 0)
    identity:  q = p - alpha p_cf         (W = 1, b = -p_cf)

and q replaces p: the labels' logits shift among themselves and keep the probability that they have together, so that
nothing else changes; spellings of a label keep their ratios. alpha = 1 is the paper's. For two labels the diagonal
form moves the log-odds by -log(p_cf,1 / p_cf,2), and at alpha = 1 both forms choose alike, up to eps. The identity form
can be negative, so that only its arg max means anything; what is written back is the distribution nearest to q (its
projection onto the simplex), which has the same arg max and is p at alpha = 0. A prompt whose likeliest first token is
no label is left alone: it does not begin an answer of the kind that is calibrated.

The official code (yfzhang114/LLaVA-Align) looks at the ten likeliest tokens and at one spelling of each label, which is
0 / 0 where no label is among them; here it is the full softmax and all spellings. It can also average p_cf over a data
set, which a method that sees one prompt cannot. The content-free prompts differ in the picture alone: placeholders go,
and not the line break after them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from sightline.errors import InputError, unknown
from sightline.grounding.contrastive_decoding import ContrastiveDecoding, check_seed, contrasted, encode_view
from sightline.grounding.diffusion_noise import STEPS, diffused
from sightline.methods import in_range, register
from sightline.models.call import NO_PICTURE, Encoded, Stream

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.call import Call

PRIORS = ("none", "unk", "unk_full", "noise", "zero", "one", "mean_feature")


@register
@dataclass(frozen=True)
class Debiasing(ContrastiveDecoding):
    """Takes the language model's prior out of the next token's logits, or of the probabilities of an answer's labels.

    Args:
        mode: `sampling` (VDD) for any text, or `posthoc` for questions with a closed set of one-token answers, which
            reads the content-free branches once and leaves every step after the first to the stock model.
        alpha: how much of the prior is taken out, in [0, 100]; 0 is the stock model (without the restriction to
            plausible tokens too). 1 is the paper's, in both modes.
        beta: share of the likeliest token's probability that a token needs in sampling, in [0, 1]; 0 lets all tokens
            through. 0.1 is the default of the official code, whose scripts have 0.2.
        priors: what the content-free branches see, one or more of `PRIORS`. `none`: no picture; `unk`: the unknown
            token once for each image; `unk_full`: the unknown token in every visual token's place; `noise`: the picture
            after step 999 of diffusion, multiplied by 0.29; `zero`, `one`: pixels of that value after normalisation;
            `mean_feature`: each visual token replaced by the mean over its image. `none` is a branch that other methods
            share; `unk_full` and `mean_feature` are not the paper's.
        calibration: the `diagonal` (default of the official code) or `identity` form of the post-hoc step.
        labels: the answers of the post-hoc step, as words; every token that reads so, up to case and spaces, counts.
            Needs the processor (`attach(..., processor=processor)`).
        label_tokens: instead of `labels`, one token id for each answer.
        eps: is added to the prior's probabilities, in (0, 1]; the official code's.
        seed: of the noise.
    """

    paper: ClassVar[str] = "debiasing"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("alpha", (0.25, 0.5, 1.0, 1.5, 2.0))

    mode: Literal["sampling", "posthoc"] = "sampling"
    alpha: float = 1.0
    beta: float = 0.1
    priors: tuple[str, ...] = ("none",)
    calibration: Literal["diagonal", "identity"] = "diagonal"
    labels: tuple[str, ...] = ("yes", "no")
    label_tokens: tuple[int, ...] | None = None
    eps: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("mode", ("sampling", "posthoc")), ("calibration", ("diagonal", "identity"))):
            if getattr(self, name) not in allowed:
                raise unknown(f"{name} of debiasing", str(getattr(self, name)), allowed)
        in_range(self, "alpha", 0, 100)
        in_range(self, "beta", 0, 1)
        in_range(self, "eps", 0, 1, low_open=True)
        check_seed(self, self.seed)
        if not isinstance(self.priors, tuple) or not self.priors or len(set(self.priors)) < len(self.priors):
            raise InputError(f"priors of debiasing must be a tuple of one or more different names, not {self.priors!r}")
        for prior in self.priors:
            if prior not in PRIORS:
                raise unknown("prior of debiasing", str(prior), PRIORS)
        _check_labels("labels", self.labels, lambda label: isinstance(label, str) and label == label.strip() != "")
        if self.label_tokens is not None:
            _check_labels("label_tokens", self.label_tokens, lambda token: type(token) is int and token >= 0)

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0

    def identity(self) -> Self:
        return replace(self, alpha=0.0)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if {"unk", "unk_full"} & set(self.priors):
            _unknown_token(anatomy)
        if self.mode == "posthoc":
            self._label_tokens(anatomy)

    def branches(self, call: Call) -> Sequence[Stream]:
        if self.mode == "sampling":
            return [self._stream(call, prior) for prior in self.priors]
        if not _is_first_step(call):
            return []
        return [replace(self._stream(call, prior), transient=True) for prior in self.priors]

    def _stream(self, call: Call, prior: str) -> Stream:
        if prior == "none":
            return NO_PICTURE
        name = (self, prior)
        if name not in call.memory:
            call.memory[name] = self._content_free(call, prior)
        encoded: Encoded = call.memory[name]
        return Stream(name, encoded=encoded, visible=_first_left(call, encoded) if prior == "unk" else None)

    def _content_free(self, call: Call, prior: str) -> Encoded:
        if prior == "noise":
            return encode_view(
                call,
                lambda pictures, generator: [diffused(picture, STEPS - 1, generator) for picture in pictures],
                seed=self.seed,
                normalised=True,
            )
        if prior in ("zero", "one"):
            value = float(prior == "one")
            return call.boundary.encode_changed(
                call, lambda picture, image: torch.full_like(picture, value), normalised=True
            )
        main = call.encoded
        if prior == "mean_feature":
            features, *deepstack = (_image_means(call, features) for features in (main.features, *main.deepstack))
            return replace(main, features=features, deepstack=deepstack)
        anatomy = call.boundary.anatomy
        token = torch.tensor(_unknown_token(anatomy), device=call.input_ids.device)
        embedding: Tensor = anatomy.model.get_input_embeddings()(token)
        # Words get nothing from the tower in the later layers, and neither does this one.
        nothing = [torch.zeros_like(features) for features in main.deepstack]
        return replace(main, features=embedding.expand(len(main.features), -1), deepstack=nothing)

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        if self.mode == "sampling":
            return super().logits(call, logits)
        if not _is_first_step(call):
            return logits
        own = call.own_logits
        assert own is not None
        branches = [call.branch_logits(name) for name in call.memory[self, "branches"]]
        tokens = self._label_tokens(call.boundary.anatomy)
        return logits + self.label_shift(own, branches, tokens).to(logits.dtype)

    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        return contrasted(logits, own, torch.stack(list(branches)).mean(dim=0), self.alpha, self.beta)

    def label_shift(self, own: Tensor, branches: Sequence[Tensor], tokens: Sequence[Sequence[int]]) -> Tensor:
        """What the post-hoc step adds to the logits, float32 [B, V]: other than 0 at labels only, and only in rows
        whose likeliest token is one.

        Args:
            own: logits [B, V] with the picture.
            branches: those of the content-free branches.
            tokens: the ids of each label's spellings.
        """
        log_p = _of_labels(own, tokens).log_softmax(dim=-1)
        log_prior = torch.stack([_of_labels(branch, tokens) for branch in branches]).logsumexp(dim=0)
        shifts = self.calibrate(log_p, log_prior.log_softmax(dim=-1)) - log_p
        begins = torch.zeros(own.shape[-1], dtype=torch.bool, device=own.device)
        shift = torch.zeros_like(own, dtype=torch.float32)
        for label, ids in enumerate(tokens):
            begins[list(ids)] = True
            shift[:, list(ids)] = shifts[:, label, None]
        return shift.where(begins[own.argmax(dim=-1)][:, None], 0.0)

    def calibrate(self, log_p: Tensor, log_prior: Tensor) -> Tensor:
        """log q [..., K] from the logarithms of p and of the prior (before eps), each normalised over the K labels."""
        prior = log_prior.exp() + self.eps
        if self.calibration == "diagonal":
            return (log_p - self.alpha * prior.log()).log_softmax(dim=-1)
        return project_onto_simplex(log_p.exp() - self.alpha * prior).log()

    def _label_tokens(self, anatomy: Anatomy) -> tuple[tuple[int, ...], ...]:
        """The token ids of each label."""
        if self.label_tokens is None:
            if not hasattr(anatomy.tokenizer, "get_vocab"):
                raise InputError(
                    "mode posthoc of debiasing looks its labels up in the tokenizer: give attach the model's "
                    "processor, or the ids as label_tokens"
                )
            return spellings(anatomy.tokenizer, self.labels)
        vocabulary = int(anatomy.text_config.vocab_size)
        for token in self.label_tokens:
            if token >= vocabulary:
                raise InputError(f"label_tokens of debiasing must be ids below {vocabulary}, not {token}")
        return tuple((token,) for token in self.label_tokens)


@functools.lru_cache(maxsize=8)
def spellings(tokenizer: Any, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """For each label, the ids of all tokens that read as it does, up to case and surrounding spaces.

    Raises:
        InputError: for a label that is no single token.
    """
    vocabulary = tokenizer.get_vocab()
    found = []
    for label in labels:
        wanted = label.lower()
        ids = {
            index
            for token, index in vocabulary.items()
            if wanted in token.lower() and len(token) <= len(wanted) + 2  # a mark for the space before a word
        }
        for spelling in (wanted, wanted.capitalize(), wanted.upper()):  # tokens of bytes do not show their letters
            for text in (spelling, " " + spelling):
                encoded = tokenizer.encode(text, add_special_tokens=False)
                ids |= set(encoded) if len(encoded) == 1 else set()
        ids = {index for index in ids if tokenizer.decode([index]).strip().lower() == wanted}
        if not ids:
            raise InputError(
                f"labels of debiasing must be single tokens of the model, which {label!r} is not; choose another word, "
                "or give the ids of first tokens as label_tokens"
            )
        found.append(tuple(sorted(ids)))
    return tuple(found)


def project_onto_simplex(values: Tensor) -> Tensor:
    """The distribution nearest to `values` [..., K]: a constant is taken off, and what is then below 0 becomes 0."""
    ordered = values.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, values.shape[-1] + 1, dtype=values.dtype, device=values.device)
    offsets = (ordered.cumsum(dim=-1) - 1) / ranks
    positive = (ordered > offsets).sum(dim=-1, keepdim=True)
    return (values - offsets.gather(-1, positive - 1)).clamp(min=0)


def _of_labels(logits: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """log of the full softmax [B, V], summed over the spellings of each label -> [B, K]."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    return torch.stack([log_probabilities[:, list(ids)].logsumexp(dim=-1) for ids in tokens], dim=-1)


def _is_first_step(call: Call) -> bool:
    return call.seen == 0 and call.input_ids.shape[1] == call.prompt_length


def _unknown_token(anatomy: Anatomy) -> int:
    token = getattr(anatomy.tokenizer, "unk_token_id", None)
    if token is None:
        raise InputError(
            "the priors unk and unk_full of debiasing need a tokenizer with an unknown token: give attach the model's "
            "processor, or choose other priors where its tokenizer has none"
        )
    return int(token)


def _first_left(call: Call, encoded: Encoded) -> Tensor:
    """bool [N]: of each image, the first visual token that the other methods leave in the prompt."""
    visible = torch.zeros(len(encoded.features), dtype=torch.bool, device=encoded.features.device)
    left = call.reduced(encoded)
    for start, end in (image for row in call.images for image in row):
        visible[start + (0 if left is None else int(left.keep[start:end].int().argmax()))] = True
    return visible


def _image_means(call: Call, features: Tensor) -> Tensor:
    """[N, D] with every visual token replaced by the mean over its image."""
    images = [image for row in call.images for image in row]
    return torch.cat([features[start:end].mean(dim=0).expand(end - start, -1) for start, end in images])


def _check_labels(name: str, values: Any, is_good: Any) -> None:
    good = isinstance(values, tuple) and len(values) >= 2 and all(is_good(value) for value in values)
    if not good or len({value.lower() if isinstance(value, str) else value for value in values}) < len(values):
        what = "words without spaces around them" if name == "labels" else "token ids"
        raise InputError(f"{name} of debiasing must be a tuple of two or more different {what}, not {values!r}")
