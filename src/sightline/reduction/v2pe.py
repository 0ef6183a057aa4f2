"""V2PE: visual tokens advance the position by a step below one (Ge et al. 2024, arXiv:2412.09616).

In: the prompt's positions, [B, S], or [A, B, S] with A axes. Out: float32 positions of the same shape. No token is
removed; rotary phases are computed from the fractions.

    text token                        p <- p + 1
    k-th token of an image            p_image + k * delta,   p_image: the position of the token before the image
    after an image of n tokens        p <- ceil(p_image + n * delta)

so that a prompt ends near (text tokens) + (sum over images of n * delta), and pictures by the hundred fit the positions
that a decoder was trained on. The paper writes delta = S / 256 for tiles of 256 tokens, S = 1, 2, 4, ..., 256. With
S = 64 the prompt `t t t <img> v * 256 </img>` has positions 0 1 2 3, then 3.25 3.5 ... 67, then 68. Where a family cuts
an image into runs of tokens with text between them, each run counts as an image. What is generated advances by one.

The official code (OpenGVLab/V2PE, `get_rope_pos_id`) builds a range with a fractional step, whose length is right only
for powers of two, and works on one row at a time; here positions are p_image + k * delta in any row of a padded batch.

Choices of ours, where the paper has none: positions of several axes (Qwen-VL) are scaled on every axis, so that a
picture takes delta times its extent; tokens that a reducer dropped count where it leaves positions as they were
(`kept`) and do not where they close up (`compact`); a prompt without a picture is left alone.

In training the paper draws a step for every picture, uniformly from the nine: `random = True` with `per_step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.methods import Method, in_range, register

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.call import Call
    from sightline.models.rows import AttentionMask, View

STEPS = tuple(2.0**power for power in range(-8, 1))
"""1/256, 1/128, ..., 1."""


@register
@dataclass(frozen=True)
class V2PE(Method):
    """Numbers visual tokens in steps of `delta`.

    Small steps suit prompts that are longer than those that the decoder was trained on, large ones short prompts; a
    decoder that was not trained with them loses accuracy.

    Args:
        delta: the step, in (0, 1]; 1 is the stock model. The paper's are S / 256; its answers come from one step for
            all pictures, chosen by the length of the prompt.
        random: whether in training each picture's step is drawn from 1/256, 1/128, ..., 1.
        draw: the seed that each picture's step is drawn by, which `per_step` sets; 0: all have `delta`.
    """

    paper: ClassVar[str] = "v2pe"
    changes: ClassVar[frozenset[str]] = frozenset({"the positions of visual tokens"})
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("delta", (1 / 256, 1 / 64, 1 / 16, 0.25, 0.5, 1.0))

    delta: float = 0.25
    random: bool = False
    draw: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "delta", 0, 1, low_open=True)
        in_range(self, "draw", 0, 2**32, whole=True)

    @property
    def is_identity(self) -> bool:
        return self.delta == 1 and not self.draw

    def identity(self) -> Self:
        return replace(self, delta=1.0, draw=0)

    def per_step(self, rng: Random) -> Self:
        """The settings of one training step: other draws, if they are to be random."""
        return replace(self, draw=rng.randint(1, 2**32)) if self.random else self

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if "flash" in str(anatomy.text_config._attn_implementation):
            raise InputError(
                f"{self.paper} needs a model loaded with attn_implementation='sdpa' or 'eager': flash attention takes "
                "positions that do not advance by one for the beginnings of further prompts"
            )

    def deltas(self, images: int) -> list[float]:
        """The step of each image of a batch."""
        if not self.draw:
            return [self.delta] * images
        rng = Random(self.draw)
        return [rng.choice(STEPS) for _ in range(images)]

    def rewrite(self, call: Call, view: View, mask: AttentionMask) -> tuple[View, AttentionMask]:
        assert call.positions is not None
        assert view.columns is not None
        deltas = self.deltas(sum(len(row) for row in call.images))
        columns = view.columns.clamp(min=0)
        images = call.image_of.gather(1, columns).masked_fill(~view.visual, -1)
        numbered = scaled_positions(view.positions, images, deltas)
        # Where nothing has closed up, dropped and hidden tokens go on taking their place.
        whole = scaled_positions(call.positions, call.image_of, deltas)
        whole = whole.gather(-1, columns.expand(*whole.shape[:-1], -1))
        as_given = view.positions[..., -1:] == call.positions[..., -1:]
        positions = torch.where(as_given, whole, numbered)
        if mask is None:
            mask = view.real.long()  # without one, steps that are not 1 would be taken for ends of packed prompts
        return replace(view, positions=positions), mask


def scaled_positions(positions: Tensor, images: Tensor, deltas: Sequence[float]) -> Tensor:
    """Positions in which each image's tokens advance by its own step.

    Args:
        positions: whole numbers, [B, S] or [A, B, S]; of four axes the first counts the columns and is left alone.
        images: int [B, S], the number of the image that a column belongs to; -1: none.
        deltas: the step of each image.

    Returns:
        float32, as `positions`.
    """
    axes = positions.double()
    if axes.ndim == 2:
        axes = axes[None]
    counting, axes = (axes[:1], axes[1:]) if len(axes) == 4 else (axes[:0], axes)
    visual = images >= 0
    begins = visual & (images != torch.nn.functional.pad(images, (1, 0), value=-1)[:, :-1])
    run = begins.long().cumsum(dim=1)  # the latest run at each column, from 1 on; 0: none yet
    shape = (len(run), int(run.max()) + 1)
    rows, columns = begins.nonzero(as_tuple=True)
    before, step = axes.new_zeros(shape), axes.new_ones(shape)
    before[rows, run[rows, columns]] = axes[0, rows, columns] - 1  # a picture's first token is one ahead on every axis
    step[rows, run[rows, columns]] = torch.tensor(deltas, dtype=axes.dtype, device=axes.device)[images[rows, columns]]
    last = before.scatter_reduce(1, run * visual, axes.amax(dim=0).where(visual, axes.new_zeros(())), "amax")
    extent = last - before
    # The product is rounded: 0.1 * 30 must not be more than 3.
    saved = extent - (extent * step - 1e-9).ceil()
    saved[:, 0] = 0
    total = saved.cumsum(dim=1)
    own = (before - (total - saved)).gather(1, run) + step.gather(1, run) * (axes - before.gather(1, run))
    scaled = torch.cat([counting, torch.where(visual, own, axes - total.gather(1, run))]).float()
    return scaled[0] if positions.ndim == 2 else scaled
