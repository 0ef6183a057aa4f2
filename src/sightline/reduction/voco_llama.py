"""VoCo-LLaMA: the decoder writes a picture into a few tokens, and forgets the picture (Ye et al., CVPR 2025,
arXiv:2406.12275).

In: a prompt `prefix, v_1 .. v_N, text`. Out: `prefix, v_1 .. v_N, c_1 .. c_n, text`, the c being n copies of one
learned embedding [D], and a mask by which text sees the c but never the picture:

    may(q, k) = k <= q  and    k vision  ->  q is no text, of the same image
                               k voco    ->  q is text, or of the same image (any earlier one with `cross_group`)
                               k prefix  ->  q is no text
                               k text    ->  q is text

`prefix` is what stands before a row's first picture; the text does not see it either, as in the release, so a prompt
shows its picture first and asks afterwards. Tokens between the tiles of an image count with its vision. A row without a
picture is read as by the stock model. Positions run on over the full length. Nothing after the c depends on what came
before them but through their keys and values; so once the prompt has been read, the cache is cut to c and text. What is
left of a picture can be stored and asked about later: `sightline.reduction.compressed_picture`.

One image gives the release's mask (Yxxxb/VoCo-LLaMA, `make_voco_mask_llava`). For several, the release's rule would
open all between the first c and the last one to the text; the groups above do not. The release's decoding is not
followed: it fails for want of a mask, and would move the window by one each step. Where a model reads prompts in both
directions (PaliGemma), `k <= q` is the model's own mask instead. Qwen-VL's axes all go on from the furthest place of
the picture.

The mask must be trained for; on a decoder that was not, answers are useless.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sightline.errors import InputError
from sightline.methods import in_range, register
from sightline.models.narrowing import slides
from sightline.models.rows import causal, gather_square, hide_keys
from sightline.reduction.trained_reducer import TrainedReducer

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.call import Call
    from sightline.models.rows import AttentionMask, View

PADDING, PREFIX, VISION, VOCO, TEXT = range(5)


@register
@dataclass(frozen=True)
class VoCo(TrainedReducer):
    """Compresses each picture into the keys and values of `tokens` learned tokens that follow it.

    Args:
        tokens: n, the compression tokens of a picture; 0 is the stock model. The paper tries 1 to 128, and gives 1 as
            its main result.
        cross_group: whether the tokens of a picture see those of earlier pictures of the row.
        weights: see `TrainedReducer`.
    """

    paper: ClassVar[str] = "voco_llama"
    # The text reads no visual token: there are none to drop, in no layer, and none whose logits could be raised.
    changes: ClassVar[frozenset[str]] = frozenset(
        {
            "which visual tokens reach the decoder",
            "which visual tokens decoder layers read",
            "the attention logits",
        }
    )
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("tokens", (1, 2, 4, 8, 16, 32))

    tokens: int = 1
    cross_group: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "tokens", 0, 4096, whole=True)

    @property
    def is_identity(self) -> bool:
        return self.tokens == 0

    def identity(self) -> Self:
        return replace(self, tokens=0)

    def build(self, anatomy: Anatomy) -> nn.Module:
        return VoCoEmbedding(anatomy)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if slides(anatomy):
            raise InputError(
                f"{self.paper} cannot run on {anatomy.family} with sliding layers: their windows count what is in the "
                "cache, from which pictures are cut"
            )
        if "flash" in str(anatomy.text_config._attn_implementation):
            raise InputError(
                f"{self.paper} hides pictures from the text by a mask, which flash attention does not take; load the "
                "model with attn_implementation='sdpa' or 'eager'"
            )

    def rewrite(self, call: Call, view: View, mask: AttentionMask) -> tuple[View, AttentionMask]:
        assert view.columns is not None
        anatomy = call.boundary.anatomy
        images = call.image_of.gather(1, view.columns.clamp(min=0)).masked_fill(view.columns < 0, -1)
        layout = Layout.of(images, view.visual, self.tokens)
        call.memory[self] = layout
        row: Tensor = self.module(anatomy)()
        longer = layout.insert(view, row.to(view.embeds))
        square = layout.mask(mask, longer.real, cross_group=self.cross_group)
        if str(anatomy.text_config._attn_implementation).endswith("eager"):  # which adds its mask
            lowest = torch.finfo(view.embeds.dtype).min
            square = torch.zeros_like(square, dtype=view.embeds.dtype).masked_fill(~square, lowest)
        return longer, square

    def after_prompt(self, call: Call, cache: Any) -> None:
        layout: Layout = call.memory[self]
        call.cut_cache(cache, (layout.kind == VOCO) | (layout.kind == TEXT))


class VoCoEmbedding(nn.Module):
    """The one learned embedding; fresh, it is drawn like the entries of the vocabulary."""

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        embed: Any = anatomy.model.get_input_embeddings()
        with torch.no_grad():
            known = embed(torch.arange(min(4096, embed.num_embeddings), device=embed.weight.device)).float().cpu()
        self.embedding = nn.Parameter(known.mean(dim=0) + known.std(dim=0) * torch.randn(known.shape[1]))

    def forward(self) -> Tensor:
        return self.embedding


@dataclass(frozen=True)
class Layout:
    """Where the columns of a prompt are once n have been put after each image: B rows, T columns, padded left."""

    source: Tensor
    """int [B, T]: the old column that each was; of one that was put in, the image's last."""
    kind: Tensor
    """int [B, T]: PADDING (that the layout added), PREFIX, VISION, VOCO or TEXT."""
    group: Tensor
    """int [B, T]: which of the row's images a column belongs to."""
    shown: Tensor
    """bool [B, T]: False for the VOCO of an image that is hidden as a whole."""

    @classmethod
    def of(cls, images: Tensor, visual: Tensor, tokens: int) -> Layout:
        """The layout of rows whose images stand at `images` (int [B, S], -1: none), of which `visual` is not hidden."""
        rows = [cls._row(one, shown, tokens) for one, shown in zip(images, visual, strict=True)]
        padded = [pad_sequence(list(part), True, 0, "left") for part in zip(*rows, strict=True)]
        return cls(padded[0], padded[1], padded[2], padded[3].bool())

    @staticmethod
    def _row(images: Tensor, visual: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kind, group, repeats = (torch.full_like(images, value) for value in (TEXT, 0, 1))
        shown = torch.ones_like(images)
        found = images[images >= 0].unique_consecutive().tolist()
        for number, image in enumerate(found):
            places = (images == image).nonzero()[:, 0]
            first, last = int(places[0]), int(places[-1])
            if number == 0:
                kind[:first] = PREFIX
            kind[first : last + 1] = VISION
            group[first : last + 1] = number
            repeats[last] += tokens
            shown[last] = visual[first : last + 1].any()
        source = torch.arange(len(images), device=images.device).repeat_interleave(repeats)
        inserted = source == nn.functional.pad(source, (1, 0), value=-1)[:-1]
        return source, kind[source].masked_fill(inserted, VOCO), group[source], shown[source]

    def insert(self, view: View, embedding: Tensor) -> View:
        """The view with the columns put in, all of them with `embedding` [D]."""
        inserted, padding = self.kind == VOCO, self.kind == PADDING
        assert view.columns is not None
        embeds = view.embeds.gather(1, self.source[..., None].expand(-1, -1, view.embeds.shape[-1]))
        real = view.real.gather(1, self.source)
        return replace(
            view,
            embeds=torch.where(inserted[..., None], embedding, embeds),
            positions=self.positions(view.positions),
            visual=view.visual.gather(1, self.source) & ~inserted & ~padding,
            real=torch.where(inserted, self.shown, real & ~padding),
            columns=view.columns.gather(1, self.source).masked_fill(inserted | padding, -1),
        )

    def positions(self, positions: Tensor) -> Tensor:
        """[..., B, S] -> [..., B, T], with one more for each column that was put in."""
        inserted = self.kind == VOCO
        furthest = positions.ceil() if positions.is_floating_point() else positions
        if positions.ndim == 3:  # the last token of a picture is the furthest on one of the axes
            counting, axes = (furthest[:1], furthest[1:]) if len(furthest) == 4 else (furthest[:0], furthest)
            furthest = torch.cat([counting, axes.amax(dim=0, keepdim=True).expand_as(axes)])
        source = self.source.expand(*positions.shape[:-1], -1)
        places = torch.where(inserted, furthest.gather(-1, source), positions.gather(-1, source))
        return places + inserted.long().cumsum(dim=1)

    def mask(self, mask: AttentionMask, real: Tensor, *, cross_group: bool) -> Tensor:
        """bool [B, 1, T, T], from the model's own mask of the old columns."""
        rows, length = self.source.shape
        order = causal(rows, length, length, self.source.device)
        if mask is not None and mask.ndim == 4:
            own = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            own = gather_square(own, self.source)
            together = (self.source[:, :, None] == self.source[:, None, :])[:, None]
            order = torch.where(together, order, own)
        square = order & visible(self.kind, self.group, cross_group=cross_group)[:, None]
        itself = torch.eye(length, dtype=torch.bool, device=square.device)  # padding, too, must see something
        return hide_keys(square | itself, ~real)


def visible(kind: Tensor, group: Tensor, *, cross_group: bool) -> Tensor:
    """bool [B, T, T]: which key (last) a query may see, whatever their order. Kinds and groups as in `Layout`."""
    key, same = kind[:, None, :], group[:, :, None] == group[:, None, :]
    of_text = (key == VOCO) | (key == TEXT)
    of_others = (key == PREFIX) | (((key == VISION) | (key == VOCO)) & same) | ((key == VOCO) & cross_group)
    return torch.where(kind[:, :, None] == TEXT, of_text, of_others)
