"""What is known of one prompt while methods are attached: its encoded pictures, its extra rows, what methods remember.

Shapes as in `sightline.models.rows`; N is the number of visual tokens of the encoded batch.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.models.rows import View

if TYPE_CHECKING:
    from sightline.models.boundary import Boundary


@dataclass
class Encoded:
    """A batch of pictures after the tower and the connector, before beams multiplied its rows."""

    inputs: dict[str, Any]
    features: Tensor
    """[N, D], in the order of the visual tokens of the batch."""
    deepstack: list[Tensor]
    """Extra features [N, D] for each of the first decoder layers (Qwen3-VL), else empty."""
    readings: dict[str, Tensor] = field(default_factory=dict)
    """What methods asked to have read off the tower (`Method.readings`), by name, each [pictures, patches] or
    [pictures, patches, d]."""
    output: Any = None
    """The features as the model itself gave them."""


@dataclass(frozen=True)
class Reduced:
    """What is left of the visual tokens of an encoded batch."""

    keep: Tensor
    """bool [N]: which of their places in the prompt stay."""
    features: Tensor | None = None
    """[K, D]: what stands at the places that stay, in their order; None: what the connector gave there."""

    def dense(self) -> Tensor:
        """`features` at their places among all N, [N, D]; zeros elsewhere."""
        assert self.features is not None
        places = self.features.new_zeros(len(self.keep), self.features.shape[-1])
        return places.masked_scatter(self.keep[:, None], self.features)


@dataclass(frozen=True)
class Stream:
    """Extra rows, one for each row of the batch, that read another view of the prompt."""

    name: Hashable
    """Streams of the same name are the same: several methods that ask for one share its rows."""
    encoded: Encoded | None = None
    """Pictures to put in the place of the main ones; None: the same."""
    visible: Tensor | None = None
    """bool [N]: the visual tokens that are left; the others are hidden, which equals deleting them. None: all."""
    without_picture: bool = False
    """Hide all visual tokens."""
    keep_positions: bool = False
    """Where tokens are hidden, leave the positions of what follows as they are; else they close up."""
    transient: bool = False
    """Only while the prompt is read."""


NO_PICTURE = Stream("no picture", without_picture=True)
"""The prompt without its pictures, read and then fed what the main rows generate: the branch that carries the prior."""


@dataclass
class Call:
    """One `generate`, or one prompt read by a plain forward, and what the methods remember of it."""

    boundary: Boundary
    input_ids: Tensor
    host_ids: Tensor
    """The same on the CPU: what is counted on a GPU waits for all that was launched there before."""
    mask: Tensor | None
    """The prompt's 2-D mask [B, S], or None where nothing is padded."""
    host_mask: Tensor | None
    """The same on the CPU."""
    encoded: Encoded
    memory: dict[Any, Any] = field(default_factory=dict)
    """What a method learnt while the prompt was read, by method; survives from step to step also without a cache."""
    prompt_length: int = 0
    """S of the first forward; without a cache later forwards are longer."""
    seen: int = 0
    """Columns that the caller has given before the ones that are read now."""
    base_counts: bool = False
    """Whether `base` makes the positions itself (if any), from the length of the cache, without the dropped tokens."""
    reading_prompt: bool = True
    streams: list[Stream] = field(default_factory=list)
    real: list[Tensor] = field(default_factory=list)
    """For the main rows and those of each lasting stream, bool [B, T]: the prompt's columns that may be seen."""
    shown: list[Tensor] = field(default_factory=list)
    """For the main rows and those of every stream (lasting ones first), bool [B, T]: the prompt's visual tokens that
    are not hidden."""
    positions: Tensor | None = None
    """[B, S] or [A, B, S]: those of the prompt, as the caller counts."""
    last_position: Tensor | None = None
    """[B, 1] or [A, B, 1]: where the prompt ends, as the caller counts."""
    shift: Tensor | None = None
    """How far the rows' positions lie behind those the caller counts: [R, 1], or [A, R, 1]."""
    padded: bool = False
    """Whether `real` hides anything."""
    dropped: int = 0
    """S - T, T being the prompt's columns in the cache."""
    rewritten: bool = False
    """Whether a method rewrote the prompt's rows: their columns, or only their positions."""
    columns: Tensor | None = None
    """int [B, T]: for each column of the prompt that the decoder read, which of the caller's it was; -1: none."""
    rows_real: Tensor | None = None
    """bool [R, T]: as `real`, for the main rows and those of every stream."""
    rows_padded: bool = False
    """Whether `rows_real` hides anything."""
    layer_tokens: list[int] | None = None
    """How many of the prompt's columns each decoder layer reads, where methods narrow some; None: all read T."""
    hidden: list[Tensor] = field(default_factory=list)
    """Final hidden state [B, D] at the last position of each stream that was just read, in the order of `streams`."""
    prompt: tuple[View, Any] | None = None
    """The main view and its mask, while the prompt is read."""
    keep: Tensor | None = None
    """bool [visual tokens of all rows]: which of them stayed; None: all."""
    own_logits: Tensor | None = None
    """[B, vocabulary]: the model's own next-token logits of this step, before any method changed them."""
    _branches: Tensor | None = None
    _reduced: dict[int, tuple[Encoded, Reduced | None]] = field(default_factory=dict)

    @functools.cached_property
    def rows(self) -> int:
        return len(self.input_ids)

    @functools.cached_property
    def visual(self) -> Tensor:
        """bool [B, S]"""
        return self.boundary.anatomy.visual_positions(self.input_ids)

    @functools.cached_property
    def host_visual(self) -> Tensor:
        """The same on the CPU."""
        return self.boundary.anatomy.visual_positions(self.host_ids)

    @functools.cached_property
    def visual_count(self) -> int:
        """Visual tokens of all rows."""
        return int(self.host_visual.sum())

    @functools.cached_property
    def beams(self) -> int:
        """How many rows were made of each row that was encoded."""
        return max(1, self.visual_count // max(1, len(self.encoded.features)))

    @functools.cached_property
    def bare(self) -> Tensor | None:
        """bool [B]: rows without a picture, which methods leave as the stock model has them; None if all have one."""
        bare = ~self.host_visual.any(dim=1)
        return bare.to(self.input_ids.device) if bool(bare.any()) else None

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """What the encoder got, with the input ids of its rows, on the CPU."""
        return {**self.encoded.inputs, "input_ids": self.host_ids[:: self.beams]}

    @functools.cached_property
    def images(self) -> list[list[tuple[int, int]]]:
        """For each encoded row, for each of its images, the range of its tokens among the N features."""
        anatomy = self.boundary.anatomy
        rows: list[list[tuple[int, int]]] = [[] for _ in range(self.rows // self.beams)]
        start = 0
        for length, row in zip(anatomy.tokens_per_image(self.inputs), anatomy.image_indices(self.inputs), strict=True):
            rows[row].append((start, start + length))
            start += length
        return rows

    @property
    def kept(self) -> list[list[Tensor]] | None:
        """For each row, for each of its images, the indices of the visual tokens that stay; None: all."""
        if self.keep is None:
            return None
        rows: list[list[Tensor]] = []
        start = 0
        for images in self.images:
            for _ in range(self.beams):
                rows.append([])
                for first, last in images:
                    rows[-1].append(self.keep[start : start + last - first].nonzero()[:, 0])
                    start += last - first
        return rows

    @functools.cached_property
    def image_of(self) -> Tensor:
        """int [B, S]: which image of the encoded batch each of the caller's columns belongs to; -1: none."""
        lengths = [last - first for row in self.images for first, last in row]
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
        images = torch.full_like(self.visual, -1, dtype=torch.long)
        images[self.visual] = self.spread(numbers.to(images.device))
        return images

    @property
    def new_queries(self) -> int:
        """How many of the positions that are read now lie at or after the prompt's end: one while the prompt is read,
        more where, without a cache, what was generated is read again with it."""
        return self.input_ids.shape[1] - self.prompt_length + 1 if self.reading_prompt else 1

    @property
    def changed(self) -> bool:
        """Whether the decoder read other rows than the caller's: fewer columns, more, or other positions."""
        return self.keep is not None or self.rewritten

    def cut_cache(self, cache: Any, stays: Tensor) -> None:
        """Leaves only some of the prompt's columns in a cache that was just filled. For `Method.after_prompt`.

        Args:
            cache: a dynamic cache of layers that do not slide.
            stays: bool [B, T], alike for the rows of all streams.
        """
        lasting = len(self.real)
        stays = torch.cat([stays & real for real in self.real])
        columns = stays.int().argsort(dim=1, stable=True)[:, -int(stays.sum(dim=1).max()) :]
        for layer in cache.layers:
            places = columns[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, places), layer.values.gather(2, places)
        self.dropped += stays.shape[1] - columns.shape[1]
        self.real = list(stays.gather(1, columns).chunk(lasting))
        shown = torch.cat(self.shown[:lasting]).gather(1, columns)
        self.shown = list((shown & torch.cat(self.real)).chunk(lasting))
        self.padded = not all(bool(real.all()) for real in self.real)

    def key_columns(self, keys: int, queries: int) -> slice:
        """Which of the columns read so far the keys of a layer are: all of them, or the last, in a layer that slides.

        Args:
            keys: how many keys the layer has, those of this forward included.
            queries: how many positions this forward reads.
        """
        columns = self.seen - self.dropped + queries if self.seen else keys
        return slice(columns - keys, columns)

    def on_columns(self, values: Tensor) -> Tensor:
        """One value for each of the N visual tokens of the encoded batch -> [B, T], 0 where the prompt that the decoder
        reads has none of them. For `Method.before_prompt`."""
        assert self.prompt is not None
        visual = self.prompt[0].visual
        values = self.spread(values)
        columns = values.new_zeros(visual.shape)
        columns[visual] = values if self.keep is None else values[self.keep]
        return columns

    def prompt_ids(self, row: int) -> Tensor:
        """The token ids of a row's prompt, without padding, on the CPU."""
        ids = self.host_ids[row, : self.prompt_length]
        return ids if self.host_mask is None else ids[self.host_mask[row, : self.prompt_length].bool()]

    def question(self, row: int) -> Tensor:
        """The decoder's embeddings [L, D] of a row's text after its last picture; of all its text where nothing
        follows. Only while the prompt is read."""
        assert self.prompt is not None
        visual = self.host_visual[row, : self.prompt_length]  # without a cache the answer so far comes after it
        text = ~visual if self.host_mask is None else ~visual & self.host_mask[row, : self.prompt_length].bool()
        after = text & (visual.flip(0).cumsum(0).flip(0) == 0)
        columns = (after if bool(after.any()) else text).nonzero()[:, 0]
        return self.prompt[0].embeds[row, columns.to(self.input_ids.device)]

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens of each row that reached the decoder."""
        if self.kept is None:
            counts: list[int] = self.visual.sum(dim=1).tolist()
            return counts
        return [sum(len(image) for image in row) for row in self.kept]

    def stream_rows(self, name: Hashable) -> slice | None:
        """Where the rows of a stream are in the batch that the decoder runs now, if it has any there."""
        for index, stream in enumerate(self.streams, start=1):
            if stream.name == name and (self.reading_prompt or not stream.transient):
                return slice(index * self.rows, (index + 1) * self.rows)
        return None

    def branch_logits(self, name: Hashable) -> Tensor:
        """Next-token logits [B, vocabulary] of a stream that was just read; the head reads those of all at once."""
        if self._branches is None:
            logits = self.boundary.anatomy.head_logits(torch.cat(self.hidden))
            self._branches = logits.unflatten(0, (-1, self.rows))
        return self._branches[[stream.name for stream in self.streams].index(name)]

    def heard(self, hidden: list[Tensor]) -> None:
        """Takes the final hidden states of the streams at a new step."""
        self.hidden, self._branches = hidden, None

    def reduced(self, encoded: Encoded) -> Reduced | None:
        """What the methods leave of the visual tokens of these pictures; None when none drops or merges any. Asked of
        the methods once a prompt."""
        if id(encoded) not in self._reduced:
            asked = (method.reduced(self, encoded) for method in self.boundary.methods)
            self._reduced[id(encoded)] = encoded, next((one for one in asked if one is not None), None)
        return self._reduced[id(encoded)][1]

    def spread(self, values: Tensor) -> Tensor:
        """[N, ...] of the encoded batch -> the same for the visual tokens of all rows, row after row."""
        if self.beams == 1:
            return values
        parts = []
        for images in self.images:
            if images:
                parts += [values[images[0][0] : images[-1][1]]] * self.beams
        return torch.cat(parts)


def check_room(config: Any, visual: Tensor, mask: Tensor | None) -> None:
    """Raises `InputError` where the text of a row that shows a picture fills all that the model of a configuration can
    read. `visual`, and the mask of what is no padding, are [B, S]."""
    text = (~visual if mask is None else ~visual & mask.bool()).sum(dim=1)[visual.any(dim=1)]
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    if room is not None and len(text) and int(text.max()) >= room:
        raise InputError(
            f"a prompt has {int(text.max())} tokens of text, and {config.model_type} reads {room} at most: no visual "
            "token fits beside them; shorten the question"
        )
