"""The tiny models of `families.py` behave, and so do members of the families that are not among them."""

from __future__ import annotations

from typing import Any

import families as tiny
import pytest
import torch
from families import FAMILIES, IMAGE

from sightline.models.anatomy import Anatomy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("images_per_row", [1, 2, [2, 0, 1]], ids=["one", "two", "some"])
def test_a_padded_batch_gives_the_logits_of_its_rows_one_by_one(family: str, padding: str, images_per_row: Any) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=images_per_row, padding=padding)
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(3):
            alone = model(**tiny.single(family, model, row, images_per_row=images_per_row)).logits[0]
            torch.testing.assert_close(together[row][batch["attention_mask"][row].bool()], alone, atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_makes_the_asked_number_of_tokens_and_no_placeholder(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=2)
    answer = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert answer.shape == (3, 6)
    assert int(answer.max()) < tiny.TEXT.stop
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert not model.training


# --- Other members of the families: other towers, other ways of cutting ---


def test_llava_with_a_siglip_tower() -> None:
    model = tiny.tiny_model(
        "llava",
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    anatomy = Anatomy.of(model)
    batch = tiny.inputs("llava", model)
    assert anatomy.tokens_per_image(batch) == [16, 16, 16]
    assert anatomy.grids(batch) == [(4, 4)] * 3
    assert anatomy.cls is None
    assert anatomy.pixel_mean == anatomy.pixel_std == tiny.HALF
    with torch.no_grad():
        model(**batch)


def test_pixtral_has_pictures_of_any_size() -> None:
    model = tiny.tiny_model(
        "llava",
        vision_config=dict(model_type="pixtral", image_size=32, head_dim=8),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    anatomy = Anatomy.of(model)
    sizes = torch.tensor([[16, 24], [20, 16]])
    ids = torch.tensor([[1] + [IMAGE] * 24 + [5], [1] + [IMAGE] * 20 + [5] * 5])
    pixels = torch.zeros(2, 3, 20, 24)
    pixels[0, :, :16, :24], pixels[1, :, :20, :16] = 1.0, 1.0
    inputs = dict(input_ids=ids, pixel_values=pixels, image_sizes=sizes)
    assert anatomy.tokens_per_image(inputs) == [24, 20]
    assert anatomy.grids(inputs) == [(4, 6), (5, 4)]
    with torch.no_grad():
        model(**inputs)
    shapes: list[tuple[int, ...]] = []
    changed = anatomy.map_pictures(inputs, lambda picture, _: shapes.append(tuple(picture.shape)) or picture * 0)
    assert shapes == [(3, 16, 24), (3, 20, 16)]
    assert torch.equal(changed["pixel_values"].eq(0), pixels.eq(0))  # the padding stays as it was


def test_onevision_encodes_images_that_share_a_prompt_whole_only() -> None:
    model = tiny.tiny_model("llava_onevision")
    anatomy = Anatomy.of(model)
    rows = tiny.rows_of("llava_onevision", model, images_per_row=[1, 2, 0])
    batch = tiny.collate("llava_onevision", model, rows, "left")
    whole = 16 + 1  # and one newline
    longest = 1 + rows[0].lengths[0] + 3
    ids = torch.zeros(2, longest, dtype=torch.long)
    ids[0, 1 : 1 + rows[0].lengths[0]] = IMAGE
    ids[1, 1 : 1 + 2 * whole] = IMAGE
    inputs = {
        **batch,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "batch_num_images": torch.tensor([1, 2]),
    }
    assert anatomy.tokens_per_image(inputs) == [rows[0].lengths[0], whole, whole]
    assert anatomy.image_indices(inputs) == [0, 1, 1]
    seen: list[int] = []
    anatomy.map_pictures(inputs, lambda picture, index: seen.append(index) or picture)
    assert seen == [0, 0, 0, 1, 2]
    with torch.no_grad():
        model(**inputs)


def test_onevision_shrinks_a_raster_that_is_too_large() -> None:
    pinpoints = [[64, 64]]
    model = tiny.tiny_model("llava_onevision", image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_2")
    anatomy = Anatomy.of(model)
    side = int(16 // (16 * 16 / (2 * 16)) ** 0.5)  # 16 x 16 patches, at most about two pictures' worth of them
    tokens = 16 + side * (side + 1)
    ids = torch.tensor([[1] + [IMAGE] * tokens + [5]])
    inputs = dict(input_ids=ids, pixel_values=torch.rand(1, 17, 3, 16, 16), image_sizes=torch.tensor([[60, 60]]))
    assert anatomy.tokens_per_image(inputs) == [tokens]
    with torch.no_grad():
        model(**inputs)


def test_idefics3_tiles_are_told_from_the_whole_when_tags_are_spelt_in_pieces() -> None:
    anatomy = Anatomy.of(tiny.tiny_model("idefics3"))
    end, one, two, img = 70, 71, 72, 73  # pieces: ">", "1", "2", "img"
    picture = [IMAGE] * 16
    split = [tiny.FAKE, one, end, *picture, tiny.FAKE, two, end, *picture, tiny.FAKE, img, end, *picture, tiny.FAKE]
    plain = [tiny.FAKE, img, end, *picture, tiny.FAKE]
    row = [1, *split, 5, *plain, *plain, *split, 7]
    other = [0] * (len(row) - len(plain)) + plain
    inputs = dict(input_ids=torch.tensor([row, other]))
    assert anatomy.tokens_per_image(inputs) == [48, 16, 16, 48, 16]
    assert anatomy.image_indices(inputs) == [0, 0, 0, 0, 1]
