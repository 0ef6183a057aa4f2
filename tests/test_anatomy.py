"""The anatomy of every family, on tiny random-weight models of the real classes."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import families as tiny
import pytest
import torch
from families import CLS_FAMILIES, FAMILIES, IMAGE, MROPE_FAMILIES, Row
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sightline.errors import InputError
from sightline.models.anatomy import Anatomy, ClsAttention, known_families, runs

RASTER_FAMILIES = [family for family in FAMILIES if not family.startswith(("llava_next", "llava_onevision"))]
SHAPES = pytest.mark.parametrize("images_per_row", [1, 2, [2, 0, 1]], ids=["one", "two", "some"])
PADDING = pytest.mark.parametrize("padding", ["left", "right"])
EVERY = pytest.mark.parametrize("family", FAMILIES)

CLIP_FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
MEANS = dict.fromkeys(FAMILIES, tiny.HALF) | dict.fromkeys(CLIP_FAMILIES, tiny.CLIP_MEAN)
STDS = dict.fromkeys(FAMILIES, tiny.HALF) | dict.fromkeys(CLIP_FAMILIES, tiny.CLIP_STD)
MEANS["internvl"], STDS["internvl"] = tiny.IMAGENET_MEAN, tiny.IMAGENET_STD


def plain(family: str, picture: Tensor) -> Tensor:
    """A normalised picture back in [0, 1]."""
    return picture * torch.tensor(STDS[family])[:, None, None] + torch.tensor(MEANS[family])[:, None, None]


def normalised(family: str, picture: Tensor) -> Tensor:
    return (picture - torch.tensor(MEANS[family])[:, None, None]) / torch.tensor(STDS[family])[:, None, None]


class Calls:
    """The keyword arguments (and input_ids, if positional) of every call of a module while the context is open."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.calls = module, []

    def __enter__(self) -> list[dict[str, Any]]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls.append({**({"input_ids": args[0]} if args else {}), **kwargs})

        self.handle = self.module.register_forward_pre_hook(note, with_kwargs=True)
        return self.calls

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


# --- Parts ---


def test_every_family_of_the_tests_is_known_and_the_other_way_round() -> None:
    assert sorted(FAMILIES) == list(known_families())


@EVERY
def test_the_parts_are_those_that_the_forward_runs_through(family: str) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    batch = tiny.inputs(family, model)
    order: list[str] = []
    parts: dict[str, nn.Module] = {
        "base": anatomy.base,
        "tower": anatomy.vision_tower,
        "connector": anatomy.connector,
        "decoder": anatomy.language_model,
        "first": anatomy.layers[0],
        "last": anatomy.layers[-1],
        "norm": anatomy.final_norm,
        "head": anatomy.head,
    }
    handles = [part.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, part in parts.items()]
    with torch.no_grad(), Calls(anatomy.language_model) as calls:
        model(**batch)
    for handle in handles:
        handle.remove()
    assert order == ["base", "tower", "connector", "decoder", "first", "last", "norm", "head"]
    assert calls[0]["inputs_embeds"].shape[:2] == batch["input_ids"].shape
    assert len(anatomy.layers) == 3
    assert (anatomy.num_heads, anatomy.num_key_value_heads, anatomy.head_dim) == (4, 2, 8)
    assert anatomy.mrope == (family in MROPE_FAMILIES)
    assert anatomy.family == family


@EVERY
def test_head_logits_of_the_final_norm_are_the_logits_of_the_model(family: str) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    batch = tiny.inputs(family, model)
    kept: list[Tensor] = []
    handle = anatomy.final_norm.register_forward_hook(lambda _module, _args, output: kept.append(output))
    with torch.no_grad():
        expected = model(**batch).logits
        handle.remove()
        torch.testing.assert_close(anatomy.head_logits(kept[0]), expected, atol=0, rtol=0)


def test_head_logits_are_capped_where_the_model_caps_them() -> None:
    model = tiny.tiny_model("paligemma", text_config=dict(model_type="gemma2", final_logit_softcapping=0.5))
    anatomy = Anatomy.of(model)
    batch = tiny.inputs("paligemma", model)
    kept: list[Tensor] = []
    anatomy.final_norm.register_forward_hook(lambda _module, _args, output: kept.append(output))
    with torch.no_grad():
        expected = model(**batch).logits
        assert expected.abs().max() <= 0.5
        torch.testing.assert_close(anatomy.head_logits(kept[0]), expected, atol=1e-7, rtol=0)


@EVERY
def test_attention_heads_input_holds_the_heads_in_order(family: str) -> None:
    model = tiny.tiny_model(family)
    model.set_attn_implementation("eager")
    anatomy = Anatomy.of(model)
    layer = anatomy.layers[1]
    got: dict[str, Tensor] = {}
    anatomy.attention_heads_input(layer).register_forward_pre_hook(lambda _module, args: got.update(heads=args[0]))
    layer.get_submodule("self_attn.v_proj").register_forward_hook(lambda _m, _a, output: got.update(values=output))
    anatomy.mlp(layer).register_forward_hook(lambda _m, _a, output: got.update(mlp=output))
    with torch.no_grad():
        attention = model(**tiny.inputs(family, model), output_attentions=True).attentions[1]
    values = got["values"].unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, dim=1)  # two queries share a key
    expected = (attention @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got["heads"], expected, atol=1e-5, rtol=0)
    assert got["mlp"].shape == (*expected.shape[:2], 32)


# --- Visual positions ---


@EVERY
@PADDING
@SHAPES
def test_images_are_counted_and_placed_as_the_prompt_was_built(family: str, padding: str, images_per_row: Any) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    rows = tiny.rows_of(family, model, images_per_row=images_per_row)
    batch = tiny.collate(family, model, rows, padding)
    assert anatomy.tokens_per_image(batch) == [length for row in rows for length in row.lengths]
    assert anatomy.image_indices(batch) == [index for index, row in enumerate(rows) for _ in row.lengths]
    for index, row in enumerate(rows):
        inside = anatomy.visual_positions(batch["input_ids"])[index][batch["attention_mask"][index].bool()]
        assert inside.tolist() == [token == IMAGE for token in row.ids]


@EVERY
@SHAPES
def test_visual_positions_hold_the_features_of_the_images_in_order(family: str, images_per_row: Any) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    rows = tiny.rows_of(family, model, images_per_row=images_per_row)
    batch = tiny.collate(family, model, rows, "left")
    with torch.no_grad(), Calls(anatomy.language_model) as calls:
        model(**batch)
        embeds = calls[0]["inputs_embeds"][anatomy.visual_positions(batch["input_ids"])]
        for image, features in zip(
            [image for row in rows for image in one_image_rows(row)],
            embeds.split(anatomy.tokens_per_image(batch)),
            strict=True,
        ):
            model(**tiny.collate(family, model, [image], "left"))
            alone = calls[-1]["inputs_embeds"][0][torch.tensor(image.ids) == IMAGE]
            torch.testing.assert_close(features, alone, atol=2e-5, rtol=0)


def one_image_rows(row: Row) -> list[Row]:
    """For each image of a row, a row of nothing but this image and the token before each of its runs."""
    is_image = torch.tensor([[token == IMAGE for token in row.ids]])
    blocks = [row.ids[start - 1 : start + length] for _, start, length in runs(is_image)]
    if is_image[0, 0]:  # PaliGemma: nothing comes before or between the images
        blocks = [[IMAGE] * length for length in row.lengths]
    images = []
    for tiles, size, length in zip(row.pictures, row.sizes, row.lengths, strict=True):
        ids: list[int] = []
        while ids.count(IMAGE) < length:
            ids += blocks.pop(0)
        images.append(Row(ids, [tiles], [size], [length]))
    return images


@EVERY
@pytest.mark.parametrize("beams", [1, 2])
def test_images_are_counted_from_what_generate_passes_on(family: str, beams: int) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    rows = tiny.rows_of(family, model, images_per_row=[2, 1, 3])
    with Calls(anatomy.base) as calls:
        model.generate(**tiny.collate(family, model, rows, "left"), max_new_tokens=2, num_beams=beams, do_sample=False)
    assert calls[0]["pixel_values"] is None
    assert anatomy.tokens_per_image(calls[0]) == [n for row in rows for _ in range(beams) for n in row.lengths]
    owners = [index for index, row in enumerate(r for r in rows for _ in range(beams)) for _ in row.lengths]
    assert anatomy.image_indices(calls[0]) == owners


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "internvl"])
def test_a_prompt_that_does_not_fit_the_pictures_is_refused(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model)
    first = batch["input_ids"][0].eq(IMAGE).nonzero()[0]
    batch["input_ids"][0, first] = tiny.TEXT.start
    with pytest.raises(InputError, match="placeholders"):
        Anatomy.of(model).tokens_per_image(batch)


def test_an_image_that_spans_two_rows_is_refused() -> None:
    model = tiny.tiny_model("llava")
    ids = torch.full((2, 10), tiny.TEXT.start)
    ids[0, 2:], ids[1, :8] = IMAGE, IMAGE
    with pytest.raises(InputError, match="two rows"):
        Anatomy.of(model).image_indices(dict(input_ids=ids))


def test_without_token_ids_the_visual_tokens_cannot_be_found() -> None:
    with pytest.raises(InputError, match="input_ids are needed"):
        Anatomy.of(tiny.tiny_model("llava")).tokens_per_image(dict(inputs_embeds=torch.zeros(1, 3, 32)))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_families_with_free_sizes_say_which_input_is_missing(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model)
    missing = "image_grid_thw" if family == "qwen2_vl" else "image_sizes"
    del batch[missing]
    with pytest.raises(InputError, match=missing):
        Anatomy.of(model).tokens_per_image(batch)


def test_runs() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]]).bool()
    assert list(runs(mask)) == [(0, 1, 2), (0, 4, 1), (1, 0, 5), (3, 0, 1), (3, 2, 1)]


# --- Grids and pictures ---


def silence_tower_attention(anatomy: Anatomy) -> None:
    """Makes the tower's attention add nothing, so that each patch is encoded by itself."""
    silenced = 0
    for name, module in anatomy.vision_tower.named_modules():
        if isinstance(module, nn.Linear) and re.search(r"(self_attn\.out_proj|attn\.proj|projection_layer)$", name):
            nn.init.zeros_(module.weight)
            silenced += 1
    assert silenced >= 2


@pytest.mark.parametrize("family", RASTER_FAMILIES)
def test_a_change_in_one_square_of_a_picture_changes_the_one_token_of_the_grid_there(family: str) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    silence_tower_attention(anatomy)
    rows = tiny.rows_of(family, model, images_per_row=2)
    batch = tiny.collate(family, model, rows, "left")
    grids, lengths = anatomy.grids(batch), anatomy.tokens_per_image(batch)
    visual = anatomy.visual_positions(batch["input_ids"])
    sizes = [size for row in rows for size in row.sizes]
    with torch.no_grad(), Calls(anatomy.language_model) as calls:
        model(**batch)
        before = calls[-1]["inputs_embeds"][visual]
        tried = 0
        for image, grid in enumerate(grids):
            if grid is None:
                continue
            row, column = (image + 1) % grid[0], (2 * image + 1) % grid[1]

            def paint(
                picture: Tensor, index: int, image: int = image, grid: tuple[int, int] = grid, at: Any = (row, column)
            ) -> Tensor:
                if index == image:
                    assert picture.shape == (3, *sizes[image])
                    high, wide = picture.shape[1] // grid[0], picture.shape[2] // grid[1]
                    square = picture[:, at[0] * high : (at[0] + 1) * high, at[1] * wide : (at[1] + 1) * wide]
                    square.copy_(1 - square)
                return picture

            model(**anatomy.map_pictures(batch, paint))
            moved = (calls[-1]["inputs_embeds"][visual] - before).abs().amax(-1) > 1e-4
            assert moved.nonzero()[:, 0].tolist() == [sum(lengths[:image]) + row * grid[1] + column]
            tried += 1
        assert tried >= 3


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llava", [(4, 4)] * 4),
        ("llava_next", [None] * 4),
        ("llava_onevision", [None] * 4),
        ("qwen2_5_vl", [(4, 6), (5, 4), (4, 4), (4, 6)]),
        ("internvl", [(4, 4), None, (4, 4), None]),
        ("idefics3", [(4, 4), None, (4, 4), None]),
    ],
)
def test_grids(family: str, expected: list[tuple[int, int] | None]) -> None:
    model = tiny.tiny_model(family)
    assert Anatomy.of(model).grids(tiny.inputs(family, model, images_per_row=[2, 0, 2])) == expected


@EVERY
@SHAPES
def test_map_pictures_shows_every_real_picture_once_and_leaves_it_as_it_was(family: str, images_per_row: Any) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    rows = tiny.rows_of(family, model, images_per_row=images_per_row)
    batch = tiny.collate(family, model, rows, "left")
    kept = {name: value.clone() for name, value in batch.items()}
    seen: list[tuple[Tensor, int]] = []

    def look(picture: Tensor, index: int) -> Tensor:
        seen.append((picture.clone(), index))
        return picture

    same = anatomy.map_pictures(batch, look)
    images = [tiles for row in rows for tiles in row.pictures]
    expected = [(tile, index) for index, tiles in enumerate(images) for tile in tiles]
    assert [index for _, index in seen] == [index for _, index in expected]
    for (picture, _), (tile, _) in zip(seen, expected, strict=True):
        torch.testing.assert_close(picture, plain(family, tile), atol=1e-6, rtol=0)
    torch.testing.assert_close(same["pixel_values"], batch["pixel_values"], atol=1e-5, rtol=0)
    assert same.keys() == batch.keys()
    for name, value in kept.items():
        assert torch.equal(batch[name], value)


@EVERY
def test_map_pictures_puts_the_changed_picture_where_the_model_reads_it(family: str) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    rows = tiny.rows_of(family, model, images_per_row=2)
    batch = tiny.collate(family, model, rows, "left")

    def turn(picture: Tensor, index: int) -> Tensor:
        return picture.flip(2) * 3 - index  # some of it leaves [0, 1]

    image = 0
    for row in rows:
        for tiles in row.pictures:
            tiles[:] = [normalised(family, turn(plain(family, tile), image).clamp(0, 1)) for tile in tiles]
            image += 1
    expected = tiny.collate(family, model, rows, "left")["pixel_values"]
    torch.testing.assert_close(anatomy.map_pictures(batch, turn)["pixel_values"], expected, atol=1e-5, rtol=0)


@EVERY
def test_map_pictures_keeps_the_dtype_and_refuses_another_shape(family: str) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    batch = tiny.inputs(family, model)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    dtypes = set()

    def note(picture: Tensor, _: int) -> Tensor:
        dtypes.add(picture.dtype)
        return picture

    assert anatomy.map_pictures(batch, note)["pixel_values"].dtype == torch.bfloat16
    assert dtypes == {torch.float32}
    with pytest.raises(InputError, match="was changed into"):
        anatomy.map_pictures(batch, lambda picture, _: picture[:, 1:])
    with pytest.raises(InputError, match="no pixel_values"):
        anatomy.map_pictures(dict(input_ids=batch["input_ids"]), note)


@EVERY
def test_pictures_painted_grey_all_over_are_still_seen(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=2)
    grey = Anatomy.of(model).map_pictures(batch, lambda picture, _: torch.full_like(picture, 0.5))
    with torch.no_grad():
        assert model(**grey).logits.isfinite().all()


def test_qwen_patches_are_laid_out_as_the_image_processor_lays_them_out() -> None:
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 10**6}
    )
    pictures = [torch.randint(0, 256, (3, 24, 40), dtype=torch.uint8), torch.randint(0, 256, (3, 32, 16)).byte()]
    done = processor(images=[picture.numpy() for picture in pictures], return_tensors="pt", input_data_format="CHW")
    assert done["image_grid_thw"].tolist() == [[1, 6, 10], [1, 8, 4]]
    ids = torch.tensor([[IMAGE] * (15 + 8)])
    anatomy = Anatomy.of(tiny.tiny_model("qwen2_vl"), processor)
    seen: list[Tensor] = []

    def look(picture: Tensor, _: int) -> Tensor:
        seen.append(picture)
        return picture

    same = anatomy.map_pictures(dict(input_ids=ids, **done), look)["pixel_values"]
    for picture, original in zip(seen, pictures, strict=True):
        torch.testing.assert_close(picture * 255, original.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(same, done["pixel_values"], atol=1e-6, rtol=0)


def test_qwen_films_are_shown_frame_by_frame() -> None:
    anatomy: Any = Anatomy.of(tiny.tiny_model("qwen3_vl"))
    frames = torch.rand(4, 3, 16, 24)  # two temporal patches of two frames each
    flat = anatomy.flatten((frames - 0.5) / 0.5)
    assert flat.shape == (2 * 4 * 6, 3 * 2 * 4 * 4)
    torch.testing.assert_close(anatomy.unflatten(flat, (2, 4, 6)), (frames - 0.5) / 0.5, atol=0, rtol=0)
    seen: list[Tensor] = []
    inputs = dict(input_ids=torch.full((1, 12), IMAGE), pixel_values=flat, image_grid_thw=torch.tensor([[2, 4, 6]]))
    dark = anatomy.map_pictures(inputs, lambda picture, _: seen.append(picture) or picture * 0)
    torch.testing.assert_close(torch.stack(seen), frames, atol=1e-6, rtol=0)
    assert torch.equal(dark["pixel_values"], torch.full_like(flat, -1))
    assert anatomy.grids(inputs) == [None]


def test_llava_next_takes_tiles_in_one_row_too() -> None:
    model = tiny.tiny_model("llava_next")
    anatomy = Anatomy.of(model)
    batch = tiny.inputs("llava_next", model)
    tiles = [3, 3, 5]
    flat = torch.cat([pixels[:count] for pixels, count in zip(batch["pixel_values"], tiles, strict=True)])
    owners: list[int] = []
    changed = anatomy.map_pictures(
        {**batch, "pixel_values": flat}, lambda picture, index: owners.append(index) or picture.flip(1)
    )["pixel_values"]
    assert owners == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    torch.testing.assert_close(changed, flat.flip(2), atol=1e-6, rtol=0)


# --- [CLS] attention ---


@EVERY
def test_towers_without_a_cls_token_say_so(family: str) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    assert (anatomy.cls is not None) == (family in CLS_FAMILIES)
    if family in MROPE_FAMILIES:
        with pytest.raises(InputError, match=rf"{family} .*not known which of them make which visual token"):
            anatomy.on_tokens(torch.zeros(3, 16), tiny.inputs(family, model))


@pytest.mark.parametrize("family", CLS_FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chosen", [-2, -1, -3, 1, 3])
def test_cls_row_is_that_of_eager_attention(family: str, implementation: str, chosen: int) -> None:
    model = tiny.tiny_model(family, vision_feature_layer=chosen)
    anatomy = Anatomy.of(model)
    cls = anatomy.cls
    assert cls is not None
    batch = tiny.inputs(family, model, images_per_row=2)
    model.set_attn_implementation(implementation)
    rows: list[Tensor] = []
    cls.module.register_forward_pre_hook(lambda _m, args, kwargs: rows.append(cls.read(args, kwargs)), with_kwargs=True)
    with torch.no_grad(), Calls(anatomy.vision_tower) as calls:
        model(**batch)
        pixels = calls[0].get("pixel_values", calls[0].get("input_ids"))  # a positional argument is the pixels here
        model.set_attn_implementation("eager")
        attention = anatomy.vision_tower(pixels, output_attentions=True, output_hidden_states=True).attentions
    layer = chosen - 1 if chosen > 0 else 3 + chosen
    expected = attention[layer].float().mean(dim=1)[:, 0, 1:]
    assert rows[0].dtype == torch.float32
    torch.testing.assert_close(rows[0], expected, atol=1e-6, rtol=0)
    assert expected.std() > 1e-3  # far from uniform, or the comparison would say little


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("chosen", [-2, -1, 1, 2, [-3, -1], [1, 2]])
def test_cls_is_read_in_the_layer_whose_output_the_connector_reads(family: str, chosen: int | list[int]) -> None:
    model = tiny.tiny_model(family, vision_feature_layer=chosen)
    anatomy = Anatomy.of(model)
    assert isinstance(anatomy.cls, ClsAttention)
    tower: Any = anatomy.vision_tower
    owner = next(layer for layer in tower.encoder.layers if layer.self_attn is anatomy.cls.module)
    outputs: list[Tensor] = []
    owner.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    with torch.no_grad():
        states = tower(torch.rand(2, 3, 16, 16), output_hidden_states=True).hidden_states
    deepest = chosen if isinstance(chosen, int) else chosen[-1]
    torch.testing.assert_close(outputs[0], states[deepest], atol=0, rtol=0)


def test_cls_is_none_when_no_layer_made_the_features_or_cls_is_itself_a_token() -> None:
    assert Anatomy.of(tiny.tiny_model("llava", vision_feature_layer=0)).cls is None
    full = tiny.tiny_model("llava", vision_feature_select_strategy="full", image_seq_length=17)
    anatomy = Anatomy.of(full)
    assert anatomy.cls is None
    ids = torch.tensor([[tiny.BOS] + [IMAGE] * 17 + [5]])
    inputs = dict(input_ids=ids, pixel_values=torch.rand(1, 3, 16, 16))
    assert anatomy.tokens_per_image(inputs) == [17]
    assert anatomy.grids(inputs) == [None]
    with torch.no_grad():
        full(**inputs)  # the model agrees that 17 tokens are right


def test_cls_scores_of_llava_are_the_rows_themselves() -> None:
    model = tiny.tiny_model("llava")
    rows = torch.rand(4, 16)
    scores = Anatomy.of(model).on_tokens(rows, tiny.inputs("llava", model, images_per_row=[2, 1, 1]))
    assert torch.equal(torch.stack(scores), rows)


def test_cls_scores_of_llava_next_follow_the_packing_of_the_tiles() -> None:
    model = tiny.tiny_model("llava_next")
    batch = tiny.inputs("llava_next", model, images_per_row=[1, 2, 0])
    rows = torch.rand(3 + 3 + 5, 16)
    scores = Anatomy.of(model).on_tokens(rows, batch)
    first = 0
    for size, got in zip(tiny.SIZES, scores, strict=True):
        down, across = tiny.TILINGS[size]
        kept_rows, kept_columns = tiny.packed_raster(*size)
        expected = rows[first].tolist()  # the whole image comes first
        for row in kept_rows:
            for column in kept_columns:
                tile = first + 1 + (row // 4) * across + column // 4
                expected.append(float(rows[tile, (row % 4) * 4 + column % 4]))
            expected.append(-torch.inf)
        assert got.tolist() == expected
        first += 1 + down * across
    assert len(tiny.packed_raster(12, 48)[0]) == 2  # one row of padding is cut off on each side
    assert len(tiny.packed_raster(48, 14)[1]) == 2
    assert [len(tokens) for tokens in scores] == Anatomy.of(model).tokens_per_image(batch)


def test_cls_scores_of_internvl_add_up_the_patches_of_a_token() -> None:
    model = tiny.tiny_model("internvl")
    batch = tiny.inputs("internvl", model, images_per_row=[1, 1, 0])
    rows = torch.rand(1 + 3, 64)  # one tile, and three of the second image; 8 x 8 patches each
    expected = [
        [
            sum(float(rows[tile, (2 * r + i) * 8 + 2 * c + j]) for i in range(2) for j in range(2))
            for tile in tiles
            for r in range(4)
            for c in range(4)
        ]
        for tiles in ([0], [1, 2, 3])
    ]
    for got, want in zip(Anatomy.of(model).on_tokens(rows, batch), expected, strict=True):
        torch.testing.assert_close(got, torch.tensor(want), atol=1e-6, rtol=0)


# --- What is not a bare known model ---


def test_a_processor_overrides_mean_and_deviation() -> None:
    model = tiny.tiny_model("llava")
    assert Anatomy.of(model).pixel_mean == pytest.approx(tiny.CLIP_MEAN)
    own = CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    for processor in (own, SimpleNamespace(image_processor=own)):
        anatomy = Anatomy.of(model, processor)
        assert anatomy.pixel_mean == (0.1, 0.2, 0.3)
        assert anatomy.pixel_std == (0.4, 0.5, 0.6)
    untouched = Anatomy.of(model, CLIPImageProcessorPil(do_normalize=False))
    assert (untouched.pixel_mean, untouched.pixel_std) == ((0, 0, 0), (1, 1, 1))


def test_a_wrapped_model_is_unwrapped() -> None:
    model = tiny.tiny_model("llava")
    wrapper: Any = SimpleNamespace(get_base_model=lambda: model, config=model.config)
    assert Anatomy.of(wrapper).model is model


def test_an_unknown_family_is_refused_with_the_known_ones_and_how_to_add_one() -> None:
    stranger: Any = SimpleNamespace(config=SimpleNamespace(model_type="lava"))
    with pytest.raises(InputError) as caught:
        Anatomy.of(stranger)
    message = str(caught.value)
    assert "unknown model family 'lava' (did you mean 'llava'?)" in message
    assert all(family in message for family in FAMILIES)
    assert "register_family" in message
