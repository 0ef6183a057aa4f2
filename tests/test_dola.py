"""DoLa: the contrast of layers by hand, and whole answers against the hidden states that the stock model gives out."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import families as tiny
import pytest
import torch
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.grounding.dola import Dola
from sightline.methods import attach, describe, parse_methods

LAYERS = 6
DEEP: dict[str, Any] = dict(text_config=dict(num_hidden_layers=LAYERS))


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slow_distance(p: list[float], q: list[float], divergence: str) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    if divergence == "reverse":
        return (kl(middle, p) + kl(middle, q)) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def slow_dola(own: list[float], early: dict[int, list[float]], method: Dola) -> tuple[int, list[float]]:
    """One row: the layer that is chosen, and the new logits."""
    last = softmax(own)
    votes = {layer: softmax(logits) for layer, logits in early.items()}
    chosen = max(votes, key=lambda layer: slow_distance(last, votes[layer], method.divergence))
    return chosen, [
        math.log(p) - method.strength * math.log(q) if p >= method.relative_top * max(last) else -math.inf
        for p, q in zip(last, votes[chosen], strict=True)
    ]


def early_logits(model: Any, batch: dict[str, Any], layers: list[int], lens_norm: bool) -> tuple[Tensor, Tensor]:
    """Of a stock forward: the logits [B, V], and those of each of the layers [layers, B, V]."""
    out = model(**batch, output_hidden_states=True, use_cache=False)
    hidden = torch.stack([out.hidden_states[layer][:, -1] for layer in layers])
    if lens_norm:
        hidden = sl.Anatomy.of(model).final_norm(hidden)
    return out.logits[:, -1], model.lm_head(hidden)


# --- Defaults and candidates ---


def test_the_defaults() -> None:
    assert dataclasses.asdict(Dola()) == {
        "strength": 1.0,
        "bucket": "high",
        "layers": None,
        "relative_top": 0.1,
        "divergence": "js",
        "lens_norm": False,
    }
    assert Dola.paper == "dola"
    assert not Dola.needs_picture


def test_candidates_are_every_second_layer_of_one_half() -> None:
    high, low = Dola(), Dola(bucket="low")
    # The official runs of LLaMA 7B, 13B, 30B and 65B (whose README names the mature layer last).
    assert high.candidates(32) == [16, 18, 20, 22, 24, 26, 28, 30]
    assert high.candidates(40) == [20, 22, 24, 26, 28, 30, 32, 34, 36, 38]
    assert high.candidates(60) == [40, 42, 44, 46, 48, 50, 52, 54, 56, 58]
    assert high.candidates(80) == [60, 62, 64, 66, 68, 70, 72, 74, 76, 78]
    assert low.candidates(32) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert low.candidates(40) == low.candidates(60) == low.candidates(80) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert low.candidates(32, tied=True) == [2, 4, 6, 8, 10, 12, 14]
    assert [high.candidates(depth) for depth in (1, 2, 3, 4, 5)] == [[0], [1], [1], [2], [2, 4]]
    assert [low.candidates(depth) for depth in (1, 2, 3, 4, 5)] == [[0], [0], [0], [0], [0]]
    assert [low.candidates(depth, tied=True) for depth in (1, 2, 3, 4, 6)] == [[0], [1], [2], [2], [2]]
    assert Dola(layers=(5, 0, 3)).candidates(32, tied=True) == [0, 3, 5]


def test_settings_are_written_and_read_on_the_command_line() -> None:
    method = Dola(layers=(2, 4), bucket="low", lens_norm=True)
    assert describe([method]) == "dola:bucket=low,layers=2;4,lens_norm=true"
    assert parse_methods(describe([method])) == (method,)
    assert parse_methods("dola") == (Dola(),)
    assert parse_methods("dola:layers=none") == (Dola(),)


# --- The contrast ---


def test_three_tokens_by_hand() -> None:
    own = torch.tensor([[0.5, 0.4, 0.1]]).log()
    near, far = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.8, 0.1, 0.1]]).log()
    early = torch.stack([near, far])
    # The second layer is farther away. Half a point of the first token was known early, the second one is what came.
    expected = [math.log(0.5 / 0.8), math.log(0.4 / 0.1), math.log(0.1 / 0.1)]
    assert Dola().contrast(own, own, early)[0].tolist() == pytest.approx(expected)
    shifted = Dola().contrast(own + 3, own + 3, early - 7)[0].tolist()
    assert shifted == pytest.approx(expected, abs=1e-5)  # logits need not be normalised
    assert int(own.argmax()) == 0
    assert int(Dola().contrast(own, own, early).argmax()) == 1
    half = Dola(strength=0.5, relative_top=0.5).contrast(own, own, early)[0].tolist()
    assert half == pytest.approx([math.log(0.5 / 0.8**0.5), math.log(0.4 / 0.1**0.5), -math.inf])
    # After another method its logits are contrasted, but plausibility and the choice come from the model's own.
    before = torch.tensor([[1.0, 2.0, -math.inf]])
    after = Dola(relative_top=0.5).contrast(before, own, early)[0].tolist()
    assert after == pytest.approx([1 - math.log(0.8), 2 - math.log(0.1), -math.inf])


@pytest.mark.parametrize("divergence", ["js", "reverse"])
def test_each_row_contrasts_with_the_layer_that_differs_most(divergence: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(50, 40, generator=generator) * 3
    early = torch.randn(4, 50, 40, generator=generator) * torch.tensor([0.5, 1.0, 2.0, 3.0])[:, None, None]
    method = Dola(divergence=divergence, strength=0.7, relative_top=0.05)
    distances = method.distances(own.log_softmax(dim=-1), early.log_softmax(dim=-1))
    changed = method.contrast(own, own, early)
    picked = set()
    for row in range(50):
        votes = {layer: early[layer, row].tolist() for layer in range(4)}
        chosen, expected = slow_dola(own[row].tolist(), votes, method)
        slow = [slow_distance(softmax(own[row].tolist()), softmax(votes[layer]), divergence) for layer in range(4)]
        torch.testing.assert_close(distances[:, row], torch.tensor(slow), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(changed[row], torch.tensor(expected), atol=1e-4, rtol=1e-4)
        picked.add(chosen)
    assert len(picked) > 1


def test_the_two_divergences_may_choose_different_layers() -> None:
    """Mass on a token that the other all but rules out counts more in the reverse one."""
    own = torch.tensor([[0.5, 0.5 - 1e-8, 1e-8]])
    moved, risen = torch.tensor([[0.9, 0.1 - 1e-8, 1e-8]]), torch.tensor([[0.42, 0.42, 0.16]])
    distances = {
        name: Dola(divergence=name).distances(own.log(), torch.stack([moved, risen]).log())[:, 0]
        for name in ("js", "reverse")
    }
    for name, both in distances.items():
        for place, other in enumerate((moved, risen)):
            assert float(both[place]) == pytest.approx(
                slow_distance(own[0].tolist(), other[0].tolist(), name), abs=1e-5
            )
    assert int(distances["js"].argmax()) == 0
    assert int(distances["reverse"].argmax()) == 1


@torch.no_grad()
def test_without_weight_it_is_the_stock_model() -> None:
    assert Dola(strength=0.0).is_identity
    assert Dola(bucket="low").identity() == Dola(bucket="low", strength=0.0)
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits
    with attach(model, Dola(strength=0.0)):
        assert torch.equal(model(**batch).logits, stock)


# --- What the layers say ---


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("layers", "lens_norm"), [((0, 1, 2), False), ((1, 2), True), ((0,), True)])
def test_the_layers_are_those_of_the_stock_model(family: str, layers: tuple[int, ...], lens_norm: bool) -> None:
    """Layer 0 being the embeddings, as in `hidden_states`."""
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[1, 2, 1])
    method = Dola(layers=layers, lens_norm=lens_norm, relative_top=0.01)
    own, early = early_logits(model, batch, list(layers), lens_norm)
    with attach(model, method):
        got = model(**batch).logits[:, -1]
    for row in range(3):
        votes = {layer: early[place, row].tolist() for place, layer in enumerate(layers)}
        _, expected = slow_dola(own[row].tolist(), votes, method)
        torch.testing.assert_close(got[row], torch.tensor(expected), atol=2e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [Dola(), Dola(bucket="low"), Dola(layers=(1, 2, 5), lens_norm=True, divergence="reverse", strength=0.6)],
    ids=lambda method: describe([method]),
)
def test_an_answer_is_that_of_a_model_that_reads_everything_anew(method: Dola) -> None:
    model = tiny.tiny_model("llava", seed=3, **DEEP)
    batch = tiny.inputs("llava", model)
    layers = method.candidates(LAYERS)
    with attach(model, method):
        output = model.generate(
            **batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    start = batch["input_ids"].shape[1]
    chosen = set()
    for step in range(6):
        ids = output.sequences[:, : start + step]
        mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, start:])], dim=1)
        own, early = early_logits(model, {**batch, "input_ids": ids, "attention_mask": mask}, layers, method.lens_norm)
        for row in range(3):
            votes = {layer: early[place, row].tolist() for place, layer in enumerate(layers)}
            layer, expected = slow_dola(own[row].tolist(), votes, method)
            torch.testing.assert_close(output.logits[step][row], torch.tensor(expected), atol=2e-4, rtol=0)
            assert int(output.sequences[row, start + step]) == max(range(len(expected)), key=expected.__getitem__)
            chosen.add(layer)
    assert len(chosen) > 1 or method.bucket == "low"
    stock = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert stock.tolist() != output.sequences.tolist()


@torch.no_grad()
def test_where_the_head_is_the_embeddings_the_low_bucket_leaves_them_out() -> None:
    model = tiny.tiny_model("llava", tie_word_embeddings=True, **DEEP)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    batch = tiny.single("llava", model, 0)
    with attach(model, Dola(bucket="low")):
        got = model(**batch).logits
    with attach(model, Dola(layers=(2,))):
        assert torch.equal(model(**batch).logits, got)
    with attach(model, Dola(layers=(0,))):
        assert not torch.equal(model(**batch).logits, got)


@torch.no_grad()
def test_what_the_last_layer_does_not_change_has_no_say() -> None:
    """A last layer that adds nothing leaves all plausible tokens level; one that adds a little of a token that was not
    the likeliest decides for it."""
    model = tiny.tiny_model("llava", **DEEP)
    last = model.model.language_model.layers[-1]
    last.self_attn.o_proj.weight.zero_()
    last.mlp.down_proj.weight.zero_()
    batch = tiny.single("llava", model, 1)
    method = Dola(layers=(LAYERS - 1,), lens_norm=True, relative_top=0.05)
    stock = model(**batch).logits[0, -1]
    with attach(model, method):
        level = model(**batch).logits[0, -1]
    finite = level.isfinite()
    assert 2 < finite.sum() < len(finite)
    torch.testing.assert_close(level[finite], torch.zeros(int(finite.sum())), atol=1e-5, rtol=0)

    second = int(stock.topk(2).indices[1])
    direction = 0.01 * model.lm_head.weight[second]
    handle = last.mlp.register_forward_hook(lambda module, args, output: output + direction)
    assert int(model(**batch).logits[0, -1].argmax()) == int(stock.argmax()) != second
    with attach(model, method):
        assert int(model(**batch).logits[0, -1].argmax()) == second
    handle.remove()


# --- With other methods ---


@torch.no_grad()
def test_with_a_contrast_of_pictures_the_order_does_not_matter() -> None:
    model = tiny.tiny_model("llava", **DEEP)
    batch = tiny.inputs("llava", model)
    flip = sl.Ritual(transform="horizontal_flip", alpha=1.0)
    with attach(model, Dola(), flip):
        one = model(**batch).logits[:, -1]
    with attach(model, flip, Dola()):
        other = model(**batch).logits[:, -1]
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    with attach(model, flip):
        assert (model(**batch).logits[:, -1] - one).abs().nan_to_num().max() > 1e-2


def test_it_does_not_share_the_lens_with_vista() -> None:
    model = tiny.tiny_model("llava")
    with pytest.raises(InputError, match="dola and vista do not compose: both change how late layers vote"):
        attach(model, Dola(), sl.Vista())
    with attach(model, Dola(), sl.Vista(gamma=0.0)), torch.no_grad():
        assert model(**tiny.inputs("llava", model)).logits.shape[0] == 3


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strength=-1.0), r"strength of dola must lie in \[0, 10\], not -1.0"),
        (dict(relative_top=1.5), r"relative_top of dola must lie in \[0, 1\], not 1.5"),
        (dict(bucket="hihg"), r"unknown bucket of dola .*did you mean 'high'"),
        (dict(divergence="kl"), "unknown divergence of dola"),
        (dict(layers=()), r"layers of dola must be None or a tuple of different whole numbers .*, not \(\)"),
        (dict(layers=(-1, 2)), r"layers of dola must be .*, not \(-1, 2\)"),
        (dict(layers=(2, 2)), r"layers of dola must be .*, not \(2, 2\)"),
        (dict(layers=(1.0,)), r"layers of dola must be .*, not \(1.0,\)"),
        (dict(layers=[0, 2]), r"layers of dola must be .*, not \[0, 2\]"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Dola(**options)


def test_layers_that_the_decoder_lacks_are_refused() -> None:
    model = tiny.tiny_model("llava", **DEEP)
    attach(model, Dola(layers=(5,))).detach()
    with pytest.raises(InputError, match=r"layers of dola must lie in \[0, 5\] for a decoder of 6 layers, not 6"):
        attach(model, Dola(layers=(0, 6)))
