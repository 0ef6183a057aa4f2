"""Where the parts of a stock vision-language model are, and which of its inputs are visual.

`Anatomy.of(model)` gives a small object that answers, for every supported family alike: which module is the vision
tower, the connector, the decoder; which positions of a prompt are visual, to which image they belong and on which grid
they lie; what can be read off the tower's patches (attention, keys) and which tokens they make; how a picture is taken
out of the model's inputs and put back. The families themselves are in `families.py`, one small class each; no model
class is named there or here.

Words: a *picture* is one square that the tower encodes, an *image* is what the user gave. Families that cut an image
into tiles (LlavaNext, LlavaOnevision, InternVL, Idefics3, SmolVLM) encode several pictures for one image. Images are
numbered through the batch, row after row, in the order of their tokens in the prompt.

What a forward receives. `model(**inputs)` gives `model.forward` and `base.forward` what the processor made: input_ids
and pixel_values, with image_sizes (LlavaNext, LlavaOnevision), image_grid_thw (Qwen) or pixel_attention_mask (Idefics3,
SmolVLM). `model.generate(**inputs)` (transformers 5.23, `generation/utils.py`) first calls `base.get_image_features`,
takes *all arguments that this function names* out of the inputs, and then calls the forward at prefill, or at every
step when there is no cache, with `mm_encoder_outputs={"image": encoded}` in their place. `encoded.pooler_output` is

- a list with one tensor [tokens, width] an image: Llava, LlavaNext, LlavaOnevision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL;
- a list with one tensor a row: Idefics3, SmolVLM;
- a tensor [pictures, tokens, width]: InternVL, PaliGemma, Gemma3.

Under beam search rows (and with them these features) are repeated before prefill, but the tower has run before that.
The methods below that take `inputs` take either form, unless they say what they need.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from sightline.errors import InputError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = Mapping[str, Any]
PictureFn = Callable[[Tensor, int], Tensor]
Triple = tuple[float, float, float]

# Normalisation of the tower's pixels by the `model_type` of the vision config: mean and standard deviation of R, G, B.
NORMALISATION: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "pixtral": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "qwen2_vl_vision": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "qwen2_5_vl_vision": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "internvl_vision": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
# Towers whose layers are alike: [layer_norm1, self_attn, layer_norm2, mlp], with q_proj and k_proj inside.
PLAIN_TOWERS = ("clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision")
STANDARD = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)  # one half each: SigLIP and what is made after it


class TowerReading(ABC):
    """Something read off a self-attention of the vision tower, a number or a vector for each patch.

    Hook `module` with `register_forward_pre_hook(hook, with_kwargs=True)` and give the hook's arguments to `read`. What
    is read is recomputed from the module's input, whatever attention implementation the tower runs with.

    Args:
        module: the layer's self-attention.
        leading: how many tokens stand before the patches: 1 where the tower has a [CLS] token.
    """

    def __init__(self, module: nn.Module, *, leading: int = 1) -> None:
        self.module, self.leading = module, leading

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """`row` of the hidden states among the arguments that a forward pre-hook of `module` gets."""
        return self.row(args[0] if args else kwargs["hidden_states"], visible_keys(kwargs.get("attention_mask")))

    @abstractmethod
    def row(self, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
        """What is read, [CLS] itself left out.

        Args:
            hidden_states: the module's input, [pictures, leading + patches, width].
            visible: bool [pictures, leading + patches]: which of them are no padding; None: all.

        Returns:
            float32 [pictures, patches], or [pictures, patches, d].
        """

    def keys(self, hidden_states: Tensor) -> Tensor:
        """The keys of all heads side by side, [pictures, leading + patches, heads * head_dim]."""
        module: Any = self.module
        key: Tensor = module.k_proj(hidden_states)
        return module.k_norm(key) if hasattr(module, "k_norm") else key  # InternVL normalises over all heads together

    def weights(
        self, hidden_states: Tensor, queries: slice, visible: Tensor | None = None, *, split: bool = True
    ) -> Tensor:
        """softmax(Q K^T * scale) of some queries over all keys, float32 [pictures, heads, queries, keys].

        `split=False` takes the full width as one single head.
        """
        module: Any = self.module
        heads, width = int(module.num_heads), int(module.head_dim)
        query, key = module.q_proj(hidden_states[:, queries]), self.keys(hidden_states)
        if hasattr(module, "q_norm"):
            query = module.q_norm(query)
        scale = float(module.scale) if split else (heads * width) ** -0.5
        if not split:
            heads, width = 1, heads * width
        query = query.unflatten(-1, (heads, width)).transpose(1, 2)
        key = key.unflatten(-1, (heads, width)).transpose(1, 2)
        logits: Tensor = (query @ key.transpose(-1, -2) * scale).float()
        if visible is not None:
            logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
        return logits.softmax(dim=-1)


def visible_keys(mask: Tensor | None) -> Tensor | None:
    """bool [pictures, keys] from the mask that a self-attention of a tower is given, of whatever form."""
    if mask is None:
        return None
    mask = mask[:, 0, 0] if mask.ndim == 4 else mask
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()


class ClsAttention(TowerReading):
    """The attention that the tower's [CLS] token pays to the patches in one layer, which costs O(patches) a head.

    Args:
        module: the layer's self-attention.
        leading: how many tokens stand before the patches, [CLS] the first of them.
        split: as the tower has it, averaged over its heads; False takes the full width as one head.
    """

    def __init__(self, module: nn.Module, *, leading: int = 1, split: bool = True) -> None:
        super().__init__(module, leading=leading)
        self.split = split

    @torch.no_grad()
    def row(self, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
        """A row's sum is 1 minus the weight that [CLS] gives itself."""
        weights = self.weights(hidden_states, slice(0, 1), visible, split=self.split)
        return weights.mean(dim=1)[:, 0, self.leading :]


class ReceivedAttention(TowerReading):
    """The attention that each patch receives from all patches in one layer: the column sums of the mean over heads."""

    @torch.no_grad()
    def row(self, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
        """Sums to less than the number of patches, where these also look at [CLS]."""
        weights = self.weights(hidden_states, slice(self.leading, None), visible)
        return weights.mean(dim=1).sum(dim=1)[:, self.leading :]


class GivenAttention(TowerReading):
    """The attention that each patch gives to all patches in one layer: what it does not give to [CLS]."""

    @torch.no_grad()
    def row(self, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
        """Row sums of the mean over heads: 1 each where the tower has no [CLS] token."""
        weights = self.weights(hidden_states, slice(self.leading, None), visible)
        return weights.mean(dim=1)[..., self.leading :].sum(dim=-1)


class MeanKeys(TowerReading):
    """The key of each patch in one layer, averaged over the heads: [pictures, patches, head_dim]."""

    @torch.no_grad()
    def row(self, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
        module: Any = self.module
        keys = self.keys(hidden_states[:, self.leading :]).unflatten(-1, (int(module.num_heads), -1))
        return keys.float().mean(dim=-2)


_Reading = TypeVar("_Reading", bound=TowerReading)


class Anatomy:
    """The parts of one model. Made by `Anatomy.of(model)`; the subclasses in `families.py` say what differs.

    This base class is right for a model made of `vision_tower`, `multi_modal_projector` and `language_model` whose
    images are one picture of a fixed size each (PaliGemma, and in most things Llava).
    """

    mrope: ClassVar[bool] = False
    """Positions have several axes (time, height, width), as in the Qwen-VL families."""

    tower_name: ClassVar[str] = "vision_tower"
    connector_name: ClassVar[str] = "multi_modal_projector"
    language_name: ClassVar[str] = "language_model"

    def __init__(self, model: PreTrainedModel, processor: Any = None) -> None:
        self.model = model
        self.family: str = model.config.model_type
        self.config: Any = model.config
        self.text_config: Any = model.config.get_text_config()
        self.vision_config: Any = self.config.vision_config
        mean, std = NORMALISATION.get(self.vision_config.model_type, STANDARD)
        self.processor = processor
        image_processor = getattr(processor, "image_processor", processor)
        if image_processor is not None and not getattr(image_processor, "do_normalize", True):
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        elif image_processor is not None:
            mean, std = image_processor.image_mean, image_processor.image_std
        self.pixel_mean: Triple = _triple(mean)
        self.pixel_std: Triple = _triple(std)

    @staticmethod
    def of(model: PreTrainedModel, processor: Any = None) -> Anatomy:
        """The anatomy of `model` (of the model inside, if it is wrapped by peft). A processor, if given, overrides the
        family's default pixel mean and deviation.

        Raises `InputError` for a model of an unknown family.
        """
        from sightline.models import families  # noqa: F401  (registers them; imported late because it needs this module)

        unwrap: Any = getattr(model, "get_base_model", None)
        model = model if unwrap is None else unwrap()
        family = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
        if family not in _FAMILIES:
            raise InputError(
                f"{unknown('model family', family, _FAMILIES)}. To add one, write a class like those in "
                "sightline/models/families.py and decorate it with @register_family(<model_type of its config>)."
            )
        return _FAMILIES[family](model, processor)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; None when no processor was given."""
        return getattr(self.processor, "tokenizer", self.processor)

    # --- Parts ---

    @property
    def base(self) -> Any:
        """The inner model that merges image features into the embeddings and calls `language_model`."""
        return self.model.model

    @property
    def vision_tower(self) -> nn.Module:
        tower: nn.Module = self.base.get_submodule(self.tower_name)
        return tower

    @property
    def connector(self) -> nn.Module | None:
        """What maps the tower's features into the decoder's space; None where it cannot be told from the tower."""
        connector: nn.Module = self.base.get_submodule(self.connector_name)
        return connector

    @property
    def plain_connector(self) -> bool:
        """Whether the connector reads [pictures, patches, C] and gives one visual token for each patch, in their order,
        so that something else may take its place."""
        return False

    @property
    def connector_width(self) -> int:
        """C: the width of the patches that a plain connector reads."""
        assert self.connector is not None
        return next(int(module.in_features) for module in self.connector.modules() if isinstance(module, nn.Linear))

    @property
    def language_model(self) -> Any:
        """The decoder without its head, called by `base` with `inputs_embeds=...`."""
        return self.base.get_submodule(self.language_name)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        layers: nn.ModuleList = self.language_model.layers
        return layers

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.language_model.norm
        return norm

    @property
    def head(self) -> nn.Module:
        """The output head. Prefer `head_logits`, which adds what the family does to the logits afterwards."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm [..., width] -> the model's logits [..., vocabulary]."""
        logits: Tensor = self.head(hidden)
        return logits

    @property
    def num_heads(self) -> int:
        """Query heads of a decoder layer."""
        return int(self.text_config.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        return int(self.text_config.num_key_value_heads)

    @property
    def head_dim(self) -> int:
        attention: Any = self.layers[0].get_submodule("self_attn")
        return int(attention.head_dim)

    def attention(self, layer: nn.Module) -> Any:
        """The self-attention of a decoder layer."""
        return layer.get_submodule("self_attn")

    def attention_heads_input(self, layer: nn.Module) -> nn.Linear:
        """The output projection of a decoder layer's attention. Its input [B, T, heads * head_dim] holds the outputs of
        the heads side by side, in the order of the query heads."""
        projection: nn.Linear = layer.get_submodule("self_attn.o_proj")  # type: ignore[assignment]
        return projection

    def mlp(self, layer: nn.Module) -> nn.Module:
        """The feed-forward part of a decoder layer."""
        return layer.get_submodule("mlp")

    # --- Visual positions ---

    @property
    def image_token_id(self) -> int:
        """The placeholder token: a prompt holds one for every visual token."""
        return int(self.config.image_token_id)

    def visual_positions(self, input_ids: Tensor) -> Tensor:
        """[B, S] -> bool [B, S]: where the visual tokens are."""
        return input_ids == self.image_token_id

    def tokens_per_image(self, inputs: Inputs) -> list[int]:
        """Number of visual tokens of each image of the batch; the sum is that of `visual_positions(input_ids)`.

        Raises `InputError` when prompt and pictures do not fit together.
        """
        counts = self._image_lengths(inputs)
        total = int(self.visual_positions(_ids(inputs)).sum())
        if sum(counts) != total:
            raise InputError(
                f"the images need {sum(counts)} visual tokens but the prompt has {total} placeholders (token "
                f"{self.image_token_id}); use the processor that belongs to the model"
            )
        return counts

    def image_indices(self, inputs: Inputs) -> list[int]:
        """For each image of the batch, the row that it belongs to. Raises `InputError` when an image spans two rows."""
        counts = self.tokens_per_image(inputs)
        rows = self.visual_positions(_ids(inputs)).nonzero()[:, 0].tolist()
        owners = []
        start = 0
        for count in counts:
            if rows[start] != rows[start + count - 1]:
                raise InputError("the placeholders of an image are spread over two rows; use the model's own processor")
            owners.append(rows[start])
            start += count
        return owners

    def grids(self, inputs: Inputs) -> list[tuple[int, int] | None]:
        """(rows, columns) of each image's visual tokens as a raster, read row by row. None for an image whose tokens
        are no single raster (it was cut into tiles, or has newline tokens)."""
        whole, grid = self._picture_tokens(), self.picture_grid
        return [grid if count == whole else None for count in self.tokens_per_image(inputs)]

    @property
    def picture_grid(self) -> tuple[int, int]:
        """(rows, columns) of the visual tokens of one picture, where all have the same size."""
        side = int(self._picture_tokens() ** 0.5)
        rows, columns = getattr(self.vision_config, "grid", None) or (side, side)  # an encoder of ours says its grid
        return int(rows), int(columns)

    @property
    def rasters(self) -> bool:
        """Whether every picture that the tower encodes gives one raster of visual tokens, and nothing but it."""
        return True

    def _picture_tokens(self) -> int:
        """Visual tokens of one picture, where all have the same size."""
        own = getattr(self.vision_config, "num_tokens", None)  # of an encoder of ours
        return int(own or (self.vision_config.image_size // self.vision_config.patch_size) ** 2)

    def _image_lengths(self, inputs: Inputs) -> list[int]:
        whole = self._picture_tokens()
        return [whole] * (int(self.visual_positions(_ids(inputs)).sum()) // whole)

    # --- Readings of the tower ---

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        """The layers of the tower, where it is known which of its patches make which visual token; else nothing."""
        if self.vision_config.model_type not in PLAIN_TOWERS:
            return ()
        tower: Any = self.vision_tower
        return list(getattr(tower, "vision_model", tower).encoder.layers)

    @property
    def tower_attentions(self) -> Sequence[nn.Module]:
        """The self-attention of each of `tower_layers`."""
        return [layer.get_submodule("self_attn") for layer in self.tower_layers]

    @property
    def leading_tokens(self) -> int:
        """How many tokens stand before the patches in the tower: its [CLS] token, or none."""
        return int(self.vision_config.model_type == "clip_vision_model")

    @property
    def connected_layer(self) -> int | None:
        """Which of `tower_layers` gives the output that the connector reads; None: none of them."""
        return len(self.tower_layers) - 1 if self.tower_layers else None

    @property
    def cls(self) -> ClsAttention | None:
        """The attention of the tower's [CLS] token in the layer whose output the connector reads; None when the tower
        has none."""
        layer = self.connected_layer
        if layer is None or self.leading_tokens == 0:
            return None
        return ClsAttention(self.tower_attentions[layer], leading=self.leading_tokens)

    @property
    def patches_are_tokens(self) -> bool:
        """Whether each patch of a picture is one visual token, and not a part of one."""
        if not self.tower_layers:
            return False
        patches: int = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return self._picture_tokens() == patches

    def reading(self, kind: type[_Reading], name: str) -> _Reading:
        """A reading of the layer whose output the connector reads.

        Args:
            kind: the class of the reading.
            name: of the method that asks, for the error.

        Raises:
            InputError: where it is not known which patches of the tower make which visual token.
        """
        layer = self.connected_layer
        if layer is None:
            raise InputError(f"{name} looks at the patches of the vision tower, but {self._no_layout()}")
        return kind(self.tower_attentions[layer], leading=self.leading_tokens)

    def _no_layout(self) -> str:
        return f"in {self.family} with this tower it is not known which of them make which visual token"

    def on_tokens(self, reading: Tensor, inputs: Inputs) -> list[Tensor]:
        """What was read off the tower for each patch, on the visual tokens instead.

        Where several patches make one token, it gets their sum; a token that is no patch (a newline) gets -inf, or
        zeros for a vector.

        Args:
            reading: [pictures, patches] or [pictures, patches, d], of the whole batch.
            inputs: of the batch.

        Returns:
            For each image [tokens] or [tokens, d], in the order of the tokens in the prompt.

        Raises:
            InputError: where it is not known which patches make which token.
        """
        if not self.tower_layers:
            raise InputError(f"patches cannot be laid on visual tokens: {self._no_layout()}")
        tokens = square_sums(reading, self._picture_tokens()).flatten(0, 1)
        return list(torch.split(tokens, self.tokens_per_image(inputs)))

    # --- Pixels ---

    def map_pictures(self, inputs: Inputs, fn: PictureFn, *, normalised: bool = False) -> dict[str, Any]:
        """A copy of `inputs` whose pictures have been changed by `fn(picture, index)`.

        `picture` is float32 [3, H, W] in [0, 1], `index` says which image of the batch it is or is a tile of; `fn`
        gives back a picture of the same shape. The result is clamped to [0, 1] and cast back. With `normalised`, `fn`
        sees the pixels as the tower does, and nothing is clamped. The tensors of `inputs` are not touched. Raises
        `InputError` when there are no pixel_values.
        """
        if inputs.get("pixel_values") is None:
            raise InputError("there are no pixel_values to change: give the inputs that the processor made")

        def change(picture: Tensor, index: int) -> Tensor:
            return self._checked(picture, fn(picture, index)) if normalised else self._changed(picture, fn, index)

        return {**inputs, "pixel_values": self._mapped(inputs, change)}

    def pictures(self, inputs: Inputs, *, normalised: bool = False) -> list[list[Tensor]]:
        """What `map_pictures` gives to its `fn`: for each image of the batch the picture, or its tiles in order."""
        found: list[list[Tensor]] = [[] for _ in self.image_indices(inputs)]

        def take(picture: Tensor, image: int) -> Tensor:
            found[image].append(picture)
            return picture

        self.map_pictures(inputs, take, normalised=normalised)
        return found

    def _mapped(self, inputs: Inputs, fn: PictureFn) -> Tensor:
        """`pixel_values` [pictures, 3, H, W] with every picture, normalised as it is, changed."""
        pixels: Tensor = inputs["pixel_values"]
        owners = self._picture_owners(inputs)
        if len(owners) != len(pixels):
            raise InputError(f"there are {len(pixels)} pictures but the prompt has placeholders for {len(owners)}")
        return torch.stack([fn(pixels[place], owner) for place, owner in enumerate(owners)])

    def _picture_owners(self, inputs: Inputs) -> list[int]:
        """For each picture that the tower encodes, the image that it belongs to."""
        return list(range(len(self.tokens_per_image(inputs))))

    def _changed(self, normalised: Tensor, fn: PictureFn, index: int) -> Tensor:
        mean = torch.tensor(self.pixel_mean, device=normalised.device)[:, None, None]
        std = torch.tensor(self.pixel_std, device=normalised.device)[:, None, None]
        picture = normalised.float() * std + mean
        changed = self._checked(picture, fn(picture, index))
        return ((changed.clamp(0, 1) - mean) / std).to(normalised.dtype)

    @staticmethod
    def _checked(picture: Tensor, changed: Tensor) -> Tensor:
        if changed.shape != picture.shape:
            raise InputError(f"a picture of shape {tuple(picture.shape)} was changed into {tuple(changed.shape)}")
        return changed.to(picture.dtype)


def square_sums(values: Tensor, tokens: int) -> Tensor:
    """Sums over squares of patches: [pictures, patches, ...] of square pictures -> [pictures, tokens, ...]."""
    patches = values.shape[1]
    if patches == tokens:
        return values
    rows, high = math.isqrt(tokens), math.isqrt(patches // tokens)
    squares = values.reshape(len(values), rows, high, rows, high, *values.shape[2:])
    return squares.sum(dim=(2, 4)).flatten(1, 2)


_FAMILIES: dict[str, type[Anatomy]] = {}
_Class = TypeVar("_Class", bound=type[Anatomy])


def register_family(*model_types: str) -> Callable[[_Class], _Class]:
    """Class decorator: the anatomy of models whose `config.model_type` is one of `model_types`."""

    def register(anatomy: _Class) -> _Class:
        for model_type in model_types:
            _FAMILIES[model_type] = anatomy
        return anatomy

    return register


def known_families() -> tuple[str, ...]:
    """The `model_type` of every supported family, sorted."""
    from sightline.models import families  # noqa: F401  (registers them)

    return tuple(sorted(_FAMILIES))


def runs(mask: Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, start, length) of every unbroken run of True in bool [B, S], row after row.

    >>> list(runs(torch.tensor([[False, True, True], [True, False, True]])))
    [(0, 1, 2), (1, 0, 1), (1, 2, 1)]
    """
    edges = nn.functional.pad(mask.long(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    for (row, start), (_, end) in zip(starts, ends, strict=True):
        yield row, start, end - start


def encoded_lengths(inputs: Inputs) -> list[int] | None:
    """Lengths of the features that `generate` has already computed, one for each entry of its list, or None."""
    image = (inputs.get("mm_encoder_outputs") or {}).get("image")
    return None if image is None else [len(features) for features in image.pooler_output]


def _ids(inputs: Inputs) -> Tensor:
    ids: Tensor | None = inputs.get("input_ids")
    if ids is None:
        raise InputError("input_ids are needed to find the visual tokens; inputs_embeds alone do not show them")
    return ids


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
