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
    """What methods asked to have read off the tower (`Method.readings`), by name, each [pictures, patches]."""


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
    visual: Tensor
    """bool [B, S]"""
    mask: Tensor | None
    """The prompt's 2-D mask [B, S], or None where nothing is padded."""
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
    last_position: Tensor | None = None
    """[B, 1] or [A, B, 1]: where the prompt ends, as the caller counts."""
    shift: Tensor | None = None
    """How far the rows' positions lie behind those the caller counts: [R, 1], or [A, R, 1]."""
    padded: bool = False
    """Whether `real` hides anything."""
    dropped: int = 0
    """S - T."""
    kept: list[list[Tensor]] | None = None
    hidden: list[Tensor] = field(default_factory=list)
    """Final hidden state [B, D] at the last position of each stream that was just read, in the order of `streams`."""
    prompt: tuple[View, Any] | None = None
    """The main view and its mask, while the prompt is read."""
    keep: Tensor | None = None
    """bool [visual tokens of all rows]: which of them stayed; None: all."""
    own_logits: Tensor | None = None
    """[B, vocabulary]: the model's own next-token logits of this step, before any method changed them."""
    _branches: Tensor | None = None

    @functools.cached_property
    def rows(self) -> int:
        return len(self.input_ids)

    @functools.cached_property
    def beams(self) -> int:
        """How many rows were made of each row that was encoded."""
        return max(1, int(self.visual.sum()) // max(1, len(self.encoded.features)))

    @functools.cached_property
    def bare(self) -> Tensor | None:
        """bool [B]: rows without a picture, which methods leave as the stock model has them; None if all have one."""
        bare = ~self.visual.any(dim=1)
        return bare if bool(bare.any()) else None

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """What the encoder got, with the input ids of its rows."""
        return {**self.encoded.inputs, "input_ids": self.input_ids[:: self.beams]}

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
    def new_queries(self) -> int:
        """How many of the positions that are read now lie at or after the prompt's end: one while the prompt is read,
        more where, without a cache, what was generated is read again with it."""
        return self.input_ids.shape[1] - self.prompt_length + 1 if self.reading_prompt else 1

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
        """The token ids of a row's prompt, without padding."""
        ids = self.input_ids[row, : self.prompt_length]
        return ids if self.mask is None else ids[self.mask[row, : self.prompt_length].bool()]

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

    def spread(self, values: Tensor) -> Tensor:
        """[N, ...] of the encoded batch -> the same for the visual tokens of all rows, row after row."""
        if self.beams == 1:
            return values
        parts = []
        for images in self.images:
            if images:
                parts += [values[images[0][0] : images[-1][1]]] * self.beams
        return torch.cat(parts)
