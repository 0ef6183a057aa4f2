"""Which parts of a picture match what is asked about it.

A `Matcher` gives, for each picture, a map of relevance and one number that says how well picture and prompt fit. Three
are here:

- `DecoderAttention`: the decoder's own attention to the visual tokens. Needs nothing else, but says nothing of how well
  picture and prompt fit.
- a BLIP image-text matching checkpoint: GradCAM of its cross-attention.
- a CLIP checkpoint: the attention of its last vision layer, weighted by the gradient of the similarity.

Shapes: a map is float32 [h, w], a picture float32 [3, H, W] in [0, 1]; an image that the model cuts into tiles comes as
its tiles.
"""

from __future__ import annotations

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from sightline.errors import InputError
from sightline.models.answering import prompt
from sightline.models.attending import AttentionSwitch
from sightline.models.stock_reading import prompt_attention

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.call import Call


@dataclass(frozen=True)
class Match:
    """How one picture answers to its prompt."""

    relevance: Tensor
    """float32 [h, w], on any scale; higher matches more."""
    similarity: float
    """How well the whole picture fits: 1 perfectly, 0 not at all."""


class Matcher(ABC):
    """Finds what in the pictures matches the prompts."""

    def check(self, anatomy: Anatomy) -> None:  # noqa: B027  (some need nothing)
        """Raises `InputError` where it cannot work on this model."""

    @abstractmethod
    def matches(self, call: Call, pictures: Sequence[Sequence[Tensor]]) -> list[list[Match]]:
        """For each image of the batch, for each of its pictures, the match with the prompt that holds the image. Asked
        while the prompt is about to be read, before anything is dropped from it."""


@dataclass(frozen=True)
class DecoderAttention(Matcher):
    """The attention of the unchanged decoder, the mean over heads and some layers; costs one forward more a prompt.

    Args:
        layers: of a decoder of some depth, which (0-based); None for the third and the fourth fifth.
        queries: `last` looks from the prompt's last position, where the answer begins; `text` takes the mean over all
            positions after the last visual token.
        similarity: what every picture is said to have.
    """

    layers: tuple[int, ...] | None
    queries: str
    similarity: float

    def layers_of(self, depth: int) -> Sequence[int]:
        if self.layers is not None:
            return sorted(set(self.layers))
        return range(round(0.4 * depth), round(0.8 * depth))

    def check(self, anatomy: Anatomy) -> None:
        if not anatomy.rasters:
            raise InputError(
                f"the decoder's attention cannot be laid over the pictures of this {anatomy.family}, whose visual "
                "tokens are no raster; give a CLIP or BLIP checkpoint as the matcher"
            )
        depth = len(anatomy.layers)
        wrong = [layer for layer in self.layers_of(depth) if not 0 <= layer < depth]
        if wrong:
            raise InputError(f"the decoder has layers 0 to {depth - 1}, and no layer {wrong[0]} to read attention from")
        AttentionSwitch(anatomy.attention(anatomy.layers[0]).config).back()  # raises where weights cannot be had

    @torch.no_grad()
    def matches(self, call: Call, pictures: Sequence[Sequence[Tensor]]) -> list[list[Match]]:
        assert call.prompt is not None
        view, anatomy = call.prompt[0], call.boundary.anatomy
        layers = self.layers_of(len(anatomy.layers))
        attention = prompt_attention(call, layers).mean(dim=1)  # [B, T, T]
        grids = anatomy.grids(call.inputs)
        found: list[list[Match]] = []
        for encoded_row, images in enumerate(call.images):
            row = encoded_row * call.beams
            visual = view.visual[row]
            looks = attention[row, self._looking(visual, view.real[row])].mean(dim=0)[visual]
            for start, end in images:
                first = images[0][0]
                found.append(self._maps(looks[start - first : end - first], grids[len(found)], pictures[len(found)]))
        if any(not matches for matches in found):
            raise InputError(
                f"a map cannot be laid over an image of this {anatomy.family} whose visual tokens are no raster; give "
                "a CLIP or BLIP checkpoint as the matcher"
            )
        return found

    def _looking(self, visual: Tensor, real: Tensor) -> Tensor:
        """bool [T]: the positions whose attention is read."""
        places = torch.arange(len(visual), device=visual.device)
        if self.queries == "last":
            return places == len(visual) - 1
        after = real & (places > places[visual].amax()) if bool(visual.any()) else real
        return after if bool(after.any()) else places == len(visual) - 1

    def _maps(self, looks: Tensor, grid: tuple[int, int] | None, tiles: Sequence[Tensor]) -> list[Match]:
        """One map of the whole image, or one of each of its tiles; nothing where the tokens are no rasters."""
        if grid is None:
            side = math.isqrt(len(looks) // len(tiles))
            grid = (side, side)
        if len(tiles) * grid[0] * grid[1] != len(looks):
            return []
        return [Match(part.reshape(grid), self.similarity) for part in looks.float().chunk(len(tiles))]


@dataclass(frozen=True)
class Checkpoint(Matcher):
    """A BLIP or CLIP checkpoint, a folder or a hub id. It is loaded when the first prompt is read, from safetensors
    only, and stays in memory, beside the one used before it."""

    name: str

    def check(self, anatomy: Anatomy) -> None:
        if not callable(getattr(anatomy.tokenizer, "decode", None)):
            raise InputError(
                f"the matcher {self.name!r} reads the question, for which the model's tokenizer is needed: "
                "attach(model, ..., processor=processor)"
            )
        _matching_class(self.name)

    def matches(self, call: Call, pictures: Sequence[Sequence[Tensor]]) -> list[list[Match]]:
        owners = call.boundary.anatomy.image_indices(call.inputs)
        # Gradients are needed, and tensors made in inference mode can have none.
        with torch.inference_mode(False), torch.enable_grad():
            matching = _loaded(self.name)
            found = []
            for row, tiles in zip(owners, pictures, strict=True):
                text = question(call, row * call.beams)
                found.append([matching.match(tile.detach().clone(), text) for tile in tiles])
        return found


# --- The question ---

_PLACE = "THE-QUESTION-STANDS-HERE"


def question(call: Call, row: int) -> str:
    """The text of a row's prompt after its last picture (all of it, if there is none), without special tokens, and
    without what the processor's chat template puts around a question, if the prompt was made by that."""
    anatomy = call.boundary.anatomy
    tokenizer, ids = anatomy.tokenizer, call.prompt_ids(row)
    visual = anatomy.visual_positions(ids[None])[0]
    between, after = _template(anatomy.processor, tokenizer)
    for part in (ids[int(visual.nonzero()[-1]) + 1 :], ids[~visual]):
        text = str(tokenizer.decode(part, skip_special_tokens=True)).strip()
        text = text.removeprefix(between).removesuffix(after).strip()
        if text:
            break
    return text


def _template(processor: Any, tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes between a picture and a question, and after it, as decoding shows it."""
    if getattr(processor, "image_processor", None) is None or not getattr(processor, "chat_template", None):
        return "", ""
    before, _, after = prompt(processor, _PLACE).partition(_PLACE)
    between = before.rpartition(getattr(processor, "image_token", "<image>"))[2]

    def shown(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    return shown(between), shown(after)


# --- Checkpoints ---


class ImageTextModel(ABC):
    """A small model that scores a picture against a text, and says which patches speak for it."""

    architecture: ClassVar[str]
    longest: ClassVar[int]
    """Tokens of the longest text that is read."""

    def __init__(self, model: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    @abstractmethod
    def match(self, picture: Tensor, text: str) -> Match:
        """Asked with gradients on."""

    def pixels(self, picture: Tensor) -> Tensor:
        """[1, 3, side, side] as the model wants it; a picture that is no square is stretched, so that the map covers
        all of it."""
        self.model.to(picture.device)
        side = int(self.model.config.vision_config.image_size)
        resized = F.interpolate(picture[None], size=(side, side), mode="bicubic", antialias=True)
        pixels = (resized.clamp(0, 1) - self.mean.to(picture)) / self.std.to(picture)
        return pixels.requires_grad_()

    def words(self, text: str) -> dict[str, Tensor]:
        """input_ids and attention_mask [1, L]."""
        longest = min(self.longest, int(self.model.config.text_config.max_position_embeddings))
        encoded = self.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def square(self, patches: Tensor) -> Tensor:
        """[patches] -> [side, side]."""
        side = math.isqrt(len(patches))
        return patches.reshape(side, side).detach()


class BlipMatching(ImageTextModel):
    """GradCAM of BLIP's image-text matching (Li et al. 2022, arXiv:2201.12086; `compute_gradcam` of LAVIS).

    P are the cross-attention probabilities of the text layer in the middle (6 of 12), G the gradient of the logit of
    "match" with respect to them:

        map        = mean over the text's own tokens of   mean over heads of P * relu(G)
        similarity = cosine of the projected [CLS] of picture and text (the ITC head)

    The text is cleaned as BLIP cleans captions. As in LAVIS the matching head reads the token [ENC], which
    `transformers` leaves to the caller; a checkpoint whose vocabulary has no room for it reads [CLS].
    """

    architecture: ClassVar[str] = "BlipForImageTextRetrieval"
    longest: ClassVar[int] = 35

    def match(self, picture: Tensor, text: str) -> Match:
        model, words = self.model, self.words(clean(text))
        layers = model.text_encoder.encoder.layer
        seen: list[Tensor] = []
        handle = (
            layers[len(layers) // 2]
            .crossattention.get_submodule("self")
            .register_forward_hook(lambda module, args, output: seen.append(output[1]))
        )
        try:
            output = model(
                input_ids=self._encoding(words["input_ids"]),
                attention_mask=words["attention_mask"],
                pixel_values=self.pixels(picture),
                use_itm_head=True,
            )
        finally:
            handle.remove()
        cam = gradcam(seen[0], output.itm_score[:, 1].sum())[0]  # [L, 1 + patches]
        own = cam[1:-1, 1:]  # without [ENC] and [SEP], and without the picture's [CLS]
        relevance = own.mean(dim=0) if len(own) else cam.new_zeros(cam.shape[1] - 1)
        with torch.no_grad():
            text_state = model.text_encoder(**words).last_hidden_state[:, 0]
            image_state = output.last_hidden_state[:, 0]
            cosine = F.cosine_similarity(model.vision_proj(image_state), model.text_proj(text_state))
        return Match(self.square(relevance), cosine.item())

    def _encoding(self, ids: Tensor) -> Tensor:
        """The same text with [ENC] in the place of [CLS]."""
        vocabulary = int(self.model.config.text_config.vocab_size)
        enc = self.tokenizer.get_vocab().get("[ENC]")
        if enc is None and vocabulary == len(self.tokenizer) + 2:  # BLIP adds [DEC] and [ENC], its tokenizer may not
            enc = vocabulary - 1
        if enc is None:
            return ids
        ids = ids.clone()
        ids[:, 0] = enc
        return ids


class ClipMatching(ImageTextModel):
    """The gradient-weighted attention of CLIP's last vision layer; not from the paper, which has BLIP only.

    A is that layer's attention, G the gradient of the cosine s of picture and text with respect to it:

        map = mean over heads of A * relu(G), from [CLS] to the patches,        similarity = s
    """

    architecture: ClassVar[str] = "CLIPModel"
    longest: ClassVar[int] = 77

    def match(self, picture: Tensor, text: str) -> Match:
        model, seen = self.model, []
        layer: nn.Module = model.vision_model.encoder.layers[-1].self_attn
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        try:
            output = model(**self.words(text), pixel_values=self.pixels(picture))
        finally:
            handle.remove()
        cosine = (output.image_embeds * output.text_embeds).sum()
        return Match(self.square(gradcam(seen[0], cosine)[0, 0, 1:]), cosine.item())


def gradcam(attention: Tensor, score: Tensor) -> Tensor:
    """Attention [..., heads, q, k] where it speaks for the score: P * relu(dscore/dP), the mean over heads."""
    (gradient,) = torch.autograd.grad(score, attention)
    return (attention * gradient.clamp(min=0)).mean(dim=-3).detach()


def clean(text: str) -> str:
    """A text as BLIP reads captions: lower case, without punctuation, at most 50 words."""
    words = re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split()
    return " ".join(words[:50])


_Result = TypeVar("_Result")

MATCHING: tuple[type[ImageTextModel], ...] = (BlipMatching, ClipMatching)


def _matching_class(checkpoint: str) -> type[ImageTextModel]:
    config = _read(checkpoint, lambda: transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False))
    for kind in MATCHING:
        if kind.architecture in (config.architectures or ()):
            return kind
    raise InputError(
        f"the matcher {checkpoint!r} must be a checkpoint of {' or '.join(kind.architecture for kind in MATCHING)}, "
        f"not of {config.model_type!r}"
    )


@functools.lru_cache(maxsize=2)
def _loaded(checkpoint: str) -> ImageTextModel:
    kind = _matching_class(checkpoint)

    def load() -> ImageTextModel:
        # Eager attention, because others hide their weights; float32, because the map is a product of small numbers.
        model = getattr(transformers, kind.architecture).from_pretrained(
            checkpoint,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="eager",
        )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        settings, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint)
        return kind(model.eval().requires_grad_(False), tokenizer, settings["image_mean"], settings["image_std"])

    return _read(checkpoint, load)


def _read(checkpoint: str, read: Callable[[], _Result]) -> _Result:
    try:
        return read()
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot load the matcher {checkpoint!r}: {reason}") from error
