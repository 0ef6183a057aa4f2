"""The supported families: what each does differently from `Anatomy`. Checked against transformers 5.23."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.image_processing_utils import select_best_resolution

from sightline.errors import InputError
from sightline.models.anatomy import (
    Anatomy,
    Inputs,
    PictureFn,
    encoded_lengths,
    register_family,
    runs,
)


def _layer_index(chosen: int | list[int], layers: int) -> int | None:
    """Index of the tower layer whose output is `hidden_states[chosen]`; of several, the deepest. None: no layer's.

    `hidden_states` has one entry more than there are layers, the embeddings come first: entry k is the output of layer
    k - 1, and counted from the end entry -k is that of layer -k.
    """
    entries = [chosen] if isinstance(chosen, int) else list(chosen)
    index = max(entry - 1 if entry >= 0 else layers + entry for entry in entries)
    return index if 0 <= index < layers else None


class _ClipAnatomy(Anatomy):
    """What Llava and LlavaNext share: a CLIP or SigLIP tower, one of whose layers is chosen by the config."""

    @property
    def _drops_cls(self) -> bool:
        """[CLS] is there, and is not itself handed on as a visual token."""
        clip: bool = self.vision_config.model_type == "clip_vision_model"
        return clip and self.config.vision_feature_select_strategy == "default"

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        """None where [CLS] is itself a visual token, or the first patch is taken for one."""
        drops_first = self.config.vision_feature_select_strategy == "default"
        return super().tower_layers if drops_first == bool(self.leading_tokens) else ()

    @property
    def connected_layer(self) -> int | None:
        return _layer_index(self.config.vision_feature_layer, len(self.tower_layers))


@register_family("llava")
class Llava(_ClipAnatomy):
    """LLaVA-1.5 and its like (CLIP or SigLIP tower), and Pixtral in the same class (pictures of any size)."""

    def _picture_tokens(self) -> int:
        patches = super()._picture_tokens()
        keeps_cls = self.vision_config.model_type == "clip_vision_model" and not self._drops_cls
        return patches + int(keeps_cls)

    def _image_lengths(self, inputs: Inputs) -> list[int]:
        if self.vision_config.model_type != "pixtral":
            return super()._image_lengths(inputs)
        if inputs.get("image_sizes") is not None:
            return [rows * columns for rows, columns in self._pixtral_grids(inputs)]
        return _encoded_or_missing(inputs, "image_sizes")

    def _pixtral_grids(self, inputs: Inputs) -> list[tuple[int, int]]:
        patch = int(self.vision_config.patch_size)
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        return [(int(height) // patch, int(width) // patch) for height, width in sizes]

    def grids(self, inputs: Inputs) -> list[tuple[int, int] | None]:
        if self.vision_config.model_type == "pixtral":
            _needed(inputs, "image_sizes")
            return list(self._pixtral_grids(inputs))
        if not self.rasters:  # [CLS] is one of the tokens
            return [None] * len(self.tokens_per_image(inputs))
        return super().grids(inputs)

    @property
    def rasters(self) -> bool:
        return self._picture_tokens() == super()._picture_tokens()

    @property
    def plain_connector(self) -> bool:
        return self.rasters and self.vision_config.model_type != "pixtral"

    def _mapped(self, inputs: Inputs, fn: PictureFn) -> Tensor:
        if self.vision_config.model_type != "pixtral":
            return super()._mapped(inputs, fn)
        changed: Tensor = inputs["pixel_values"].clone()  # pictures are padded on the right and below
        for index, (height, width) in enumerate(torch.as_tensor(_needed(inputs, "image_sizes")).tolist()):
            part = changed[index, :, :height, :width]
            changed[index, :, :height, :width] = fn(part, index)
        return changed


@register_family("llava_next")
class LlavaNext(_ClipAnatomy):
    """LLaVA-1.6: an image is encoded whole and in tiles; the tiles' features are laid out as one raster, the padding is
    cut away and a newline token ends each row (`pack_image_features`)."""

    def tiles_per_image(self, inputs: Inputs) -> list[int]:
        """Pictures that the tower encodes for each image: the whole, and the tiles of its best resolution."""
        side = int(self.vision_config.image_size)
        counts = []
        for size in torch.as_tensor(_needed(inputs, "image_sizes")).tolist():
            height, width = select_best_resolution(size, self.config.image_grid_pinpoints)
            counts.append(math.ceil(height / side) * math.ceil(width / side) + 1)
        return counts

    def _pack(self, features: list[Tensor], inputs: Inputs, newline: Tensor) -> list[Tensor]:
        """The model's own packing, of features [tiles, patches, d] of each image -> [tokens, d] of each image."""
        sizes = torch.as_tensor(inputs["image_sizes"])
        packed, _ = self.base.pack_image_features(
            features,
            sizes,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            image_newline=newline,
        )
        return list(packed)

    def _image_lengths(self, inputs: Inputs) -> list[int]:
        if inputs.get("image_sizes") is None:
            return _encoded_or_missing(inputs, "image_sizes")
        patches = self._tower_patches()
        blank = [torch.zeros(tiles, patches, 1) for tiles in self.tiles_per_image(inputs)]
        return [len(tokens) for tokens in self._pack(blank, inputs, torch.zeros(1))]

    def _tower_patches(self) -> int:
        return int(self.vision_config.image_size // self.vision_config.patch_size) ** 2

    def grids(self, inputs: Inputs) -> list[tuple[int, int] | None]:
        return [None] * len(self.tokens_per_image(inputs))

    @property
    def rasters(self) -> bool:
        return False

    def on_tokens(self, reading: Tensor, inputs: Inputs) -> list[Tensor]:
        if not self.tower_layers:
            return super().on_tokens(reading, inputs)
        tiles = self.tiles_per_image(inputs)
        if reading.ndim == 3:
            return self._pack(list(torch.split(reading, tiles)), inputs, reading.new_zeros(reading.shape[-1]))
        newline = reading.new_full((1,), -torch.inf)
        return [tokens[:, 0] for tokens in self._pack(list(torch.split(reading[..., None], tiles)), inputs, newline)]

    def _picture_owners(self, inputs: Inputs) -> list[int]:
        return [image for image, tiles in enumerate(self.tiles_per_image(inputs)) for _ in range(tiles)]

    def _mapped(self, inputs: Inputs, fn: PictureFn) -> Tensor:
        pixels: Tensor = inputs["pixel_values"]
        if pixels.ndim == 4:  # the tiles of all images one after the other
            return super()._mapped(inputs, fn)
        changed = pixels.clone()  # [images, most tiles, 3, H, W]: the tiles past an image's own are padding
        for image, tiles in enumerate(self.tiles_per_image(inputs)):
            for tile in range(tiles):
                changed[image, tile] = fn(pixels[image, tile], image)
        return changed


@register_family("llava_onevision")
class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: as LlavaNext with a SigLIP tower; rasters that are too large are shrunk while packing, and
    images that share their prompt with others (`batch_num_images`) are encoded whole only."""

    def tiles_per_image(self, inputs: Inputs) -> list[int]:
        tiles = super().tiles_per_image(inputs)
        groups = inputs.get("batch_num_images")
        if groups is None:
            return tiles
        alone = [int(number) == 1 for number in groups for _ in range(int(number))]
        return [count if single else 1 for count, single in zip(tiles, alone, strict=True)]

    def _pack(self, features: list[Tensor], inputs: Inputs, newline: Tensor) -> list[Tensor]:
        sizes = torch.as_tensor(inputs["image_sizes"])
        packed, _ = self.base.pack_image_features(
            features, sizes, image_newline=newline, vision_aspect_ratio=self.config.vision_aspect_ratio
        )
        return list(packed)


@register_family("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
class QwenVL(Anatomy):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size as flat patches, merged 2 x 2 into tokens."""

    mrope = True
    tower_name = "visual"
    connector_name = "visual.merger"

    @property
    def _merge(self) -> int:
        return int(self.vision_config.spatial_merge_size)

    def _image_lengths(self, inputs: Inputs) -> list[int]:
        if inputs.get("image_grid_thw") is None:
            return _encoded_or_missing(inputs, "image_grid_thw")
        return [frames * rows * columns // self._merge**2 for frames, rows, columns in _grid(inputs)]

    def grids(self, inputs: Inputs) -> list[tuple[int, int] | None]:
        return [
            (rows // self._merge, columns // self._merge) if frames == 1 else None
            for frames, rows, columns in _grid(inputs)
        ]

    def _mapped(self, inputs: Inputs, fn: PictureFn) -> Tensor:
        pixels: Tensor = inputs["pixel_values"]
        grid = _grid(inputs)
        changed = []
        for index, flat in enumerate(torch.split(pixels, [frames * rows * columns for frames, rows, columns in grid])):
            frames = self.unflatten(flat, grid[index])
            if bool((frames == frames[:1]).all()):  # a still picture, repeated to fill the temporal patch
                frames = fn(frames[0], index).expand_as(frames)
            else:
                frames = torch.stack([fn(frame, index) for frame in frames])
            changed.append(self.flatten(frames))
        return torch.cat(changed)

    def unflatten(self, flat: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches [t * h * w, 3 * temporal * patch * patch] of one image -> frames [t * temporal, 3, H, W]."""
        (frames, rows, columns), merge = grid, self._merge
        patch, temporal = int(self.vision_config.patch_size), int(self.vision_config.temporal_patch_size)
        blocks = flat.reshape(
            frames, rows // merge, columns // merge, merge, merge, -1, temporal, patch, patch
        )  # t, block row, block column, row in block, column in block, channel, frame in patch, row, column
        ordered = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        return ordered.reshape(frames * temporal, -1, rows * patch, columns * patch)

    def flatten(self, frames: Tensor) -> Tensor:
        """The inverse of `unflatten`."""
        merge = self._merge
        patch, temporal = int(self.vision_config.patch_size), int(self.vision_config.temporal_patch_size)
        times, channels, height, width = frames.shape
        blocks = frames.reshape(
            times // temporal,
            temporal,
            channels,
            height // (patch * merge),
            merge,
            patch,
            width // (patch * merge),
            merge,
            patch,
        )  # t, frame in patch, channel, block row, row in block, row, block column, column in block, column
        return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * temporal * patch * patch)


@register_family("internvl")
class InternVL(Anatomy):
    """InternVL: tiles of a fixed size, each of whose patch features are pixel-shuffled (2 x 2 patches make a token).
    The tokens of all tiles of an image stand in one unbroken run, between tokens that open and close it."""

    def _picture_tokens(self) -> int:
        height, width = self.vision_config.image_size
        patch_height, patch_width = self.vision_config.patch_size
        patches = (height // patch_height) * (width // patch_width)
        return int(patches * self.config.downsample_ratio**2)

    def _image_lengths(self, inputs: Inputs) -> list[int]:
        return [length for _, _, length in runs(self.visual_positions(inputs["input_ids"]))]

    def _picture_owners(self, inputs: Inputs) -> list[int]:
        whole = self._picture_tokens()
        lengths = self.tokens_per_image(inputs)
        return [image for image, length in enumerate(lengths) for _ in range(length // whole)]

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        if self.config.vision_feature_select_strategy != "default":  # [CLS] is one of the features
            return ()
        layers: Any = self.vision_tower.get_submodule("encoder.layer")
        return list(layers)

    @property
    def tower_attentions(self) -> Sequence[nn.Module]:
        return [layer.get_submodule("attention") for layer in self.tower_layers]

    @property
    def patches_are_tokens(self) -> bool:
        return False

    @property
    def leading_tokens(self) -> int:
        return 1

    @property
    def connected_layer(self) -> int | None:
        return _layer_index(self.config.vision_feature_layer, len(self.tower_layers))


@register_family("idefics3", "smolvlm")
class Idefics3(Anatomy):
    """Idefics3 and SmolVLM: an image is encoded whole, and if it is large also in tiles that come before the whole.

    Each picture's tokens are one run, announced by a tag that says which tile it is, or that it is the whole image. The
    processor ends every image with the whole; so the last run of a row shows which tag announces the whole, and an
    image ends with each run that this tag announces. (The last two tokens before a run tell tags apart even where a
    tokenizer spells them in pieces, all of which end in ">".)
    """

    tower_name = "vision_model"
    connector_name = "connector"
    language_name = "text_model"

    def _picture_tokens(self) -> int:
        return int(super()._picture_tokens() // self.config.scale_factor**2)

    def _pictures_per_image(self, inputs: Inputs) -> list[int]:
        ids: Tensor = inputs["input_ids"]
        whole = self._picture_tokens()
        found = list(runs(self.visual_positions(ids)))
        tags = [ids[row, max(0, start - 2) : start].tolist() for row, start, _ in found]
        tag_of_whole = {row: tag for (row, _, _), tag in zip(found, tags, strict=True)}  # the last of a row stays
        counts = []
        open_pictures = 0
        for (row, _, length), tag in zip(found, tags, strict=True):
            open_pictures += length // whole
            if tag == tag_of_whole[row]:
                counts.append(open_pictures)
                open_pictures = 0
        return counts

    def _image_lengths(self, inputs: Inputs) -> list[int]:
        whole = self._picture_tokens()
        return [whole * pictures for pictures in self._pictures_per_image(inputs)]

    def _picture_owners(self, inputs: Inputs) -> list[int]:
        self.tokens_per_image(inputs)  # checks the prompt
        return [image for image, count in enumerate(self._pictures_per_image(inputs)) for _ in range(count)]

    def _mapped(self, inputs: Inputs, fn: PictureFn) -> Tensor:
        pixels: Tensor = inputs["pixel_values"]  # [rows, most pictures, 3, H, W]
        real = pixels.flatten(2).ne(0).any(dim=-1)  # the model takes an all-zero picture for padding
        owners = self._picture_owners(inputs)
        if int(real.sum()) != len(owners):
            raise InputError(f"there are {int(real.sum())} pictures but the prompt has placeholders for {len(owners)}")
        changed = pixels.clone()
        for (row, place), owner in zip(real.nonzero().tolist(), owners, strict=True):
            picture = fn(pixels[row, place], owner)
            if not picture.any():  # an even mid-grey would be taken for padding and its tokens would have no features
                picture[0, 0, 0] = 1e-3
            changed[row, place] = picture
        return changed


@register_family("paligemma")
class PaliGemma(Anatomy):
    """PaliGemma (Gemma decoder) and PaliGemma 2 (Gemma 2 decoder, which caps its logits)."""

    @property
    def plain_connector(self) -> bool:
        return True

    def head_logits(self, hidden: Tensor) -> Tensor:
        logits = super().head_logits(hidden)
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


@register_family("gemma3")
class Gemma3(Anatomy):
    """Gemma 3: the features of a picture are averaged over squares of patches. Crops of pan-and-scan count as images of
    their own, because nothing in the model's inputs tells them from further images."""

    def _picture_tokens(self) -> int:
        return int(self.config.mm_tokens_per_image)


def _needed(inputs: Inputs, name: str) -> Any:
    value = inputs.get(name)
    if value is None:
        raise InputError(f"{name} is needed to find the tokens of each image: give the inputs that the processor made")
    return value


def _grid(inputs: Inputs) -> list[tuple[int, int, int]]:
    """(temporal, rows, columns) of the patches of each image."""
    return [(int(t), int(h), int(w)) for t, h, w in torch.as_tensor(_needed(inputs, "image_grid_thw")).tolist()]


def _encoded_or_missing(inputs: Inputs, name: str) -> list[int]:
    """Tokens of each image, told by the features that `generate` has computed, or the error that `name` is missing."""
    lengths = encoded_lengths(inputs)
    if lengths is None:
        _needed(inputs, name)
    return lengths or []
