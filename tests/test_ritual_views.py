"""RITUAL's six transformations, each against a slow one of numpy, Pillow or colorsys."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from sightline.grounding import ritual
from sightline.grounding.ritual import TRANSFORMATIONS, turn_hue


def random_picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[float]], ritual.Transformation]:
    """The transformation whose uniform parameters are the given ones."""

    def drawn(name: str, values: list[float]) -> ritual.Transformation:
        waiting = iter(values)
        monkeypatch.setattr(ritual, "_uniform", lambda generator, low, high: next(waiting))
        return TRANSFORMATIONS[name](torch.Generator().manual_seed(0))

    return drawn


def test_parameters_are_drawn_uniformly_from_the_ranges_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = ritual._uniform, []

    def watched(generator: torch.Generator, low: float, high: float) -> float:
        calls.append((low, high, original(generator, low, high)))
        return calls[-1][2]

    monkeypatch.setattr(ritual, "_uniform", watched)
    ratio = (math.log(3 / 4), math.log(4 / 3))
    ranges: dict[str, list[tuple[float, float]]] = {
        "horizontal_flip": [],
        "vertical_flip": [],
        "rotation": [(-180, 180)],
        "colour_jitter": [(0, 2), (0, 2), (0, 2), (-0.5, 0.5)],
        "gaussian_blur": [(1.5, 2.0)],
        "random_resized_crop": [(0.08, 1), ratio] * 10 + [(0, 1), (0, 1)],
    }
    assert list(TRANSFORMATIONS) == list(ranges)
    generator = torch.Generator().manual_seed(0)
    for name, expected in ranges.items():
        calls.clear()
        for _ in range(200):
            TRANSFORMATIONS[name](generator)
        assert [(low, high) for low, high, _ in calls] == expected * 200
        for parameter in range(len(expected)):
            low, high = expected[parameter]
            shares = [(value - low) / (high - low) for _, _, value in calls[parameter :: len(expected)]]
            assert 0 <= min(shares) < 0.05
            assert 0.95 < max(shares) <= 1
            assert abs(sum(shares) / 200 - 0.5) < 0.1


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 20), (31, 13)])
def test_a_view_is_a_picture_of_the_same_size(name: str, height: int, width: int) -> None:
    picture = random_picture(height, width)
    before = picture.clone()
    for seed in range(10):
        view = TRANSFORMATIONS[name](torch.Generator().manual_seed(seed))(picture)
        again = TRANSFORMATIONS[name](torch.Generator().manual_seed(seed))(picture)
        assert view.shape == picture.shape
        assert view.dtype == torch.float32
        assert float(view.min()) >= -1e-5
        assert float(view.max()) <= 1 + 1e-5
        assert torch.equal(view, again)
    assert torch.equal(picture, before)


def test_flips() -> None:
    picture = torch.arange(18.0).reshape(3, 2, 3)
    generator = torch.Generator()
    assert TRANSFORMATIONS["horizontal_flip"](generator)(picture)[0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert TRANSFORMATIONS["vertical_flip"](generator)(picture)[2].tolist() == [[15, 16, 17], [12, 13, 14]]


# --- Rotation ---


@pytest.mark.parametrize("size", [7, 16])
@pytest.mark.parametrize("quarters", [-2, -1, 0, 1, 2])
def test_quarter_turns_are_exact(draw: Callable[..., ritual.Transformation], size: int, quarters: int) -> None:
    picture = random_picture(size, size)
    turned = draw("rotation", [90.0 * quarters])(picture)
    assert np.array_equal(turned.numpy(), np.rot90(picture.numpy(), quarters, axes=(1, 2)))


def test_half_turns_of_pictures_that_are_no_squares_are_exact(draw: Callable[..., ritual.Transformation]) -> None:
    picture = random_picture(9, 14)
    assert torch.equal(draw("rotation", [180.0])(picture), picture.flip(-1, -2))


@pytest.mark.parametrize("angle", [17.0, -33.3, 45.0, 121.5, -170.0])
@pytest.mark.parametrize(("height", "width"), [(15, 15), (12, 21)])
def test_rotation_takes_the_nearest_pixel(
    draw: Callable[..., ritual.Transformation], angle: float, height: int, width: int
) -> None:
    picture = random_picture(height, width)
    turned = draw("rotation", [angle])(picture)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    compared = 0
    for row, column in itertools.product(range(height), range(width)):
        x, y = column - (width - 1) / 2, row - (height - 1) / 2  # from the centre, y downwards
        from_column = cos * x - sin * y + (width - 1) / 2  # an anticlockwise turn, undone
        from_row = sin * x + cos * y + (height - 1) / 2
        if any(abs(place % 1 - 0.5) < 1e-3 for place in (from_column, from_row)):
            continue  # halfway between two pixels
        source = round(from_row), round(from_column)
        inside = 0 <= source[0] < height and 0 <= source[1] < width
        expected = picture[:, source[0], source[1]] if inside else torch.zeros(3)
        assert torch.equal(turned[:, row, column], expected)
        compared += 1
    assert compared > 0.9 * height * width


# --- Colours ---


@pytest.mark.parametrize("turn", [0.0, 0.1, 0.5, -0.25, -0.5, 0.333])
def test_the_hue_turns_as_colorsys_turns_it(turn: float) -> None:
    picture = random_picture(6, 7)
    picture[:, 0, 0] = 0.4  # grey has no hue
    picture[:, 0, 1] = 0.0
    picture[:, 0, 2] = torch.tensor([1.0, 0.0, 0.0])
    picture[:, 0, 3] = torch.tensor([0.2, 0.7, 0.7])  # two channels are the largest
    picture[:, 0, 4] = torch.tensor([0.7, 0.2, 0.7])
    turned = turn_hue(picture, turn)
    for row, column in itertools.product(range(6), range(7)):
        hue, saturation, value = colorsys.rgb_to_hsv(*picture[:, row, column].tolist())
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert turned[:, row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_third_of_a_turn_is_a_change_of_channels() -> None:
    picture = random_picture(5, 5)
    torch.testing.assert_close(turn_hue(picture, 1 / 3), picture[[2, 0, 1]])  # red becomes green
    torch.testing.assert_close(turn_hue(picture, 0.0), picture)


def enhanced(picture: np.ndarray, step: str, amount: float) -> np.ndarray:
    """One step of the jitter on [H, W, 3] in [0, 1], by Pillow, or by colorsys for the hue."""
    if step == "hue":
        out = np.zeros_like(picture)
        for place in np.ndindex(picture.shape[:2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*picture[place])
            out[place] = colorsys.hsv_to_rgb((hue + amount) % 1, saturation, value)
        return out
    kind = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }[step]
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    return np.asarray(kind(image).enhance(amount), dtype=np.float64) / 255


STEPS = ("brightness", "contrast", "saturation", "hue")


@pytest.mark.parametrize("step", STEPS)
def test_each_step_of_the_jitter_is_the_one_of_pillow(draw: Callable[..., ritual.Transformation], step: str) -> None:
    picture = random_picture(8, 9)
    for amount in (-0.4, 0.3) if step == "hue" else (0.0, 0.3, 1.7):
        values = [1.0, 1.0, 1.0, 0.0]
        values[STEPS.index(step)] = amount
        view = draw("colour_jitter", values)(picture).permute(1, 2, 0).numpy()
        expected = enhanced(picture.permute(1, 2, 0).double().numpy(), step, amount)
        assert np.abs(view - expected).max() < 2.5 / 255  # Pillow rounds, the grey mean too


def test_the_steps_of_the_jitter_come_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"brightness": 1.6, "contrast": 0.5, "saturation": 0.4, "hue": 0.2}
    picture = random_picture(4, 4)
    results = {}
    for order in itertools.permutations(STEPS):
        result = picture.permute(1, 2, 0).double().numpy()
        for step in order:
            result = enhanced(result, step, values[step])
        results[order] = result
    found = set()
    for seed in range(120):
        waiting = iter(values.values())
        monkeypatch.setattr(ritual, "_uniform", lambda generator, low, high, waiting=waiting: next(waiting))
        view = TRANSFORMATIONS["colour_jitter"](torch.Generator().manual_seed(seed))(picture)
        errors = {order: np.abs(view.permute(1, 2, 0).numpy() - result).max() for order, result in results.items()}
        nearest = min(errors, key=errors.__getitem__)
        assert errors[nearest] < 6 / 255  # rounded by Pillow at each step
        found.add(nearest)
    assert len(found) > 12


# --- Blur ---


@pytest.mark.parametrize("sigma", [1.5, 1.83, 2.0])
@pytest.mark.parametrize(("height", "width"), [(10, 10), (7, 15)])
def test_the_blur_is_a_full_convolution(
    draw: Callable[..., ritual.Transformation], sigma: float, height: int, width: int
) -> None:
    picture = random_picture(height, width)
    offsets = np.arange(-6, 7)
    square = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * sigma**2))
    square /= square.sum()
    padded = np.pad(picture.double().numpy(), ((0, 0), (6, 6), (6, 6)), mode="reflect")
    expected = np.zeros((3, height, width))
    for down, right in itertools.product(range(13), range(13)):
        expected += square[down, right] * padded[:, down : down + height, right : right + width]
    view = draw("gaussian_blur", [sigma])(picture)
    assert np.abs(view.numpy() - expected).max() < 1e-6


def test_the_blur_keeps_even_areas_and_spreads_a_dot_with_weights_that_sum_to_one(
    draw: Callable[..., ritual.Transformation],
) -> None:
    even = torch.full((3, 20, 20), 0.3)
    torch.testing.assert_close(draw("gaussian_blur", [1.7])(even), even)
    dot = torch.zeros(3, 25, 25)
    dot[:, 12, 12] = 1
    spread = draw("gaussian_blur", [1.7])(dot)
    assert spread[0].sum().item() == pytest.approx(1)
    assert (spread[0] > 0).sum() == 13 * 13
    torch.testing.assert_close(spread, spread.flip(-1))
    torch.testing.assert_close(spread, spread.transpose(-1, -2))


# --- Crop ---


def crop_of(transformation: ritual.Transformation, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of what a crop shows, read from a picture of its own rows and columns.

    Stretched to a larger size, the outermost values are those of the outermost pixels.
    """
    rows = torch.arange(height)[:, None].expand(height, width) / 1.0
    columns = torch.arange(width).expand(height, width) / 1.0
    view = transformation(torch.stack([rows, columns, rows]))
    top, left = round(float(view[0].min())), round(float(view[1].min()))
    return top, left, round(float(view[0].max())) - top + 1, round(float(view[1].max())) - left + 1


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 90), (120, 40)])
def test_crops_have_the_area_and_the_ratio_of_the_paper(height: int, width: int) -> None:
    places, shares = set(), []
    for seed in range(150):
        crop = TRANSFORMATIONS["random_resized_crop"](torch.Generator().manual_seed(seed))
        top, left, high, wide = crop_of(crop, height, width)
        assert 0 <= top <= height - high
        assert 0 <= left <= width - wide
        # Sides are whole pixels: half a pixel more or less of each.
        assert (wide - 0.5) / (high + 0.5) <= 4 / 3
        assert (wide + 0.5) / (high - 0.5) >= 3 / 4
        assert (high + 0.5) * (wide + 0.5) >= 0.08 * height * width
        places.add((top, left))
        shares.append(high * wide / (height * width))
    assert len(places) > 80
    assert min(shares) < 0.15
    assert max(shares) > min(0.9, 0.85 * 4 / 3 * min(height / width, width / height))


def resized(part: Tensor, height: int, width: int) -> Tensor:
    images = [Image.fromarray(channel.numpy()).resize((width, height), Image.Resampling.BILINEAR) for channel in part]
    return torch.stack([torch.from_numpy(np.array(image)) for image in images])


def test_a_crop_is_resized_as_pillow_resizes_it(draw: Callable[..., ritual.Transformation]) -> None:
    picture = random_picture(20, 20)
    # A quarter of the area with equal sides: 10 x 10 pixels, whose top is one of 11 rows: the one at half way.
    view = draw("random_resized_crop", [0.25, 0.0] * 10 + [0.5, 0.0])(picture)
    torch.testing.assert_close(view, resized(picture[:, 5:15, :10], 20, 20), atol=1e-5, rtol=0)
    # 64 % of the area, wide : high = 25 : 16 is not allowed to be drawn, but shows which side is which: 20 x 12.8.
    view = draw("random_resized_crop", [0.64, math.log(25 / 16)] * 10 + [0.9999, 0.9999])(picture)
    torch.testing.assert_close(view, resized(picture[:, 7:, :], 20, 20), atol=1e-5, rtol=0)
    # All of it is the picture itself.
    assert torch.equal(draw("random_resized_crop", [1.0, 0.0] * 10 + [0.5, 0.5])(picture), picture)


def test_the_first_size_that_fits_is_taken(draw: Callable[..., ritual.Transformation]) -> None:
    too_wide, fits, also = [1.0, math.log(4 / 3)], [0.25, 0.0], [0.04, 0.0]
    crop = draw("random_resized_crop", too_wide + fits + also * 8 + [0.0, 0.0])
    assert crop_of(crop, 40, 40) == (0, 0, 20, 20)
    # If none fits (a strip can't hold its whole area in a ratio of 1), the largest part of a ratio that is allowed.
    crop = draw("random_resized_crop", [1.0, 0.0] * 10 + [0.0, 0.0])
    assert crop_of(crop, 12, 60) == (0, 0, 12, 16)
    assert crop_of(crop, 60, 12) == (0, 0, 16, 12)
