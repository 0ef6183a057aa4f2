"""VideoLLM-MoD: mixture of depths for visual tokens (Wu et al., NeurIPS 2024, arXiv:2408.16730).

In: the hidden states X [T, D] in front of a decoder layer, and which columns belong to which frame (each picture of a
row is one). Out: the hidden states behind it, of which most visual ones are what they were. In a MoD layer

    mu_i = w . x_i                                  one learned router a layer
    S_t  = the k largest mu in frame t,             k = max(1, round(r n)) of its n tokens
    A    = text and all S_t,                        in the order of the prompt
    d    = layer(X[A], positions of A, causal) - X[A]
    x_i := x_i + d_i for text,    x_i + g(mu_i) d_i for i in S_t,    x_i for the visual tokens passed by

so no token is lost, yet such a layer computes, and keeps in its cache, the text and r of the vision alone. The choice
is made for each frame by itself: nothing of it depends on later frames, and a film can be read frame by frame
(`FrameStream`). Rotary phases are those of the original positions. Text is never gated and never skipped.

The code of this method was not released. Where the paper is silent: a layer that is inserted into a trained model with
g(mu) = mu near 0 would take from the chosen tokens what the layer gave them, so the default gate is 1 + tanh(mu);
`gate="raw"` is mu itself. Layer 0 is always whole, as caches tell the length of a prompt by it. The deep strategies
begin after two layers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from sightline.errors import InputError, unknown
from sightline.methods import in_range, register
from sightline.models.narrowing import Chosen, LayerInput
from sightline.models.rows import causal
from sightline.reduction.layer_reducer import LayerReducer
from sightline.reduction.trained_reducer import TrainedReducer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sightline.models.anatomy import Anatomy
    from sightline.models.call import Call

STRATEGIES = ("interleaved", "all", "all_deep", "interleaved_deep")
SELECTORS = ("learned", "uniform", "random")
GATES = ("tanh", "raw", "none")
FIRST_DEEP = 2


@register
@dataclass(frozen=True)
class VideoLLMMoD(TrainedReducer, LayerReducer):
    """In every second decoder layer only the share `r` of each frame's visual tokens is computed; the others pass by.

    Args:
        r: share of a frame's visual tokens that a MoD layer computes, in (0, 1]; at least one. 0.2 in the paper.
        strategy: which layers: every second one (`interleaved`, the paper's), `all` but the first, or either after the
            first two layers (`all_deep`, `interleaved_deep`).
        selector: `learned` routers, `uniform` spacing within a frame, or `random` tokens (the same for the same layer
            and place). The latter two have no router and no gate.
        gate: what multiplies that which the layer adds to a chosen token: 1 + tanh(mu), `raw` mu, or `none`, which
            leaves a router that is not learned. r = 1 with no gate is the stock model.
        weights: where the routers' weights are (see `TrainedReducer`).
    """

    paper: ClassVar[str] = "videollm_mod"
    bypasses: ClassVar[bool] = True
    structure: ClassVar[tuple[str, ...]] = ("strategy",)
    frames: ClassVar[bool] = True
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("r", (0.1, 0.2, 0.35, 0.5, 0.75))

    r: float = 0.2
    strategy: Literal["interleaved", "all", "all_deep", "interleaved_deep"] = "interleaved"
    selector: Literal["learned", "uniform", "random"] = "learned"
    gate: Literal["tanh", "raw", "none"] = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "r", 0, 1, low_open=True)
        for name, known in (("strategy", STRATEGIES), ("selector", SELECTORS), ("gate", GATES)):
            if getattr(self, name) not in known:
                raise unknown(f"{name} of {self.paper}", str(getattr(self, name)), known)

    @property
    def gated(self) -> bool:
        return self.selector == "learned" and self.gate != "none"

    @property
    def is_identity(self) -> bool:
        return self.r == 1 and not self.gated

    def identity(self) -> Self:
        return replace(self, r=1.0, gate="none")

    def layers(self, depth: int) -> Sequence[int]:
        first = FIRST_DEEP if self.strategy.endswith("deep") else 1
        return [layer for layer in range(first, depth) if self.strategy.startswith("all") or layer % 2 == 1]

    def check(self, anatomy: Anatomy) -> None:
        if not self.layers(len(anatomy.layers)):
            raise InputError(
                f"strategy {self.strategy!r} of {self.paper} finds no layer to act at among the {len(anatomy.layers)} "
                f"of this {anatomy.family}"
            )
        if self.selector == "learned":
            super().check(anatomy)
        else:
            LayerReducer.check(self, anatomy)

    def build(self, anatomy: Anatomy) -> nn.Module:
        if self.selector != "learned":
            return nn.ModuleList()
        width = int(anatomy.text_config.hidden_size)
        return nn.ModuleList(Router(width) for _ in self.layers(len(anatomy.layers)))

    def before_prompt(self, call: Call) -> None:
        numbers = [
            torch.full((last - first,), number) for row in call.images for number, (first, last) in enumerate(row)
        ]
        frames = torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.long)
        call.memory[self, "frames"] = call.on_columns(frames.to(call.visual.device))

    def choose(self, call: Call, here: LayerInput) -> Chosen:
        frames: Tensor = call.memory[self, "frames"]
        frames = frames.repeat(len(here.hidden) // len(frames), 1).gather(1, here.columns.index)
        frames = frames.masked_fill(~here.columns.visual, -1)
        return self.route(call.boundary.anatomy, here.layer, here.hidden, frames)

    def route(self, anatomy: Anatomy, layer: int, hidden: Tensor, frames: Tensor) -> Chosen:
        """The choice at one MoD layer.

        Args:
            anatomy: the model's.
            layer: which of its decoder layers, counted from 0.
            hidden: what goes into it, [R, T, D].
            frames: int [R, T], which frame of its row a column belongs to, counted from 0; -1: it is no vision.
        """
        place, size = ranked(frames, torch.zeros(frames.shape, device=frames.device))
        budget = (size.double() * self.r).round().clamp(min=1).long()
        if self.selector == "uniform":
            return Chosen((frames >= 0) & ((place + 1) * budget // size > place * budget // size))
        if self.selector == "random":
            return Chosen((frames >= 0) & (ranked(frames, drawn(layer, frames, place))[0] < budget))
        routers: Any = self.module(anatomy)
        score = routers[list(self.layers(len(anatomy.layers))).index(layer)](hidden)
        chosen = (frames >= 0) & (ranked(frames, score)[0] < budget)
        if self.gate == "none":
            return Chosen(chosen)
        return Chosen(chosen, score if self.gate == "raw" else 1 + score.tanh())


class Router(nn.Module):
    """Hidden states [R, T, D] -> one score for each column, float32 [R, T]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        scores: Tensor = self.score(hidden.to(self.score.weight.dtype))
        return scores[..., 0]


def ranked(frames: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column [R, T] its rank within its frame, by falling score (of equal ones the first before the second),
    and the size of the frame."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, frames.gather(1, order).argsort(dim=1, stable=True))
    in_order = frames.gather(1, order)
    places = torch.arange(frames.shape[1], device=frames.device).expand_as(frames)
    begins = nn.functional.pad(in_order[:, 1:] != in_order[:, :-1], (1, 0), value=True)
    rank = places - places.masked_fill(~begins, 0).cummax(dim=1).values
    sizes = frames.new_zeros(len(frames), frames.shape[1] + 1).scatter_add(1, frames + 1, torch.ones_like(frames))
    return torch.empty_like(rank).scatter(1, order, rank), sizes.gather(1, frames + 1)


def drawn(layer: int, frames: Tensor, place: Tensor) -> Tensor:
    """A random number for each column [R, T], which only layer, frame and place in the frame decide."""
    longest = int(place.max()) + 1
    table = []
    for frame in range(int(frames.max()) + 1):
        rng = random.Random(f"{layer} {frame}")
        table.append([rng.random() for _ in range(longest)])
    numbers = torch.tensor(table or [[0.0] * longest], dtype=torch.float64, device=frames.device)
    return numbers[frames.clamp(min=0), place]


class FrameStream:
    """Reads a film as it comes, frame by frame and text in between, into one cache that no method has to be attached
    for. What it gives equals the method's reading of the whole prompt. A frame is one picture to the tower: an image
    that the processor cuts into tiles is as many frames here, and one to the method.

        stream = FrameStream(model, VideoLLMMoD())
        stream.text(ids)
        stream.frames(pixel_values=frame)
        logits = stream.text(more_ids)

    Raises:
        InputError: for models whose positions have several axes, and for those that look ahead within a prompt.
    """

    def __init__(self, model: PreTrainedModel, method: VideoLLMMoD) -> None:
        from transformers import DynamicCache

        from sightline.models.anatomy import Anatomy

        self.anatomy, self.method = Anatomy.of(model), method
        method.check(self.anatomy)
        if self.anatomy.mrope or self.anatomy.family == "paligemma":
            raise InputError(
                f"a film cannot be read frame by frame with {self.anatomy.family}: it needs a causal model whose "
                "positions are plain numbers"
            )
        self.cache: Any = DynamicCache()
        self.length = 0
        """Columns read so far."""
        self._shown = 0

    @torch.no_grad()
    def text(self, ids: Tensor) -> Tensor:
        """Reads tokens [1, n] and gives the next-token logits [1, vocabulary]."""
        if not ids.numel():
            raise InputError("there are no tokens to read: give one or more")
        embed: Any = self.anatomy.model.get_input_embeddings()
        return self._read(embed(ids), frame=None)

    @torch.no_grad()
    def frames(self, **pictures: Tensor) -> Tensor:
        """Reads frames one by one, given as the model's own image inputs, and gives the logits behind the last."""
        if any(len(given) == 0 for given in pictures.values()):
            raise InputError("there are no frames to read: give one or more")
        for features in self.anatomy.base.get_image_features(**pictures, return_dict=True).pooler_output:
            logits = self._read(features[None], frame=self._shown)
            self._shown += 1
        return logits

    def _read(self, embeds: Tensor, frame: int | None) -> Tensor:
        anatomy, method = self.anatomy, self.method
        hidden = embeds
        positions = self.length + torch.arange(embeds.shape[1], device=embeds.device)[None]
        turns = anatomy.language_model.rotary_emb(hidden, position_ids=positions)
        where = () if method.is_identity or frame is None else method.layers(len(anatomy.layers))
        for number, layer in enumerate(anatomy.layers):
            if number not in where:
                hidden = self._through(layer, number, hidden, positions, turns)
                continue
            assert frame is not None
            chosen = method.route(anatomy, number, hidden, torch.full_like(positions, frame))
            at = chosen.stays[0].nonzero()[:, 0]
            came = hidden[:, at]
            gave = self._through(layer, number, came, positions[:, at], tuple(turn[:, at] for turn in turns))
            if chosen.gate is not None:
                gave = came + chosen.gate[:, at, None].to(gave.dtype) * (gave - came)
            hidden = hidden.index_copy(1, at, gave)
        self.length += embeds.shape[1]
        return anatomy.head_logits(anatomy.final_norm(hidden[:, -1]))

    def _through(self, layer: nn.Module, number: int, hidden: Tensor, positions: Tensor, turns: Any) -> Tensor:
        before, queries = int(self.cache.get_seq_length(number)), hidden.shape[1]
        visible = causal(1, queries, before + queries, hidden.device)
        mask = torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, torch.finfo(hidden.dtype).min)
        output: Tensor = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            position_embeddings=turns,
        )
        return output
