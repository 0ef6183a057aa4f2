"""VCD: the noise by an explicit loop over its steps, and the contrast against two stock models."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import families as tiny
import pytest
import torch
from slow_decoder import slow_answer, slow_contrast
from torch import Tensor

from sightline.errors import InputError
from sightline.grounding.diffusion_noise import diffused, signal_share
from sightline.grounding.vcd import Vcd
from sightline.methods import attach, describe, parse_methods


@dataclass(frozen=True)
class Shown(Vcd):
    """Notes the pictures that it is given and those that it makes of them."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    def view(self, pictures: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        noised = super().view(pictures, generator)
        self.seen.extend(zip(pictures, noised, strict=True))
        return noised


def slow_share(step: int) -> float:
    share = 1.0
    for t in range(step + 1):
        share *= 1 - (1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6 - 12 * t / 999)))
    return share


def test_the_defaults() -> None:
    assert dataclasses.asdict(Vcd()) == {"seed": 0, "alpha": 1.0, "beta": 0.1, "noise_step": 500}
    assert describe(parse_methods("vcd:alpha=0.5,noise_step=999")) == "vcd:alpha=0.5,noise_step=999"


# --- The noise ---


@pytest.mark.parametrize("step", [0, 1, 137, 500, 998, 999])
def test_the_share_that_is_left_after_every_step_one_by_one(step: int) -> None:
    assert signal_share(step) == pytest.approx(slow_share(step), rel=1e-6)


def test_the_picture_is_never_gone() -> None:
    assert [round(signal_share(step) ** 0.5, 2) for step in (0, 500, 999)] == [1.0, 0.86, 0.29]
    assert 1 - signal_share(0) == pytest.approx(1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6)))


@pytest.mark.parametrize("step", [0, 500, 999])
def test_noise_is_gaussian_and_independent_of_the_picture(step: int) -> None:
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(3, 61, 67, generator=generator) * 4 - 2
    noised = diffused(picture, step, torch.Generator().manual_seed(5))
    share = slow_share(step)
    noise = (noised - share**0.5 * picture) / (1 - share) ** 0.5
    torch.testing.assert_close(
        noise, torch.randn(3, 61, 67, generator=torch.Generator().manual_seed(5)), atol=2e-3, rtol=0
    )
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.var()) - 1) < 0.05


def test_noise_keeps_the_precision_of_the_picture() -> None:
    picture = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(1))
    exact = diffused(picture.bfloat16().float(), 500, torch.Generator().manual_seed(5))
    half = diffused(picture.bfloat16(), 500, torch.Generator().manual_seed(5))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


@torch.no_grad()
def test_what_is_noised_are_the_pixels_as_the_tower_sees_them() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[1, 2, 1])
    method = Shown(noise_step=700)
    with attach(model, method):
        model(**batch)
    assert len(method.seen) == 4
    share, noises = slow_share(700), []
    for (picture, noised), pixels in zip(method.seen, batch["pixel_values"], strict=True):
        assert torch.equal(picture, pixels)
        noises.append((noised - share**0.5 * pixels) / (1 - share) ** 0.5)
    assert noised.abs().max() > 1.5  # nothing is clamped to the range of a picture
    for one in range(4):  # every picture has noise of its own
        for other in range(one):
            assert (noises[one] - noises[other]).abs().max() > 0.5


# --- The contrast ---


def test_four_tokens_by_hand() -> None:
    # Probabilities .6 .3 .07 .03, plausible from .06.
    own = torch.tensor([[0.6, 0.3, 0.07, 0.03]]).log()
    noised = torch.tensor([[0.0, 1.0, -2.0, 50.0]])
    expected = [2 * math.log(0.6), 2 * math.log(0.3) - 1, 2 * math.log(0.07) + 2, -math.inf]
    assert Vcd().combine(own, own, [noised])[0].tolist() == pytest.approx(expected)
    # What an earlier method added stays added; contrast and plausibility are the model's own.
    assert Vcd().combine(own + 7, own, [noised])[0].tolist() == pytest.approx([x + 7 for x in expected])


def test_a_view_that_says_nothing_sharpens_the_plausible_tokens() -> None:
    own = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 2
    combined = Vcd(alpha=1.5).combine(own, own, [torch.full_like(own, 0.7)]).softmax(dim=-1)
    plausible = own.softmax(-1) >= 0.1 * own.softmax(-1).amax(-1, keepdim=True)
    expected = own.softmax(dim=-1) ** 2.5 * plausible
    torch.testing.assert_close(combined, expected / expected.sum(dim=-1, keepdim=True))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_an_answer_is_that_of_two_models_that_read_everything_anew(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[1, 2, 1])
    method = Shown(alpha=1.5, beta=0.05, noise_step=900, seed=3)
    with attach(model, method):
        output = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    noised = torch.stack([view for _, view in method.seen])
    assert noised.shape == batch["pixel_values"].shape  # drawn once, not once a step
    expected, scores = slow_answer(
        model, batch, noised, partial(slow_contrast, alpha=method.alpha, beta=method.beta), 4
    )
    assert output.sequences[:, -4:].tolist() == expected.tolist()
    torch.testing.assert_close(torch.stack(output.logits), torch.tensor(scores), atol=3e-4, rtol=0)
    assert model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:].tolist() != expected.tolist()


@torch.no_grad()
def test_the_contrast_grows_with_the_noise() -> None:
    """The less of the picture is left, the more of it speaks in the difference; after step 0 next to nothing does."""
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits[:, -1]
    sizes = []
    for step in (0, 300, 999):
        with attach(model, Vcd(beta=0.0, noise_step=step)):
            sizes.append(float((model(**batch).logits[:, -1] - stock).norm()))
    assert sizes[0] < 0.1 * sizes[1] < 0.1 * sizes[2]


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=-1.0), r"alpha of vcd must lie in \[0, 100\], not -1.0"),
        (dict(beta=1.5), r"beta of vcd must lie in \[0, 1\], not 1.5"),
        (dict(noise_step=1000), r"noise_step of vcd must lie in \[0, 999\], not 1000"),
        (dict(noise_step=-1), "noise_step of vcd must lie in"),
        (dict(noise_step=2.5), "noise_step of vcd must be a whole number, not 2.5"),
        (dict(seed=-1), "seed of vcd must be a whole number from 0 to 4294967295, not -1"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Vcd(**options)
