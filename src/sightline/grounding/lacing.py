"""LACING: guidance away from a learned soft image, and a softmax of its own for visual keys (Zhao et al., EMNLP 2025,
arXiv:2411.14279).

Two parts, each of which can be used without the other.

*Soft-image guidance* (IFG in the preprint, SIG in the proceedings) is classifier-free guidance. In: next-token logits
l_c [V] of the prompt and l_u [V] of the same prompt whose visual features are replaced by a learned tensor E [n, D].
Out: logits [V].

    l = l_u + cfg_scale * (l_c - l_u)                             (cfg_scale = 1 is the stock model)

E starts as N(0, 1) / sqrt(D) and is trained on next-token prediction in the place of pictures, so that it stands for "a
picture that says nothing": the other rows keep the length, the positions and the visual keys that the model is used to.
The paper trains E together with the language model (10 % of the images of its second stage are replaced). Here the
model is stock and stays as it is, and E alone is trained: `sightline train soft-image`.

*Multimodal dual attention* (MDA, off by default) changes every decoder layer, for every query, over the layer's own
logits S = q k / sqrt(d):

    P = softmax(S over visual keys) + softmax(S over text keys)      (rows sum to 2, not averaged), output P V

so that text cannot outvote the picture however long it grows. No parameters are added, but activations double: the
paper has MDA on in both training stages, and a model that was trained without it is badly disturbed by it. It is for
models that were trained with it; `dual_softmax` is a plain function that a training loop can use.

Official code (HaozheZhao/LACING, `cfg_sample.py` and `modeling_llama.py`). Its optional form of the guidance, that of
VCD with alpha = 0.5 and a plausibility mask of 0.1, is cfg_scale = 1.5 with beta = 0.1. Its scripts sweep cfg_scale
from 1 to 3 and do not say what was best; the default here is that 1.5, without the mask, as in its own default. Its
`cfg_interval` (guidance for the first tokens only, off by default) is left out. It differs in this:

- A query that has no visual or no text key to see gets nothing from that softmax; the official code does so only for
  samples without an image, and averages over forbidden keys elsewhere.
- E has as many rows as an image had visual tokens in training. For an image of another size they are taken in order,
  from the start again when they run out: averages of neighbouring rows (interpolation) would be shorter vectors than
  any that the model has seen in training.
- A soft image has nothing for the extra visual features that some decoders add in their first layers (Qwen3-VL), which
  would show the picture: they are zero.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.grounding.contrastive_decoding import ContrastiveDecoding, contrasted
from sightline.methods import in_range, register
from sightline.models.call import Encoded, Stream
from sightline.models.rows import causal

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.attending import Attended, Attending
    from sightline.models.boundary import Boundary
    from sightline.models.call import Call

SOFT_IMAGE = "soft_image"
"""Name of the tensor, and of the file beside a checkpoint's weights that holds it."""
AUTO, UNTRAINED = "auto", "untrained"
ROWS_UNTRAINED = 576  # visual tokens of the paper's model


@register
@dataclass(frozen=True)
class Lacing(ContrastiveDecoding):
    """Guides the answer away from what the model says about a learned soft image; optionally, dual attention.

    Args:
        cfg_scale: guidance scale, in [1, 100]; 1 is no guidance, and no soft image is needed. The paper's scripts try 1
            to 3.
        beta: share of the likeliest token's probability that a token needs, in [0, 1]; 0 lets all tokens through.
        soft_image: `auto` finds `soft_image.safetensors` in the folder that the model was loaded from (the built-in
            model has one); else the path of such a file, with a tensor `soft_image` [n, D]. `untrained` draws what
            training starts from: for trials, as no model was ever shown it.
        mda: dual attention in every layer. Only for models that were trained with it.
        visual_full_available: with `mda`, let every query see all images of its prompt, also those that come after it;
            else as the model's own mask has it, and an image's token sees no other visual token.
    """

    paper: ClassVar[str] = "lacing"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("cfg_scale", (1.0, 1.25, 1.5, 2.0, 2.5, 3.0))
    changes: ClassVar[frozenset[str]] = frozenset({"the attention logits"})

    cfg_scale: float = 1.5
    beta: float = 0.0
    soft_image: str = AUTO
    mda: bool = False
    visual_full_available: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "cfg_scale", 1, 100)
        in_range(self, "beta", 0, 1)
        if not (isinstance(self.soft_image, str) and self.soft_image):
            raise InputError(
                f"soft_image of lacing must be '{AUTO}', '{UNTRAINED}' or the path of a file, not {self.soft_image!r}"
            )

    def claims(self) -> frozenset[str]:
        return self.changes if self.mda else frozenset()

    @property
    def is_identity(self) -> bool:
        return self.cfg_scale == 1 and not self.mda

    def identity(self) -> Self:
        return replace(self, cfg_scale=1.0, mda=False)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.cfg_scale != 1:
            self._soft_image(anatomy)

    def install(self, boundary: Boundary) -> None:
        if self.mda:
            for layer in boundary.anatomy.layers:
                boundary.attend(layer, self._attend)

    # --- Soft-image guidance ---

    def branches(self, call: Call) -> Sequence[Stream]:
        if self.cfg_scale == 1:
            return ()
        main = call.encoded
        soft = self._soft_image(call.boundary.anatomy).to(main.features)
        lengths = [last - first for images in call.images for first, last in images]
        features = torch.cat([soft[torch.arange(length, device=soft.device) % len(soft)] for length in lengths])
        # What was read off the tower stays, so that a reducer drops the same tokens in both rows.
        nothing = [torch.zeros_like(layer) for layer in main.deepstack]
        return (Stream(self, encoded=Encoded(main.inputs, features, nothing, main.readings)),)

    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        if not branches:
            return logits
        return contrasted(logits, own, branches[0], self.cfg_scale - 1, self.beta)

    def _soft_image(self, anatomy: Anatomy) -> Tensor:
        """E, float32 [n, D].

        Raises:
            InputError: if there is none that fits the model.
        """
        width = int(anatomy.text_config.hidden_size)
        if self.soft_image == UNTRAINED:
            return untrained(ROWS_UNTRAINED, width, seed=0)
        if self.soft_image == AUTO:
            file = soft_image_of(str(anatomy.model.name_or_path))
            if file is None:
                raise InputError(
                    "lacing needs a soft image that was learned for this model, and none lies beside its weights: make "
                    f"one with `sightline train soft-image`, or give its file as soft_image ('{UNTRAINED}' draws a "
                    "random one)"
                )
        else:
            file = Path(self.soft_image).expanduser()
            if not file.is_file():
                raise InputError(
                    f"soft_image of lacing must be '{AUTO}', '{UNTRAINED}' or the path of a file that `sightline train "
                    f"soft-image` has written; there is no file {self.soft_image!r}"
                )
        soft = _read(file, file.stat().st_mtime_ns)
        if soft.shape[1] != width:
            raise InputError(
                f"the soft image in {file} has width {soft.shape[1]}, but the decoder has width {width}: it was "
                "learned for another model; make one with `sightline train soft-image`"
            )
        return soft

    # --- Dual attention ---

    def _attend(self, call: Call, attending: Attending) -> Attended:
        """All rows alike, those of branches too: it is how the model was trained to attend."""
        length, keys = attending.query.shape[2], attending.key.shape[2]
        mask = attending.mask
        if mask is None:
            allowed = causal(1, length, keys, attending.query.device)
        else:
            mask = mask[:, :, -length:, :keys]
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        logits = replace(attending, mask=torch.ones_like(allowed)).logits()
        weights = dual_softmax(
            logits, _visual_keys(call, attending), allowed, visual_full_available=self.visual_full_available
        )
        return attending.outputs(weights), weights.to(attending.query.dtype)


def dual_softmax(logits: Tensor, visual: Tensor, allowed: Tensor, *, visual_full_available: bool = True) -> Tensor:
    """The weights of multimodal dual attention: a softmax over visual keys plus one over text keys.

    Args:
        logits: scaled q k with nothing masked, [R, H, q, k]; the queries are the last q of the k places.
        visual: bool [R, k], the visual keys that a row may see.
        allowed: bool [R or 1, 1, q, k], the model's own mask.
        visual_full_available: visual keys that come after a query are open to it (a sliding window still closes those
            too far before it). Else those that `allowed` opens, of which a visual query sees only itself.

    Returns:
        float32 [R, H, q, k]. A row sums to 2; to 1 where it has keys of one type only.
    """
    queries, keys = logits.shape[-2:]
    places = torch.arange(keys, device=logits.device)
    own = places[keys - queries :, None]
    is_visual = visual[:, None, None, :]
    if visual_full_available:
        pictures = is_visual & (allowed | (places > own))
    else:
        asks_for_itself = (places == own) | ~visual[:, None, keys - queries :, None]
        pictures = is_visual & allowed & asks_for_itself
    return _softmax_over(logits, pictures) + _softmax_over(logits, allowed & ~is_visual)


def _softmax_over(logits: Tensor, keys: Tensor) -> Tensor:
    """Float32 weights over the keys where `keys` is True; all zero where there is none."""
    weights = logits.masked_fill(~keys, torch.finfo(logits.dtype).min).softmax(dim=-1, dtype=torch.float32)
    return weights.masked_fill(~keys, 0.0)


def _visual_keys(call: Call, attending: Attending) -> Tensor:
    """bool [R, k]: the visual keys that each row of the batch may see."""
    shown = torch.cat(call.shown[: len(attending.query) // call.rows])
    columns = call.key_columns(attending.key.shape[2], attending.query.shape[2])
    return F.pad(shown, (0, columns.stop - shown.shape[1]))[:, columns]


# --- Soft images ---


def untrained(rows: int, width: int, *, seed: int) -> Tensor:
    """What the training of a soft image starts from: N(0, 1) / sqrt(width), float32 [rows, width]."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) / width**0.5


def soft_image_of(folder: str) -> Path | None:
    """The soft image in the folder that a model was loaded from, if there is one."""
    file = Path(folder) / f"{SOFT_IMAGE}.safetensors"
    return file if folder and file.is_file() else None


@functools.lru_cache(maxsize=4)
def _read(file: Path, modified: int) -> Tensor:
    """The tensor in a file that was last changed at `modified`."""
    try:
        soft = load_file(file)[SOFT_IMAGE]
    except (OSError, SafetensorError, KeyError) as error:
        reason = f"it has no tensor {SOFT_IMAGE!r}" if isinstance(error, KeyError) else error
        raise InputError(f"cannot read the soft image {file}: {reason}") from error
    if soft.ndim != 2 or not soft.numel() or not soft.is_floating_point():
        raise InputError(f"the soft image in {file} must be numbers of shape [n, D], not {list(soft.shape)}")
    return soft.float()
