"""AGLA: what matches the prompt votes a second time (An et al., CVPR 2025, arXiv:2406.12718).

A matcher says which pixels of the picture match the prompt. The others are blacked out, and the logits of a branch that
sees the rest are added: the whole picture generates, the part that was asked about verifies.

In: next-token logits l [V] of the prompt and l+ [V] of the same prompt with the masked picture. Out: logits [V].

    m  = norm(blur(resize(norm(map))))                  norm: minimum to 0, maximum to 1
    r  = min(1 - s / 2, 1 - 1e-5)                       s: similarity of picture and prompt
    x+ = x where m >= the floor(r N)-th of m's N values in descending order (from 0), black elsewhere
    C  = { w : l_w >= log(beta) + max l }
    l' = l + alpha * l+   on C,   -inf elsewhere

So about s / 2 of the pixels go: the better picture and prompt fit, the more. resize is bicubic, to the picture's size;
blur is Gaussian, its deviation 0.02 of the longer side. A map that says nothing leaves the picture as it is.

The paper's matcher is BLIP's image-text matching, read by GradCAM; give a checkpoint of it as `matcher`. A CLIP
checkpoint works too. The default needs neither: it reads the decoder's own attention to the picture, which is not in
the paper and knows no similarity, so that s is a setting. See `sightline.grounding.matchers`.

Differences to the official code (Lackel/AGLA, `eval/augmentation.py`, `eval/sample.py`): there the branch takes over
the main branch's cache after its first token, so that from the second on both see the whole picture; here it keeps its
own. There pictures are masked at 384 x 384 before the model's preprocessing; here at the size the tower sees, each tile
by itself where an image is cut into tiles. The text that BLIP and CLIP read is the prompt's, without the chat template.
l' is a sum, so its temperature is 1 / (1 + alpha) of the model's; `normalise` divides it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.errors import InputError, unknown
from sightline.grounding.contrastive_decoding import ContrastiveDecoding, joined
from sightline.grounding.matchers import Checkpoint, DecoderAttention, Matcher
from sightline.methods import in_range, register
from sightline.models.call import Stream

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.call import Call, Encoded


@register
@dataclass(frozen=True)
class Agla(ContrastiveDecoding):
    """Adds the logits of a view of the picture from which what does not match the prompt is blacked out.

    Args:
        alpha: weight of the masked view's logits, in [0, 100]; 0 is the stock model (without the restriction to
            plausible tokens too). The paper's is 2.
        beta: share of the likeliest token's probability that a token needs, in [0, 1]; 0 lets all tokens through. The
            paper's is 0.5.
        normalise: divide by 1 + alpha, which takes out the lower temperature of a sum.
        matcher: `attention`, or the folder or hub id of a BLIP image-text matching or CLIP checkpoint, such as
            "Salesforce/blip-itm-large-coco", the paper's. A checkpoint needs the model's processor at `attach`.
        similarity: s for the matcher `attention`, in [0, 1]; half of it is the share of pixels that go. With BLIP the
            paper's lies between 0.2 and 0.5. Not used with a checkpoint, which measures s.
        layers: decoder layers whose attention is read (0-based); None for the third and the fourth fifth.
        queries: `last` reads the attention of the prompt's last position, `text` the mean over all text after the last
            picture. Both for the matcher `attention` only.
    """

    paper: ClassVar[str] = "agla"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("alpha", (0.25, 0.5, 1.0, 2.0, 3.0, 5.0))

    alpha: float = 2.0
    beta: float = 0.5
    normalise: bool = False
    matcher: str = "attention"
    similarity: float = 0.35
    layers: tuple[int, ...] | None = None
    queries: Literal["last", "text"] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "alpha", 0, 100)
        in_range(self, "beta", 0, 1)
        in_range(self, "similarity", 0, 1)
        if not isinstance(self.matcher, str) or not self.matcher.strip():
            raise InputError(
                f"matcher of agla must be 'attention', or a folder or hub id of a checkpoint, not {self.matcher!r}"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))  # a list cannot be hashed
            if not self.layers:
                raise InputError("layers of agla must name at least one layer, or be None")
        if self.queries not in ("last", "text"):
            raise unknown("queries of agla", str(self.queries), ["last", "text"])

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0

    def identity(self) -> Self:
        return replace(self, alpha=0.0)

    def matching(self) -> Matcher:
        """What finds the pixels that match the prompt."""
        if self.matcher == "attention":
            return DecoderAttention(self.layers, self.queries, self.similarity)
        return Checkpoint(self.matcher)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        self.matching().check(anatomy)

    def branches(self, call: Call) -> Sequence[Stream]:
        key = (self, "masked")
        if key not in call.memory:  # once a call, also when there is no cache
            call.memory[key] = self._masked(call)
        return (Stream(self, encoded=call.memory[key]),)

    def _masked(self, call: Call) -> Encoded:
        anatomy = call.boundary.anatomy
        pictures = anatomy.pictures(call.inputs)
        found = self.matching().matches(call, pictures)
        kept: list[Iterator[Tensor]] = [
            iter([matching_pixels(m.relevance, m.similarity, *tile.shape[1:]) for m, tile in zip(*both, strict=True)])
            for both in zip(found, pictures, strict=True)
        ]
        return call.boundary.encode_changed(
            call, lambda picture, image: picture * next(kept[image]).to(picture), normalised=False
        )

    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        return joined(logits, own, branches[0], self.alpha, self.beta, normalise=self.normalise)


def matching_pixels(relevance: Tensor, similarity: float, height: int, width: int) -> Tensor:
    """bool [height, width]: the pixels that stay, of a picture whose map of relevance is [h, w]."""
    small = unit_range(relevance.float())
    if small is None:
        return torch.ones(height, width, dtype=torch.bool, device=relevance.device)
    large = F.interpolate(small[None, None], size=(height, width), mode="bicubic", align_corners=False)[0, 0]
    smooth = blurred(large, 0.02 * max(height, width))
    # Its scale does not matter to the order of the pixels, so it need not be brought to [0, 1] again.
    threshold = smooth.flatten().sort(descending=True).values[int(smooth.numel() * keep_ratio(similarity))]
    return smooth >= threshold


def keep_ratio(similarity: float) -> float:
    """r, the share of pixels that stay; at least one goes, whatever the similarity."""
    return min(1 - similarity / 2, 1 - 1e-5)


def unit_range(values: Tensor) -> Tensor | None:
    """Minimum to 0, maximum to 1; None for values that are all the same (up to rounding), or not finite."""
    low, high = values.amin(), values.amax()
    spread = high - low
    if not bool(spread.isfinite()) or bool(spread <= 1e-6 * torch.maximum(low.abs(), high.abs())):
        return None
    return (values - low) / spread


def blurred(values: Tensor, deviation: float) -> Tensor:
    """[H, W] under a Gaussian cut off at four deviations, the picture mirrored at its edges (the edge pixel twice)."""
    radius = int(4 * deviation + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=values.device)
    kernel = torch.exp(-offsets.float().square() / (2 * deviation**2))
    kernel = kernel / kernel.sum()
    for axis in (0, 1):
        length = values.shape[axis]
        places = torch.arange(-radius, length + radius, device=values.device) % (2 * length)
        places = torch.minimum(places, 2 * length - 1 - places)
        along = kernel.reshape((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1))
        values = F.conv2d(values.index_select(axis, places)[None, None], along)[0, 0]
    return values
