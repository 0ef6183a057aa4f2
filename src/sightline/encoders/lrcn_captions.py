"""The caption decoder of LRCN (arXiv:1411.4389), whose cell is in `lrcn.py`: a vector in, words out, and retrieval.

    start token 0, w_1, w_2, ... -> embedding -> LSTM (-> LSTM) -> linear -> p(w_t | w_<t, picture)

Token 0 is both the start that is read and the end that is written; -1 pads captions and is not scored. The picture
[B, F] is the cells' static input: in the official code (jeffdonahue/caffe, coco_caption) a CNN's 1000 class scores. The
paper describes a video by the same decoder from a vector of its detections.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.lrcn import FlaggedLSTM, LSTMState
from sightline.errors import InputError, unknown

VARIANTS = ("one_layer", "unfactored", "factored")
END = 0
IGNORED = -1


class CaptionDecoder(nn.Module):
    """Words from a picture's feature.

    Args:
        vocabulary: V, words with the end token 0.
        feature: F, width of the picture's feature.
        variant: `one_layer`; `unfactored`, two LSTMs with the picture at the lower one; `factored`, with the picture at
            the upper one, so that the lower models language alone.
        embedding: width of the words' embeddings.
        hidden: width of each LSTM.
    """

    def __init__(
        self,
        vocabulary: int,
        feature: int = 1000,
        *,
        variant: str = "factored",
        embedding: int = 1000,
        hidden: int = 1000,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise unknown("variant of the caption decoder", variant, VARIANTS)
        if vocabulary < 2:
            raise InputError(f"a vocabulary needs the end token and a word, not {vocabulary} entries")
        self.variant, self.vocabulary = variant, vocabulary
        self.embed = nn.Embedding(vocabulary, embedding)
        below, above = (None, feature) if variant == "factored" else (feature, None)
        self.lower = FlaggedLSTM(embedding, hidden, static=below, spread=0.08)
        self.upper = None if variant == "one_layer" else FlaggedLSTM(hidden, hidden, static=above, spread=0.08)
        self.output = nn.Linear(hidden, vocabulary)
        for weight in (self.embed.weight, self.output.weight):
            nn.init.uniform_(weight, -0.08, 0.08)
        nn.init.zeros_(self.output.bias)

    def forward(
        self, picture: Tensor, words: Tensor, states: tuple[LSTMState, ...] | None = None
    ) -> tuple[Tensor, tuple[LSTMState, ...]]:
        """Logits of the word after each word.

        Args:
            picture: [B, F].
            words: [B, L] word ids; the first of a caption is the start token 0.
            states: of the LSTMs before the first word, None at the start.

        Returns:
            logits [B, L, V] and the states after the last word.
        """
        lower, upper = (None, None) if states is None else (states[0], states[-1])
        on_picture = self.variant == "factored"
        h, after = self.lower(self.embed(words), None, None if on_picture else picture, lower)
        if self.upper is None:
            return self.output(h), (after,)
        h, last = self.upper(h, None, picture if on_picture else None, upper)
        return self.output(h), (after, last)

    def word_log_probabilities(self, picture: Tensor, captions: Tensor) -> Tensor:
        """log p of each word of captions [B, L] that end with 0 and are padded with -1; 0 at padding."""
        if captions.ndim != 2 or len(captions) != len(picture):
            raise InputError(f"captions are [B, L], one a picture, not {list(captions.shape)} for {len(picture)}")
        # max() of an empty tensor would be an error of its own.
        if captions.numel() == 0 or not IGNORED <= int(captions.min()) <= int(captions.max()) < self.vocabulary:
            raise InputError(f"captions hold word ids from 0 to {self.vocabulary - 1}, and -1 for padding")
        read = F.pad(captions[:, :-1].clamp(min=END), (1, 0), value=END)
        logits, _ = self(picture, read)
        chosen = logits.log_softmax(dim=-1).gather(2, captions.clamp(min=END)[:, :, None])[:, :, 0]
        return chosen.masked_fill(captions == IGNORED, 0.0)

    def loss(self, picture: Tensor, captions: Tensor) -> Tensor:
        """The mean cross entropy of the words that are not padding."""
        return -self.word_log_probabilities(picture, captions).sum() / (captions != IGNORED).sum()

    @torch.no_grad()
    def generate(
        self,
        picture: Tensor,
        *,
        beams: int = 1,
        sample: bool = False,
        inverse_temperature: float = 1.0,
        max_words: int = 20,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """A caption for each picture [B, F], without the end token.

        Args:
            picture: [B, F].
            beams: 1 takes the likeliest word at every step; more keep as many captions and give the likeliest.
            sample: draw words, with p in proportion to exp(inverse_temperature * logit), instead.
            inverse_temperature: of sampling.
            max_words: words after which a caption is cut.
            generator: of sampling.
        """
        if beams < 1 or max_words < 1 or not inverse_temperature > 0:
            raise InputError("beams and max_words must be 1 or more and inverse_temperature positive")
        if sample and beams > 1:
            raise InputError("captions are either sampled or searched with beams, not both")
        if beams > 1:
            return [self._search(one[None], beams, max_words) for one in picture]
        words = picture.new_full((len(picture), 1), END, dtype=torch.long)
        states, written = None, []
        for _ in range(max_words):
            logits, states = self(picture, words, states)
            if sample:
                chances = (inverse_temperature * logits[:, 0]).softmax(dim=-1)
                words = torch.multinomial(chances, 1, generator=generator)
            else:
                words = logits[:, 0].argmax(dim=-1, keepdim=True)
            written.append(words)
        return [row[: row.index(END)] if END in row else row for row in torch.cat(written, dim=1).tolist()]

    def _search(self, picture: Tensor, beams: int, max_words: int) -> list[int]:
        """The likeliest caption that a search of this width finds; log probabilities are not divided by lengths."""
        done: list[tuple[float, list[int]]] = []
        alive: list[list[int]] = [[]]
        scores = picture.new_zeros(1)
        words = picture.new_full((1, 1), END, dtype=torch.long)
        states: tuple[LSTMState, ...] | None = None
        for _ in range(max_words):
            logits, states = self(picture.expand(len(words), -1), words, states)
            total = scores[:, None] + logits[:, 0].log_softmax(dim=-1)
            best, places = total.flatten().topk(min(beams, total.numel()))
            origins, chosen = (places // self.vocabulary).tolist(), (places % self.vocabulary).tolist()
            going_on = [index for index, word in enumerate(chosen) if word != END]
            done += [(float(best[i]), alive[origins[i]]) for i, word in enumerate(chosen) if word == END]
            if not going_on:
                break
            kept = torch.tensor([origins[i] for i in going_on], device=picture.device)
            alive = [[*alive[origins[i]], chosen[i]] for i in going_on]
            scores = best[going_on]
            words = torch.tensor([[chosen[i]] for i in going_on], device=picture.device)
            states = tuple((h[kept], c[kept]) for h, c in states)
            if done and max(score for score, _ in done) >= float(scores.max()):
                break  # more words only lower a score
        done += zip(scores.tolist(), alive, strict=False) if going_on else []
        return max(done, key=lambda entry: entry[0])[1]

    @torch.no_grad()
    def retrieval_scores(self, pictures: Tensor, captions: Tensor, *, normalise: bool = True) -> Tensor:
        """How well each caption fits each picture: log p(s | I) - log mean over all pictures of p(s | I').

        Args:
            pictures: [I, F].
            captions: [S, L], padded with -1.
            normalise: take off the second term, without which short and common captions win.

        Returns:
            [I, S].
        """
        rows = [
            self.word_log_probabilities(picture.expand(len(captions), -1), captions).sum(dim=1) for picture in pictures
        ]
        scores = torch.stack(rows)
        return scores - (scores.logsumexp(dim=0) - math.log(len(rows))) if normalise else scores


def retrieval_ranks(scores: Tensor, picture_of: Tensor) -> tuple[Tensor, Tensor]:
    """Places, from 1, of what belongs together.

    Args:
        scores: [I, S], higher is better.
        picture_of: [S], the picture that each caption describes.

    Returns:
        for each picture that of its best caption among all captions [I], for each caption that of its picture [S].
        Recall at k is the share of places up to k, the median rank their median.
    """
    own = picture_of[None] == torch.arange(len(scores), device=scores.device)[:, None]
    best = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
    right = scores.gather(0, picture_of[None])
    return 1 + (scores > best).sum(dim=1), 1 + (scores > right).sum(dim=0)
