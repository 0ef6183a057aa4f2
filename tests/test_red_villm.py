"""RED-VILLM: means over time and over space, and which connector reads them."""

from __future__ import annotations

from typing import Any

import families as tiny
import pytest
import torch
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.models.anatomy import Anatomy
from sightline.reduction.frame_reducer import Frames
from sightline.reduction.red_villm import RedVillm, evenly
from sightline.reduction.trained_reducer import hold

PATCHES = 16


def clip(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(frames, PATCHES, 32, generator=torch.Generator().manual_seed(seed))


def frames_of(model: Any, tower: Tensor) -> Frames:
    features = model.model.multi_modal_projector(tower)
    return Frames(Anatomy.of(model), tower, features, (4, 4), torch.zeros(2, 32), {})


def method_with_its_own_connector(model: Any, **settings: Any) -> tuple[RedVillm, Any]:
    """The method, its f_tmp no copy of f_img."""
    method = RedVillm(weights="untrained", **settings)
    f_tmp = method.fresh(Anatomy.of(model))
    with torch.no_grad():
        for parameter in f_tmp.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    hold(model, method, f_tmp)
    return method, f_tmp


@torch.no_grad()
def test_spatial_tokens_by_the_models_connector_and_temporal_ones_by_their_own() -> None:
    model = tiny.tiny_model("llava")
    method, f_tmp = method_with_its_own_connector(model)
    x = clip(5)
    spatial = sum(frame for frame in x) / 5
    temporal = torch.stack([sum(patch for patch in frame) / PATCHES for frame in x])
    f_img = model.model.multi_modal_projector
    expected = torch.cat([f_img(spatial[None])[0], f_tmp(temporal[None])[0]])
    tokens = method.tokens(frames_of(model, x))
    assert len(tokens) == PATCHES + 5
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    assert (f_tmp(temporal[None]) - f_img(temporal[None])).abs().max() > 0.1


@torch.no_grad()
def test_the_parts_their_order_and_the_shared_connector() -> None:
    model = tiny.tiny_model("llava")
    method, _ = method_with_its_own_connector(model)
    frames = frames_of(model, clip(3))
    both = method.tokens(frames)
    spatial, temporal = both[:PATCHES], both[PATCHES:]

    def tokens(**settings: Any) -> Tensor:
        return RedVillm(weights="untrained", **settings).tokens(frames)

    assert torch.equal(tokens(parts="spatial"), spatial)
    assert torch.equal(tokens(parts="temporal"), temporal)
    assert torch.equal(tokens(order="temporal first"), torch.cat([temporal, spatial]))
    shared = tokens(shared=True)
    assert torch.equal(shared[:PATCHES], spatial)
    means = model.model.multi_modal_projector(frames.tower.mean(1)[None])[0]
    torch.testing.assert_close(shared[PATCHES:], means, rtol=0, atol=1e-5)
    hold(model, method, None)  # f_tmp starts as the model's connector
    torch.testing.assert_close(tokens(), shared, rtol=0, atol=1e-6)


@torch.no_grad()
def test_centred_the_temporal_part_is_what_differs_between_frames_at_full_size() -> None:
    model = tiny.tiny_model("llava")
    method, f_tmp = method_with_its_own_connector(model, centred=True)
    x = 0.01 * clip(5) + clip(1, seed=1)  # what changes is a hundredth of what is seen
    means = [frame.mean(0) for frame in x]
    centre = sum(means) / 5
    changes = torch.stack([mean - centre for mean in means])
    inputs = changes / changes.square().mean().sqrt() * torch.stack(means).square().mean().sqrt()
    tokens = method.tokens(frames_of(model, x))
    torch.testing.assert_close(tokens[PATCHES:], f_tmp(inputs[None])[0], rtol=0, atol=1e-4)
    plain = RedVillm(weights="untrained").tokens(frames_of(model, x))
    assert torch.equal(tokens[:PATCHES], plain[:PATCHES])

    still = method.tokens(frames_of(model, clip(1).expand(5, -1, -1)))[PATCHES:]
    torch.testing.assert_close(still, f_tmp(torch.zeros(1, 5, 32))[0], rtol=0, atol=1e-2)


@torch.no_grad()
def test_a_single_frame_is_the_picture() -> None:
    model = tiny.tiny_model("llava")
    method, f_tmp = method_with_its_own_connector(model)
    frames = frames_of(model, clip(1))
    torch.testing.assert_close(method.tokens(frames), frames.features[0], rtol=0, atol=1e-6)
    temporal = RedVillm(parts="temporal", weights="untrained").tokens(frames)
    torch.testing.assert_close(temporal, f_tmp(frames.tower.mean(1)[None])[0], rtol=0, atol=1e-6)
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits[:, -1]
    with sl.attach(model, method):
        torch.testing.assert_close(model(**batch).logits[:, -1], stock, rtol=0, atol=1e-4)


@torch.no_grad()
def test_each_frame_twice_and_frames_in_another_order() -> None:
    model = tiny.tiny_model("llava")
    method, _ = method_with_its_own_connector(model)
    x = clip(4)
    once = method.tokens(frames_of(model, x))
    twice = method.tokens(frames_of(model, x.repeat_interleave(2, 0)))
    torch.testing.assert_close(twice[:PATCHES], once[:PATCHES], rtol=0, atol=1e-5)
    torch.testing.assert_close(twice[PATCHES:], once[PATCHES:].repeat_interleave(2, 0), rtol=0, atol=1e-5)
    order = [2, 0, 3, 1]
    shuffled = method.tokens(frames_of(model, x[order]))
    torch.testing.assert_close(shuffled[:PATCHES], once[:PATCHES], rtol=0, atol=1e-5)
    torch.testing.assert_close(shuffled[PATCHES:], once[PATCHES:][order], rtol=0, atol=1e-5)


def test_the_temporal_connector_is_a_copy_that_shares_nothing() -> None:
    model = tiny.tiny_model("llava")
    connector = model.model.multi_modal_projector
    calls = []
    handle = connector.linear_1.register_forward_pre_hook(lambda module, args: calls.append(0))
    f_tmp = RedVillm().fresh(Anatomy.of(model))
    ours, its = dict(f_tmp.named_parameters()), dict(connector.named_parameters())
    assert {name: value.tolist() for name, value in ours.items()} == {n: v.tolist() for n, v in its.items()}
    assert not {value.data_ptr() for value in ours.values()} & {value.data_ptr() for value in its.values()}
    f_tmp(torch.zeros(1, 2, 32))
    handle.remove()
    assert calls == []  # nor those who watch it


def test_means_do_not_lose_precision_in_half_precision() -> None:
    """A mean of many equal numbers is that number; summed up in bfloat16 it would stop growing at 256."""
    model = tiny.tiny_model("llava").bfloat16()
    one = clip(1).bfloat16()
    frames = frames_of(model, one.expand(600, -1, -1))
    with torch.no_grad():
        spatial = RedVillm(parts="spatial", most_frames=1000).tokens(frames)
        assert torch.equal(spatial, model.model.multi_modal_projector(one)[0])


def test_of_more_frames_the_middle_ones_of_equal_stretches_are_taken() -> None:
    assert evenly(4, 100) == [0, 1, 2, 3]
    assert evenly(10, 5) == [1, 3, 5, 7, 9]
    assert evenly(9, 3) == [1, 4, 7]
    assert evenly(7, 2) == [1, 5]
    model = tiny.tiny_model("llava")
    x = clip(9)
    method = RedVillm(most_frames=3, shared=True)
    with torch.no_grad():
        assert torch.equal(method.tokens(frames_of(model, x)), method.tokens(frames_of(model, x[[1, 4, 7]])))


@pytest.mark.parametrize("order", ["spatial first", "temporal first"])
def test_a_batch_of_clips_of_different_lengths(order: Any) -> None:
    model = tiny.tiny_model("llava")
    method, _ = method_with_its_own_connector(model, order=order)
    images = [4, 1, 2]
    batch = tiny.inputs("llava", model, images_per_row=images)
    with sl.attach(model, method) as attachment, torch.no_grad():
        together = model(**batch).logits[:, -1]
        assert attachment.visual_tokens == [PATCHES + 4, PATCHES, PATCHES + 2]
        for row in range(3):
            alone = model(**tiny.single("llava", model, row, images_per_row=images)).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-4)


def test_settings_without_weights_work_on_a_model_without_weights() -> None:
    model = tiny.tiny_model("llava")
    for settings in (dict(shared=True), dict(parts="spatial"), dict(most_frames=0)):
        with sl.attach(model, RedVillm(**settings)):  # type: ignore[arg-type]
            pass
    with pytest.raises(InputError, match="red_villm needs weights"):
        sl.attach(model, RedVillm())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(most_frames=-1), "most_frames of red_villm"),
        (dict(parts="all"), "parts of red_villm"),
        (dict(order="spatial"), "order of red_villm"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RedVillm(**settings)
