"""FoPru: significance by eager attention, summed in plain Python, and what each strategy keeps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import families as tiny
import pytest
import torch
from families import MROPE_FAMILIES
from specimens import anatomy_of
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.models.anatomy import Anatomy
from sightline.reduction.fopru import FoPru
from sightline.reduction.token_reducer import ImageTokens

KNOWN = [family for family in tiny.FAMILIES if family not in MROPE_FAMILIES]
PACKED = ("llava_next", "llava_onevision")


def tower_attention(anatomy: Anatomy, batch: dict[str, Any]) -> Tensor:
    """What the connected layer's attention was, [pictures, heads, queries, keys], from the eager implementation."""
    model, seen = anatomy.model, []
    assert anatomy.connected_layer is not None
    model.set_attn_implementation("eager")
    handle = anatomy.tower_attentions[anatomy.connected_layer].register_forward_hook(
        lambda module, args, output: seen.append(output[1])
    )
    with torch.no_grad():
        model(**batch)
    handle.remove()
    model.set_attn_implementation("sdpa")
    return torch.cat(seen)


def profiles(attention: Tensor, leading: int) -> tuple[list[list[float]], list[list[float]]]:
    """For each picture, what each patch receives and gives, averaged over heads and over patches, in plain Python."""
    received, given = [], []
    for picture in attention.tolist():
        patches = range(leading, len(picture[0]))
        mean = [[sum(head[i][j] for head in picture) / len(picture) for j in patches] for i in patches]
        received.append([sum(row[j] for row in mean) / len(mean) for j in range(len(mean))])
        given.append([sum(row) / len(mean) for row in mean])
    return received, given


def on_tokens(family: str, row: tiny.Row, pictures: list[list[float]]) -> list[list[float]]:
    """The patches' values of the pictures of a row -> for each image, those of its tokens."""
    images, start = [], 0
    for image, tiles in enumerate(row.pictures):
        own = pictures[start : start + len(tiles)]
        start += len(tiles)
        if family in PACKED:
            values = list(own[0])
            down, across = tiny.packed_raster(*row.sizes[image])
            for y in down:
                for x in across:
                    tile = 1 + (y // 4) * tiny.TILINGS[row.sizes[image]][1] + x // 4
                    values.append(own[tile][(y % 4) * 4 + x % 4])
                values.append(-math.inf)
        else:
            side = math.isqrt(len(own[0]))
            high = side // 4
            values = [
                sum(tile[(high * y + i) * side + high * x + j] for i in range(high) for j in range(high))
                for tile in own
                for y in range(4)
                for x in range(4)
            ]
        assert len(values) == row.lengths[image]
        images.append(values)
    return images


def kept(model: Any, batch: dict[str, Any], method: FoPru) -> list[list[list[int]]]:
    with sl.attach(model, method) as attachment, torch.no_grad():
        model(**batch)
        assert attachment.kept is not None
        return [[image.tolist() for image in row] for row in attachment.kept]


def top(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda place: -scores[place])[:count])


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("profile", ["auto", "received", "given"])
def test_rank_keeps_the_tokens_that_are_attended_to_most(family: str, profile: Any) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    method = FoPru(keep=0.3, profile=profile)
    if profile == "given" and anatomy.leading_tokens == 0:
        with pytest.raises(
            InputError, match=rf"what they do not give to \[CLS\], which {family}.*use profile received"
        ):
            sl.attach(model, method)
        return
    rows = tiny.rows_of(family, model, images_per_row=2)
    batch = tiny.collate(family, model, rows, "left")
    got = kept(model, batch, method)
    for row, row_kept in zip(rows, got, strict=True):
        attention = tower_attention(anatomy, tiny.collate(family, model, [row], "left"))
        received, given = (on_tokens(family, row, one) for one in profiles(attention, anatomy.leading_tokens))
        for image in range(2):
            chosen = received if profile != "given" else given
            expected = top(chosen[image], max(1, math.floor(0.3 * row.lengths[image])))
            assert row_kept[image] == expected
            if profile == "auto":  # the paper's pick
                finite = [[s for s in one[image] if s != -math.inf] for one in (received, given)]
                variances = [sum((s - sum(one) / len(one)) ** 2 for s in one) / len(one) for one in finite]
                assert variances[0] > variances[1]


@pytest.mark.parametrize("family", [family for family in KNOWN if family not in PACKED])
@pytest.mark.parametrize(("keep", "of_four"), [(0.25, 1), (0.74, 2), (0.01, 1)])
def test_row_keeps_whole_rows_with_the_highest_sums(family: str, keep: float, of_four: int) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    rows = tiny.rows_of(family, model, images_per_row=2)
    got = kept(model, tiny.collate(family, model, rows, "left"), FoPru(keep=keep, strategy="row"))
    for row, row_kept in zip(rows, got, strict=True):
        attention = tower_attention(anatomy, tiny.collate(family, model, [row], "left"))
        received = on_tokens(family, row, profiles(attention, anatomy.leading_tokens)[0])
        for scores, places in zip(received, row_kept, strict=True):
            lines = len(scores) // 4  # rows of all tiles, one after the other
            sums = [sum(scores[4 * line : 4 * line + 4]) for line in range(lines)]
            count = max(1, math.floor(keep * lines))
            assert lines > 4 or count == of_four
            assert places == [4 * line + column for line in top(sums, count) for column in range(4)]


def planted(values: list[float], given: list[float]) -> ImageTokens:
    rows = torch.arange(len(values)).div(3, rounding_mode="floor").double()
    readings = {"received": torch.tensor(values), "given": torch.tensor(given), "raster row": rows}
    return ImageTokens(torch.zeros(len(values), 2), readings=readings)


def test_an_example_by_hand() -> None:
    """A raster of 3 x 3: the best single token is in the row with the smallest sum."""
    image = planted([0.9, 0.0, 0.0, 0.5, 0.4, 0.3, 0.4, 0.5, 0.6], [1.0, 1.0, 1.0, 1.0, 1.01, 1.0, 1.0, 1.0, 1.0])
    assert FoPru(keep=0.12).reduce(image)[0].nonzero()[:, 0].tolist() == [0]
    assert FoPru(keep=0.23).reduce(image)[0].nonzero()[:, 0].tolist() == [0, 8]
    assert FoPru(keep=0.34, strategy="row").reduce(image)[0].nonzero()[:, 0].tolist() == [6, 7, 8]
    assert FoPru(keep=0.99, strategy="row").reduce(image)[0].nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7, 8]
    assert FoPru(keep=0.12, profile="given").reduce(image)[0].nonzero()[:, 0].tolist() == [4]
    flat = planted([0.5] * 8 + [0.6], [1.0, 3.0] + [1.0] * 7)
    assert FoPru(keep=0.12).reduce(flat)[0].nonzero()[:, 0].tolist() == [1]  # what was given varies more


def test_newlines_do_not_count_as_variance_and_go_first() -> None:
    received = torch.tensor([0.5, 0.6, -math.inf, 0.4, 0.5, -math.inf])
    given = torch.tensor([0.9, 0.2, -math.inf, 0.3, 0.4, -math.inf])
    image = ImageTokens(torch.zeros(6, 2), readings={"received": received, "given": given})
    assert FoPru(keep=0.5).reduce(image)[0].nonzero()[:, 0].tolist() == [0, 3, 4]
    assert FoPru(keep=0.7).reduce(image)[0].nonzero()[:, 0].tolist() == [0, 1, 3, 4]


def test_a_patch_that_all_look_at_stays() -> None:
    """All keys but one patch's are zero, and all queries alike and along that key."""
    model = tiny.tiny_model("paligemma", vision_config=dict(num_hidden_layers=1))
    anatomy = Anatomy.of(model)
    layer = anatomy.tower_layers[0]
    attention: Any = layer.get_submodule("self_attn")
    norm: Any = layer.get_submodule("layer_norm1")
    embeddings: Any = anatomy.vision_tower.get_submodule("embeddings")
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding.weight[:, 0] = 1.0
        embeddings.position_embedding.weight[11, 0] = -1.0  # the norm leaves the sign
        norm.weight.fill_(1)
        norm.bias.zero_()
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.zero_()
            linear.bias.zero_()
        attention.q_proj.bias.fill_(1)
        attention.k_proj.weight[:, 0] = -1.0
    batch = tiny.inputs("paligemma", model)
    assert kept(model, batch, FoPru(keep=1 / 16)) == [[[11]]] * 3
    assert kept(model, batch, FoPru(keep=0.25, strategy="row")) == [[[8, 9, 10, 11]]] * 3


def test_padding_of_smolvlm_receives_nothing() -> None:
    """Half of each picture is hidden from the tower by its mask; those patches go first."""
    model = tiny.tiny_model("smolvlm")
    batch = tiny.inputs("smolvlm", model)
    mask = torch.ones(*batch["pixel_values"].shape[:2], 32, 32, dtype=torch.bool)
    mask[..., 16:, :] = False
    with_mask = {**batch, "pixel_attention_mask": mask}
    assert kept(model, with_mask, FoPru(keep=0.5))[0] == [list(range(8))]
    assert kept(model, batch, FoPru(keep=0.5))[0] != [list(range(8))]


def test_settings() -> None:
    assert dataclasses.asdict(FoPru()) == {
        "keep": 0.25,
        "positions": "compact",
        "strategy": "rank",
        "profile": "auto",
    }
    for strategy in ("rank", "row"):
        assert FoPru(keep=1.0, strategy=strategy).is_identity
    assert [FoPru(keep=keep).budget(576) for keep in (0.75, 0.5, 0.25, 0.1, 0.002)] == [432, 288, 144, 57, 1]
    assert FoPru(keep=0.29).budget(100) == 29
    assert sl.parse_methods("fopru:keep=0.5,strategy=row") == (FoPru(keep=0.5, strategy="row"),)
    with pytest.raises(InputError, match=r"unknown strategy of fopru 'rows'.*row"):
        FoPru(strategy="rows")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"unknown profile of fopru 'receive'.*received"):
        FoPru(profile="receive")  # type: ignore[arg-type]


def test_what_has_no_layout_or_no_rows_is_refused() -> None:
    for family in MROPE_FAMILIES:
        with pytest.raises(InputError, match=f"fopru looks at the patches of the vision tower, but in {family}"):
            FoPru().check(anatomy_of(family))
    for family in PACKED:
        with pytest.raises(InputError, match=f"which the packed tiles of {family} are not; use strategy rank"):
            FoPru(strategy="row").check(anatomy_of(family))
    full = Anatomy.of(tiny.tiny_model("llava", vision_feature_select_strategy="full", image_seq_length=17))
    with pytest.raises(InputError, match="it is not known which of them make which visual token"):
        FoPru().check(full)
