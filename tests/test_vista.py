"""VISTA: the tilt of a vector by hand, the directions, and whole answers against a decoder in slow motion."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import families as tiny
import pytest
import torch
from slow_decoder import SlowDecoder
from torch import Tensor

from sightline.errors import InputError
from sightline.grounding.vista import Vista
from sightline.methods import attach
from sightline.reduction.voco_llama import VoCo

LAYERS = 5
DEEP: dict[str, Any] = dict(text_config=dict(num_hidden_layers=LAYERS))


def slow_steer(m: list[float], v: list[float], strength: float, scale: str) -> list[float]:
    """One vector, coordinate by coordinate."""

    def norm(x: list[float]) -> float:
        return math.sqrt(sum(a * a for a in x))

    if norm(v) == 0:
        return m
    if scale == "unit":
        cos = sum(a * b for a, b in zip(m, v, strict=True)) / (norm(m) * norm(v))
        kappa = 1 + max(0.0, -cos)
        tilted = [a / norm(m) + strength * kappa * b / norm(v) for a, b in zip(m, v, strict=True)]
    else:
        tilted = [a + strength * b for a, b in zip(m, v, strict=True)]
    return [norm(m) * a / norm(tilted) for a in tilted]


class Steered:
    """One row decoded greedily: every token reads everything anew, each layer steered on the way."""

    def __init__(self, model: Any, batch: dict[str, Any], method: Vista) -> None:
        self.slow, self.method = SlowDecoder(model), method
        self.embeds, visual = self.slow.prompt(batch)
        self.prompt = len(self.embeds)
        self.directions = [
            (full - text).tolist()
            for full, text in zip(self.last_outputs(self.embeds), self.last_outputs(self.embeds[~visual]), strict=True)
        ]

    def last_outputs(self, x: Tensor) -> list[Tensor]:
        """What each layer of the unchanged decoder gives at the last position."""
        outputs = []
        for layer in range(self.slow.depth):
            x = self.slow.after_attention(layer, x, self.slow.heads(layer, x))
            x = x + self.slow.mlp(layer, x)
            outputs.append(x[-1])
        return outputs

    def steer(self, layer: int, site: str, x: Tensor) -> Tensor:
        method = self.method
        if site != method.site or method.strength == 0:
            return x
        first = 0 if method.apply_to == "all" else self.prompt
        steered = [
            slow_steer(vector, self.directions[layer], method.strength, method.scale) if place >= first else vector
            for place, vector in enumerate(x.tolist())
        ]
        return torch.tensor(steered)

    def next_logits(self, x: Tensor) -> Tensor:
        slow, method, outputs = self.slow, self.method, []
        for layer in range(slow.depth):
            x = slow.after_attention(layer, x, slow.heads(layer, x))
            x = x + self.steer(layer, "mlp", slow.mlp(layer, x))
            x = self.steer(layer, "residual", x)
            outputs.append(x[-1])
        head = slow.logits if method.lens_norm else slow.bare_logits
        late = [head(outputs[layer]) for layer in range(slow.depth - 1 - method.window, slow.depth - 1)]
        return (1 - method.gamma) * slow.logits(outputs[-1]) + method.gamma * torch.stack(late).mean(dim=0)

    def answer(self, tokens: int) -> tuple[list[int], Tensor]:
        embeds, answer, scores = self.embeds, [], []
        for _ in range(tokens):
            scores.append(self.next_logits(embeds))
            answer.append(int(scores[-1].argmax()))
            embeds = torch.cat([embeds, self.slow.embed(answer[-1:])])
        return answer, torch.stack(scores)


# --- Defaults ---


def test_the_defaults() -> None:
    assert dataclasses.asdict(Vista()) == {
        "strength": 0.17,
        "gamma": 0.3,
        "window": 5,
        "site": "mlp",
        "scale": "unit",
        "apply_to": "all",
        "lens_norm": False,
    }
    assert Vista.paper == "vista"


def test_the_window_lies_before_the_last_layer() -> None:
    assert list(Vista(window=6).window_of(32)) == [25, 26, 27, 28, 29, 30]  # the official code's
    assert list(Vista(window=5).window_of(32)) == [26, 27, 28, 29, 30]
    assert list(Vista(window=1).window_of(32)) == [30]
    assert list(Vista(window=6).window_of(5)) == [0, 1, 2, 3]
    assert list(Vista(window=1).window_of(2)) == [0]


# --- The tilt ---


@pytest.mark.parametrize("scale", ["unit", "raw"])
@pytest.mark.parametrize("strength", [0.0, 0.01, 0.17, 0.9])
def test_a_steered_vector_keeps_its_length_and_leans_towards_the_direction(scale: Any, strength: float) -> None:
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(3, 50, 20, generator=generator) * torch.rand(3, 50, 1, generator=generator).mul(4).exp()
    method = Vista(strength=strength, scale=scale)
    v = method.direction(*torch.randn(2, 3, 1, 20, generator=generator))
    steered = method.steer(m, v)
    torch.testing.assert_close(steered.norm(dim=-1), m.norm(dim=-1), atol=0, rtol=1e-5)
    before, after = (torch.cosine_similarity(x.double(), v.double(), dim=-1) for x in (m, steered))
    assert (after > before - 1e-6).all()
    if strength:
        assert (after > before).double().mean() > 0.99
    else:
        torch.testing.assert_close(steered, m, rtol=1e-5, atol=1e-6)
    for row in range(3):
        for place in range(0, 50, 7):
            expected = slow_steer(m[row, place].tolist(), v[row, 0].tolist(), strength, scale)
            torch.testing.assert_close(steered[row, place], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_opposed_vectors_are_tilted_up_to_twice_as_much() -> None:
    def steer(m: list[float], strength: float) -> list[float]:
        method = Vista(strength=strength)
        v = method.direction(torch.tensor([[[1.0, 9.0]]]), torch.tensor([[[1.0, 2.0]]]))
        steered = method.steer(torch.tensor([[m]]), v)
        values: list[float] = steered[0, 0].tolist()
        return values

    # At a right angle kappa = 1: (1, 0) + 0.75 (0, 1) has length 1.25, and 5 times the unit vector is (4, 3).
    assert steer([5.0, 0.0], 0.75) == pytest.approx([4.0, 3.0])
    # Along the direction kappa = 1, and nothing can turn further.
    assert steer([0.0, 2.0], 0.75) == pytest.approx([0.0, 2.0])
    # cos = -0.6: kappa = 1.6; (0.8, -0.6) + 0.75 * 1.6 (0, 1) = (0.8, 0.6), and the length was 10.
    assert steer([8.0, -6.0], 0.75) == pytest.approx([8.0, 6.0])
    # cos = +0.6: kappa = 1; (0.8, 0.6) + 0.2 (0, 1) = (0.8, 0.8), and the length was 10.
    assert steer([8.0, 6.0], 0.2) == pytest.approx([50**0.5, 50**0.5])
    # Opposed: kappa = 2; (0, -1) + 0.4 * 2 (0, 1) = (0, -0.2) is still opposed; 0.6 * 2 turns it round.
    assert steer([0.0, -3.0], 0.4) == pytest.approx([0.0, -3.0])
    assert steer([0.0, -3.0], 0.6) == pytest.approx([0.0, 3.0])


def test_the_raw_scale_adds_the_measured_difference() -> None:
    method = Vista(strength=0.5, scale="raw")
    # (3, 0) + 0.5 (0, 8) = (3, 4) of length 5, brought back to length 3; kappa plays no part.
    steered = method.steer(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 8.0]]]))
    assert steered[0, 0].tolist() == pytest.approx([1.8, 2.4])
    # (3, -4) + 0.5 (0, 16) = (3, 4).
    steered = method.steer(torch.tensor([[[3.0, -4.0]]]), torch.tensor([[[0.0, 16.0]]]))
    assert steered[0, 0].tolist() == pytest.approx([3, 4])


@pytest.mark.parametrize("scale", ["unit", "raw"])
def test_without_a_direction_nothing_turns_and_halves_stay_halves(scale: Any) -> None:
    m = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    method = Vista(strength=2.0, scale=scale)
    torch.testing.assert_close(method.steer(m, torch.zeros(1, 1, 8)), m)
    small = method.steer(torch.zeros(1, 4, 8), method.direction(m[:, :1], -m[:, :1]))
    assert (small == 0).all()
    direction = method.direction(m[:, :1].bfloat16(), m[:, 1:2].bfloat16())
    assert direction.dtype == torch.float32
    assert method.steer(m.bfloat16(), direction).dtype == torch.bfloat16


# --- The directions ---


@torch.no_grad()
@pytest.mark.parametrize("scale", ["raw", "unit"])
def test_directions_are_the_difference_of_two_readings_by_the_stock_model(scale: Any) -> None:
    model = tiny.tiny_model("llava", **DEEP)
    seen: list[Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Watched(Vista):
        def direction(self, full: Tensor, text: Tensor) -> Tensor:
            seen.append(super().direction(full, text))
            return seen[-1]

    batch = tiny.inputs("llava", model, images_per_row=[1, 0, 2])
    with attach(model, Watched(strength=3.0, scale=scale)):
        model.generate(**batch, max_new_tokens=3)
    assert len(seen) == 1  # measured once a prompt

    for row in range(3):
        alone = tiny.single("llava", model, row, images_per_row=[1, 0, 2])
        ids = alone["input_ids"]
        readings = []
        for inputs in (alone, dict(input_ids=ids[ids != tiny.IMAGE][None])):
            # The last entry of hidden_states has the final norm in it already.
            last: list[Tensor] = []
            handle = model.model.language_model.layers[-1].register_forward_hook(
                lambda module, args, output, last=last: last.append(output)
            )
            states = [*model(**inputs, output_hidden_states=True).hidden_states[1:-1], last[0]]
            handle.remove()
            readings.append(torch.stack([state[0, -1] for state in states]))
        expected = readings[0] - readings[1]
        if scale == "unit":
            expected = torch.stack([one / one.square().sum().sqrt() for one in expected])
        if row != 1:  # that row has no picture, and its two readings are one
            torch.testing.assert_close(seen[0][row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale", ["unit", "raw"])
def test_a_row_without_a_picture_is_left_as_it_is(scale: Any) -> None:
    model = tiny.tiny_model("llava", **DEEP)
    batch = tiny.inputs("llava", model, images_per_row=[1, 0, 1])
    stock = model(**batch).logits
    with attach(model, Vista(strength=1.0, gamma=0.0, scale=scale)):
        steered = model(**batch).logits
    real = batch["attention_mask"][1].bool()
    torch.testing.assert_close(steered[1][real], stock[1][real], atol=1e-5, rtol=0)
    assert (steered[0, -1] - stock[0, -1]).abs().max() > 0.01


@torch.no_grad()
def test_a_row_without_a_picture_has_no_direction_whatever_rounding_does() -> None:
    @dataclasses.dataclass(frozen=True)
    class Noisy(Vista):
        def direction(self, full: Tensor, text: Tensor) -> Tensor:
            return torch.ones_like(full)

    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[1, 0, 1])
    stock = model(**batch).logits
    with attach(model, Noisy(gamma=0.0)):
        steered = model(**batch).logits
    real = batch["attention_mask"][1].bool()
    torch.testing.assert_close(steered[1][real], stock[1][real], atol=1e-5, rtol=0)
    assert (steered[0, -1] - stock[0, -1]).abs().max() > 0.01


@torch.no_grad()
def test_what_rounding_alone_tells_apart_is_no_direction() -> None:
    """VoCo's text sees no picture in the first layer: what a row is steered by must not depend on its batch."""
    model = tiny.tiny_model("llava")
    methods = VoCo(tokens=2, weights="untrained"), Vista(gamma=0.0)
    with attach(model, *methods):
        together = model(**tiny.inputs("llava", model)).logits[:, -1]
        alone = [model(**tiny.single("llava", model, row)).logits[0, -1] for row in range(len(together))]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-3, rtol=0)


# --- Whole answers ---


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        Vista(window=3),
        Vista(strength=0.6, gamma=0.0),
        Vista(strength=0.0, gamma=0.7, window=2),
        Vista(strength=0.0, gamma=0.7, window=2, lens_norm=True),
        Vista(strength=0.4, gamma=0.5, window=1, site="residual"),
        Vista(strength=0.4, gamma=0.2, window=4, site="residual", scale="raw"),
        Vista(strength=0.3, gamma=0.0, scale="raw"),
        Vista(strength=0.6, gamma=0.3, window=1, apply_to="new"),
        Vista(strength=0.6, gamma=0.3, window=1, apply_to="new", site="residual"),
    ],
    ids=str,
)
def test_an_answer_is_that_of_the_decoder_in_slow_motion(method: Vista) -> None:
    model = tiny.tiny_model("llava", **DEEP)
    batch = tiny.inputs("llava", model, questions=tiny.questions_for(2))
    rows = [tiny.single("llava", model, row, questions=tiny.questions_for(2)) for row in range(2)]
    expected = [Steered(model, row, method).answer(3) for row in rows]
    for use_cache in (True, False):
        with attach(model, method):
            output = model.generate(
                **batch, max_new_tokens=3, do_sample=False, use_cache=use_cache, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        for row, (answer, scores) in enumerate(expected):
            assert output.sequences[row, -3:].tolist() == answer
            torch.testing.assert_close(torch.stack(output.logits)[:, row], scores, atol=1e-4, rtol=0)


@torch.no_grad()
def test_only_what_is_generated_is_steered_if_asked() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits
    with attach(model, Vista(strength=0.5, gamma=0.0, apply_to="new")):
        assert torch.equal(model(**batch).logits, stock)
    with attach(model, Vista(strength=0.5, gamma=0.0)):
        first = model(**batch).logits[:, 0] - stock[:, 0]
    assert first.abs().max() > 0.01  # else the whole prompt, from its first position


@torch.no_grad()
def test_late_logits_alone_are_those_of_the_layer() -> None:
    model = tiny.tiny_model("llava", **DEEP)
    batch = tiny.inputs("llava", model)
    before_last = model(**batch, output_hidden_states=True).hidden_states[-2][:, -1]
    for lens_norm, expected in (
        (False, model.lm_head(before_last)),
        (True, model.lm_head(model.model.language_model.norm(before_last))),
    ):
        with attach(model, Vista(strength=0.0, gamma=1.0, window=1, lens_norm=lens_norm)):
            torch.testing.assert_close(model(**batch).logits[:, -1], expected, atol=1e-6, rtol=0)


# --- Identity and errors ---


def test_what_is_identity() -> None:
    assert Vista(strength=0.0, gamma=0.0).is_identity
    assert Vista().identity().is_identity
    assert not Vista(strength=0.0).is_identity
    assert not Vista(gamma=0.0).is_identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strength=-0.1), r"strength of vista must lie in \[0, 10\], not -0.1"),
        (dict(strength=float("nan")), "strength of vista"),
        (dict(gamma=1.1), r"gamma of vista must lie in \[0, 1\], not 1.1"),
        (dict(window=0), "window of vista must lie in"),
        (dict(site="attention"), "unknown site of vista 'attention'"),
        (dict(scale="units"), r"unknown scale of vista 'units' \(did you mean 'unit'\?\); known: raw, unit"),
        (dict(apply_to="last"), "unknown apply_to of vista 'last'"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Vista(**options)


def test_a_decoder_of_one_layer_has_no_late_layers() -> None:
    model = tiny.tiny_model("llava", text_config=dict(num_hidden_layers=1))
    with pytest.raises(InputError, match="two layers or more; set gamma=0"):
        attach(model, Vista())
    with attach(model, Vista(gamma=0.0)):
        pass
