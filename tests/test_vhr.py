"""VHR: which heads are chosen and what scaling them does, against both prompts read side by side in slow motion."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

import families as tiny
import pytest
import torch
from slow_decoder import SlowDecoder
from torch import Tensor

from sightline.errors import InputError
from sightline.grounding.vhr import VHR
from sightline.methods import attach

DEEP: dict[str, Any] = dict(text_config=dict(num_hidden_layers=5))


@dataclass(frozen=True)
class Watched(VHR):
    """Notes the factors that it chose, layer after layer: a list of [B, heads]."""

    seen: list[Tensor] = field(default_factory=list, compare=False)

    def head_factors(self, full: Tensor, text: Tensor) -> Tensor:
        self.seen.append(super().head_factors(full, text))
        return self.seen[-1]


def select(full: list[list[float]], text: list[list[float]], remove_outliers: bool = True) -> list[int]:
    """The chosen heads of a layer, from each head's output with and without the picture."""
    vhd = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) ** 0.5 for x, y in zip(full, text, strict=True)]
    firing = [sum(b * b for b in y) for y in text]
    if remove_outliers:
        high = [statistics.mean(values) + statistics.stdev(values) for values in (vhd, firing)]
        vhd = [0.0 if v > high[0] and t > high[1] else v for v, t in zip(vhd, firing, strict=True)]
    return [head for head, v in enumerate(vhd) if v > statistics.median_low(vhd)]


class Joint:
    """Both prompts of one row, read together: at each steered layer heads are chosen, and scaled in both prompts. Then
    greedy decoding with these heads."""

    def __init__(
        self, model: Any, batch: dict[str, Any], layers: list[int], alpha: float = 2.0, **options: bool
    ) -> None:
        self.slow, self.layers, self.alpha = SlowDecoder(model), layers, alpha
        self.chosen: dict[int, list[int]] = {}
        self.full, visual = self.slow.prompt(batch)
        text = self.full[~visual]
        keep_positions = options.get("keep_positions", False)
        positions = (~visual).nonzero()[:, 0].tolist() if keep_positions else list(range(len(text)))
        x, y = self.full, text
        for layer in range(self.slow.depth):
            a, b = self.slow.heads(layer, x), self.slow.heads(layer, y, positions)
            if layer in layers:
                outliers = options.get("remove_outliers", True)
                self.chosen[layer] = select(a[-1].tolist(), b[-1].tolist(), outliers)
                self.scale(layer, a)
                self.scale(layer, b)
            x, y = self.slow.after_attention(layer, x, a), self.slow.after_attention(layer, y, b)
            x, y = x + self.slow.mlp(layer, x), y + self.slow.mlp(layer, y)

    def scale(self, layer: int, heads: Tensor) -> None:
        for head in self.chosen.get(layer, []):
            heads[:, head] *= self.alpha

    def next_logits(self, embeds: Tensor) -> Tensor:
        x = embeds
        for layer in range(self.slow.depth):
            heads = self.slow.heads(layer, x)
            self.scale(layer, heads)
            x = self.slow.after_attention(layer, x, heads)
            x = x + self.slow.mlp(layer, x)
        return self.slow.logits(x[-1])

    def answer(self, tokens: int) -> tuple[list[int], Tensor]:
        embeds, answer, scores = self.full, [], []
        for _ in range(tokens):
            scores.append(self.next_logits(embeds))
            answer.append(int(scores[-1].argmax()))
            embeds = torch.cat([embeds, self.slow.embed(answer[-1:])])
        return answer, torch.stack(scores)


def chosen_by(method: Watched, layers: list[int], row: int = 0) -> dict[int, list[int]]:
    assert len(method.seen) == len(layers)  # once a layer: the heads stay fixed while the answer grows
    return {
        layer: (factors[row] == method.alpha).nonzero()[:, 0].tolist()
        for layer, factors in zip(layers, method.seen, strict=True)
    }


# --- The joint algorithm ---


def test_the_defaults() -> None:
    assert dataclasses.asdict(VHR()) == {
        "alpha": 2.0, "layers": None, "remove_outliers": True, "keep_positions": False,
    }  # fmt: skip
    assert VHR.paper == "vhr"


def test_the_published_layers() -> None:
    assert list(VHR().layers_of(32)) == [1, *range(18, 32)]
    assert list(VHR(layers=(3, 0)).layers_of(32)) == [0, 3]
    for depth in (1, 2, 3, 5, 24, 40):
        layers = list(VHR().layers_of(depth))
        assert layers == sorted(set(layers))
        assert layers[0] >= 0
        assert layers[-1] == depth - 1
        assert min(1, depth - 1) in layers


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, [1, 3, 4]),
        (dict(alpha=3.0, layers=(0, 1, 2, 3, 4)), [0, 1, 2, 3, 4]),
        (dict(alpha=0.5, layers=(2,), remove_outliers=False), [2]),
        (dict(layers=(0, 4), keep_positions=True), [0, 4]),
    ],
)
def test_heads_and_answer_are_those_of_the_two_prompts_read_layer_by_layer(
    options: dict[str, Any], layers: list[int]
) -> None:
    model = tiny.tiny_model("llava", **DEEP)
    assert model.config.text_config.num_key_value_heads < model.config.text_config.num_attention_heads
    batch = tiny.inputs("llava", model, images_per_row=[1, 2, 1])
    method = Watched(**options)
    with attach(model, method):
        output = model.generate(
            **batch, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    arguments = {"layers": layers, **{name: value for name, value in options.items() if name != "layers"}}
    for row in range(3):
        reference = Joint(model, tiny.single("llava", model, row, images_per_row=[1, 2, 1]), **arguments)
        assert chosen_by(method, layers, row) == reference.chosen
        answer, scores = reference.answer(3)
        assert output.sequences[row, -3:].tolist() == answer
        torch.testing.assert_close(torch.stack(output.logits)[:, row], scores, atol=1e-4, rtol=0)


@torch.no_grad()
def test_later_layers_see_the_reinforced_earlier_ones() -> None:
    """Choosing all heads from unreinforced readings, the variant that is not layer by layer, gives other heads."""
    model = tiny.tiny_model("llava", **DEEP)
    everything = [0, 1, 2, 3, 4]
    differ = 0
    for row in range(3):
        batch = tiny.single("llava", model, row)
        joint = Joint(model, batch, everything, alpha=3.0).chosen
        unreinforced = Joint(model, batch, everything, alpha=1.0).chosen
        assert joint[0] == unreinforced[0]
        differ += joint != unreinforced
    assert differ > 0


# --- The rule for one layer, by hand ---


def head_factors(full: list[float], text: list[float], **options: Any) -> list[float]:
    """Of heads of width one."""
    one_row = torch.tensor([full, text])[:, None, :, None]
    factors: list[float] = VHR(**options).head_factors(one_row[0], one_row[1])[0].tolist()
    return factors


def test_heads_above_the_median_are_reinforced() -> None:
    # VHD 0 1 2 3 4 5: the lower median is 2, three heads are above it.
    assert head_factors([0, 1, 2, 3, 4, 5], [0] * 6) == [1, 1, 1, 2, 2, 2]
    # Signs do not matter, and heads that tie with the median are not above it: VHD 2 2 2 2 7, median 2.
    assert head_factors([-2, 2, -2, 2, -7], [0] * 5, alpha=3) == [1, 1, 1, 1, 3]


def test_the_divergence_is_the_euclidean_distance() -> None:
    full = torch.tensor([[[3.0, 4.0], [1.0, 1.0], [0.0, 2.0]]])
    text = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.0, -1.0]]])
    assert VHR().divergence(full, text).tolist() == [[5.0, 0.0, 3.0]]


def test_a_head_that_fires_without_the_picture_is_no_vision_head() -> None:
    text = [0.0, 0, 0, 0, 0, 6]
    full = [1.0, 1.1, 1.2, 1.3, 1.4, 16]
    # VHD 1 1.1 1.2 1.3 1.4 10: mean 2.67, std 3.60, so 10 > 6.26; firing 0 0 0 0 0 36: mean 6, std 14.7, so 36 > 20.7.
    # The last head's VHD becomes 0 and the lower median 1.1.
    assert head_factors(full, text) == [1, 1, 2, 2, 2, 1]
    assert head_factors(full, text, remove_outliers=False) == [1, 1, 1, 2, 2, 2]
    # The same divergence without firing is no outlier.
    assert head_factors([1, 1.1, 1.2, 1.3, 1.4, 10], [0] * 6) == [1, 1, 1, 2, 2, 2]
    # Nor is firing without an unusual divergence: VHD 1 1.1 1.2 1.3 1.4 1.35, median 1.2.
    assert head_factors([1, 1.1, 1.2, 1.3, 1.4, 7.35], text) == [1, 1, 1, 2, 2, 2]


def test_outliers_are_told_by_the_distance_and_not_by_its_square() -> None:
    text = [0.0, 0, 0, 0, 10, 10]
    full = [1.0, 1.1, 0.9, 1, 14.1, 15]
    # VHD 1 1.1 .9 1 4.1 5: mean 2.18, std (of a sample) 1.86, so 4.1 > 4.04. Squares: mean 7.6, std 10.6, 16.8 < 18.2.
    assert head_factors(full, text) == [2, 2, 1, 2, 1, 1]  # both zeroed: 0 0 .9 1 1 1.1, lower median .9
    assert select([[x] for x in full], [[x] for x in text]) == [0, 1, 3]


@pytest.mark.parametrize("remove_outliers", [True, False])
def test_the_rule_on_random_heads(remove_outliers: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    method = VHR(remove_outliers=remove_outliers)
    for heads in (3, 6, 7, 32):
        full = torch.randn(5, heads, 4, generator=generator).exp()
        text = torch.randn(5, heads, 4, generator=generator).exp()
        for row, factors in enumerate(method.head_factors(full, text).tolist()):
            expected = select(full[row].tolist(), text[row].tolist(), remove_outliers)
            assert [head for head, factor in enumerate(factors) if factor == 2] == expected


def test_why_scaling_works() -> None:
    """cos(r + (alpha - 1) y, y) >= cos(r, y), with equality only where r and y are parallel."""
    generator = torch.Generator().manual_seed(0)
    r, y = torch.randn(2, 1000, 24, generator=generator, dtype=torch.float64)
    before = torch.cosine_similarity(r, y, dim=-1)
    for alpha in (1.1, 2.0, 3.0):
        assert (torch.cosine_similarity(r + (alpha - 1) * y, y, dim=-1) > before).all()
        parallel = torch.cosine_similarity(3 * y + (alpha - 1) * y, y, dim=-1)
        torch.testing.assert_close(parallel, torch.ones_like(parallel))


# --- Exact properties on a model ---


def test_equal_prompts_select_no_head() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 8, 4, generator=generator)
    assert (VHR().divergence(heads, heads) == 0).all()
    assert (VHR().head_factors(heads, heads) == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_a_row_without_a_picture_is_left_as_it_is(seed: int) -> None:
    model = tiny.tiny_model("llava", seed=seed)
    batch = tiny.inputs("llava", model, images_per_row=[1, 0, 1], seed=seed)
    stock = model(**batch).logits
    with attach(model, VHR(alpha=5.0, layers=(0, 1, 2))):
        steered = model(**batch).logits
    real = batch["attention_mask"][1].bool()
    torch.testing.assert_close(steered[1][real], stock[1][real], atol=1e-5, rtol=0)
    assert (steered[0, -1] - stock[0, -1]).abs().max() > 0.01
    assert (steered[2, -1] - stock[2, -1]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("method", [VHR(alpha=1.0), VHR(layers=()), VHR(alpha=4.0).identity()])
def test_without_a_factor_or_without_layers_it_is_the_stock_model(method: VHR) -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits
    assert method.is_identity
    with attach(model, method):
        assert torch.equal(model(**batch).logits, stock)


@torch.no_grad()
def test_permuted_heads_are_chosen_permuted() -> None:
    model = tiny.tiny_model("llava", text_config=dict(num_key_value_heads=4))
    batch = tiny.inputs("llava", model)
    before, after = Watched(layers=(0, 1, 2)), Watched(layers=(0, 1, 2))
    with attach(model, before):
        logits = model(**batch).logits
    order = [2, 0, 3, 1]
    attention = model.model.language_model.layers[1].self_attn
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear.weight.copy_(linear.weight.unflatten(0, (4, 8))[order].flatten(0, 1).clone())
    attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (4, 8))[:, order].flatten(1, 2).clone())
    with attach(model, after):
        torch.testing.assert_close(model(**batch).logits, logits, atol=1e-5, rtol=0)
    for layer in (0, 1, 2):
        expected = before.seen[layer][:, order] if layer == 1 else before.seen[layer]
        assert torch.equal(after.seen[layer], expected)
    assert not torch.equal(before.seen[1], after.seen[1])


@torch.no_grad()
@pytest.mark.parametrize("planted", range(4))
def test_the_one_head_that_reads_the_picture_is_found(planted: int) -> None:
    """Pictures live in the last eight channels, text in the others; one head alone has values from the former."""
    model = tiny.tiny_model("llava", text_config=dict(num_hidden_layers=2, num_key_value_heads=4))
    model.get_input_embeddings().weight[:, -8:] = 0
    projector = model.model.multi_modal_projector.linear_2
    projector.weight[:-8] = 0
    projector.bias[:-8] = 0
    values = model.model.language_model.layers[0].self_attn.v_proj.weight
    values[:, :-8] *= 0.1  # a head that gives attention away to the picture loses little by it
    for head in range(4):
        if head == planted:
            values[8 * head : 8 * head + 8, :-8] = 0
        else:
            values[8 * head : 8 * head + 8, -8:] = 0
    distances = []

    @dataclass(frozen=True)
    class Measured(Watched):
        def divergence(self, full: Tensor, text: Tensor) -> Tensor:
            distances.append((full - text).norm(dim=-1))
            return super().divergence(full, text)

    method = Measured(layers=(0,))
    with attach(model, method):
        model(**tiny.inputs("llava", model))
    assert distances[0].argmax(dim=-1).tolist() == [planted] * 3
    assert (method.seen[0][:, planted] == 2).all()


def test_a_row_without_a_picture_is_never_scaled_whatever_rounding_does() -> None:
    @dataclass(frozen=True)
    class Everything(VHR):
        def head_factors(self, full: Tensor, text: Tensor) -> Tensor:
            return torch.full(full.shape[:2], self.alpha)

    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[1, 0, 1])
    with torch.no_grad():
        stock = model(**batch).logits[:, -1]
        with attach(model, Everything()):
            steered = model(**batch).logits[:, -1]
    torch.testing.assert_close(steered[1], stock[1], atol=1e-5, rtol=0)
    assert (steered[0] - stock[0]).abs().max() > 0.01


# --- Errors ---


@pytest.mark.parametrize("alpha", [-0.1, 10.5, float("nan")])
def test_a_factor_outside_the_range_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match=r"alpha of vhr must lie in \[0, 10\]"):
        VHR(alpha=alpha)


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(InputError, match=f"asked to steer layer {layer}, but the decoder has layers 0 to 2"):
        attach(tiny.tiny_model("llava"), VHR(layers=(layer,)))


@torch.no_grad()
def test_a_layer_given_twice_is_steered_once() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    with attach(model, VHR(layers=(1,))):
        once = model(**batch).logits
    with attach(model, VHR(layers=(1, 1))):
        assert torch.equal(model(**batch).logits, once)
