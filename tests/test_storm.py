"""STORM: the scan over frames, the pooling, and what of a dropped frame is left in the others."""

from __future__ import annotations

from typing import Any

import families as tiny
import pytest
import torch
from torch import Tensor, nn

import sightline as sl
from sightline.errors import InputError
from sightline.models.anatomy import Anatomy
from sightline.reduction.frame_reducer import Frames
from sightline.reduction.storm import Storm, TemporalProjector, pooled_over_space, pooled_over_time
from sightline.reduction.trained_reducer import hold


def mixing(projector: TemporalProjector, seed: int = 0) -> TemporalProjector:
    """The projector with output projections that do something."""
    generator = torch.Generator().manual_seed(seed)
    for layer in projector.layers:
        nn.init.normal_(layer.get_parameter("mixer.out_proj.weight"), std=0.3, generator=generator)
    return projector


def projector(width: int = 6, layers: int = 2, *, forward_only: bool = False) -> TemporalProjector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return mixing(TemporalProjector(width, layers, forward_only=forward_only))


def clip(frames: int, patches: int = 6, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(frames, patches, width, generator=torch.Generator().manual_seed(seed))


def frames_of(model: Any, tower: Tensor) -> Frames:
    anatomy = Anatomy.of(model)
    side = int(tower.shape[1] ** 0.5)
    grid = (side, tower.shape[1] // side)
    return Frames(anatomy, tower, model.model.multi_modal_projector(tower), grid, torch.zeros(2, 32), {})


# --- Pooling ---


@pytest.mark.parametrize("every", [1, 2, 3, 7, 9])
def test_the_last_mean_over_time_is_that_of_the_remainder(every: int) -> None:
    x = clip(7)
    expected = []
    for start in range(0, 7, every):
        members = [x[place] for place in range(start, min(start + every, 7))]
        expected.append(sum(members) / len(members))
    torch.testing.assert_close(pooled_over_time(x, every), torch.stack(expected))


@pytest.mark.parametrize(("grid", "side"), [((3, 5), 2), ((4, 4), 2), ((4, 6), 4), ((2, 3), 1)])
def test_means_over_squares_are_cut_at_the_edges(grid: tuple[int, int], side: int) -> None:
    rows, columns = grid
    x = clip(2, rows * columns)
    expected = []
    for frame in x:
        raster = frame.view(rows, columns, -1)
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                expected.append(raster[top : top + side, left : left + side].flatten(0, 1).mean(0))
    torch.testing.assert_close(pooled_over_space(x, grid, side).flatten(0, 1), torch.stack(expected))


# --- The projector ---


def test_at_the_start_the_projector_changes_nothing() -> None:
    x = clip(5)
    assert torch.equal(TemporalProjector(6, 2, forward_only=False)(x), x)
    assert torch.equal(TemporalProjector(6, 2, forward_only=True)(x), x)


def test_frames_are_scanned_one_after_another_in_raster_order() -> None:
    """A forward scan shows the order: a token moves those after it and none before it."""
    module = projector(forward_only=True)
    x = clip(4)
    changed = x.clone()
    changed[1, 2] = clip(1, seed=2)[0, 0]
    moved = (module(changed) - module(x)).abs().sum(-1).flatten() > 1e-7
    assert moved.tolist() == [False] * 8 + [True] * 16


def test_tied_directions_follow_a_reversed_clip() -> None:
    module = projector()
    for layer in module.layers:
        layer.mixer.back.load_state_dict(layer.mixer.ahead.state_dict())
    x = clip(5)
    torch.testing.assert_close(module(x.flip(0, 1)), module(x).flip(0, 1), rtol=0, atol=1e-5)
    untied = projector()
    assert (untied(x.flip(0, 1)) - untied(x).flip(0, 1)).abs().max() > 1e-3


def test_a_forward_scan_can_be_fed_frame_by_frame() -> None:
    module = projector(forward_only=True)
    x = clip(5)
    state, found = module.init_state(), []
    for frame in x:
        out, state = module.step(frame, state)
        found.append(out)
    torch.testing.assert_close(torch.stack(found), module(x), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="set forward_only"):
        projector().init_state()


# --- The method ---


def test_the_defaults() -> None:
    method = Storm()
    assert (method.layers, method.temporal_pool, method.spatial_pool, method.sample_every) == (2, 4, 1, 1)
    assert not method.is_identity
    assert method.identity().is_identity


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (dict(temporal_pool=1), 7 * 16),
        (dict(temporal_pool=4), 2 * 16),
        (dict(temporal_pool=1, spatial_pool=3), 7 * 4),
        (dict(temporal_pool=1, sample_every=2), 4 * 16),
        (dict(temporal_pool=2, spatial_pool=2, sample_every=3), 2 * 4),
    ],
)
def test_an_untrained_projector_gives_the_plain_models_tokens_pooled(settings: dict[str, int], count: int) -> None:
    model = tiny.tiny_model("llava")
    frames = frames_of(model, clip(7, 16, 32))
    tokens = Storm(weights="untrained", **settings).tokens(frames)
    assert len(tokens) == count
    torch.testing.assert_close(tokens, Storm(layers=0, **settings).tokens(frames), rtol=0, atol=1e-5)


def test_clips_side_by_side_are_as_each_alone() -> None:
    model = tiny.tiny_model("llava")
    method = Storm(temporal_pool=2, weights="untrained")
    hold(model, method, projector(32))
    clips = [frames_of(model, clip(length, 16, 32, seed=seed)) for seed, length in enumerate((5, 3, 5, 1))]
    for together, frames in zip(method.of_clips(clips), clips, strict=True):
        torch.testing.assert_close(together, method.tokens(frames), rtol=0, atol=1e-5)


def test_pooling_and_sampling_come_after_the_scan_and_the_connector() -> None:
    model = tiny.tiny_model("llava")
    frames = frames_of(model, clip(6, 16, 32))
    method = Storm(temporal_pool=2, spatial_pool=2, sample_every=2, weights="untrained")
    module = projector(32)
    hold(model, method, module)
    got = method.tokens(frames)
    expected = []
    mapped = model.model.multi_modal_projector(module(frames.tower))
    for first in (0, 4):  # of the three pairs of frames the first and the third
        pair = (mapped[first] + mapped[first + 1]) / 2
        raster = pair.view(4, 4, -1)
        for top in (0, 2):
            for left in (0, 2):
                expected.append(raster[top : top + 2, left : left + 2].flatten(0, 1).mean(0))
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("forward_only", [False, True])
def test_of_a_dropped_frame_the_scan_leaves_something_and_the_plain_connector_nothing(forward_only: bool) -> None:
    model = tiny.tiny_model("llava")
    tower = clip(4, 16, 32).requires_grad_()
    frames = frames_of(model, tower)
    settings: dict[str, Any] = dict(temporal_pool=1, sample_every=2, forward_only=forward_only)
    plain = Storm(layers=0, **settings)
    method = Storm(weights="untrained", **settings)
    hold(model, method, projector(32, forward_only=forward_only))
    (gradient,) = torch.autograd.grad(plain.tokens(frames).square().sum(), tower)
    assert (gradient.flatten(1).abs().amax(1) > 0).tolist() == [True, False, True, False]
    (gradient,) = torch.autograd.grad(method.tokens(frames).square().sum(), tower)
    # The last frame comes after all that stay: a scan that only goes forward has nothing of it.
    assert (gradient.flatten(1).abs().amax(1) > 0).tolist() == [True, True, True, not forward_only]


def test_the_gradient_goes_through_the_whole_model() -> None:
    """To the pixels of a dropped frame and to the projector, from what the decoder answers."""
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0, images_per_row=3)
    batch["pixel_values"] = batch["pixel_values"].clone().requires_grad_()
    method = Storm(temporal_pool=1, sample_every=2, weights="untrained")
    module = projector(32)
    hold(model, method, module)
    moved = []
    for one in (Storm(layers=0, temporal_pool=1, sample_every=2), method):
        with sl.attach(model, one):
            answer = model(**batch).logits[0, -1].square().sum()
        (gradient,) = torch.autograd.grad(answer, batch["pixel_values"], retain_graph=one is method)
        moved.append((gradient.flatten(1).abs().amax(1) > 0).tolist())
    assert moved == [[True, False, True], [True, True, True]]
    answer.backward()
    assert all(value.grad is not None and value.grad.any() for value in module.parameters())


def test_pooling_alone_needs_no_weights() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0, images_per_row=4)
    with sl.attach(model, Storm(layers=0, temporal_pool=2)) as attachment, torch.no_grad():
        model(**batch)
        assert attachment.visual_tokens == [32]
    with pytest.raises(InputError, match="storm needs weights"):
        sl.attach(model, Storm())


def test_the_whole_model_without_pooling_is_the_stock_model_while_untrained() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[3, 0, 2])
    with torch.no_grad():
        stock = model(**batch).logits[:, -1]
        with sl.attach(model, Storm(temporal_pool=1, weights="untrained")) as attachment:
            torch.testing.assert_close(model(**batch).logits[:, -1], stock, rtol=0, atol=1e-5)
            assert attachment.visual_tokens == [48, 0, 32]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layers=-1), "layers of storm"),
        (dict(temporal_pool=0), "temporal_pool of storm"),
        (dict(spatial_pool=1.5), "spatial_pool of storm must be a whole number"),
        (dict(sample_every=0), "sample_every of storm"),
        (dict(weights=""), "weights of storm"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Storm(**settings)
