"""Tiny random-weight models of every supported family, and inputs for them made by hand.

No processor and no tokenizer is involved, so that each family can be tested without torchvision and without the
network. A row of a batch is made from its own seed: `single(..., row)` gives exactly the row that `inputs(...)` has in
its batch, without padding, so that a test can compare a batch with its rows one by one.

Vocabulary (99 tokens): 0 pad, 1 bos, 3..79 text, 80..98 the tokens that frame pictures. Nothing is an end token, so
that `generate(max_new_tokens=n)` always makes n tokens. The rows of the output head that belong to tokens 80..98 are
zero: their logit is 0, which is never the largest of some eighty zero-mean logits, so that a greedy answer holds no
placeholder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig

PAD, BOS = 0, 1
TEXT = range(3, 80)
TILE_MARKS = range(80, 90)  # <row_r_col_c> of Idefics3 and SmolVLM
IMAGE, VIDEO, START, END, FAKE, GLOBAL, NEWLINE = 90, 91, 92, 93, 94, 95, 96
VOCABULARY = 99

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

TEXT_CONFIG: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=1024,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=None,
    tie_word_embeddings=False,
)
MROPE: dict[str, Any] = dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=10000.0)


def _vision(model_type: str, image_size: int, **more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    return dict(model_type=model_type, image_size=image_size, patch_size=4, **sizes) | more


def _qwen_vision(model_type: str, **more: Any) -> dict[str, Any]:
    return dict(model_type=model_type, depth=2, num_heads=4, patch_size=4, temporal_patch_size=2, **more)


PINPOINTS = [[16, 32], [32, 16], [32, 32]]
SPECIAL = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
SPLIT_TEXT = dict(model_type="llama", **TEXT_CONFIG)
QWEN2_TEXT = {k: v for k, v in TEXT_CONFIG.items() if k != "head_dim"}

# Family -> (name of the model class, of the config class, arguments of the config).
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        dict(
            image_token_index=IMAGE,
            image_seq_length=16,
            vision_feature_layer=-2,
            vision_config=_vision("clip_vision_model", 16),
            text_config=dict(model_type="llama", **TEXT_CONFIG),
        ),
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        dict(
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-2,
            vision_config=_vision("clip_vision_model", 16),
            text_config=dict(model_type="mistral", sliding_window=None, **TEXT_CONFIG),
        ),
    ),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        dict(
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_config=_vision("siglip_vision_model", 16, vision_use_head=False),
            text_config=dict(model_type="qwen2", **QWEN2_TEXT),
        ),
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        dict(
            vision_config=_qwen_vision("qwen2_vl_vision", embed_dim=32, hidden_size=32, mlp_ratio=2),
            text_config=dict(rope_parameters=MROPE, **QWEN2_TEXT),
            **SPECIAL,
        ),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        dict(
            vision_config=_qwen_vision(
                "qwen2_5_vl_vision",
                hidden_size=32,
                out_hidden_size=32,
                intermediate_size=48,
                window_size=16,
                fullatt_block_indexes=[1],
            ),
            text_config=dict(rope_parameters=MROPE, **QWEN2_TEXT),
            **SPECIAL,
        ),
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        dict(
            vision_config=_qwen_vision(
                "qwen3_vl_vision",
                hidden_size=32,
                out_hidden_size=32,
                intermediate_size=48,
                num_position_embeddings=64,
                deepstack_visual_indexes=[0, 1],
            ),
            text_config=dict(rope_parameters=MROPE | dict(mrope_interleaved=True), **TEXT_CONFIG),
            **SPECIAL,
        ),
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        dict(
            image_token_id=IMAGE,
            image_seq_length=16,
            tie_word_embeddings=False,
            vision_config=_vision("internvl_vision", 32, use_qk_norm=True),
            text_config=dict(model_type="qwen2", **QWEN2_TEXT),
        ),
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        dict(
            image_token_id=IMAGE, scale_factor=2, vision_config=_vision("idefics3_vision", 32), text_config=SPLIT_TEXT
        ),
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        dict(image_token_id=IMAGE, scale_factor=2, vision_config=_vision("smolvlm_vision", 32), text_config=SPLIT_TEXT),
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        dict(
            image_token_index=IMAGE,
            projection_dim=32,
            hidden_size=32,
            tie_word_embeddings=False,
            vision_config=_vision("siglip_vision_model", 16, vision_use_head=False),
            text_config=dict(model_type="gemma", **TEXT_CONFIG),
        ),
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        dict(
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            mm_tokens_per_image=16,
            tie_word_embeddings=False,
            vision_config=_vision("siglip_vision_model", 32, vision_use_head=False),
            text_config=dict(
                sliding_window=512,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                query_pre_attn_scalar=8,
                **TEXT_CONFIG,
            ),
        ),
    ),
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
MROPE_FAMILIES: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CLS_FAMILIES: tuple[str, ...] = ("llava", "llava_next", "internvl")


def tiny_model(family: str, seed: int = 0, **config_overrides: Any) -> Any:
    """A model of the real class with random weights, in eval mode and float32, the same for the same seed.

    `config_overrides` are arguments of the family's config; a dict (`text_config={"num_hidden_layers": 5}`) is merged
    into the tiny default.
    """
    model_class, config_class, arguments = _CONFIGS[family]
    arguments = copy.deepcopy(arguments)
    for name, value in config_overrides.items():
        known = arguments.get(name)
        arguments[name] = {**known, **value} if isinstance(value, dict) and isinstance(known, dict) else value
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
        _randomise(model)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS)
    model.eval()
    return model


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights that are large enough for every part to matter; the initial ones are so small that attention is flat."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel() if parameter.shape[0] > 1 else parameter.shape[-1]
            parameter.normal_(std=1.5 * fan_in**-0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.get_output_embeddings().weight[TEXT.stop :] = 0  # type: ignore[operator]


@dataclass
class Row:
    """One row before padding: its tokens, and of its images whatever the family feeds to its tower."""

    ids: list[int]
    pictures: list[list[Tensor]] = field(default_factory=list)  # of each image its tiles, each [3, H, W], normalised
    sizes: list[tuple[int, int]] = field(default_factory=list)  # height and width of each image before tiling
    lengths: list[int] = field(default_factory=list)  # visual tokens of each image


def questions_for(rows: int, seed: int = 0) -> list[list[int]]:
    """Random text of different lengths: 3, 6, 4, 7, 5, ... tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    lengths = [3 + (3 * row) % 5 for row in range(rows)]
    return [_text(length, generator) for length in lengths]


def inputs(
    family: str,
    model: Any,
    questions: Sequence[Sequence[int]] | None = None,
    images_per_row: int | Sequence[int] = 1,
    seed: int = 0,
    padding: str = "left",
) -> dict[str, Any]:
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`: pictures first, then the row's question.

    `questions` holds the text tokens of each row (default: three random ones of different lengths), `images_per_row` a
    number, or one for each row. Neighbouring images differ in size and in tiles where the family has that.
    """
    rows = rows_of(family, model, questions, images_per_row, seed)
    return collate(family, model, rows, padding)


def single(
    family: str,
    model: Any,
    row_index: int,
    questions: Sequence[Sequence[int]] | None = None,
    images_per_row: int | Sequence[int] = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Row `row_index` of what `inputs` gives for the same arguments, alone and without padding."""
    return collate(family, model, [rows_of(family, model, questions, images_per_row, seed)[row_index]], "left")


def rows_of(
    family: str,
    model: Any,
    questions: Sequence[Sequence[int]] | None = None,
    images_per_row: int | Sequence[int] = 1,
    seed: int = 0,
) -> list[Row]:
    """The rows of `inputs` before they are padded and put together."""
    questions = questions_for(3, seed) if questions is None else questions
    counts = [images_per_row] * len(questions) if isinstance(images_per_row, int) else list(images_per_row)
    if len(counts) != len(questions):
        raise ValueError("images_per_row must be a number, or one for each question")
    rows = []
    first = 0
    for index, (question, count) in enumerate(zip(questions, counts, strict=True)):
        generator = torch.Generator().manual_seed(10_000 * (seed + 1) + index)
        rows.append(_BUILDERS[family](model, list(question), range(first, first + count), generator))
        first += count
    return rows


# --- One row of each family. `kinds` numbers the images through the batch: a builder varies size or tiles by it. ---

# Pixels and tiles, for the families that cut an image into tiles of 16 x 16. The first two are padded to fill theirs.
SIZES = [(12, 48), (48, 14), (20, 20)]
TILINGS = {(12, 48): (1, 2), (48, 14): (2, 1), (20, 20): (2, 2)}
GRIDS = [(8, 12), (10, 8), (8, 8)]  # patches, for the families with a free grid: 4 x 6, 5 x 4 and 4 x 4 tokens


def _text(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(TEXT.start, TEXT.stop, (length,), generator=generator).tolist()


def _picture(
    height: int, width: int, mean: tuple[float, ...], std: tuple[float, ...], generator: torch.Generator
) -> Tensor:
    picture = torch.rand(3, height, width, generator=generator)
    return (picture - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _plain(
    size: int, tokens: int, mean: tuple[float, ...], std: tuple[float, ...], around: tuple[list[int], list[int]]
) -> Callable[..., Row]:
    """One picture of `size` pixels and a fixed number of tokens for an image, framed by the tokens `around`."""

    def build(model: Any, question: list[int], kinds: range, generator: torch.Generator) -> Row:
        row = Row([BOS])
        for _ in kinds:
            row.ids += _text(2, generator) + around[0] + [IMAGE] * tokens + around[1]
            row.pictures.append([_picture(size, size, mean, std, generator)])
            row.sizes.append((size, size))
            row.lengths.append(tokens)
        row.ids += question
        return row

    return build


def _paligemma(model: Any, question: list[int], kinds: range, generator: torch.Generator) -> Row:
    row = Row([])
    for _ in kinds:
        row.ids += [IMAGE] * 16
        row.pictures.append([_picture(16, 16, HALF, HALF, generator)])
        row.sizes.append((16, 16))
        row.lengths.append(16)
    row.ids += [BOS, *question, NEWLINE]
    return row


def packed_raster(height: int, width: int) -> tuple[range, range]:
    """Rows and columns of a packed image's raster of patches (4 x 4 a tile) that are not all padding."""
    rows, columns = (4 * tiles for tiles in TILINGS[height, width])
    cut_rows = max(0, (rows - int(height * columns / width)) // 2)
    cut_columns = max(0, (columns - int(width * rows / height)) // 2)
    return range(cut_rows, rows - cut_rows), range(cut_columns, columns - cut_columns)


def _packed(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[..., Row]:
    def build(model: Any, question: list[int], kinds: range, generator: torch.Generator) -> Row:
        row = Row([BOS])
        for kind in kinds:
            height, width = SIZES[kind % 3]
            rows, columns = packed_raster(height, width)
            tokens = 16 + len(rows) * (len(columns) + 1)  # the whole, and a newline after each row of the raster
            tiles = 1 + TILINGS[height, width][0] * TILINGS[height, width][1]
            row.ids += _text(2, generator) + [IMAGE] * tokens
            row.pictures.append([_picture(16, 16, mean, std, generator) for _ in range(tiles)])
            row.sizes.append((height, width))
            row.lengths.append(tokens)
        row.ids += question
        return row

    return build


def _qwen(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[..., Row]:
    def build(model: Any, question: list[int], kinds: range, generator: torch.Generator) -> Row:
        row = Row([BOS])
        for kind in kinds:
            high, wide = GRIDS[kind % 3]
            tokens = high * wide // 4
            row.ids += _text(2, generator) + [START] + [IMAGE] * tokens + [END]
            row.pictures.append([_picture(4 * high, 4 * wide, mean, std, generator)])
            row.sizes.append((4 * high, 4 * wide))
            row.lengths.append(tokens)
        row.ids += question
        return row

    return build


def _internvl(model: Any, question: list[int], kinds: range, generator: torch.Generator) -> Row:
    row = Row([BOS])
    for kind in kinds:
        tiles = 1 if kind % 2 == 0 else 3
        row.ids += _text(2, generator) + [START] + [IMAGE] * (16 * tiles) + [END]
        row.pictures.append([_picture(32, 32, IMAGENET_MEAN, IMAGENET_STD, generator) for _ in range(tiles)])
        row.sizes.append((32, 32))
        row.lengths.append(16 * tiles)
    row.ids += question
    return row


def _split(model: Any, question: list[int], kinds: range, generator: torch.Generator) -> Row:
    """Idefics3 and SmolVLM: every second image is split into 2 x 2 tiles, each marked, before the whole of it."""
    row = Row([BOS])
    for kind in kinds:
        tiles = 0 if kind % 2 == 0 else 4
        row.ids += _text(2, generator)
        for tile in range(tiles):
            row.ids += [FAKE, TILE_MARKS[tile]] + [IMAGE] * 16 + ([NEWLINE] if tile % 2 else [])
        row.ids += ([NEWLINE] if tiles else []) + [FAKE, GLOBAL] + [IMAGE] * 16 + [FAKE]
        row.pictures.append([_picture(32, 32, HALF, HALF, generator) for _ in range(tiles + 1)])
        row.sizes.append((32, 32))
        row.lengths.append(16 * (tiles + 1))
    row.ids += question
    return row


_BUILDERS: dict[str, Callable[..., Row]] = {
    "llava": _plain(16, 16, CLIP_MEAN, CLIP_STD, ([], [])),
    "llava_next": _packed(CLIP_MEAN, CLIP_STD),
    "llava_onevision": _packed(HALF, HALF),
    "qwen2_vl": _qwen(CLIP_MEAN, CLIP_STD),
    "qwen2_5_vl": _qwen(CLIP_MEAN, CLIP_STD),
    "qwen3_vl": _qwen(HALF, HALF),
    "internvl": _internvl,
    "idefics3": _split,
    "smolvlm": _split,
    "paligemma": _paligemma,
    "gemma3": _plain(32, 16, HALF, HALF, ([NEWLINE, START], [END, NEWLINE])),
}


def flatten_patches(picture: Tensor, patch: int = 4, merge: int = 2, temporal: int = 2) -> Tensor:
    """A picture [3, H, W] as the Qwen towers want it, [patches, 3 * temporal * patch * patch], written patch by patch.

    Patches come merge block by merge block (the `merge x merge` patches that become one token are neighbours), a patch
    holds channel, frame, row, column in this order, and a still picture is a film of `temporal` equal frames.
    """
    rows, columns = picture.shape[1] // patch, picture.shape[2] // patch
    patches = []
    for block_row in range(rows // merge):
        for block_column in range(columns // merge):
            for inner_row in range(merge):
                for inner_column in range(merge):
                    top = (block_row * merge + inner_row) * patch
                    left = (block_column * merge + inner_column) * patch
                    piece = picture[:, top : top + patch, left : left + patch]
                    patches.append(torch.stack([piece] * temporal, dim=1).flatten())
    return torch.stack(patches)


def collate(family: str, model: Any, rows: Sequence[Row], padding: str) -> dict[str, Any]:
    """Pads the rows and puts their pictures into the tensors that the family's forward takes."""
    if padding not in ("left", "right"):
        raise ValueError("padding is 'left' or 'right'")
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row.ids), longest) if padding == "left" else slice(0, len(row.ids))
        ids[index, place] = torch.tensor(row.ids)
        mask[index, place] = 1
    batch: dict[str, Any] = dict(input_ids=ids, attention_mask=mask)
    images = [tiles for row in rows for tiles in row.pictures]
    if family in MROPE_FAMILIES:
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    if family == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    if family == "paligemma":
        batch["token_type_ids"] = torch.zeros_like(ids)  # everything is prefix: no answer is given
    if not images:
        return batch
    if family in ("llava_next", "llava_onevision"):
        most = max(len(tiles) for tiles in images)
        stacked = torch.zeros(len(images), most, *images[0][0].shape)
        for index, tiles in enumerate(images):
            stacked[index, : len(tiles)] = torch.stack(tiles)
        batch["pixel_values"] = stacked
        batch["image_sizes"] = torch.tensor([size for row in rows for size in row.sizes])
    elif family in MROPE_FAMILIES:
        batch["pixel_values"] = torch.cat([flatten_patches(tiles[0]) for tiles in images])
        batch["image_grid_thw"] = torch.tensor([[1, h // 4, w // 4] for row in rows for h, w in row.sizes])
    elif family in ("idefics3", "smolvlm"):
        most = max(sum(len(tiles) for tiles in row.pictures) for row in rows)
        stacked = torch.zeros(len(rows), most, *images[0][0].shape)
        pixels = torch.zeros(len(rows), most, *images[0][0].shape[1:], dtype=torch.long)
        for index, row in enumerate(rows):
            for place, tile in enumerate(tile for tiles in row.pictures for tile in tiles):
                stacked[index, place] = tile
                pixels[index, place] = 1
        batch["pixel_values"] = stacked
        batch["pixel_attention_mask"] = pixels
    else:
        batch["pixel_values"] = torch.stack([tile for tiles in images for tile in tiles])
    return batch
